# SPDX-License-Identifier: Apache-2.0
"""The emoji set that comes with this project."""

from __future__ import annotations

import csv
import os
from pathlib import Path

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


def write_images(folder: str | os.PathLike) -> int:
    """
    Write every sixth emoji as a PNG file into a new folder, with a `metadata.csv` of their names: images with captions
    to try things on.

    Args:
        folder (`str` or `os.PathLike`): Must not exist, or be empty.

    Returns:
        `int`: How many there are.

    Raises:
        FileExistsError: the folder holds something.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already: name a new folder.")
    emoji = load_emoji()
    rows = emoji.select(range(0, len(emoji), 6))
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for code, name, image in zip(rows["codepoint"], rows["name"], rows["noto"], strict=True):
            image.convert("RGB").save(folder / f"{code}.png")
            table.writerow([f"{code}.png", name])
    return len(rows)


def split_rows(emoji: Dataset) -> dict[str, np.ndarray]:
    """The rows of each split, by its name."""
    splits = np.array(emoji["split"])
    return {split: np.flatnonzero(splits == split) for split in ("train", "validation", "test")}


def recalls(similarity: np.ndarray) -> dict[int, Estimate]:
    """Recall at each of `CUTOFFS`, query i's answer being candidate i."""
    ranks = target_ranks(similarity)
    return {k: recall_at(ranks, k) for k in CUTOFFS}
