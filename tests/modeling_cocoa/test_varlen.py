# SPDX-License-Identifier: Apache-2.0
"""Attention by boundaries: a plain kernel of the same signature takes the place of torch's, which needs a GPU."""

from __future__ import annotations

import inspect
import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_cocoa import packed_attention
from modeling_cocoa.packed_attention import GROUPS, VARLEN, attend, find_varlen_attn, sdpa_kernel, varlen_attention
from modeling_cocoa.packing import pack
from tests.conftest import CLASSES, tiny_config
from tests.modeling_cocoa.test_modeling import batch_of, rows, with_backend
from tests.modeling_cocoa.test_packing import SHAPE, Attention, segments_of


def oldest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """torch 2.11's, which knows no grouped heads: sample after sample."""
    assert query.shape[1] == key.shape[1] == value.shape[1], "heads have to be repeated"
    return newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale)


def newest(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """torch 2.14's."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query.dtype == key.dtype == value.dtype
    outputs = []
    for ends, longest, states in ((cu_seq_q, max_q, query), (cu_seq_k, max_k, key)):
        assert ends.dtype == torch.int32 and ends.device == states.device
        assert int(ends[0]) == 0 and int(ends[-1]) == len(states)
        assert type(longest) is int and longest == int(ends.diff().max())
    for (a, b), (c, d) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        sample = (part.transpose(0, 1) for part in (query[a:b], key[c:d], value[c:d]))
        found = torch.nn.functional.scaled_dot_product_attention(*sample, scale=scale, enable_gqa=enable_gqa)
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


KERNELS = pytest.mark.parametrize("kernel", [oldest, newest])


def use(patch, kernel):
    """Have `sdpa` go by boundaries, with a kernel."""
    patch.setattr(packed_attention, "find_varlen_attn", lambda: kernel)
    patch.setattr(packed_attention, "sdpa_kernel", lambda *args: VARLEN)
    packed_attention.image_spans.cache_clear()


@pytest.fixture(params=[oldest, newest], ids=["torch 2.11", "torch 2.14"])
def kernel(request, monkeypatch):
    """The stand-in, in use."""
    use(monkeypatch, request.param)
    yield request.param
    packed_attention.image_spans.cache_clear()


@KERNELS
@given(SHAPE, st.booleans(), st.booleans())
def test_boundaries_give_what_groups_give(kernel, shapes, left, eos_sees_target):
    packed = pack(segments_of(shapes, left), eos_sees_target)
    generator = torch.Generator().manual_seed(len(shapes))
    query = torch.randn(len(packed.index), 4, 8, generator=generator)
    key, value = (torch.randn(len(packed.index), 2, 8, generator=generator) for _ in range(2))
    states = [part.clone().requires_grad_() for part in (query, key, value)]

    def run() -> tuple[torch.Tensor, ...]:
        output = attend(Attention(), *states, packed, implementation="sdpa", scaling=0.5)
        return output, *torch.autograd.grad(output.square().sum(), states)

    expected = run()
    with pytest.MonkeyPatch.context() as patch:
        use(patch, kernel)
        found = run()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_vectors_and_gradients_are_those_of_the_padded_reference(kernel, model_type, padding_side):
    """Texts, images of several sizes and windows, in one batch."""
    found = {}
    for implementation in ("sdpa", "eager"):
        model = with_backend(model_type, implementation)
        vectors = model(**batch_of(rows(model_type), padding_side)).pooler_output
        weights = [model.visual.blocks[0].attn.qkv.weight, model.language_model.layers[0].self_attn.k_proj.weight]
        found[implementation] = vectors, *torch.autograd.grad(vectors[:, 0].sum(), weights)
    torch.testing.assert_close(found["sdpa"], found["eager"], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_images_in_any_order_keep_their_features(kernel, model_type):
    """By boundaries nothing is sorted."""
    torch.manual_seed(0)
    model = CLASSES[model_type][1](tiny_config(model_type)).eval()
    grids = torch.tensor([[1, 8, 6], [1, 2, 4], [2, 6, 4], [1, 2, 4]])
    width = model.config.vision_config.in_channels * model.config.vision_config.temporal_patch_size * 8**2
    pixels = torch.randn(int(grids.prod(-1).sum()), width)
    found = model.visual(pixels, grids).pooler_output
    model.visual.set_attn_implementation("eager")
    torch.testing.assert_close(found, model.visual(pixels, grids).pooler_output, atol=1e-5, rtol=0)


def test_the_call_is_one_that_every_torch_takes():
    """torch's own function is held to what the stand-ins take, and they to the call."""
    own = find_varlen_attn()
    if own is None:
        pytest.skip("this torch has no varlen_attn with a scale")
    known = inspect.signature(newest if "enable_gqa" in inspect.signature(own).parameters else oldest).parameters
    taken = inspect.signature(own).parameters
    assert [name for name, p in taken.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == list(known)[:7]
    assert {"scale", *("enable_gqa",) * ("enable_gqa" in known)} <= set(taken)
    assert taken["window_size"].default == (-1, -1), "by default nothing is causal"


def test_mixed_precision_is_brought_to_that_of_the_values(kernel):
    """Under autocast queries and keys are rotated in float32."""
    packed = pack(segments_of([(3, 0, 0), (1, 0, 0)], left=False))
    states = torch.randn(3, len(packed.index), 2, 8)
    value = states[2].bfloat16()
    output = attend(Attention(), states[0], states[1], value, packed, implementation="sdpa", scaling=0.5)
    assert output.dtype == torch.bfloat16
    assert varlen_attention(value, value, value, *[torch.tensor([0, 6], dtype=torch.int32)] * 2, 6, 6, scale=1.0).shape


def test_a_cpu_takes_groups_without_a_word(backbone, caplog):
    sdpa_kernel.cache_clear()
    assert sdpa_kernel(torch.device("cpu"), torch.bfloat16) == GROUPS
    assert f"attention={GROUPS}" in repr(backbone)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "capability", "kernel", "reason"),
    [
        ((torch.bfloat16, False), (9, 0), newest, None),
        ((torch.float16, False), (8, 0), oldest, None),
        ((torch.float32, False), (9, 0), newest, "dtype=torch.bfloat16"),
        ((torch.bfloat16, True), (9, 0), newest, "attention_dropout to 0"),
        ((torch.bfloat16, False), (9, 0), None, "torch 2.11 or newer"),
        ((torch.bfloat16, False), (7, 5), newest, "Ampere GPU or a newer one, not Tesla T4"),
    ],
)
def test_a_gpu_that_cannot_go_by_boundaries_is_named_once(options, capability, kernel, reason, monkeypatch, caplog):
    sdpa_kernel.cache_clear()
    monkeypatch.setattr(packed_attention, "find_varlen_attn", lambda: kernel)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    caplog.set_level(logging.DEBUG, logger=packed_attention.__name__)
    found = [sdpa_kernel(torch.device("cuda", 0), *options) for _ in range(3)]
    assert found == [VARLEN if reason is None else GROUPS] * 3
    (record,) = caplog.records
    assert record.levelname == ("DEBUG" if reason is None else "WARNING")
    assert (reason or VARLEN) in record.message
    sdpa_kernel.cache_clear()
