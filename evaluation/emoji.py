# SPDX-License-Identifier: Apache-2.0
"""The emoji set, and how well a model finds its pictures by name and its names by picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from .assets import asset_path
from .baselines import PixelRidge, lookup_similarity, pixel_features
from .retrieval import Estimate, recall_at, target_ranks

STYLES = {"noto": "Noto", "twemoji": "Twemoji"}
"""Columns of the pictures, with the names of their styles."""
SPLITS = ("train", "test")
DIRECTIONS = ("name_to_image", "image_to_name")
CUTOFFS = (1, 5, 10)


def load_emoji() -> Dataset:
    """The emoji set that comes with this project, all splits; pictures are decoded when a row is read."""
    return Dataset.from_parquet(str(asset_path("data/emoji.parquet")))


@dataclass
class EmojiEmbeddings:
    """
    Unit vectors of every emoji, rows in the set's order.

    Args:
        names (`np.ndarray` of shape `(emoji, hidden)`).
        pictures (`dict[str, np.ndarray]`): By style, each of shape `(emoji, hidden)`.
    """

    names: np.ndarray
    pictures: dict[str, np.ndarray]


@dataclass
class EmojiScore:
    """
    Recall in one direction, for the concepts of one split in one style.

    Args:
        split (`str`): `"train"` (seen in training) or `"test"` (held out). Candidates are that split's, all of them.
        style (`str`): `"noto"` or `"twemoji"`.
        direction (`str`): `"name_to_image"` or `"image_to_name"`.
        candidates (`int`).
        model, baseline, chance (`dict[int, Estimate]`): Recall@k by k; chance has no interval.
        baseline_name (`str`): Which untrained baseline.
    """

    split: str
    style: str
    direction: str
    candidates: int
    model: dict[int, Estimate]
    baseline: dict[int, Estimate]
    chance: dict[int, float]
    baseline_name: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        values = asdict(self)
        for key in ("model", "baseline"):
            values[key] = {f"recall@{k}": estimate._asdict() for k, estimate in getattr(self, key).items()}
        values["chance"] = {f"recall@{k}": value for k, value in self.chance.items()}
        return values


def embed_emoji(
    model: Any,
    names: Sequence[str],
    pictures: dict[str, list[Any]],
    *,
    batch_size: int = 64,
    on_progress: Callable[[str, int], None] = lambda name, done: None,
) -> EmojiEmbeddings:
    """
    Embed names as queries and pictures as documents; both directions of retrieval use these vectors.

    Args:
        model (`SentenceTransformer`): Or anything with its `encode_query` and `encode_document`.
        names (`Sequence[str]`).
        pictures (`dict[str, list[PIL.Image.Image]]`): By style.
        batch_size (`int`, defaults to 64).
        on_progress (`Callable[[str, int], None]`, *optional*): Told `"names"` or a style, and how many are done.
    """

    def embed(kind: str, encode: Callable[..., Any], inputs: Sequence[Any]) -> np.ndarray:
        parts = []
        for start in range(0, len(inputs), batch_size):
            part = list(inputs[start : start + batch_size])
            parts.append(encode(part, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False))
            on_progress(kind, start + len(part))
        return np.concatenate(parts).astype(np.float32)

    return EmojiEmbeddings(
        names=embed("names", model.encode_query, names),
        pictures={style: embed(style, model.encode_document, images) for style, images in pictures.items()},
    )


@dataclass
class EmojiBaselines:
    """
    What pixels alone can do: see `evaluation/baselines.py`.

    Args:
        similarity (`dict[tuple[str, str], np.ndarray]`): By split and style, of shape `(names, pictures)`.
        name (`dict[str, str]`): By split, which baseline it is.
    """

    similarity: dict[tuple[str, str], np.ndarray]
    name: dict[str, str]


def compare_pixels(emoji: Dataset, pictures: dict[str, list[Any]]) -> EmojiBaselines:
    """
    Compute the untrained baselines: a look-up through the other style for seen concepts, ridge regression for those
    held out.

    Args:
        emoji ([`~datasets.Dataset`]): The set, as from [`load_emoji`].
        pictures (`dict[str, list[PIL.Image.Image]]`): By style, of all its rows.
    """
    names, rows = np.array(emoji["name"]), split_rows(emoji)
    pixels = {
        (split, style): pixel_features([images[row] for row in rows[split]])
        for style, images in pictures.items()
        for split in rows
    }
    ridge = PixelRidge.fit(
        [pixels["train", style] for style in STYLES],
        names[rows["train"]],
        [pixels["validation", style] for style in STYLES],
        names[rows["validation"]],
    )
    similarity = {}
    for style, other in zip(STYLES, reversed(STYLES), strict=True):
        similarity["train", style] = lookup_similarity(pixels["train", other], pixels["train", style])
        similarity["test", style] = ridge.similarity(pixels["test", style], names[rows["test"]])
    return EmojiBaselines(similarity, {"train": "look-up through the other style", "test": str(ridge)})


def score_emoji(emoji: Dataset, embeddings: EmojiEmbeddings, baselines: EmojiBaselines) -> list[EmojiScore]:
    """
    Recall of a model beside chance and the untrained baselines, for each split, style and direction.

    Args:
        emoji ([`~datasets.Dataset`]): The set, as from [`load_emoji`].
        embeddings ([`EmojiEmbeddings`]): Of all its rows.
        baselines ([`EmojiBaselines`]): As from [`compare_pixels`].
    """
    rows, scores = split_rows(emoji), []
    for split in SPLITS:
        of = rows[split]
        for style in STYLES:
            similarity = embeddings.names[of] @ embeddings.pictures[style][of].T
            baseline = baselines.similarity[split, style]
            for direction in DIRECTIONS:
                if direction == "image_to_name":
                    similarity, baseline = similarity.T, baseline.T
                scores.append(
                    EmojiScore(
                        split=split,
                        style=style,
                        direction=direction,
                        candidates=len(of),
                        model=recalls(similarity),
                        baseline=recalls(baseline),
                        chance={k: min(k / len(of), 1.0) for k in CUTOFFS},
                        baseline_name=baselines.name[split],
                    )
                )
    return scores


def split_rows(emoji: Dataset) -> dict[str, np.ndarray]:
    """The rows of each split, by its name."""
    splits = np.array(emoji["split"])
    return {split: np.flatnonzero(splits == split) for split in ("train", "validation", "test")}


def recalls(similarity: np.ndarray) -> dict[int, Estimate]:
    """Recall at each of `CUTOFFS`, query i's answer being candidate i."""
    ranks = target_ranks(similarity)
    return {k: recall_at(ranks, k) for k in CUTOFFS}
