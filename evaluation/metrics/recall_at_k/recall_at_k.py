# SPDX-License-Identifier: Apache-2.0
"""Recall@k of ranked lists, as a module of the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

DESCRIPTION = "The share of what is relevant to a query that is among the first k places."

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each query what it found, the best first. Something that is in a list twice
        counts at its first place.
    references (`list[list[str]]`): For each query all that is relevant to it, in any order.
    k (`int`, defaults to 10): How far down the lists to look.

Returns:
    `dict`: `recall_at_k`, the mean over queries, 0 to 1.

Raises:
    ValueError: `k` is below 1, a query has nothing relevant, or the two are not equally many.
"""


def recall_at_k(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], k: int = 10) -> float:
    """Recall@k; see `INPUTS`."""
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}.")
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"Need one ranked list a query, and a query: {len(predictions)} lists, {len(references)}.")
    total = 0.0
    for number, (found, wanted) in enumerate(zip(predictions, references, strict=True)):
        relevant = set(wanted)
        if not relevant:
            raise ValueError(f"Query {number} has nothing relevant; leave it out.")
        total += len(relevant.intersection(found[:k])) / len(relevant)
    return total / len(references)


class RecallAtK(evaluate.Metric):
    """Recall@k; see [`recall_at_k`]."""

    def _info(self) -> evaluate.MetricInfo:
        lists = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": lists, "references": lists}),
        )

    def _compute(
        self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], k: int = 10
    ) -> dict[str, float]:
        return {"recall_at_k": recall_at_k(predictions, references, k)}
