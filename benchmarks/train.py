# SPDX-License-Identifier: Apache-2.0
"""How fast a training step is, against the straightforward one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import batch_to_device
from torch import nn

from modeling_cocoa import CocoaProcessor, CocoaTransformer
from modeling_cocoa.attention import attention_mask_for
from modeling_cocoa.losses import normalize_patches
from modeling_cocoa.packing import pack
from modeling_cocoa.reconstruction import CocoaForReconstruction
from modeling_cocoa.special_tokens import attach_mask_token
from trainers.data.collators import ReconstructionCollator, model_arguments

from .measure import alternate
from .models import device, make_images, make_texts
from .operations import embedding_operations, text_operations, vision_operations

PLAIN = "straightforward"
FORWARD_AND_BACKWARD = 3
"""A backward pass multiplies twice what the forward pass multiplies once."""


def plain_loss(model: CocoaForReconstruction, batch: dict[str, Any]) -> torch.Tensor:
    """A step of stage 1 or 2 written straight down: padded rows, a dense mask, logits of every token."""
    backbone, ids, segments = model.model, batch["input_ids"], batch["segment_ids"]
    is_image = ids == backbone.config.image_token_id
    embeds = backbone.get_input_embeddings()(ids)
    features = model._image_features(batch["pixel_values"], batch["image_grid_thw"], batch["image_is_target"])
    embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds))
    positions = backbone.mrope_positions(ids, batch["attention_mask"], batch["image_grid_thw"])
    mask = attention_mask_for("sdpa", segments, None, embeds.dtype, model.eos_sees_target)
    text = backbone.language_model
    hidden = text(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=dict.fromkeys(set(text.config.layer_types), mask),
        use_cache=False,
    ).last_hidden_state
    head = backbone.get_input_embeddings() if model.lm_head is None else model.lm_head
    logits = hidden @ head.weight.T
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none"
    ).view(ids.shape[0], -1)
    loss = losses[batch["labels"][:, 1:] != -100].mean()
    if not bool(batch["unit_mask"].any()):
        return loss
    units = torch.zeros_like(is_image)
    units[is_image] = batch["unit_mask"]
    pixels = model._decode(hidden, positions, units, {"attention_mask": mask})
    targets = normalize_patches(batch["pixel_labels"].view(-1, *pixels.shape[1:])[batch["unit_mask"]].float())
    return loss + model.image_loss_weight * (pixels.float() - targets).square().mean()


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to each one's largest entry."""
    return max(
        float((first[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)) for name, value in second.items()
    )


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that has one; the model's own are cleared."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def pretraining_batch(processor: CocoaProcessor, stage: str, pairs: Iterable[tuple[Any, str]]) -> dict[str, Any]:
    """Pairs of an image and a text as the arguments of a step of a stage, on the device."""
    items = [
        {"query": image, "positive": text, "seed": (0, number), "index": number}
        for number, (image, text) in enumerate(pairs)
    ]
    batch = model_arguments(ReconstructionCollator(processor, stage=stage)(items))
    return {name: value.to(device()) for name, value in batch.items()}


def bench_pretraining(folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    """
    Measure a bridge step, forward and backward.

    Returns:
        `dict`: Seconds, peak memory above weights and gradients, speed and memory against the straightforward step,
        and the largest relative difference of losses and gradients.
    """
    module = CocoaTransformer(folder).to(device())
    model = CocoaForReconstruction(module.model).train()
    attach_mask_token(model.model, module.processor.mask_token_id)
    batch = pretraining_batch(module.processor, "bridge", zip(make_images(rows), make_texts(rows), strict=True))
    ways = {PLAIN: lambda: plain_loss(model, batch), "packed": lambda: model(**batch).loss}
    losses = {name: float(way().detach()) for name, way in ways.items()}
    found = {name: gradients(model, way()) for name, way in ways.items()}
    difference = relative_difference(found["packed"], found[PLAIN])
    del found
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # present in every run, so that they are not counted
    results, rate = alternate({name: (lambda way=way: way().backward()) for name, way in ways.items()}, repeats)
    plain = results[PLAIN]
    needed = FORWARD_AND_BACKWARD * pretraining_operations(model, batch)
    return {
        "step": {
            name: {
                "seconds": result.median,
                "against straightforward": plain.median / result.median,
                "share of matmul rate": needed / result.median / rate,
                "peak MiB": result.peak,
                "share of its memory": result.peak / plain.peak,
            }
            for name, result in results.items()
        },
        "relative difference": {
            "packed": {
                "loss": abs(losses["packed"] - losses[PLAIN]) / losses[PLAIN],
                "gradients": difference,
            }
        },
    }


def pretraining_operations(model: CocoaForReconstruction, batch: dict[str, Any]) -> float:
    """What a step on pairs needs, forward: images, text layers, logits of masked places, pixels of masked units."""
    packing = pack(batch["segment_ids"], model.eos_sees_target)
    spans = [(length, length) for length in packing.sources.lengths]
    spans += [(length, length + 1) for length in packing.targets.lengths]
    text = text_operations(model.model, spans)
    vision = vision_operations(model.model, batch["image_grid_thw"])
    head = model.model.get_input_embeddings().weight.numel() * int((batch["labels"] != -100).sum())
    if units := int(batch["unit_mask"].sum()):
        text *= 1 + len(model.image_decoder.layers) / len(model.model.language_model.layers)
        head += model.image_decoder.projection.weight.numel() * units
    return text + vision + 2.0 * head


def bench_contrastive(folder: Path, pairs: int, repeats: int) -> dict[str, Any]:
    """
    Measure a contrastive step, forward and backward, with sentence-transformers' own loss.

    Returns:
        `dict`: As [`bench_pretraining`], against a model of stock modules.
    """
    texts, images = make_texts(pairs, 5, 30), make_images(pairs)
    models = {
        "stock": SentenceTransformer(str(folder)),
        "CocoaTransformer": SentenceTransformer(modules=[CocoaTransformer(folder)]),
    }

    def loss_of(model: SentenceTransformer) -> torch.Tensor:
        features = [batch_to_device(model.preprocess(items), model.device) for items in (texts, images)]
        return MultipleNegativesRankingLoss(model, scale=20.0)(features, None)

    for model in models.values():
        model.train()
    losses = {name: float(loss_of(model).detach()) for name, model in models.items()}
    found = {}
    for name, model in models.items():
        grads = gradients(model, loss_of(model))
        found[name] = {key.split("model.", 1)[1]: value for key, value in grads.items()}
    difference = relative_difference(found["CocoaTransformer"], found["stock"])
    del found

    def step(model: SentenceTransformer) -> None:
        loss_of(model).backward()

    results, rate = alternate({name: partial(step, model) for name, model in models.items()}, repeats)
    stock = results["stock"]
    module = models["CocoaTransformer"][0]
    rows = [row for items in (texts, images) for row in module.processor.preprocess(items)]
    needed = FORWARD_AND_BACKWARD * embedding_operations(module.model, rows, with_gradients=True)
    return {
        "step": {
            name: {
                "seconds": result.median,
                "against stock": stock.median / result.median,
                "share of matmul rate": needed / result.median / rate,
                "peak MiB": result.peak,
            }
            for name, result in results.items()
        },
        "relative difference": {
            "CocoaTransformer": {
                "loss": abs(losses["CocoaTransformer"] - losses["stock"]) / losses["stock"],
                "gradients": difference,
            }
        },
    }
