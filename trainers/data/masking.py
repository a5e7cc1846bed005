# SPDX-License-Identifier: Apache-2.0
"""Which tokens and image units are masked; every draw comes from the generator that is passed in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


def check_ratios(options: Any) -> None:
    """Raise `ValueError` where a mask ratio is outside (0, 1]; a source's may be 0."""
    for name in ("text_mask_ratio", "image_mask_ratio", "source_mask_ratio", "target_mask_ratio"):
        ratio, may_be_zero = getattr(options, name), name == "source_mask_ratio"
        if not 0.0 <= ratio <= 1.0 or (ratio == 0.0 and not may_be_zero):
            raise ValueError(f"{name} must be in {'[' if may_be_zero else '('}0, 1]; got {ratio}.")


def choose(count: int, ratio: float, generator: np.random.Generator) -> Tensor:
    """Choose `ratio` of `count` places, at least one unless it is 0, as a bool tensor of shape `(count,)`."""
    chosen = torch.zeros(count, dtype=torch.bool)
    if count and ratio:
        number = min(count, max(1, round(ratio * count)))
        chosen[torch.from_numpy(generator.choice(count, size=number, replace=False))] = True
    return chosen


def mask_text(
    input_ids: Tensor, maskable: Tensor, ratio: float, mask_token_id: int, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """
    Mask `ratio` of the `maskable` tokens (a bool tensor that leaves out the template, vision tokens and the EOS).

    Returns:
        The ids with `<|mask|>` in the chosen places, and the labels: the ids that were there, `-100` elsewhere.
    """
    hidden = torch.zeros_like(maskable)
    hidden[maskable] = choose(int(maskable.sum()), ratio, generator)
    labels = input_ids.masked_fill(~hidden, IGNORE_INDEX)
    return input_ids.masked_fill(hidden, mask_token_id), labels
