# SPDX-License-Identifier: Apache-2.0
"""Recall@k of a retrieval with one right answer a query, and how sure of it one can be."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over queries, with the ends of its bootstrap interval; all in 0 to 1."""

    value: float
    low: float
    high: float


def target_ranks(similarity: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """
    The rank of each query's right answer, 1 the best. A tie counts against us: equals are ranked before it.

    Args:
        similarity (`np.ndarray` of shape `(queries, candidates)`): Higher is nearer.
        targets (`np.ndarray` of shape `(queries,)`, *optional*): Index of each query's right candidate. Query i's is
            candidate i where this is not given.

    Returns:
        `np.ndarray` of shape `(queries,)`, int.

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
        resamples (`int`, defaults to 1000).
        confidence (`float`, defaults to 0.95).
        seed (`int`, defaults to 0).

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
