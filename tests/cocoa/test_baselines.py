# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from cocoa.demo.baselines import SIZE, STRENGTHS, PixelRidge, TfIdf, lookup_similarity, pixel_features
from evaluation.emoji import load_emoji
from evaluation.ranking import target_ranks

COLOURS = {"red": (200, 20, 20), "green": (20, 180, 40), "blue": (30, 40, 210), "grey": (128, 128, 128)}
SHAPES = {"square": (8, 8, 56, 56), "bar": (4, 26, 60, 38), "pole": (26, 4, 38, 60), "corner": (0, 0, 24, 24)}


def draw(colour, shape, shift):
    image = Image.new("RGB", (64, 64), "white")
    left, top, right, bottom = SHAPES[shape]
    image.paste(COLOURS[colour], (left + shift, top, right, bottom))
    return image


def concepts(pairs, shift=0):
    return pixel_features([draw(*pair, shift) for pair in pairs]), [" ".join(pair) for pair in pairs]


@pytest.fixture(scope="module")
def split():
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    held_out = {"validation": [pairs[0], pairs[5], pairs[7]], "test": [pairs[2], pairs[8], pairs[13], pairs[15]]}
    return {"train": [pair for pair in pairs if pair not in sum(held_out.values(), [])], **held_out}


@pytest.fixture(scope="module")
def ridge(split):
    train, names = concepts(split["train"])
    validation, validation_names = concepts(split["validation"])
    return PixelRidge.fit([train], names, [validation], validation_names)


def test_features_are_shrunk_pixels_whatever_the_mode():
    features = pixel_features([Image.new("RGB", (64, 64), (255, 0, 51)), Image.new("L", (30, 40), 102)])
    assert features.shape == (2, SIZE * SIZE * 3) and features.dtype == np.float32
    np.testing.assert_allclose(features[0].reshape(-1, 3), np.tile([1, 0, 0.2], (SIZE**2, 1)), atol=1e-6)
    np.testing.assert_allclose(features[1], 0.4, atol=1e-6)


def test_a_look_up_finds_the_same_drawing_moved_and_paler(split):
    remembered, _ = concepts(split["train"])
    searched, _ = concepts(split["train"], shift=3)
    paler = 0.5 + 0.5 * searched
    similarity = lookup_similarity(remembered, paler)
    assert (target_ranks(similarity) == 1).all() and (target_ranks(similarity.T) == 1).all()
    assert np.abs(similarity).max() <= 1 + 1e-5


def test_a_blank_picture_is_like_nothing_and_not_an_error():
    features = pixel_features([Image.new("RGB", (64, 64), "white"), draw("red", "bar", 0)])
    np.testing.assert_allclose(lookup_similarity(features, features), [[0, 0], [0, 1]], atol=1e-5)


def test_ridge_reads_words_off_pictures_of_concepts_that_it_never_saw(split, ridge):
    pictures, names = concepts(split["test"])
    similarity = ridge.similarity(pictures, names)
    assert similarity.shape == (4, 4)
    assert (target_ranks(similarity) == 1).all() and (target_ranks(similarity.T) == 1).all()


def test_vectors_of_names_are_those_of_scikit_learn():
    names = list(load_emoji()["name"])
    reference = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit(names[:200])
    ours = TfIdf(names[:200])
    assert list(ours.places) == list(reference.get_feature_names_out())
    others = [*names[200:300], "A b", "", "ÄÖ  é"]
    np.testing.assert_allclose(ours(others), reference.transform(others).toarray(), atol=1e-6)


def test_ridge_is_the_regression_that_it_claims_to_be(split, ridge):
    pixels, names = concepts(split["train"])
    terms = ridge.vectorizer(names)
    reference = Ridge(alpha=ridge.strength).fit(pixels, terms)
    pictures, names = concepts(split["test"])
    predicted = reference.predict(pictures)
    ours = (pictures - ridge.center) @ ridge.axes @ ridge.targets + terms.mean(axis=0)
    np.testing.assert_allclose(ours, predicted, atol=1e-4)
    centred = (ridge.vectorizer(names) - terms.mean(axis=0), predicted - terms.mean(axis=0))
    vectors, predicted = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in centred)
    np.testing.assert_allclose(ridge.similarity(pictures, names), vectors @ predicted.T, atol=1e-4)


def test_validation_picks_the_strength_that_ranks_it_best(split, monkeypatch):
    noise = np.random.default_rng(0)
    pixels, names = concepts(split["train"])
    validation, validation_names = concepts(split["validation"] + split["test"])
    pixels, validation = (rows + noise.normal(size=rows.shape, scale=0.5) for rows in (pixels, validation))
    data = ([pixels], names, [validation], validation_names)
    scores = {}
    for strength in STRENGTHS:
        with monkeypatch.context() as patch:
            patch.setattr("cocoa.demo.baselines.STRENGTHS", (strength,))
            scores[strength] = PixelRidge.fit(*data).reciprocal_rank([validation], validation_names)
    assert min(scores.values()) < max(scores.values()), "the strengths must differ for a choice to show"
    assert scores[PixelRidge.fit(*data).strength] == max(scores.values())


def test_the_same_data_give_the_same_regression(split, ridge):
    train, names = concepts(split["train"])
    validation, validation_names = concepts(split["validation"])
    again = PixelRidge.fit([train], names, [validation], validation_names)
    np.testing.assert_array_equal(again.axes @ again.targets, ridge.axes @ ridge.targets)
    assert str(again) == str(ridge)
