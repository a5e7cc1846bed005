# SPDX-License-Identifier: Apache-2.0
"""Vectors of a device are those of the CPU: of any inputs, in any precision, by every way that leads to them."""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from evaluation.emoji import load_emoji
from modeling_cocoa.encoding import encode_inputs
from modeling_cocoa.packed_attention import FLEX_ATTENTION
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.saving import save_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer
from tests.gpu.conftest import HALF, lost_cosine, moved
from tests.modeling_cocoa.conftest import make_image
from tests.modeling_cocoa.test_modeling import batch_of, rows, with_backend
from tests.modeling_cocoa.test_saving import VISION_CONFIGS, of_kind
from tests.modeling_cocoa.test_sentence_transformer import mixture, module_of
from trainers.recipes.from_scratch import build_model

pytestmark = pytest.mark.gpu
CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "cocoa-tiny"
BOTH_SIDES = pytest.mark.parametrize("padding_side", ["right", "left"])


def same(found, expected) -> None:
    """Vectors in float32: two ways to compute one differ by 3e-7, TF32 by 1e-4."""
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.fixture
def module(model_type, processor_folder) -> CocoaTransformer:
    """On the CPU, with a processor of the backbone's kind."""
    return module_of(CocoaProcessor.from_pretrained(processor_folder), model_type)[0].eval()


@pytest.fixture
def items(image, tmp_path) -> list:
    """Texts of many lengths, conversations, pictures, both, several, paths, videos, a few of them twice; in a mess."""
    found = mixture(image, tmp_path) + [f"{'a red apple ' * (number % 9)} {number}" for number in range(40)]
    found += [make_image(16 + 8 * number, 24, seed=number) for number in range(6)]
    found += [{"images": [make_image(40, 40, seed=7), image], "text": "two"}, "a nerd face", image]
    return [found[place] for place in torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def device_module(module: CocoaTransformer, device: torch.device, **to) -> CocoaTransformer:
    """A copy on the device."""
    return copy.deepcopy(module).to(device, **to)


@torch.no_grad()
@BOTH_SIDES
@pytest.mark.parametrize("eos_only", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_forward_pass_is_that_of_the_cpu(model_type, device, padding_side, eos_only, implementation):
    batch = batch_of(rows(model_type), padding_side)
    expected = with_backend(model_type, "eager")(**batch)
    found = with_backend(model_type, implementation).to(device)(**moved(batch, device), eos_only=eos_only)
    same(found.pooler_output.cpu(), expected.pooler_output)
    if not eos_only:
        real = batch["attention_mask"].bool()
        states = found.last_hidden_state.cpu()[real]
        torch.testing.assert_close(states, expected.last_hidden_state[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@BOTH_SIDES
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
def test_a_forward_pass_in_half_precision_keeps_the_direction(model_type, device, dtype, implementation, padding_side):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    batch = batch_of(rows(model_type), padding_side)
    expected = with_backend(model_type, "eager")(**batch).pooler_output
    dtype = HALF[dtype]
    half = with_backend(model_type, implementation).to(device, dtype)
    found = half(**moved(batch, device, dtype), eos_only=True).pooler_output
    assert lost_cosine(found, expected) < 16 * torch.finfo(dtype).eps ** 2


@pytest.mark.parametrize("options", [{}, {"batch_num_tokens": 30}, {"batch_size": 2}], ids=str)
def test_encode_gives_the_vectors_of_the_cpu_in_their_order(module, device, items, options):
    expected = module.encode(items, prompt="Find it.")
    model = device_module(module, device).model
    found = encode_inputs(model, module.processor, items, prompt="Find it.", **options)
    assert found.device.type == "cpu" and found.dtype == torch.float32
    same(found, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_encode_in_half_precision_keeps_the_direction(module, device, items, dtype):
    found = device_module(module, device, dtype=HALF[dtype]).encode(items, batch_num_tokens=200)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert lost_cosine(found, module.encode(items)) < 16 * torch.finfo(HALF[dtype]).eps ** 2


LOADERS = {"stock": {}, "remote code": {"trust_remote_code": True}}


@pytest.mark.parametrize("loader", [*LOADERS, "ours"])
@BOTH_SIDES
def test_a_saved_folder_gives_the_vectors_of_the_cpu_by_every_loader(module, device, tmp_path, loader, padding_side):
    """Stock classes, remote code and our own module; and in bfloat16."""
    module.processor.tokenizer.padding_side = padding_side
    save_cocoa(module.model, module.processor, tmp_path / "cocoa")
    image = make_image(48, 32)
    items = ["a red apple", image, {"text": "apple", "image": image}, {"image": [image, image], "text": "twice"}]
    items += ["nerd face with glasses " * 9, {"video": np.stack([np.asarray(image)] * 4), "text": "moving"}]
    expected = module.encode(items)

    def opened(**options):
        if loader == "ours":
            inner = CocoaTransformer(tmp_path / "cocoa", model_kwargs=options)
            return SentenceTransformer(modules=[inner], device=str(device))
        return SentenceTransformer(
            str(tmp_path / "cocoa"), device=str(device), model_kwargs=options, **LOADERS[loader]
        )  # fmt: skip

    for batch_size in (1, 32):
        same(opened().encode(items, batch_size=batch_size), expected)
    half = opened(dtype=torch.bfloat16).encode(items, convert_to_tensor=True)
    assert half.device.type == device.type
    assert lost_cosine(half, expected) < 16 * torch.finfo(torch.bfloat16).eps ** 2


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_heads_of_the_sizes_that_models_have(model_type, processor_folder, device, items, dtype):
    """128 in the text layers, with keys and values for a quarter of the heads; 80 in the vision tower."""
    processor = of_kind(CocoaProcessor.from_pretrained(processor_folder), model_type)
    text = {"hidden_size": 512, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 1}
    vision = dict(VISION_CONFIGS[model_type])
    vision["embed_dim" if model_type == "qwen2_vl" else "hidden_size"] = 160
    model = build_model(processor, text, vision, model_type=model_type, seed=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.dim() > 1 else 1)  # so that attention is not the same for all keys
    expected = encode_inputs(model, processor, items)
    dtype = getattr(torch, dtype)
    found = encode_inputs(model.to(device, dtype), processor, items)
    assert lost_cosine(found, expected) < 16 * torch.finfo(dtype).eps ** (1 if dtype == torch.float32 else 2)


@pytest.mark.parametrize(("dtype", "mean", "most"), [("float16", 1e-5, 1e-3), ("bfloat16", 5e-4, 1e-2)])
def test_the_trained_checkpoint_keeps_the_direction(device, dtype, mean, most):
    """By as much as on a CPU (test_precision.py): float16 7e-7 on average and 3e-4 at most, bfloat16 1e-4 and 3e-3."""
    emoji = load_emoji().select(range(0, 1500, 40))
    items = [*emoji["name"], *emoji["noto"]]
    found = CocoaTransformer(CHECKPOINT, model_kwargs={"dtype": dtype}).to(device).encode(items)
    drift = 1 - (found * CocoaTransformer(CHECKPOINT).encode(items)).sum(1)
    assert drift.mean() < mean and drift.max() < most, (drift.mean(), drift.max())


@pytest.mark.parametrize("placed", ["auto", "whole", "spread"])
def test_a_device_map_gives_the_vectors_of_the_cpu(module, device, items, tmp_path, placed):
    """`auto` on one GPU is that GPU; `spread` keeps a layer on the CPU, from where it is fetched for each pass."""
    save_cocoa(module.model, module.processor, tmp_path / "cocoa")
    names = ["visual", "language_model.embed_tokens", "language_model.layers.0", "language_model.norm"]
    names += ["language_model.rotary_emb", "pooler"]
    spread = {**dict.fromkeys(names, str(device)), "language_model.layers.1": "cpu"}
    device_map = {"auto": "auto", "whole": {"": str(device)}, "spread": spread}[placed]
    found = CocoaTransformer(tmp_path / "cocoa", model_kwargs={"device_map": device_map})
    assert found.model.device.type == device.type
    same(found.encode(items), module.encode(items))


def test_too_little_memory_takes_smaller_batches(module, cuda, caplog):
    """The error is the GPU's own: 64 MiB beside what its libraries keep are less than a batch needs."""
    texts = [f"{number} a red apple " * 40 for number in range(2000)]
    module = module.to(cuda)
    expected = module.encode(texts)
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        with caplog.at_level(logging.WARNING):
            found = module.encode(texts, batch_num_tokens=10**6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    same(found, expected)
    assert "memory does not suffice" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flex_attention_gives_the_vectors_of_the_cpu(device, dtype):
    """Compiled on a GPU, hence last, and one backbone; its text layers are those of the other."""
    batch = batch_of(rows(), "left")
    expected = with_backend("qwen2_vl", "eager")(**batch).pooler_output
    dtype = getattr(torch, dtype)
    found = with_backend("qwen2_vl", FLEX_ATTENTION).to(device, dtype)(**moved(batch, device, dtype)).pooler_output
    assert lost_cosine(found, expected) < 16 * torch.finfo(dtype).eps ** (1 if dtype == torch.float32 else 2)
