# SPDX-License-Identifier: Apache-2.0
"""Everyday words: two halves that stay, names that exist, and the share of words with an accepted drawing."""

import itertools

import numpy as np
import pytest

from evaluation.emoji import load_emoji
from evaluation.everyday_words import CUTOFF, everyday_words, score_words


def test_the_words_are_no_names_and_accept_at_most_fifteen_drawings_that_exist():
    validation, test = everyday_words("validation"), everyday_words("test")
    assert len(validation) == len(test) == 30 and not set(validation) & set(test)
    names = load_emoji()["name"]
    for word, accepted in {**validation, **test}.items():
        assert 1 <= len(accepted) == len(set(accepted)) <= 15 and set(accepted) <= set(names), word
        assert word.casefold() not in {name.casefold() for name in names}, word


def test_score_and_chance_are_those_of_counting():
    names = ["egg", "rake", "moon", "rain", "tea", "egg", "star"]
    words = {"breakfast": ["egg", "tea"], "night": ["moon", "star"], "garden": ["rake"]}
    similarity = np.array([[1, 0, 9, 8, 0, 7, 6], [9, 8, 1, 7, 6, 5, 0], [1, 0, 2, 3, 4, 5, 6]], dtype=float)
    score = score_words(words, similarity, names)
    assert score.hits == ["breakfast"] and score.percent == pytest.approx(100 / 3)
    assert score.found["breakfast"] == ["moon", "rain", "egg", "star", "egg"]
    draws = list(itertools.combinations(names, CUTOFF))
    shares = [np.mean([bool(set(draw) & set(accepted)) for draw in draws]) for accepted in words.values()]
    assert score.chance == pytest.approx(100 * np.mean(shares))
