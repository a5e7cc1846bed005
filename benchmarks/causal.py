# SPDX-License-Identifier: Apache-2.0
"""The attention of the generative model, for arms that leave it as it is: each token sees those before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from modeling_cocoa.packing import Spans

CAUSAL = "flash_causal"
"""By `flash` in its name, CoCoA hands it a packed row and the boundaries of its samples."""


def make_causal(backbone: CocoaModelMixin) -> None:
    """Give a CoCoA backbone causal attention; what it computes for each token is what the stock model does."""
    backbone.set_attn_implementation({"text_config": CAUSAL})


def attend_causally(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Causal attention within each sample of a packed row, in the form of transformers' flash attention.

    Args:
        query, key, value (`Tensor` of shape `(1, heads, tokens, head size)`): The queries are all tokens of each
            sample, or its last alone.
    """
    query_spans, key_spans = (Spans(starts.diff().tolist()) for starts in (cu_seq_lens_q, cu_seq_lens_k))
    counts, grouped = key_spans.counts, query.shape[1] != key.shape[1]
    groups = zip(
        query_spans.batches(query[0].transpose(0, 1), counts),
        key_spans.batches(key[0].transpose(0, 1), counts),
        key_spans.batches(value[0].transpose(0, 1), counts),
        strict=True,
    )
    outputs = (
        nn.functional.scaled_dot_product_attention(
            *group, dropout_p=dropout, scale=scaling, enable_gqa=grouped, is_causal=group[0].shape[2] > 1
        )
        for group in groups
    )
    return torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])[None], None


AttentionInterface.register(CAUSAL, attend_causally)
