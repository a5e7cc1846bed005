# SPDX-License-Identifier: Apache-2.0
"""Precision, recall, mean reciprocal rank and nDCG of ranked lists, as a module of the `evaluate` library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import datasets
import evaluate

DESCRIPTION = """
Of the first k places, as means over queries, 0 to 1: precision (how many are relevant), recall (how much of what is
relevant they hold), mean reciprocal rank (one over the place of the first that is relevant, or 0), and nDCG (the
discounted gain of what is relevant, as a share of the most there could be).
"""

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each query what it found, the best first. Something that is in a list twice
        counts at its first place.
    references (`list[list[str]]`): For each query all that is relevant to it, in any order.
    k (`int`, defaults to 10): How far down the lists to look.

Returns:
    `dict`: `precision_at_k`, `recall_at_k`, `mrr_at_k` and `ndcg_at_k`.

Raises:
    ValueError: `k` is below 1, a query has nothing relevant, or the two are not equally many.
"""

Lists = Sequence[Sequence[str]]


def ranking_metrics(predictions: Lists, references: Lists, k: int = 10) -> dict[str, float]:
    """All metrics of this module; see `INPUTS`."""
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}.")
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"Need one ranked list a query, and a query: {len(predictions)} lists, {len(references)}.")
    totals = dict.fromkeys(("precision_at_k", "recall_at_k", "mrr_at_k", "ndcg_at_k"), 0.0)
    for number, (found, wanted) in enumerate(zip(predictions, references, strict=True)):
        if not wanted:
            raise ValueError(f"Query {number} has nothing relevant; leave it out.")
        relevant = set(wanted)
        hits = [place for place, name in enumerate(found[:k]) if name in relevant and found.index(name) == place]
        totals["precision_at_k"] += len(hits) / k
        totals["recall_at_k"] += len(hits) / len(relevant)
        totals["mrr_at_k"] += 1 / (hits[0] + 1) if hits else 0.0
        totals["ndcg_at_k"] += gain(hits) / gain(range(min(len(relevant), k)))
    return {name: total / len(references) for name, total in totals.items()}


def gain(places: Iterable[int]) -> float:
    """The discounted gain of what is relevant at some places, counted from 0."""
    return sum(1 / math.log2(place + 2) for place in places)


class RankingMetrics(evaluate.Metric):
    """Metrics of ranked lists; see [`ranking_metrics`]."""

    def _info(self) -> evaluate.MetricInfo:
        lists = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": lists, "references": lists}),
        )

    def _compute(self, predictions: Lists, references: Lists, k: int = 10) -> dict[str, float]:
        return ranking_metrics(predictions, references, k)
