# SPDX-License-Identifier: Apache-2.0
"""Does a search for an everyday word, which is no name of an emoji, find a drawing that a person would accept?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from .assets import asset_path

WORDS_FILE = "data/everyday_words.json"
CUTOFF = 5
"""Drawings that a person looks at."""


def everyday_words(split: str) -> dict[str, list[str]]:
    """
    Words with the names of the emoji that are accepted for each, 15 at most.

    Args:
        split (`"validation"` or `"test"`): Half of the words each, by the order of their sha256; the test half is for
            the end.
    """
    words = json.loads(asset_path(WORDS_FILE).read_text(encoding="utf-8"))
    ordered = sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
    half = len(ordered) // 2
    chosen = {"validation": ordered[:half], "test": ordered[half:]}[split]
    return {word: words[word] for word in chosen}


@dataclass
class EverydayScore:
    """
    Args:
        found (`dict[str, list[str]]`): For each word the names of the first [`CUTOFF`] drawings.
        hits (`list[str]`): Words for which one of these is accepted.
        chance (`float`): The expected share of hits among drawings in random order, in percent.
    """

    found: dict[str, list[str]]
    hits: list[str]
    chance: float

    @property
    def percent(self) -> float:
        """The share of words with a hit, in percent."""
        return 100 * len(self.hits) / len(self.found)


def score_words(words: Mapping[str, Sequence[str]], similarity: np.ndarray, names: Sequence[str]) -> EverydayScore:
    """
    Score a search for each word.

    Args:
        words (`Mapping[str, Sequence[str]]`): With the accepted names, as of [`everyday_words`].
        similarity (`np.ndarray` of shape `(words, drawings)`): Of each word, in their order, to each drawing.
        names (`Sequence[str]`): Of the drawings.
    """
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :CUTOFF]
    found = {word: [names[column] for column in row] for word, row in zip(words, order, strict=True)}
    right = [sum(map(set(accepted).__contains__, names)) for accepted in words.values()]
    missed = [comb(len(names) - count, CUTOFF) / comb(len(names), CUTOFF) for count in right]
    return EverydayScore(
        found,
        hits=[word for word, accepted in words.items() if set(found[word]) & set(accepted)],
        chance=100 * (1 - float(np.mean(missed))),
    )
