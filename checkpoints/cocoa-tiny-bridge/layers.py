# SPDX-License-Identifier: Apache-2.0
"""The stock layers, made to work on packed rows; weights, names and the stock forward stay as they are."""

from __future__ import annotations

import sys
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .packing import VARLEN, Packing, Spans, attend, attend_spans, sdpa_kernel

CONVOLUTION_ROWS = 384
"""Rows from which a pointwise convolution beats a matrix product on a CPU; with fewer, it is slower."""

SILU = (nn.SiLU, type(ACT2FN["silu"]))
"""The activation of every published Qwen2-VL and Qwen2.5-VL, by its two names."""

LARGEST_RECYCLED = 31 * 2**20
"""Bytes: a little below the 32 MiB from which glibc takes every block anew from the system."""


class PackedDecoderLayer:
    """
    In front of a stock decoder layer: with a `packing` it takes a packed row, without one it is the stock layer.

    Being the layer itself, it keeps what is attached to layers: gradient checkpointing, adapters, sharding.
    """

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packing: Packing | None = None,
        eos_only: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Args:
            hidden_states (`Tensor` of shape `(tokens, hidden)`): A packed row.
            packing ([`Packing`]).
            eos_only (`bool`, defaults to `False`): Compute the EOS tokens' output only; others serve as keys.
            position_embeddings: Cosines and sines `(tokens, head size)`.

        Returns:
            `Tensor` of shape `(tokens, hidden)`, or `(batch, hidden)` in packed order with `eos_only`.
        """
        if packing is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        attention = self.self_attn
        shape = (-1, attention.head_dim)
        cos, sin = rotary_factors(position_embeddings)
        normed = self.input_layernorm(hidden_states)
        key = rotate(attention.k_proj(normed).unflatten(-1, shape), cos, sin)
        value = attention.v_proj(normed).unflatten(-1, shape)
        if eos_only:
            places = packing.eos[packing.order]
            parts = (hidden_states, normed, cos, sin)
            hidden_states, normed, cos, sin = (part.index_select(0, places) for part in parts)
        query = rotate(attention.q_proj(normed).unflatten(-1, shape), cos, sin)
        attended = attend(
            attention,
            query,
            key,
            value,
            packing,
            implementation=attention.config._attn_implementation,
            scaling=attention.scaling,
            dropout=attention.attention_dropout if self.training else 0.0,
            eos_only=eos_only,
        )
        hidden_states = hidden_states + attention.o_proj(attended)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PackedVisionAttention:
    """In front of a stock vision attention: images (or windows) of equal size attend as one batch."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Args:
            hidden_states (`Tensor` of shape `(patches, hidden)`).
            cu_seqlens (`Tensor` of shape `(images + 1,)`): First patch of each image or window, and the end.
            position_embeddings: Cosines and sines `(patches, head size)`.
        """
        if self.config._attn_implementation != "sdpa":
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        both, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=1)
        cos, sin = (factor.float()[:, None] for factor in rotary_factors(position_embeddings))
        query, key = rotate(both.float(), cos, sin).to(value.dtype).unbind(1)
        value = value[:, 0]
        spans, places = vision_spans(cu_seqlens, sdpa_kernel(value.device, value.dtype))
        if places is not None:
            query, key, value = (part.index_select(0, places) for part in (query, key, value))
        dropout = self.attention_dropout if self.training else 0.0
        output = attend_spans(
            self, query, spans, key, value, spans, implementation="sdpa", scaling=self.scaling, dropout=dropout
        )
        if places is not None:
            output = torch.empty_like(output).index_copy(0, places, output)
        return self.proj(output)


@lru_cache(maxsize=4)
def vision_spans(cu_seqlens: Tensor, kernel: str) -> tuple[Spans, Tensor | None]:
    """
    Where images or windows lie, worked out once for all layers, which are given the same tensor.

    Args:
        cu_seqlens (`Tensor` of shape `(images + 1,)`): First patch of each image or window, and the end.
        kernel (`str`): Of [`~packing.sdpa_kernel`].

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


class PatchConvolution(nn.Conv3d):
    """The patch embedding's convolution, whose patches do not overlap, as one matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        """`(patches, channels, time, height, width)`, each of the kernel's size, to `(patches, hidden, 1, 1, 1)`."""
        return multiply(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


class GatedMLP:
    """In front of a stock gated MLP: where no gradient is asked for, two tensors of the inner width less."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(tokens, hidden)` to the same."""
        if torch.is_grad_enabled() or not isinstance(self.act_fn, SILU):
            return super().forward(hidden_states)
        gate = nn.functional.silu(self.gate_proj(hidden_states), inplace=True)
        return self.down_proj(gate.mul_(self.up_proj(hidden_states)))


class Linear(nn.Linear):
    """The linear layer with [`multiply`] for its product."""

    def forward(self, inputs: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return multiply(inputs, self.weight, self.bias)


def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """
    [`~torch.nn.functional.linear`]; on a CPU, in float32 and without gradient, many rows as a pointwise convolution.

    torch gives matrix products to MKL and convolutions to oneDNN, which is the faster of the two: by a tenth on an AMD
    EPYC, with 1,000 rows and the widths of a 118M-parameter model.

    Args:
        inputs (`Tensor` of shape `(..., in_features)`).
        weight (`Tensor` of shape `(out_features, in_features)`), bias (`Tensor`, *optional*).
    """
    is_convolved = (
        inputs.device.type == "cpu"
        and inputs.dim() == 2
        and len(inputs) >= CONVOLUTION_ROWS
        and inputs.dtype == weight.dtype == torch.float32
        and type(weight) in (nn.Parameter, Tensor)  # neither quantized nor sharded
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )
    if not is_convolved:
        return nn.functional.linear(inputs, weight, bias)
    # Rows are the width of an image of one line whose channels lie last: none of these views copies.
    image = inputs[None, None].permute(0, 3, 1, 2)
    return nn.functional.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[0, 0]


@cache
def keep_freed_memory() -> None:
    """
    On Linux, let freed tensors be used again instead of going back to the system, whose fresh pages cost as much time
    as a tenth of the matrix products. Once a process.

    glibc gives back at once what is larger than the largest block that was freed so far, up to 32 MiB: so one such
    block is freed here. At most 64 MiB stay with the process.
    """
    if sys.platform == "linux":
        torch.empty(LARGEST_RECYCLED, dtype=torch.uint8)


class RMSNorm:
    """In front of a stock RMS norm: torch's own, in one pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(tokens, hidden)` to the same."""
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class QuickGELU:
    """In front of the stock activation: where no gradient is asked for, in place (nobody else reads its input)."""

    def forward(self, states: Tensor) -> Tensor:
        """`x * sigmoid(1.702 x)`, of any shape."""
        if torch.is_grad_enabled():
            return super().forward(states)
        return nn.functional.silu(states.mul_(1.702), inplace=True).mul_(1 / 1.702)


def merged_rotary(language_model: nn.Module, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """
    Cosines and sines `(batch, tokens, head size)`, in which time, height and width have their sections.

    Args:
        language_model: Stock text model.
        hidden_states (`Tensor`): Of the dtype and on the device that they should have.
        positions (`Tensor` of shape `(3, batch, tokens)`).
    """
    cos, sin = language_model.rotary_emb(hidden_states, positions)
    if cos.ndim == 3:
        return cos, sin
    # Before transformers 5.17 the three come apart, and the stock attention puts them together.
    sections = language_model.config.rope_parameters["mrope_section"] * 2
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(factor.split(sections, dim=-1))], dim=-1)
        for factor in (cos, sin)
    )
    return cos, sin


def rotary_factors(position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """
    Cosines and sines `(tokens, head size)` as [`rotate`] takes them: of shape `(tokens, 1, head size)`, the first half
    of the sines negative.
    """
    cos, sin = position_embeddings
    first, second = sin.chunk(2, dim=-1)
    return cos[:, None], torch.cat([-first, second], dim=-1)[:, None]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """
    Rotary position embedding of `(tokens, heads, head size)` by [`rotary_factors`]: what stock writes as
    `x * cos + rotate_half(x) * sin`, with the sign in the sines.
    """
    half = states.shape[-1] // 2
    if torch.is_grad_enabled():
        return torch.addcmul(states * cos, states.roll(half, -1), sin)
    rotated = states * cos  # then in place, without the tensor that is rolled
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half])
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated
