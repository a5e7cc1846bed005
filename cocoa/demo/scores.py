# SPDX-License-Identifier: Apache-2.0
"""How well a model finds emoji by name and names by emoji, beside chance and baselines without a trained encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from datasets import Dataset
from PIL.Image import Image

from evaluation.digests import digest_content
from evaluation.emoji import CUTOFFS, STYLES, recalls, split_rows
from evaluation.ranking import Estimate
from evaluation.vectors import VectorStore, embed_missing

from .baselines import PixelRidge, lookup_similarity, pixel_features

SPLITS = ("train", "test")
DIRECTIONS = ("name_to_image", "image_to_name")


@dataclass
class EmojiEmbeddings:
    """Unit vectors of every emoji in the set's order, `(emoji, hidden)`: of its name, and by style of its images."""

    names: np.ndarray
    images: dict[str, np.ndarray]


@dataclass
class EmojiBaselines:
    """Similarities by pixels alone, `(names, images)`, by split and style; and by split, which baseline it is."""

    similarity: dict[tuple[str, str], np.ndarray]
    name: dict[str, str]


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
    images: Mapping[str, Sequence[Image]],
    store: VectorStore,
    batch_size: int = 64,
) -> EmojiEmbeddings:
    """
    Embed names as queries and images, by style, as documents; both directions of retrieval use these vectors.

    Args:
        model (`SentenceTransformer`).
        names (`Sequence[str]`): The names of the emoji.
        images (`Mapping[str, Sequence[Image]]`): By style, the images of the same emoji.
        store ([`VectorStore`]): Of this model: what it has is not embedded again, what is new is added.
        batch_size (`int`, defaults to 64).
    """
    options: dict[str, Any] = {"batch_size": batch_size, "normalize_embeddings": True, "show_progress_bar": False}
    name_keys = [digest_content(["query", name]) for name in names]
    image_keys = {
        style: [digest_content(["document", image.size, digest_content(image.tobytes())]) for image in of_style]
        for style, of_style in images.items()
    }
    documents = {
        key: image for style, keys in image_keys.items() for key, image in zip(keys, images[style], strict=True)
    }
    queries = dict(zip(name_keys, names, strict=True))
    embed_missing(partial(model.encode_query, **options), queries, store, title="Names")
    embed_missing(partial(model.encode_document, **options), documents, store, title="Images")
    return EmojiEmbeddings(store[name_keys], {style: store[keys] for style, keys in image_keys.items()})


def compare_pixels(emoji: Dataset, images: Mapping[str, Sequence[Any]]) -> EmojiBaselines:
    """The baselines: a look-up through the other style for seen concepts, ridge regression for held-out ones."""
    names, rows = np.array(emoji["name"]), split_rows(emoji)
    pixels = {
        (split, style): pixel_features([of_style[row] for row in rows[split]])
        for style, of_style in images.items()
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
    """Recall of a model beside chance and the untrained baselines, for each split, style and direction."""
    rows, scores = split_rows(emoji), []
    for split, style, direction in product(SPLITS, STYLES, DIRECTIONS):
        of = rows[split]
        similarity = embeddings.names[of] @ embeddings.images[style][of].T
        baseline = baselines.similarity[split, style]
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
