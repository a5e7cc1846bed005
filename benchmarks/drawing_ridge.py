# SPDX-License-Identifier: Apache-2.0
"""
How well held-out emoji are found without a trained image encoder, by a teacher of texts: kernel ridge regression from
gradients and colours of a drawing to the teacher's vector of its name. The opponent of the bundled model.

    python -m trainers.recipes.small_data && python -m benchmarks.drawing_ridge
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

from evaluation.emoji import CUTOFFS, STYLES, load_emoji, recalls, split_rows
from evaluation.ranking import target_ranks
from modeling_cocoa.files import atomic_write
from trainers.recipes.small_data import FOLDER

SIDE, CELL, BINS = 64, 8, 9
"""Pixels of a side and of a cell, and directions of gradients."""
COLOURS = 4
"""Steps of each of red, green and blue in the histogram."""
STRENGTHS = tuple(10.0**power for power in np.arange(-3, 1, 0.5))
WIDTHS = tuple(2.0**power for power in range(-3, 4))
"""Ridge penalties, and widths of the kernel relative to the median distance, from which validation picks."""
RESULT = Path(__file__).parent / "results" / "drawing_ridge.json"


def gradients(image: Image.Image) -> np.ndarray:
    """Histograms of oriented gradients, normalised by blocks of 2 x 2 cells (Dalal and Triggs, 2005)."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    vertical, horizontal = np.gradient(grey)
    size, angle = np.hypot(horizontal, vertical), np.arctan2(vertical, horizontal) % np.pi
    cells = SIDE // CELL
    bins = np.minimum((angle / np.pi * BINS).astype(int), BINS - 1)
    row, column = np.indices(grey.shape) // CELL
    histogram = np.zeros((cells, cells, BINS), dtype=np.float32)
    np.add.at(histogram, (row, column, bins), size)
    blocks = np.lib.stride_tricks.sliding_window_view(histogram, (2, 2), axis=(0, 1)).reshape((cells - 1) ** 2, -1)
    return (blocks / np.sqrt((blocks**2).sum(axis=1, keepdims=True) + 1e-3)).ravel()


def colours(image: Image.Image) -> np.ndarray:
    """The share of pixels of each colour that is not white, as square roots, in each quarter of the image."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(int)
    index = (pixels * COLOURS // 256) @ np.array([COLOURS**2, COLOURS, 1])
    half = SIDE // 2
    quarters = [index[top : top + half, left : left + half] for top, left in product((0, half), repeat=2)]
    counts = np.stack([np.bincount(quarter.ravel(), minlength=COLOURS**3) for quarter in quarters])[:, :-1]
    return np.sqrt(counts / half**2).astype(np.float32).ravel()


def features(images: Sequence[Image.Image]) -> np.ndarray:
    """Gradients and colours, each part of length 1 on average, `(images, numbers)`."""
    parts = [np.stack([part(image) for image in images]) for part in (gradients, colours)]
    return np.concatenate([part / np.linalg.norm(part, axis=1).mean() for part in parts], axis=1)


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Between all rows of two arrays."""
    return np.maximum((left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T, 0)


def main() -> None:
    """Choose on validation, measure on test, print the recalls and write them to [`RESULT`]."""
    emoji = load_emoji()
    rows, names = split_rows(emoji), np.array(emoji["name"])
    vectors = SentenceTransformer(str(FOLDER / "teacher"), device="cpu").encode(
        [name.lower() for name in names], normalize_embeddings=True, show_progress_bar=False
    )
    seen = {
        (split, style): features([emoji[int(row)][style] for row in rows[split]])
        for split, style in product(rows, STYLES)
    }
    train = np.concatenate([seen["train", style] for style in STYLES])
    mean = vectors[rows["train"]].mean(axis=0)
    targets = np.concatenate([vectors[rows["train"]] - mean] * len(STYLES))
    within = squared_distances(train, train)
    median = np.median(within)
    distances = {
        (split, style): squared_distances(seen[split, style], train)
        for split in ("validation", "test")
        for style in STYLES
    }

    def similarity(split: str, style: str, width: float, weights: np.ndarray) -> np.ndarray:
        """Cosines of a split's names with what its drawings predict, the mean of all names taken off."""
        found = np.exp(-distances[split, style] / (width * median)) @ weights
        wanted = vectors[rows[split]] - mean
        return (wanted / np.linalg.norm(wanted, axis=1)[:, None]) @ (found / np.linalg.norm(found, axis=1)[:, None]).T

    fits = []
    for width in WIDTHS:
        values, axes = np.linalg.eigh(np.exp(-within / (width * median)))
        turned = axes.T @ targets
        for strength in STRENGTHS:
            weights = (axes / (np.maximum(values, 0) + strength)) @ turned
            scores = [similarity("validation", style, width, weights) for style in STYLES]
            rank = np.mean([1 / target_ranks(part) for one in scores for part in (one, one.T)])
            fits.append((float(rank), width, strength, weights))
    rank, width, strength, weights = max(fits, key=lambda fit: fit[0])
    result = {"width": width, "strength": strength, "validation_reciprocal_rank": rank, "scores": {}}
    for style in STYLES:
        matrix = similarity("test", style, width, weights)
        for direction, scores in ((f"name_to_{style}", matrix), (f"{style}_to_name", matrix.T)):
            estimates = recalls(scores)
            result["scores"][direction] = {f"recall@{k}": estimates[k]._asdict() for k in CUTOFFS}
            line = ", ".join(f"R@{k} {100 * estimates[k].value:.1f}" for k in CUTOFFS)
            print(f"{direction:18} {line}")
    with atomic_write(RESULT) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
