# SPDX-License-Identifier: Apache-2.0
"""Mean reciprocal rank of ranked lists, as a module of the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate

from .ranked_lists import Lists, describe, mean_over_queries


def mrr_at_k(predictions: Lists, references: Lists, k: int = 10) -> float:
    """One over the place of the first that is relevant, or 0 where there is none among the first k."""

    def score(found: Sequence[str], relevant: set[str], k: int) -> float:
        return next((1 / place for place, name in enumerate(found, start=1) if name in relevant), 0.0)

    return mean_over_queries(score, predictions, references, k)


class MRRAtK(evaluate.Metric):
    """Mean reciprocal rank; see [`mrr_at_k`]."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(mrr_at_k.__doc__)

    def _compute(self, predictions: Lists, references: Lists, k: int = 10) -> dict[str, float]:
        return {"mrr_at_k": mrr_at_k(predictions, references, k)}
