# SPDX-License-Identifier: Apache-2.0
"""
Collaborative attention: who sees whom, written once as a predicate, and the forms of it that attention backends take.

A row of EOS-bridged pre-training is `source · EOS · target` (CoCoA, arXiv 2603.01471):

| query \\ key | source | EOS | target |
|---|---|---|---|
| source | yes | yes | no |
| EOS | yes | yes | yes |
| target | no | yes | yes |

Source and target reach each other through the EOS only, as in the authors' code (`create_block_attention_mask` of
their repository) and figure. With `eos_sees_target=False`, an option of this package, the EOS does not see the target,
and the embedding of a training row is that of its source alone. Padding is seen by nobody, and samples packed into one
row never see each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

PADDING, SOURCE, EOS, TARGET = 0, 1, 2, 3
"""Segment ids: what part of its sample a token belongs to."""


def is_visible(
    query_sample: Tensor,
    key_sample: Tensor,
    query_segment: Tensor,
    key_segment: Tensor,
    eos_sees_target: bool = True,
) -> Tensor:
    """
    The collaborative-attention predicate; every other form of the mask is derived from it.

    Args:
        query_sample, key_sample (`Tensor`): Ids of the samples that the two tokens belong to.
        query_segment, key_segment (`Tensor`): `PADDING`, `SOURCE`, `EOS` or `TARGET`. All four broadcast.
        eos_sees_target (`bool`, defaults to `True`): Whether the EOS attends to its target.

    Returns:
        `Tensor` of bool: whether the query token may attend to the key token.
    """
    same_sample = (query_sample == key_sample) & (query_segment != PADDING) & (key_segment != PADDING)
    same_side = (query_segment == TARGET) == (key_segment == TARGET)
    visible = same_side | (key_segment == EOS)
    if eos_sees_target:
        visible = visible | (query_segment == EOS)
    return same_sample & visible


def collaborative_mask(segment_ids: Tensor, sample_ids: Tensor | None = None, eos_sees_target: bool = True) -> Tensor:
    """
    Dense form of the mask.

    Args:
        segment_ids (`Tensor` of shape `(batch, tokens)`): `PADDING`, `SOURCE`, `EOS` or `TARGET`.
        sample_ids (`Tensor` of shape `(batch, tokens)`, *optional*): Tells the samples of a packed row apart; by
            default each row is one sample.
        eos_sees_target (`bool`, defaults to `True`): As in [`is_visible`].

    Returns:
        `Tensor` of bool, shape `(batch, 1, tokens, tokens)`: `[b, 0, q, k]` says whether q attends to k.
    """
    if sample_ids is None:
        sample_ids = torch.zeros_like(segment_ids)
    return is_visible(
        sample_ids[:, None, :, None],
        sample_ids[:, None, None, :],
        segment_ids[:, None, :, None],
        segment_ids[:, None, None, :],
        eos_sees_target,
    )


def packed_block_mask(
    segment_ids: Tensor, sample_ids: Tensor, eos_sees_target: bool = True, block: int = 128
) -> BlockMask:
    """
    Block form of the mask of one packed row, made from what each block of tokens holds: never tokens x tokens.

    Args:
        segment_ids, sample_ids (`Tensor` of shape `(tokens,)`): As in [`is_visible`], without padding.
        eos_sees_target (`bool`, defaults to `True`): As in [`is_visible`].
        block (`int`, defaults to 128): Tokens of a block.

    Returns:
        `BlockMask` over `(1, heads (broadcast), tokens, tokens)`.
    """
    tokens, device = len(segment_ids), segment_ids.device
    blocks = torch.arange(tokens, device=device) // block
    count = -(-tokens // block)

    def holds(chosen: Tensor) -> Tensor:
        """Which blocks hold a chosen token of which samples: `(blocks, samples)`, 0 or 1."""
        found = torch.zeros(count, int(sample_ids.max()) + 1, device=device)
        found[blocks[chosen], sample_ids[chosen]] = 1
        return found

    is_target = segment_ids == TARGET
    sources, targets, ends = holds(~is_target), holds(is_target), holds(segment_ids == EOS)
    seen = sources @ sources.T + targets @ (targets + ends).T
    if eos_sees_target:
        seen = seen + ends @ targets.T
    visible = seen > 0
    counts = visible.sum(-1, dtype=torch.int32)
    order = visible.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        samples, segments = (sample_ids[query], sample_ids[key]), (segment_ids[query], segment_ids[key])
        return is_visible(*samples, *segments, eos_sees_target)

    return BlockMask.from_kv_blocks(
        counts[None, None], order[None, None], BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(tokens, tokens)
    )


def attention_mask_for(
    attn_implementation: str,
    segment_ids: Tensor,
    sample_ids: Tensor | None,
    dtype: torch.dtype,
    eos_sees_target: bool = True,
) -> Tensor:
    """
    The mask in the form that a backend's stock layers take on a padded batch.

    Args:
        attn_implementation (`str`): The text model's `config._attn_implementation`.
        segment_ids, sample_ids: As in [`collaborative_mask`].
        dtype (`torch.dtype`): Of the hidden states; eager attention adds its mask to the scores.
        eos_sees_target (`bool`, defaults to `True`): As in [`is_visible`].

    Returns:
        bool mask for `sdpa`, additive mask for `eager`.

    Raises:
        ValueError: the backend takes no such mask.
    """
    mask = collaborative_mask(segment_ids, sample_ids, eos_sees_target)
    # A softmax over nothing is NaN: a padding token looks at itself. Nobody looks at it.
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    mask = mask | (itself & (segment_ids == PADDING)[:, None, :, None])
    if attn_implementation == "sdpa":
        return mask
    if attn_implementation == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    raise ValueError(
        f"There is no mask of a padded batch for attn_implementation={attn_implementation!r}: load the model with "
        "'sdpa' or 'eager'."
    )
