# SPDX-License-Identifier: Apache-2.0
"""Collaborative attention over packed rows against attention under the dense mask, written plainly in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling_cocoa.attention import PADDING, collaborative_mask
from modeling_cocoa.packed_attention import FLEX_ATTENTION, attend
from modeling_cocoa.packing import pack
from tests.gpu.conftest import HALF
from tests.modeling_cocoa.test_packing import Attention, segments_of

pytestmark = pytest.mark.gpu
HEADS = {"64": (4, 2, 64), "80, ungrouped": (4, 4, 80), "128": (12, 2, 128)}
"""Heads, those of keys and values, and their size: of a vision tower the second, of Qwen2-VL-2B the third."""
SHAPES = {
    "many lengths": [(length, length * 5 % 31, 0) for length in range(0, 61, 3)] + [(200, 3, 0), (1, 130, 0)],
    "no targets": [(length, 0, 0) for length in (7, 0, 7, 150, 0, 33, 7)],
    "rows of one token": [(0, 0, 0)] * 5,
    "targets of one token": [(0, 1, 0), (5, 1, 0), (0, 1, 0)],
    "some targets": [(9, 0, 0), (4, 6, 0), (0, 0, 0), (4, 0, 0), (0, 6, 0)],
}


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of `(batch, tokens, heads, size)` under a mask, written out."""
    groups = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)


def check(found: Tensor, expected: Tensor, bound: float, name: str, least: float = 0.0) -> None:
    """Every token's and head's vector is right to a part of its own and the usual length; a wrong key is 1 away."""
    found, expected = found.detach().double(), expected.detach()
    length = expected.norm(dim=-1)
    error = (found - expected).norm(dim=-1) / (length + length.mean() + least)
    assert float(error.max()) < bound, (name, float(error.max()))


def compare(shapes, heads, dtype, device, *, left=False, eos_sees_target=True, implementation="sdpa"):
    """Outputs and the gradients of queries, keys and values."""
    bound = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    segment_ids = segments_of(shapes, left).to(device)
    real = segment_ids != PADDING
    generator = torch.Generator().manual_seed(len(shapes))
    number, groups, size = heads
    tokens = segment_ids.shape
    # The same numbers in both: what is measured is the arithmetic, not the rounding of its inputs.
    parts = [torch.randn(*tokens, count, size, generator=generator) for count in (number, groups, groups)]
    parts = [part.to(device, dtype) for part in parts]
    upstream = torch.randn(*tokens, number, size, generator=generator).to(device, dtype)
    packing = pack(segment_ids, eos_sees_target)
    packed = [part.flatten(0, 1)[packing.index].requires_grad_() for part in parts]
    module = Attention()
    module.num_key_value_groups = number // groups
    output = attend(module, *packed, packing, implementation=implementation, scaling=size**-0.5)
    assert output.dtype == dtype and output.shape == (len(packing.index), number * size)
    output.backward(upstream.flatten(0, 1)[packing.index].flatten(1))
    exact = [part.double().requires_grad_() for part in parts]
    mask = collaborative_mask(segment_ids, eos_sees_target=eos_sees_target)
    mask = mask | (torch.eye(tokens[1], dtype=torch.bool, device=device) & ~real[:, None, :, None])
    expected = attention(*exact, mask).flatten(0, 1)[packing.index]
    expected.backward(upstream.double().flatten(0, 1)[packing.index])
    check(output.unflatten(-1, (number, size)), expected, bound, "output")
    for name, part, whole in zip(("query", "key", "value"), packed, exact, strict=True):
        # Gradients of scores are differences, and zero where there is one key: their error is that of the two parts.
        least = size**0.5 / 4 if name != "value" else 0.0
        check(part.grad, whole.grad.flatten(0, 1)[packing.index], bound, name, least)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_packed_attention_is_attention_under_the_dense_mask(device, shapes, heads, dtype, implementation):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
        if dtype == "float32":
            pytest.skip("takes half precision only")
    rows, dtype, heads = SHAPES[shapes], getattr(torch, dtype), HEADS[heads]
    if device.type == "cpu":
        rows, heads = [row for row in rows if sum(row) < 40], (heads[0] // heads[1], 1, heads[2])
    for left, eos_sees_target in ((False, True), (True, False)):
        options = {"left": left, "eos_sees_target": eos_sees_target, "implementation": implementation}
        compare(rows, heads, dtype, device, **options)


@pytest.mark.parametrize("eos_sees_target", [True, False])
def test_flex_attention_is_attention_under_the_dense_mask(cuda, eos_sees_target):
    """Its backward pass exists on a GPU alone; over several blocks of 128 tokens."""
    options = {"eos_sees_target": eos_sees_target, "implementation": FLEX_ATTENTION}
    compare(SHAPES["many lengths"], HEADS["64"], torch.bfloat16, cuda, **options)
