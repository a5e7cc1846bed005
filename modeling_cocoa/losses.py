# SPDX-License-Identifier: Apache-2.0
"""Reconstruction losses, element by element, so that callers can average them by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _chunk_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = nn.functional.linear(hidden, weight).float()
    return nn.functional.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(dim=-1)


def masked_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int = 1024) -> tuple[Tensor, Tensor]:
    """
    Cross-entropy of chosen tokens, a chunk of the rows against the vocabulary at a time.

    Logits are the largest tensor of a step; here at most `chunk_size` rows of them exist, in the backward pass too
    (they are computed again there).

    Args:
        hidden (`Tensor` of shape `(tokens, hidden)`): The states that predict.
        weight (`Tensor` of shape `(vocabulary, hidden)`): The language-model head.
        labels (`Tensor` of shape `(tokens,)`): The tokens to predict.

    Returns:
        Loss of each token, float32 of shape `(tokens,)`, and the likeliest token in its place, of shape `(tokens,)`.
    """
    losses, likeliest = [], []
    for rows, targets in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
        loss, tokens = checkpoint(_chunk_cross_entropy, rows, weight, targets, use_reentrant=False)
        losses.append(loss)
        likeliest.append(tokens)
    return torch.cat(losses), torch.cat(likeliest)


def normalize_patches(patches: Tensor, epsilon: float = 1e-6) -> Tensor:
    """
    Each patch to zero mean and unit variance over its values, as in masked auto-encoding (MAE, arXiv 2111.06377).

    A patch of one colour, which has no variance, becomes zeros.

    Args:
        patches (`Tensor` of shape `(..., values)`).
    """
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True, correction=0)
    return (patches - mean) / (variance + epsilon).sqrt()
