# SPDX-License-Identifier: Apache-2.0
"""Small random changes of images, for data that has few of them."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torchvision.transforms import v2

from modeling_cocoa.media import load_image

AUGMENT = v2.Compose(
    [
        v2.ColorJitter(saturation=(0.6, 1.4)),
        v2.RandomAffine(degrees=0, translate=(0.08, 0.08), scale=(0.8, 1.1), fill=255),
    ]
)
"""Saturation, shifts by up to 8 % and scale, on white: nothing that changes the name of an image, such as mirroring,
rotation or hue."""


def augment_images(dataset: Dataset, columns: list[str], seed: int) -> Dataset:
    """A copy of a dataset with the images of some columns changed a little, by the seed and the row's number."""
    return dataset.map(
        augment_row, with_indices=True, fn_kwargs={"columns": columns, "seed": seed}, desc="Augmenting images"
    )


def augment_row(row: dict[str, Any], index: int, columns: list[str], seed: int) -> dict[str, Any]:
    """One row's images, changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + index)
        return {name: AUGMENT(load_image(row[name])) for name in columns if row[name] is not None}
