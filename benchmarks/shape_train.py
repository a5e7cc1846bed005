# SPDX-License-Identifier: Apache-2.0
"""How fast models of the published shapes train, against the straightforward way, and the memory that it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import batch_to_device, cos_sim
from torch import Tensor, nn

from modeling_cocoa.reconstruction import CocoaForReconstruction
from trainers.adapter_files import adapter_state_dict
from trainers.adapters import prepare_parts

from .measure import alternate
from .memory import GIB, RESULT, SHAPES, Shape, activations, bytes_kept
from .models import device, make_images, make_texts
from .operations import bfloat16_rate, embedding_operations
from .parts import Work
from .shapes import Models, Scale, build_models, creating
from .train import FORWARD_AND_BACKWARD, PLAIN, plain_loss, pretraining_batch, pretraining_operations

OURS, STOCK = "packed", "stock sentence-transformers"
RANK = 16
"""LoRA rank, at every linear layer, as in `benchmarks.memory`."""
STAGES = ("contrastive", "bridge", "warmup")


@dataclass
class Step:
    """
    A training step, in two ways of which the last is ours.

    Args:
        models (`dict[str, nn.Module]`), losses (`dict[str, Callable]`): By way.
        operations (`float`): That the step needs, forward.
        tokens, patches (`int`): Real ones.
    """

    models: dict[str, nn.Module]
    losses: dict[str, Callable[[], Tensor]]
    operations: float
    tokens: int
    patches: int


def step_works(
    scale: Scale, name: str, with_adapters: bool, repeats: int, seconds: float
) -> Iterator[tuple[str, Work]]:
    """
    Measure a step of each stage, forward and backward, computing in bfloat16 by autocast: first their times and peak
    memory with gradient checkpointing, then how far their gradients agree, then a step without checkpointing.

    Args:
        scale ([`Scale`]).
        name (`str`): Of the shape.
        with_adapters (`bool`): Train adapters over weights in bfloat16; otherwise all weights, in float32.
        repeats (`int`): Runs of each way, fewer where time is short.
        seconds (`float`): Of all together, nearly.
    """
    shape = scale.shapes[name]
    models = build_models(shape, torch.bfloat16 if with_adapters else torch.float32)
    if with_adapters:
        add_adapters(models)
    with creating(torch.float32):
        embeddings = models.ours.model.get_input_embeddings().weight.detach()
        model = CocoaForReconstruction(models.ours.model, lm_head=None if shape.tied else embeddings.clone())
    if with_adapters and model.lm_head is not None:
        model.lm_head.requires_grad_(False)
    for module in (model, models.stock):
        module.train()
    rows = scale.adapter_rows if with_adapters else scale.full_rows
    share = seconds / 10
    arguments = (shape, kept_bytes(scale, name, with_adapters), repeats)
    make = partial(make_step, models, model, scale.sides[0])
    checkpoint(models, True)
    for stage in STAGES:
        yield f"{stage} step", partial(measure_step, make, stage, rows, True, *arguments, 2 * share)
    precisions = (torch.bfloat16,) if with_adapters else (torch.float32, torch.bfloat16)
    for stage in STAGES:
        yield f"{stage} gradients", partial(compare_gradients, make, stage, scale.checked_rows, precisions)
    checkpoint(models, False)
    yield (
        "bridge step, nothing computed twice",
        partial(measure_step, make, "bridge", scale.kept_rows, False, *arguments, share),
    )


def add_adapters(models: Models) -> None:
    """The same adapters at every linear layer of both models."""
    config = LoraConfig(r=RANK, target_modules="all-linear")
    for backbone in (models.ours.model, models.stock[0].model):
        prepare_parts(backbone, [], config)
    models.stock[0].model.load_state_dict(adapter_state_dict(models.ours.model), strict=False)


def checkpoint(models: Models, is_on: bool) -> None:
    """Have both models compute their layers anew in the backward pass, or keep everything."""
    for backbone in (models.ours.model, models.stock[0].model):
        if is_on:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            backbone.gradient_checkpointing_disable()


def kept_bytes(scale: Scale, name: str, with_adapters: bool) -> dict[str, float]:
    """What a layer keeps of a token and of a patch, as `benchmarks.memory` measured it."""
    dtype = torch.bfloat16 if with_adapters else torch.float32
    if scale.shapes is not SHAPES:
        return bytes_kept(scale.shapes[name], dtype)
    return json.loads(RESULT.read_text())[name]["kept"][str(dtype).removeprefix("torch.")]


def make_step(models: Models, model: CocoaForReconstruction, side: int, stage: str, rows: int) -> Step:
    """A training step of a stage on pairs of a text and a square image; `side` is in pixels."""
    images = make_images(rows, side, side)
    if stage == "contrastive":
        return contrastive_step(models, make_texts(rows, 5, 30), images)
    batch = pretraining_batch(models.ours.processor, stage, zip(images, make_texts(rows), strict=True))
    return Step(
        {PLAIN: model, OURS: model},
        {PLAIN: lambda: plain_loss(model, batch), OURS: lambda: model(**batch).loss},
        pretraining_operations(model, batch),
        int(batch["attention_mask"].sum()),
        int(batch["image_grid_thw"].prod(-1).sum()),
    )


def contrastive_step(models: Models, texts: list[str], images: list[Any]) -> Step:
    """Texts against images, with sentence-transformers' own loss; the inputs are read beforehand."""
    trees = {STOCK: models.stock, OURS: SentenceTransformer(modules=[models.ours], device=device()).train()}

    def loss_of(tree: SentenceTransformer) -> Callable[[], Tensor]:
        features = [batch_to_device(tree.preprocess(items), tree.device) for items in (texts, images)]
        loss = MultipleNegativesRankingLoss(tree, scale=20.0, similarity_fct=exact_cosines)
        return lambda: loss([dict(part) for part in features], None)

    rows = [row for items in (texts, images) for row in models.ours.processor.preprocess(items)]
    grids = [row["image_grid_thw"] for row in rows if "image_grid_thw" in row]
    return Step(
        trees,
        {name: loss_of(tree) for name, tree in trees.items()},
        embedding_operations(models.ours.model, rows, with_gradients=True),
        sum(len(row["input_ids"]) for row in rows),
        int(torch.cat(grids).prod(-1).sum()),
    )


def exact_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines in float32: vectors of random weights are so alike that bfloat16 would round their differences away."""
    with torch.autocast(device(), enabled=False):
        return cos_sim(first.float(), second.float())


def measure_step(
    make: Callable[[str, int], Step],
    stage: str,
    rows: int,
    is_checkpointed: bool,
    shape: Shape,
    kept: dict[str, float],
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    """
    Measure a step, forward and backward, without the optimizer's.

    Returns:
        `dict`: By way, seconds, real tokens a second, speed against the first way, share of the rate of bfloat16
        matrix multiplication (of what the step needs, so without what checkpointing computes twice), and peak memory
        with weights and gradients; of ours what it should be, by `benchmarks.memory`: see [`peak_bytes`].
    """
    step = make(stage, rows)

    def run(name: str) -> None:
        with torch.autocast(device(), torch.bfloat16):
            loss = step.losses[name]()
        loss.backward()
        step.models[name].zero_grad(set_to_none=True)

    ways = {name: partial(run, name) for name in step.losses}
    results, rate = alternate(ways, repeats, seconds=seconds, rate=bfloat16_rate)
    first = next(iter(results.values()))
    weights = list(step.models[OURS].parameters())
    held, trained = sum(w.nbytes for w in weights), [w for w in weights if w.requires_grad]
    full = len(trained) == len(weights)
    # Frozen weights ask for no gradient of their own: of three products of a linear layer, two remain.
    needed = (FORWARD_AND_BACKWARD if full else FORWARD_AND_BACKWARD - 1) * step.operations
    layers = activations(shape, kept, 4 if full else 2, step.tokens, step.patches)
    worked_out = held + peak_bytes(step.models[OURS], layers, is_checkpointed)
    found = {
        name: {
            "seconds": result.median,
            "tokens a second": step.tokens / result.median,
            "against the other": first.median / result.median,
            "share of matmul rate": needed / result.median / rate,
            "peak GiB": held / GIB + result.peak / 1024,
            "tokens": step.tokens,
            "runs": len(result.seconds),
        }
        for name, result in results.items()
    }
    found[OURS] |= {
        "worked out GiB": worked_out / GIB,
        "measured / worked out": found[OURS]["peak GiB"] * GIB / worked_out,
        "matmul TFLOP/s": rate / 1e12,
    }
    title = f"{stage} step of {rows} rows" + ("" if is_checkpointed else ", nothing computed twice")
    return {title: found}


def peak_bytes(model: nn.Module, layers: dict[str, float], is_checkpointed: bool) -> float:
    """
    The most bytes beside the weights in a step that begins without gradients: what the layers keep is let go while
    gradients come, those of the text layers before those of the vision tower.

    Args:
        model (`nn.Module`).
        layers (`dict`): Of `benchmarks.memory.activations`.
        is_checkpointed (`bool`): Otherwise the bfloat16 casts of float32 weights are kept too.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = sum(weight.nbytes for weight in trained.values())
    if is_checkpointed:
        of_text = sum(weight.nbytes for name, weight in trained.items() if "visual." not in name)
        return max(layers["checkpointed"], of_text + layers["vision"], gradients)
    casts = 2 * sum(weight.numel() for weight in trained.values() if weight.dim() > 1)
    return max(layers["kept"] + casts * (next(iter(trained.values())).dtype == torch.float32), gradients)


def compare_gradients(
    make: Callable[[str, int], Step], stage: str, rows: int, precisions: tuple[torch.dtype, ...]
) -> dict[str, Any]:
    """
    How far losses and gradients of both ways agree.

    Returns:
        `dict`: By precision, the relative difference of the losses, of the gradients of some layers' matrices taken
        together, and of the one of these that differs most; matrices count whose gradient is finite in the first way.

    Raises:
        ValueError: ours are not finite, or are gradients of other weights.
    """
    step = make(stage, rows)
    found = {}
    for dtype in precisions:
        losses, grads = [], []
        for name, way in step.losses.items():
            with torch.autocast(device(), torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = way()
            losses.append(float(loss.detach()))
            grads.append(some_gradients(step.models[name], loss))
            del loss
        first, second = grads
        if first.keys() != second.keys() or not first:
            raise ValueError(f"Gradients of other weights: {sorted(first.keys() ^ second.keys())[:4]}.")
        if broken := [name for name, value in second.items() if not value.isfinite().all()]:
            raise ValueError(f"Our gradients are not finite: {broken[:4]}.")
        # torch 2.11's kernel for a dense mask gave such on a GPU, to all of the vision tower.
        first = {name: value for name, value in first.items() if value.isfinite().all()}
        differences = {name: float((second[name] - value).norm()) for name, value in first.items()}
        norms = {name: float(value.norm()) for name, value in first.items()}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        found[str(dtype).removeprefix("torch.")] = {
            "loss": abs(losses[1] - losses[0]) / abs(losses[0]),
            "gradients": sum(value**2 for value in differences.values()) ** 0.5 / total,
            "worst matrix": max(differences[name] / norm for name, norm in norms.items() if norm > 0),
            "matrices": len(first),
        }
    return {f"{stage} gradients, relative difference": found}


def some_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients in float32 of the matrices of the first, middle and last layer, by name in the backbone."""
    backbone = next(module for module in model.modules() if hasattr(module, "language_model"))
    layers, blocks = len(backbone.language_model.layers), len(backbone.visual.blocks)
    chosen = [f"layers.{place}." for place in (0, layers // 2, layers - 1)]
    chosen += [f"blocks.{place}." for place in (0, blocks // 2, blocks - 1)]
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {
        name: weight.grad.float().clone()
        for name, weight in backbone.named_parameters()
        if weight.grad is not None and weight.dim() == 2 and any(part in name for part in chosen)
    }
    model.zero_grad(set_to_none=True)
    return found
