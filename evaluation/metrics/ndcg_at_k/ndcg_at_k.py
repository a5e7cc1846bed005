# SPDX-License-Identifier: Apache-2.0
"""nDCG@k of ranked lists, as a module of the `evaluate` library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import evaluate

DESCRIPTION = "Discounted gain of what is relevant in the first k places, as a share of the most there could be."

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each query what it found, the best first. Something that is in a list twice
        counts at its first place.
    references (`list[list[str]]`): For each query all that is relevant to it, in any order.
    k (`int`, defaults to 10): How far down the lists to look.

Returns:
    `dict`: `ndcg_at_k`, the mean over queries, 0 to 1.

Raises:
    ValueError: `k` is below 1, a query has nothing relevant, or the two are not equally many.
"""


def ndcg_at_k(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], k: int = 10) -> float:
    """nDCG@k; see `INPUTS`."""
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}.")
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"Need one ranked list a query, and a query: {len(predictions)} lists, {len(references)}.")
    total = 0.0
    for number, (found, wanted) in enumerate(zip(predictions, references, strict=True)):
        relevant = set(wanted)
        if not relevant:
            raise ValueError(f"Query {number} has nothing relevant; leave it out.")
        seen: set[str] = set()
        gain = 0.0
        for place, name in enumerate(found[:k], start=1):
            if name in relevant and name not in seen:
                seen.add(name)
                gain += 1 / math.log2(place + 1)
        total += gain / sum(1 / math.log2(place + 1) for place in range(1, min(len(relevant), k) + 1))
    return total / len(references)


class NDCGAtK(evaluate.Metric):
    """nDCG@k; see [`ndcg_at_k`]."""

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
        return {"ndcg_at_k": ndcg_at_k(predictions, references, k)}
