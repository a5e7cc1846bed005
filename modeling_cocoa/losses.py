# SPDX-License-Identifier: Apache-2.0
"""The losses of reconstruction, element by element and by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from .attention import TARGET

LOSSES = ("text_source", "text_target", "image")
"""Names of the losses: masked source tokens, masked target tokens, predicted image units."""


@dataclass
class ReconstructionOutput(ModelOutput):
    """
    Output of [`CocoaForReconstruction`].

    Args:
        loss (`Tensor`): `text_source + text_target + image_loss_weight * image`, of those that are present.
        losses (`dict[str, Tensor]`): Means by name, without weights: `text_source` (masked source tokens),
            `text_target` (masked target tokens; nats), `image` (squared error of normalised pixels).
        token_losses, token_predictions (`Tensor` of shape `(masked tokens,)`): Of each masked token, its loss and the
            likeliest token in its place, in the order of `labels[labels != -100]`.
        unit_losses (`Tensor` of shape `(predicted units,)`): In the order of `unit_mask.nonzero()`.
        pixels (`Tensor` of shape `(predicted units, 4 patches, values)`): The rebuilt (normalised) pixels.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    token_losses: Tensor | None = None
    token_predictions: Tensor | None = None
    unit_losses: Tensor | None = None
    pixels: Tensor | None = None


def count_losses(labels: Tensor, segment_ids: Tensor, unit_mask: Tensor | None) -> Tensor:
    """How many terms each of [`LOSSES`] has in a batch, `(3,)`; arguments as in [`CocoaForReconstruction.forward`]."""
    masked = labels != -100
    is_target = segment_ids == TARGET
    units = torch.zeros((), dtype=torch.long, device=labels.device) if unit_mask is None else unit_mask.sum()
    return torch.stack([(masked & ~is_target).sum(), (masked & is_target).sum(), units])


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
