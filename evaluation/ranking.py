# SPDX-License-Identifier: Apache-2.0
"""Where the right candidate stands: in a query's own list, as MMEB-V1 ranks it, and among all candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TIE = 1e-6
"""Scores that differ by no more are equal: that much float32 rounds a dot product of unit vectors."""


@dataclass(frozen=True)
class Ranking:
    """
    What a query found.

    Args:
        found (`tuple[str, ...]`), scores (`tuple[float, ...]`): The best candidates, the best first.
        rank (`int`): Of the right candidate, 1 the best, in the order that the benchmark's evaluator makes.
        ties (`int`): Other candidates whose score equals the right one's, within [`TIE`].
        rank_ties_against (`int`): The rank with these before the right one.
        right_score (`float`): Of the right candidate.
    """

    found: tuple[str, ...]
    scores: tuple[float, ...]
    rank: int
    ties: int
    rank_ties_against: int
    right_score: float


class Estimate(NamedTuple):
    """A mean over queries, with the ends of its bootstrap interval; all in 0 to 1."""

    value: float
    low: float
    high: float


def rank(
    query: np.ndarray, candidates: np.ndarray, names: Sequence[str], *, first_wins: bool = False, depth: int = 10
) -> Ranking:
    """
    Rank a query's own candidates by dot product.

    Args:
        query (`np.ndarray` of shape `(hidden,)`), candidates (`np.ndarray` of shape `(candidates, hidden)`).
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


def target_ranks(similarity: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """
    The rank of each query's right candidate among all, 1 the best. A tie counts against the model: equals are ranked
    before the right one.

    Args:
        similarity (`np.ndarray` of shape `(queries, candidates)`): Higher is nearer.
        targets (`np.ndarray` of shape `(queries,)`, *optional*): Index of each query's right candidate; by default
            query i's is candidate i.

    Raises:
        ValueError: a similarity is not a number (it would rank first or last by accident), or the shapes disagree.
    """
    if np.isnan(similarity).any():
        row = int(np.isnan(similarity).any(axis=1).argmax())
        raise ValueError(f"The similarities of query {row} are not all numbers; check the model's embeddings for NaN.")
    targets = np.arange(len(similarity)) if targets is None else np.asarray(targets)
    if targets.shape != similarity.shape[:1]:
        raise ValueError(f"Need one target a query: {len(similarity)} queries, targets of shape {targets.shape}.")
    if len(targets) and not (0 <= targets.min() and targets.max() < similarity.shape[1]):
        raise ValueError(f"A target lies outside the {similarity.shape[1]} candidates.")
    right = np.take_along_axis(similarity, targets[:, None], axis=1)
    return (similarity >= right).sum(axis=1)


def bootstrap_interval(
    values: np.ndarray, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of a mean over queries.

    It covers the choice of queries and nothing else: not the choice of candidates, nor of training run.

    Args:
        values (`np.ndarray` of shape `(queries,)`): One score a query.
        resamples (`int`, defaults to 1000): How often queries are drawn, with replacement.
        confidence (`float`, defaults to 0.95): Share of the means of these draws that the interval holds.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        `tuple[float, float]`: The lower and the upper end.
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError("There are no queries to average over.")
    drawn = np.random.default_rng(seed).integers(0, values.size, size=(resamples, values.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[drawn].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def recall_at(ranks: np.ndarray, k: int) -> Estimate:
    """The share of queries whose right answer is among the first `k`, with its 95 % bootstrap interval."""
    hits = np.asarray(ranks) <= k
    return Estimate(float(hits.mean()), *bootstrap_interval(hits))
