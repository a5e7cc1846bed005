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
        baseline_name (`str`): Which untrained baseline: pixels are looked up in the other style for seen concepts,
            and regressed on the words of the name for those held out.
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


def score_emoji(emoji: Dataset, embeddings: EmojiEmbeddings, pictures: dict[str, list[Any]]) -> list[EmojiScore]:
    """
    Recall of the model beside chance and the untrained baselines, for each split, style and direction.

    Args:
        emoji ([`~datasets.Dataset`]): The set, as from [`load_emoji`].
        embeddings ([`EmojiEmbeddings`]): Of all its rows.
        pictures (`dict[str, list[PIL.Image.Image]]`): By style, of all its rows.
    """
    names, splits = np.array(emoji["name"]), np.array(emoji["split"])
    rows = {split: np.flatnonzero(splits == split) for split in ("train", "validation", "test")}
    pixels = {style: pixel_features(images) for style, images in pictures.items()}
    other = dict(zip(STYLES, reversed(STYLES), strict=True))
    ridge = PixelRidge.fit(
        [pixels[style][rows["train"]] for style in STYLES],
        names[rows["train"]],
        [pixels[style][rows["validation"]] for style in STYLES],
        names[rows["validation"]],
    )
    scores = []
    for split in SPLITS:
        of = rows[split]
        for style in STYLES:
            similarity = embeddings.names[of] @ embeddings.pictures[style][of].T
            if split == "train":
                baseline_name = f"look-up of the {STYLES[other[style]]} picture"
                baseline = lookup_similarity(pixels[other[style]][of], pixels[style][of])
            else:
                baseline_name = str(ridge)
                baseline = ridge.similarity(pixels[style][of], names[of])
            for direction in DIRECTIONS:
                flip = (lambda scores: scores.T) if direction == "image_to_name" else (lambda scores: scores)
                scores.append(
                    EmojiScore(
                        split=split,
                        style=style,
                        direction=direction,
                        candidates=len(of),
                        model=recalls(flip(similarity)),
                        baseline=recalls(flip(baseline)),
                        chance={k: min(k / len(of), 1.0) for k in CUTOFFS},
                        baseline_name=baseline_name,
                    )
                )
    return scores


def recalls(similarity: np.ndarray) -> dict[int, Estimate]:
    """Recall at each of `CUTOFFS`, query i's answer being candidate i."""
    ranks = target_ranks(similarity)
    return {k: recall_at(ranks, k) for k in CUTOFFS}
