# SPDX-License-Identifier: Apache-2.0
"""A padded batch as one row without padding, and collaborative attention over it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .attention import FLEX_ATTENTION, PADDING, TARGET, packed_block_mask

logger = logging.getLogger(__name__)

VARLEN = "varlen_attn"
"""How `sdpa` attends on packed rows where torch has a kernel that goes by boundaries: one call a layer."""
GROUPS = "scaled_dot_product_attention"
"""How it does elsewhere: samples of equal length as one batch, a call for each length."""


@dataclass
class Spans:
    """
    Samples behind one another in a packed row, those of equal length together.

    Args:
        lengths (`list[int]`): Tokens of each sample.
    """

    lengths: list[int]
    _boundaries: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    @cached_property
    def counts(self) -> list[int]:
        """How many samples of one length follow one another, for each such group."""
        return [len(list(members)) for _, members in groupby(self.lengths)]

    def boundaries(self, device: torch.device) -> Tensor:
        """First token of each sample and the end of the last, int32, as variable-length kernels take them."""
        if device not in self._boundaries:
            ends = [0, *accumulate(self.lengths)]
            self._boundaries[device] = torch.tensor(ends, dtype=torch.int32, device=device)
        return self._boundaries[device]

    def batches(self, tokens: Tensor, counts: list[int]) -> list[Tensor]:
        """
        Tokens `(tokens, heads, size)` as views `(samples, heads, length, size)`.

        Args:
            tokens (`Tensor`).
            counts (`list[int]`): Samples of each view, which have to be of one length.
        """
        firsts = [0, *accumulate(counts)][:-1]
        lengths = [self.lengths[first] for first in firsts]
        parts = tokens.split([samples * length for samples, length in zip(counts, lengths, strict=True)])
        return [
            part.view(samples, length, *tokens.shape[1:]).transpose(1, 2)
            for part, samples, length in zip(parts, counts, lengths, strict=True)
        ]


@dataclass
class Packing:
    """
    Where the tokens of a padded batch lie in one row without padding: sources, each with its EOS, by increasing
    length; then targets, by increasing length. Build it with [`pack`].

    Args:
        index (`Tensor` of shape `(tokens,)`): Place of each packed token in the flattened batch.
        sources, targets ([`Spans`]).
        eos (`Tensor` of shape `(batch,)`): Packed place of each batch row's EOS, in the batch's order.
        order (`Tensor` of shape `(batch,)`): The batch row of each source, in packed order.
        target_keys (`Tensor`): Packed places of what targets see: each one's EOS and itself.
        segment_ids, sample_ids (`Tensor` of shape `(tokens,)`): As in [`~attention.is_visible`].
        eos_sees_target (`bool`): As in [`~attention.is_visible`].
        eos_queries (`Tensor`): Packed places of each EOS that sees a target, by the length of its row.
        eos_spans ([`Spans`]): Those rows, source and target together.
        eos_keys (`Tensor`): Packed places of what these EOS tokens see: their whole rows.
    """

    index: Tensor
    sources: Spans
    targets: Spans
    eos: Tensor
    order: Tensor
    target_keys: Tensor
    segment_ids: Tensor
    sample_ids: Tensor
    eos_sees_target: bool
    eos_queries: Tensor
    eos_spans: Spans
    eos_keys: Tensor

    @cached_property
    def block_mask(self) -> BlockMask:
        """The collaborative mask of the packed row, for flex attention."""
        return packed_block_mask(self.segment_ids, self.sample_ids, self.eos_sees_target)

    def to(self, device: torch.device, non_blocking: bool = False) -> Packing:
        """The same on a device; where a model is spread over several, layers ask for it."""
        if self.index.device == device:
            return self
        moved = {
            entry.name: value.to(device, non_blocking=non_blocking)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), Tensor)
        }
        return replace(self, **moved)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """Packed tokens `(tokens, hidden)` in their places of a batch of `shape` `(batch, tokens)`, padding zero."""
        padded = packed.new_zeros(shape.numel(), packed.shape[-1]).index_copy(0, self.index, packed)
        return padded.view(*shape, -1)


def pack(segment_ids: Tensor, eos_sees_target: bool = True) -> Packing:
    """
    Find the places of a batch's tokens in one row.

    Args:
        segment_ids (`Tensor` of shape `(batch, tokens)`): `PADDING`, `SOURCE`, `EOS` or `TARGET`; padding may be
            anywhere. A row's last token that is neither padding nor target counts as its EOS.
        eos_sees_target (`bool`, defaults to `True`): As in [`~attention.is_visible`].

    Raises:
        ValueError: a row has no token besides padding and target; names the row.
    """
    is_target = segment_ids == TARGET
    is_token = segment_ids != PADDING
    order, lengths, source_index = by_length(is_token & ~is_target)
    if lengths and lengths[0] == 0:
        raise ValueError(f"Row {int(order[0])} of the batch is padding only: every input must hold at least the EOS.")
    _, target_lengths, target_index = by_length(is_target)
    index = torch.cat([source_index, target_index])
    eos = torch.empty_like(order)
    eos[order] = torch.tensor(lengths, device=order.device).cumsum(0) - 1
    none = index.new_empty(0)
    target_keys = eos_queries = eos_keys = none
    eos_lengths: list[int] = []
    if len(target_index):
        places = torch.empty(segment_ids.numel(), dtype=torch.long, device=index.device)
        places[index] = torch.arange(len(index), device=index.device)
        has_target = is_target.any(1, keepdim=True)
        is_eos = torch.zeros_like(is_target).flatten().index_fill(0, index[eos], True).view_as(is_target)
        target_keys = places[by_length(is_target | (is_eos & has_target))[2]]
        if eos_sees_target:
            eos_order, eos_lengths, row_index = by_length(is_token & has_target)
            eos_queries = eos[eos_order[eos_lengths.count(0) :]]
            eos_keys = places[row_index]
    return Packing(
        index=index,
        sources=Spans(lengths),
        targets=Spans([length for length in target_lengths if length]),
        eos=eos,
        order=order,
        target_keys=target_keys,
        segment_ids=segment_ids.flatten()[index],
        sample_ids=index // segment_ids.shape[1],
        eos_sees_target=eos_sees_target,
        eos_queries=eos_queries,
        eos_spans=Spans([length for length in eos_lengths if length]),
        eos_keys=eos_keys,
    )


def by_length(chosen: Tensor) -> tuple[Tensor, list[int], Tensor]:
    """Rows by their number of chosen places, these numbers, and the flat index of each such place in that order."""
    lengths, order = chosen.sum(1).sort(stable=True)
    rows, columns = chosen[order].nonzero(as_tuple=True)
    return order, lengths.tolist(), order[rows] * chosen.shape[1] + columns


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
    eos_only: bool = False,
) -> Tensor:
    """
    Collaborative attention over a packed row; no mask of tokens x tokens is made.

    Sources see their own source and EOS, targets their own EOS and target, the EOS all of its row (CoCoA, arXiv
    2603.01471): each is full attention between two stretches of the row, which any backend can do.

    Args:
        module: The attention module; backends read its number of key and value heads.
        query (`Tensor` of shape `(tokens, heads, head size)`): With `eos_only`, of the EOS tokens in packed order.
        key, value (`Tensor` of shape `(tokens, key and value heads, head size)`).
        packing ([`Packing`]).
        implementation (`str`): `"sdpa"` (see [`sdpa_kernel`]) and flash attention go by boundaries, [`FLEX_ATTENTION`]
            by a block mask.
        scaling (`float`): Of the scores.
        dropout (`float`, defaults to 0).
        eos_only (`bool`, defaults to `False`): The queries are the EOS tokens alone, of rows without a target.

    Returns:
        `Tensor` of shape `(queries, heads * head size)`.

    Raises:
        ValueError: `eos_only`, and a row has a target.
    """
    if eos_only and packing.targets.lengths:
        raise ValueError("eos_only takes rows without a target, as they are embedded.")
    options = {"implementation": implementation, "scaling": scaling, "dropout": dropout}
    if implementation == FLEX_ATTENTION and not eos_only:
        row = (part.transpose(0, 1)[None] for part in (query, key, value))
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]
        return kernel(module, *row, packing.block_mask, scaling=scaling, dropout=dropout)[0].flatten(2)[0]
    sources = packing.sources
    ends = sum(sources.lengths)
    # Below, `index_select` and not brackets, whose gradient a GPU has to sort for.
    if eos_only:
        ones = Spans([1] * len(sources.lengths))
        return attend_spans(module, query, ones, key[:ends], value[:ends], sources, **options)
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
    if implementation not in ("sdpa", FLEX_ATTENTION):
        raise ValueError(
            f"attn_implementation={implementation!r} is not known on packed rows. Load the model with 'sdpa', "
            f"'flash_attention_2', {FLEX_ATTENTION!r}, or 'eager' for the stock layers on the padded batch."
        )
    if implementation == "sdpa" and sdpa_kernel(value.device, value.dtype, dropout > 0) == VARLEN:
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
