# SPDX-License-Identifier: Apache-2.0
"""The emoji set that comes with this project."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from .assets import asset_path
from .ranking import Estimate, recall_at, target_ranks

STYLES = {"noto": "Noto", "twemoji": "Twemoji"}
"""Columns of the images, with the names of their styles."""
CUTOFFS = (1, 5, 10)


def load_emoji() -> Dataset:
    """The emoji set that comes with this project, all splits; images are decoded when a row is read."""
    return Dataset.from_parquet(str(asset_path("data/emoji.parquet")))


def split_rows(emoji: Dataset) -> dict[str, np.ndarray]:
    """The rows of each split, by its name."""
    splits = np.array(emoji["split"])
    return {split: np.flatnonzero(splits == split) for split in ("train", "validation", "test")}


def recalls(similarity: np.ndarray) -> dict[int, Estimate]:
    """Recall at each of `CUTOFFS`, query i's answer being candidate i."""
    ranks = target_ranks(similarity)
    return {k: recall_at(ranks, k) for k in CUTOFFS}
