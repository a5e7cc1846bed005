# SPDX-License-Identifier: Apache-2.0
"""Recall@k of ranked lists, as a module of the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate

from .ranked_lists import Lists, describe, mean_over_queries


def recall_at_k(predictions: Lists, references: Lists, k: int = 10) -> float:
    """The share of what is relevant to a query that is among the first k places."""

    def score(found: Sequence[str], relevant: set[str], k: int) -> float:
        return len(relevant.intersection(found)) / len(relevant)

    return mean_over_queries(score, predictions, references, k)


class RecallAtK(evaluate.Metric):
    """Recall@k; see [`recall_at_k`]."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(recall_at_k.__doc__)

    def _compute(self, predictions: Lists, references: Lists, k: int = 10) -> dict[str, float]:
        return {"recall_at_k": recall_at_k(predictions, references, k)}
