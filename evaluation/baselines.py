# SPDX-License-Identifier: Apache-2.0
"""What pixels alone can do: two baselines without a trained encoder, for concepts seen and held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from .retrieval import target_ranks

SIZE = 16
"""Pixels of a side to which a picture is shrunk."""
TEXT_FEATURES = {
    "words": {"analyzer": "word", "token_pattern": r"\w+"},
    "character 2- to 4-grams": {"analyzer": "char_wb", "ngram_range": (2, 4)},
}
STRENGTHS = tuple(float(10**power) for power in np.arange(1, 4, 0.5))
"""Of the ridge penalty, from which validation picks."""


def pixel_features(images: Sequence[Image.Image]) -> np.ndarray:
    """Pictures as rows of `SIZE * SIZE * 3` numbers in 0 to 1, float32."""
    small = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image, dtype=np.float32).ravel() / 255 for image in small])


def lookup_similarity(remembered: np.ndarray, searched: np.ndarray) -> np.ndarray:
    """
    The baseline for seen concepts: a name is looked up, and its picture in one style compared with those in another.

    Args:
        remembered (`np.ndarray` of shape `(names, features)`): Each name's own picture in the style that is known.
        searched (`np.ndarray` of shape `(pictures, features)`): Pictures in the style that is searched.

    Returns:
        `np.ndarray` of shape `(names, pictures)`: Correlation of their pixels, which finds more than their distance.
    """
    means = (remembered.mean(axis=1, keepdims=True), searched.mean(axis=1, keepdims=True))
    return unit(remembered - means[0]) @ unit(searched - means[1]).T


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


@dataclass
class PixelRidge:
    """
    The baseline for held-out concepts: ridge regression from pixels to the TF-IDF vector of the name.

    A prediction is a weighted sum of the train names' vectors, and is kept as these weights: fewer than the terms.
    Build it with [`PixelRidge.fit`].

    Args:
        vectorizer (`TfidfVectorizer`): Fitted on the train names.
        terms (`scipy.sparse.csr_matrix` of shape `(names, terms)`): The train names' vectors.
        gram (`np.ndarray` of shape `(names, names)`): Their products with one another.
        center (`np.ndarray` of shape `(pixels,)`): Mean of the train pictures.
        weights (`np.ndarray` of shape `(pixels, names)`): From a picture's pixels, centred, to the weights of its sum.
        text_features (`str`): Which of `TEXT_FEATURES` validation chose.
        strength (`float`): Which of `STRENGTHS` validation chose.
    """

    vectorizer: TfidfVectorizer
    terms: csr_matrix
    gram: np.ndarray
    center: np.ndarray
    weights: np.ndarray
    text_features: str
    strength: float

    @classmethod
    def fit(
        cls,
        pictures: Sequence[np.ndarray],
        names: Sequence[str],
        validation_pictures: Sequence[np.ndarray],
        validation_names: Sequence[str],
    ) -> PixelRidge:
        """
        Fit on train concepts; text features and strength are those with the best mean reciprocal rank on validation,
        over both directions and all styles.

        Args:
            pictures: One array of shape `(names, pixels)` a style, rows in the order of `names`.
            names: Of the train concepts.
            validation_pictures, validation_names: Likewise, of the validation concepts.
        """
        center = np.concatenate(pictures).mean(axis=0)
        centred = [style - center for style in pictures]
        values, vectors = np.linalg.eigh(sum(style.T @ style for style in centred))
        rotated = vectors.T @ sum(centred).T  # a name's pictures all predict its one vector
        solutions = {strength: vectors @ (rotated / (values + strength)[:, None]) for strength in STRENGTHS}
        best, best_score = None, -1.0
        for text_features, options in TEXT_FEATURES.items():
            vectorizer = TfidfVectorizer(**options)
            terms = vectorizer.fit_transform(names)
            gram = (terms @ terms.T).toarray().astype(np.float32)
            for strength, weights in solutions.items():
                ridge = cls(vectorizer, terms, gram, center, weights, text_features, strength)
                score = np.mean([ridge._reciprocal_rank(style, validation_names) for style in validation_pictures])
                if score > best_score:
                    best, best_score = ridge, score
        return best

    def similarity(self, pictures: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """
        How near each picture's predicted vector is to each name's, of shape `(names, pictures)`: the cosine between
        them, the mean vector taken from both (what all names share tells none of them apart).
        """
        sums = (pictures - self.center) @ self.weights
        offset = np.asarray(self.terms.mean(axis=0))
        vectors = self.vectorizer.transform(names)
        predicted_length = np.sqrt(np.einsum("ij,ij->i", sums @ self.gram, sums))
        vector_length = np.linalg.norm(vectors.toarray() - offset, axis=1)
        products = (self.terms @ vectors.T).toarray() - self.terms @ offset.T
        cosine = sums @ products / np.maximum(predicted_length[:, None] * vector_length, 1e-9)
        return cosine.T

    def __str__(self) -> str:
        return f"regression from pixels to TF-IDF of the name ({self.text_features}, strength {self.strength:.3g})"

    def _reciprocal_rank(self, pictures: np.ndarray, names: Sequence[str]) -> float:
        similarity = self.similarity(pictures, names)
        return float(np.mean([(1 / target_ranks(scores)).mean() for scores in (similarity, similarity.T)]))
