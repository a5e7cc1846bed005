# SPDX-License-Identifier: Apache-2.0
"""nDCG@k of ranked lists, as a module of the `evaluate` library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import evaluate

from .ranked_lists import Lists, describe, mean_over_queries


def ndcg_at_k(predictions: Lists, references: Lists, k: int = 10) -> float:
    """Discounted gain of what is relevant in the first k places, as a share of the most there could be."""

    def score(found: Sequence[str], relevant: set[str], k: int) -> float:
        hits = [place for place, name in enumerate(found) if name in relevant and found.index(name) == place]
        return gain(hits) / gain(range(min(len(relevant), k)))

    return mean_over_queries(score, predictions, references, k)


def gain(places: Iterable[int]) -> float:
    """What relevant things are worth at some places, counted from 0."""
    return sum(1 / math.log2(place + 2) for place in places)


class NDCGAtK(evaluate.Metric):
    """nDCG@k; see [`ndcg_at_k`]."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(ndcg_at_k.__doc__)

    def _compute(self, predictions: Lists, references: Lists, k: int = 10) -> dict[str, float]:
        return {"ndcg_at_k": ndcg_at_k(predictions, references, k)}
