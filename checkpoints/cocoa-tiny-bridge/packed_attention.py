# SPDX-License-Identifier: Apache-2.0
"""
What stock layers call for their attention: collaborative attention over a packed row, and the images or windows of a
vision tower in one call.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .packing import Packing, Spans

logger = logging.getLogger(__name__)

TEXT_ATTENTION = "cocoa"
"""Under this name stock text layers call [`attend_text`]."""
VISION_ATTENTION = "cocoa_flash"
"""Under this name vision towers call [`attend_images`]: by "flash" in it once, with boundaries, not once an image."""
FLEX_ATTENTION = "cocoa_flex"
"""`attn_implementation` under which flex attention serves Qwen2-VL, whose stock classes do not declare it
(transformers refuses names that contain "flex_attention" for such classes)."""
VARLEN = "varlen_attn"
"""How `sdpa` attends on packed rows where torch has a kernel that goes by boundaries: one call a layer."""
GROUPS = "scaled_dot_product_attention"
"""How it does elsewhere: samples of equal length as one batch, a call for each length."""


def attend_text(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_attention: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """
    Registered with transformers' attention interface for text layers. It only calls what the model hands its layers,
    so that copies of this file in one process, of the package and of checkpoints, need not be of one version.

    Args:
        packed_attention (`Callable`, *optional*): [`attend_row`], its own arguments bound; without it, two-sided
            `sdpa` on a padded batch.
    """
    if packed_attention is None:
        kwargs = {**kwargs, "is_causal": False}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return packed_attention(module, query, key, value, **kwargs), None


def attend_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    packing: Packing,
    implementation: str,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """
    [`attend`] in the shapes of transformers' attention interface.

    Args:
        query, key, value (`Tensor` of shape `(1, heads, tokens, head size)`).
        kwargs: What stock layers hand to every attention function.

    Returns:
        `Tensor` of shape `(1, tokens, heads, head size)`.
    """
    row = (part[0].transpose(0, 1) for part in (query, key, value))
    packing = packing.to(query.device)  # where the layers are spread over devices
    output = attend(module, *row, packing, implementation=implementation, scaling=scaling, dropout=dropout)
    return output.unflatten(-1, (query.shape[1], -1))[None]


def attend_images(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Registered with transformers' attention interface for vision towers: full attention within each image (or window),
    those of equal size as one batch.

    Args:
        query, key, value (`Tensor` of shape `(1, heads, patches, head size)`).
        cu_seq_lens_q (`Tensor` of shape `(images + 1,)`): First patch of each image or window, and the end.
        kwargs: What stock layers hand to every attention function.

    Returns:
        `Tensor` of shape `(1, patches, heads, head size)`.
    """
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]
    spans, places = image_spans(cu_seq_lens_q, sdpa_kernel(value.device, value.dtype))
    if places is not None:
        rows = [part.index_select(0, places) for part in rows]
    output = attend_spans(
        module, rows[0], spans, *rows[1:], spans, implementation="sdpa", scaling=scaling, dropout=dropout
    )
    if places is not None:
        output = torch.empty_like(output).index_copy(0, places, output)
    return output.unflatten(-1, (query.shape[1], -1))[None], None


@lru_cache(maxsize=4)
def image_spans(cu_seqlens: Tensor, kernel: str) -> tuple[Spans, Tensor | None]:
    """
    Where images or windows lie, worked out once for all layers, which are given the same tensor.

    Args:
        cu_seqlens (`Tensor` of shape `(images + 1,)`): First patch of each image or window, and the end.
        kernel (`str`): Of [`sdpa_kernel`].

    Returns:
        Their lengths, and the place of each patch in the order of these lengths, where that is another than its own.
    """
    lengths = cu_seqlens.diff()
    spans = Spans(lengths.tolist())
    if kernel == VARLEN or spans.lengths == sorted(spans.lengths):
        return spans, None
    lengths, order = lengths.sort(stable=True)
    starts = cu_seqlens[:-1][order]
    within = torch.arange(int(cu_seqlens[-1]), device=lengths.device)
    within = within - nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1].repeat_interleave(lengths)
    return Spans(lengths.tolist()), starts.repeat_interleave(lengths) + within


# Registering is an assignment, so doing it again (package and remote copy in one process) is harmless.
for name in (TEXT_ATTENTION, FLEX_ATTENTION):
    AttentionInterface.register(name, attend_text)
AttentionInterface.register(VISION_ATTENTION, attend_images)
# Or a padded batch would silently get no mask.
AttentionMaskInterface.register(TEXT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    implementation: str,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """
    Collaborative attention over a packed row; no mask of tokens x tokens is made.

    Sources see their own source and EOS, targets their own EOS and target, the EOS all of its row (CoCoA, arXiv
    2603.01471): each is full attention between two stretches of the row, which any backend can do.

    Args:
        module: The attention module; backends read its number of key and value heads.
        query (`Tensor` of shape `(tokens, heads, head size)`).
        key, value (`Tensor` of shape `(tokens, key and value heads, head size)`).
        packing ([`Packing`]).
        implementation (`str`): `"sdpa"` (see [`sdpa_kernel`]) and flash attention go by boundaries, [`FLEX_ATTENTION`]
            by a block mask.
        scaling (`float`): Of the scores.
        dropout (`float`, defaults to 0).

    Returns:
        `Tensor` of shape `(tokens, heads * head size)`.
    """
    options = {"implementation": implementation, "scaling": scaling, "dropout": dropout}
    if implementation == FLEX_ATTENTION:
        return flex_row(query, key, value, packing.block_mask, scaling)
    sources = packing.sources
    ends = sum(sources.lengths)
    # Below, `index_select` and not brackets, whose gradient a GPU has to sort for.
    output = attend_spans(module, query[:ends], sources, key[:ends], value[:ends], sources, **options)
    if not packing.targets.lengths:
        return output
    seen = Spans([length + 1 for length in packing.targets.lengths])
    keys, values = (part.index_select(0, packing.target_keys) for part in (key, value))
    of_targets = attend_spans(module, query[ends:], packing.targets, keys, values, seen, **options)
    output = torch.cat([output, of_targets])
    if not packing.eos_spans.lengths:
        return output
    ones = Spans([1] * len(packing.eos_spans.lengths))
    keys, values = (part.index_select(0, packing.eos_keys) for part in (key, value))
    eos = query.index_select(0, packing.eos_queries)
    of_eos = attend_spans(module, eos, ones, keys, values, packing.eos_spans, **options)
    return output.index_copy(0, packing.eos_queries, of_eos)


def attend_spans(
    module: nn.Module,
    query: Tensor,
    query_spans: Spans,
    key: Tensor,
    value: Tensor,
    key_spans: Spans,
    *,
    implementation: str,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """
    Full attention of each sample's queries to its keys.

    Args:
        query_spans, key_spans ([`Spans`]): The same samples; those with keys of one length have queries of one length.

    Returns:
        `Tensor` of shape `(queries, heads * head size)`.

    Raises:
        ValueError: the implementation is another; names those that there are.
    """
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        row = (part.transpose(0, 1)[None] for part in (query, key, value))
        output, _ = ALL_ATTENTION_FUNCTIONS[implementation](
            module,
            *row,
            None,
            cu_seq_lens_q=query_spans.boundaries(query.device),
            cu_seq_lens_k=key_spans.boundaries(key.device),
            max_length_q=query_spans.longest,
            max_length_k=key_spans.longest,
            scaling=scaling,
            dropout=dropout,
            is_causal=False,
        )
        return output.reshape(len(query), -1)
    if implementation != "sdpa":
        raise ValueError(
            f"attn_implementation={implementation!r} is not known on packed rows. Load the model with 'sdpa', "
            f"'flash_attention_2', {FLEX_ATTENTION!r}, or 'eager' for the stock layers on the padded batch."
        )
    if sdpa_kernel(value.device, value.dtype, dropout > 0) == VARLEN:
        boundaries = query_spans.boundaries(query.device), key_spans.boundaries(key.device)
        longest = query_spans.longest, key_spans.longest
        # Rotated in float32 under autocast, while the values are not.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return varlen_attention(query, key, value, *boundaries, *longest, scale=scaling).flatten(1)
    counts, grouped = key_spans.counts, query.shape[1] != key.shape[1]
    groups = zip(
        query_spans.batches(query, counts),
        key_spans.batches(key, counts),
        key_spans.batches(value, counts),
        strict=True,
    )
    outputs = (
        nn.functional.scaled_dot_product_attention(*group, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
        for group in groups
    )
    return torch.cat([output.transpose(1, 2).flatten(0, 1).flatten(1) for output in outputs])


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, *boundaries: Tensor | int, scale: float) -> Tensor:
    """
    torch's attention by boundaries, whatever the number of key and value heads.

    Args:
        query (`Tensor` of shape `(queries, heads, head size)`).
        key, value (`Tensor` of shape `(keys, key and value heads, head size)`).
        boundaries: As [`torch.nn.attention.varlen.varlen_attn`] takes them.
        scale (`float`): Of the scores.

    Returns:
        `Tensor` of shape `(queries, heads, head size)`.
    """
    kernel = find_varlen_attn()
    shared = query.shape[1] // key.shape[1]
    if shared == 1:
        return kernel(query, key, value, *boundaries, scale=scale)
    if "enable_gqa" in parameters_of(kernel):
        return kernel(query, key, value, *boundaries, scale=scale, enable_gqa=True)
    key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
    return kernel(query, key, value, *boundaries, scale=scale)


@cache
def find_varlen_attn() -> Callable[..., Tensor] | None:
    """torch's `varlen_attn`, where it takes a scale and boundaries of queries and of keys: from torch 2.11 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in parameters_of(varlen_attn) else None


@cache
def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a function takes, by name."""
    return inspect.signature(function).parameters


@cache
def sdpa_kernel(device: torch.device, dtype: torch.dtype, with_dropout: bool = False) -> str:
    """
    How `sdpa` attends on packed rows: [`VARLEN`] or [`GROUPS`]. On a GPU it says so in a debug log, and warns of
    [`GROUPS`], which is slow there.

    Args:
        device (`torch.device`), dtype (`torch.dtype`): Of the values.
        with_dropout (`bool`, defaults to `False`): Whether attention weights are dropped.
    """
    if device.type != "cuda":
        return GROUPS
    reason = None
    if dtype not in (torch.bfloat16, torch.float16):
        reason = f"takes bfloat16 and float16, not {dtype}: load the model with dtype=torch.bfloat16"
    elif with_dropout:
        reason = "has no dropout: set attention_dropout to 0"
    elif find_varlen_attn() is None:
        reason = f"is not in torch {torch.__version__}: install torch 2.11 or newer"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"needs an Ampere GPU or a newer one, not {torch.cuda.get_device_name(device)}"
    if reason is None:
        logger.debug("Attention of packed rows on %s in %s: %s.", device, dtype, VARLEN)
        return VARLEN
    logger.warning("Attention goes a length at a time on %s, which is slow: %s %s.", device, VARLEN, reason)
    return GROUPS


def flex_row(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scaling: float) -> Tensor:
    """
    Flex attention over a packed row, in and out as [`attend`] takes and gives.

    Compiled on a GPU, where that is the point of it. On a CPU it is for tests, and runs as written: the compiled CPU
    kernel of torch 2.14 gives wrong numbers for masks that tell the samples of a packed row apart.
    """
    # Rotated in float32 under autocast, while the values are not; the kernel's backward pass wants one dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    kernel = compiled_flex_attention() if query.device.type == "cuda" else flex_attention
    row = (part.transpose(0, 1)[None] for part in (query, key, value))
    output = kernel(*row, block_mask=block_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return output[0].transpose(0, 1).flatten(1)


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """torch's flex attention, compiled at its first use."""
    return torch.compile(flex_attention)
