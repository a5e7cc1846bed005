# SPDX-License-Identifier: Apache-2.0
"""Mean reciprocal rank of ranked lists, as a module of the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

DESCRIPTION = "One over the place of the first that is relevant, or 0 where there is none among the first k."

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each query what it found, the best first. Something that is in a list twice
        counts at its first place.
    references (`list[list[str]]`): For each query all that is relevant to it, in any order.
    k (`int`, defaults to 10): How far down the lists to look.

Returns:
    `dict`: `mrr_at_k`, the mean over queries, 0 to 1.

Raises:
    ValueError: `k` is below 1, a query has nothing relevant, or the two are not equally many.
"""


def mrr_at_k(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], k: int = 10) -> float:
    """Mean reciprocal rank; see `INPUTS`."""
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}.")
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"Need one ranked list a query, and a query: {len(predictions)} lists, {len(references)}.")
    total = 0.0
    for number, (found, wanted) in enumerate(zip(predictions, references, strict=True)):
        relevant = set(wanted)
        if not relevant:
            raise ValueError(f"Query {number} has nothing relevant; leave it out.")
        total += next((1 / place for place, name in enumerate(found[:k], start=1) if name in relevant), 0.0)
    return total / len(references)


class MRRAtK(evaluate.Metric):
    """Mean reciprocal rank; see [`mrr_at_k`]."""

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
        return {"mrr_at_k": mrr_at_k(predictions, references, k)}
