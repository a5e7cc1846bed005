# SPDX-License-Identifier: Apache-2.0
"""The protocol of MMEB-V1: each query ranks candidates of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TIE = 1e-6
"""Scores that differ by no more are equal: that much float32 rounds a dot product of unit vectors."""


@dataclass(frozen=True)
class Ranking:
    """
    What a query found.

    Args:
        found (`tuple[str, ...]`): Names of the best candidates, the best first.
        scores (`tuple[float, ...]`): Theirs.
        rank (`int`): Of the right candidate, 1 the best, in the order that the benchmark's evaluator makes.
        ties (`int`): Other candidates whose score equals the right one's, within [`TIE`].
        rank_ties_against (`int`): The rank with these before the right one.
        right_score (`float`).
    """

    found: tuple[str, ...]
    scores: tuple[float, ...]
    rank: int
    ties: int
    rank_ties_against: int
    right_score: float


def rank(
    query: np.ndarray, candidates: np.ndarray, names: Sequence[str], *, first_wins: bool = False, depth: int = 10
) -> Ranking:
    """
    Rank a query's candidates by dot product.

    Args:
        query (`np.ndarray` of shape `(hidden,)`).
        candidates (`np.ndarray` of shape `(candidates, hidden)`).
        names (`Sequence[str]`): Of the candidates; the first is right, and so is every other of that name.
        first_wins (`bool`, defaults to `False`): Rank equals in the order they are given in, as the benchmark's first
            evaluator does (argmax); otherwise in the order of numpy's default sort, as its current one does.
        depth (`int`, defaults to 10): How many to keep.
    """
    if first_wins:
        scores = np.dot(candidates, query)
        order = np.argsort(-scores, kind="stable")
    else:
        scores = np.dot(query, candidates.T)
        order = np.argsort(-scores)
    is_right = np.fromiter((name == names[0] for name in names), dtype=bool, count=len(names))
    right_score = scores[is_right].max()
    ahead = scores[~is_right] - right_score
    return Ranking(
        found=tuple(names[place] for place in order[:depth]),
        scores=tuple(float(scores[place]) for place in order[:depth]),
        rank=int(is_right[order].argmax()) + 1,
        ties=int((np.abs(ahead) <= TIE).sum()),
        rank_ties_against=1 + int((ahead >= -TIE).sum()),
        right_score=float(right_score),
    )
