# SPDX-License-Identifier: Apache-2.0
"""A padded batch as one row without padding: where its tokens lie."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .attention import PADDING, TARGET, packed_block_mask


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
