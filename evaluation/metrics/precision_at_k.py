# SPDX-License-Identifier: Apache-2.0
"""Precision@k of ranked lists, as a module of the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate

from .ranked_lists import Lists, describe, mean_over_queries


def precision_at_k(predictions: Lists, references: Lists, k: int = 1) -> float:
    """The share of the first k places that hold something relevant; with k = 1, how often the best is."""

    def score(found: Sequence[str], relevant: set[str], k: int) -> float:
        return len(relevant.intersection(found)) / k

    return mean_over_queries(score, predictions, references, k)


class PrecisionAtK(evaluate.Metric):
    """Precision@k; see [`precision_at_k`]."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(precision_at_k.__doc__)

    def _compute(self, predictions: Lists, references: Lists, k: int = 1) -> dict[str, float]:
        return {"precision_at_k": precision_at_k(predictions, references, k)}
