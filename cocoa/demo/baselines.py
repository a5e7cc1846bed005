# SPDX-License-Identifier: Apache-2.0
"""What pixels alone can do: two baselines without a trained encoder, for concepts seen and held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from evaluation.ranking import target_ranks

SIZE = 16
"""Pixels of a side to which an image is shrunk."""
STRENGTHS = tuple(float(10**power) for power in np.arange(1, 4, 0.5))
"""Ridge penalties, from which validation picks."""


def pixel_features(images: Sequence[Image.Image]) -> np.ndarray:
    """Images as rows of `SIZE * SIZE * 3` numbers in 0 to 1, float32."""
    small = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image, dtype=np.float32).ravel() / 255 for image in small])


def lookup_similarity(remembered: np.ndarray, searched: np.ndarray) -> np.ndarray:
    """
    The baseline for seen concepts: a name is looked up, and its image in one style compared with those in the searched
    style, `(names, images)`, by the correlation of their pixels, which finds more than their distance.
    """
    left, right = (unit(rows - rows.mean(axis=1, keepdims=True)) for rows in (remembered, searched))
    return left @ right.T


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def split_terms(name: str) -> list[str]:
    """All runs of 2 to 4 characters in each word of a name, with the spaces around it."""
    words = [f" {word} " for word in name.lower().split()]
    return [
        word[start : start + length]
        for word in words
        for length in range(2, min(4, len(word)) + 1)
        for start in range(len(word) - length + 1)
    ]


class TfIdf:
    """TF-IDF vectors of length 1. The terms that are known are those of some names; one of few names weighs more."""

    def __init__(self, names: Sequence[str]) -> None:
        terms = sorted({term for name in names for term in split_terms(name)})
        self.places = {term: place for place, term in enumerate(terms)}
        self.weights = np.log((1 + len(names)) / (1 + (self.count(names) > 0).sum(axis=0))) + 1

    def count(self, names: Sequence[str]) -> np.ndarray:
        """How often each name has each term, `(names, terms)`."""
        counts = np.zeros((len(names), len(self.places)))
        for row, name in enumerate(names):
            for term in split_terms(name):
                if term in self.places:
                    counts[row, self.places[term]] += 1
        return counts

    def __call__(self, names: Sequence[str]) -> np.ndarray:
        """The vectors, `(names, terms)`, float32."""
        return unit(self.count(names) * self.weights).astype(np.float32)


@dataclass
class PixelRidge:
    """
    The baseline for held-out concepts: ridge regression from pixels to the TF-IDF vector of the name. Build it with
    [`PixelRidge.fit`].

    Args:
        vectorizer ([`TfIdf`]): Of the train names.
        mean (`np.ndarray` of shape `(terms,)`): Of the train names' vectors.
        center (`np.ndarray` of shape `(pixels,)`): Mean of the train images.
        axes (`np.ndarray` of shape `(pixels, axes)`), targets (`np.ndarray` of shape `(axes, terms)`): Their product
            are the weights, from an image's pixels, centred, to its vector.
        strength (`float`): Which of `STRENGTHS` validation chose.
    """

    vectorizer: TfIdf
    mean: np.ndarray
    center: np.ndarray
    axes: np.ndarray
    targets: np.ndarray
    strength: float

    @classmethod
    def fit(
        cls,
        images: Sequence[np.ndarray],
        names: Sequence[str],
        validation_images: Sequence[np.ndarray],
        validation_names: Sequence[str],
    ) -> PixelRidge:
        """
        Fit on train concepts, one array of shape `(names, pixels)` a style. The strength is the one with the best mean
        reciprocal rank on validation, over both directions and all styles.
        """
        center = np.concatenate(images).mean(axis=0)
        centred = [style - center for style in images]
        values, vectors = np.linalg.eigh(sum(style.T @ style for style in centred))
        vectorizer = TfIdf(names)
        terms = vectorizer(names)
        targets = vectors.T @ sum(centred).T @ terms  # all images of a name have its one vector
        ridges = [
            cls(vectorizer, terms.mean(axis=0), center, vectors / (values + strength), targets, strength)
            for strength in STRENGTHS
        ]
        return max(ridges, key=lambda ridge: ridge.reciprocal_rank(validation_images, validation_names))

    def similarity(self, images: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """
        How near each image's predicted vector is to each name's, of shape `(names, images)`: the cosine between them,
        the mean vector taken from both (what all names share tells none of them apart).
        """
        predicted = (images - self.center) @ self.axes @ self.targets
        return unit(self.vectorizer(names) - self.mean) @ unit(predicted).T

    def reciprocal_rank(self, images: Sequence[np.ndarray], names: Sequence[str]) -> float:
        """Its mean over styles, both directions and all names."""
        similarities = [self.similarity(style, names) for style in images]
        return float(np.mean([1 / target_ranks(scores) for one in similarities for scores in (one, one.T)]))

    def __str__(self) -> str:
        return f"regression from pixels to TF-IDF of the name (character 2- to 4-grams, strength {self.strength:.3g})"
