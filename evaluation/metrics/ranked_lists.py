# SPDX-License-Identifier: Apache-2.0
"""What the metrics of ranked lists have in common; the `evaluate` library loads this file beside each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import datasets
import evaluate

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each query what it found, the best first. Something that is in a list twice
        counts at its first place.
    references (`list[list[str]]`): For each query all that is relevant to it, in any order.
    k (`int`): How far down the lists to look.

Returns:
    `dict`: The mean over queries, 0 to 1, by the metric's name.

Raises:
    ValueError: `k` is below 1, a query has nothing relevant, or the two are not equally many.
"""

Lists = Sequence[Sequence[str]]


def describe(description: str) -> evaluate.MetricInfo:
    """What the `evaluate` library is told of a metric."""
    lists = datasets.Sequence(datasets.Value("string"))
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=INPUTS,
        features=datasets.Features({"predictions": lists, "references": lists}),
    )


def mean_over_queries(
    score: Callable[[Sequence[str], set[str], int], float], predictions: Lists, references: Lists, k: int
) -> float:
    """
    The mean of a score over queries; see `INPUTS` for the other arguments.

    Args:
        score (`Callable`): Of the first `k` that a query found, all that is relevant to it, and `k`.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}.")
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"Need one ranked list a query, and a query: {len(predictions)} lists, {len(references)}.")
    total = 0.0
    for number, (found, wanted) in enumerate(zip(predictions, references, strict=True)):
        if not wanted:
            raise ValueError(f"Query {number} has nothing relevant; leave it out.")
        total += score(found[:k], set(wanted), k)
    return total / len(references)
