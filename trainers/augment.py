# SPDX-License-Identifier: Apache-2.0
"""Small random changes of pictures, for sets that have few of them."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torchvision.transforms import v2

from modeling_cocoa.inputs import load_image

AUGMENT = v2.Compose(
    [
        v2.ColorJitter(saturation=(0.6, 1.4)),
        v2.RandomAffine(degrees=0, translate=(0.08, 0.08), scale=(0.8, 1.1), fill=255),
    ]
)
"""Makes colours stronger or weaker, moves a picture by up to 8 % of its size and scales it; what comes into view is
white. Nothing that changes what a picture is called: no mirroring, turning or change of hue."""


def augment_pictures(dataset: Dataset, columns: list[str], seed: int) -> Dataset:
    """
    A copy of a dataset with its pictures moved, scaled and their colours changed a little at random.

    Args:
        dataset ([`~datasets.Dataset`]).
        columns (`list[str]`): Which columns hold pictures to change.
        seed (`int`): Each row's change follows from it and the row's number.
    """
    return dataset.map(
        augment_row, with_indices=True, fn_kwargs={"columns": columns, "seed": seed}, desc="Augmenting pictures"
    )


def augment_row(row: dict[str, Any], index: int, columns: list[str], seed: int) -> dict[str, Any]:
    """One row's pictures, changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + index)
        return {name: AUGMENT(load_image(row[name])) for name in columns if row[name] is not None}
