# SPDX-License-Identifier: Apache-2.0
"""The module of the `evaluate` library, held against torchmetrics on random scores with ties."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import (
    retrieval_normalized_dcg,
    retrieval_precision,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

REFERENCES = {
    "precision_at_k": retrieval_precision,
    "recall_at_k": retrieval_recall,
    "mrr_at_k": retrieval_reciprocal_rank,
    "ndcg_at_k": retrieval_normalized_dcg,
}


@pytest.fixture(scope="module")
def metrics():
    return evaluate.load(str(Path(__file__).parents[2] / "evaluation" / "ranking_metrics.py"))


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_they_are_those_of_torchmetrics(metrics, k):
    generator = np.random.default_rng(k)
    found, wanted, expected = [], [], {name: [] for name in REFERENCES}
    for _ in range(30):
        scores = generator.integers(0, 6, size=25) / 5  # many are equal; the ranking puts one before the other
        relevant = generator.random(25) < 0.2
        relevant[generator.integers(25)] = True
        order = np.argsort(-scores, kind="stable")
        found.append([f"d{place}" for place in order])
        wanted.append([f"d{place}" for place in np.flatnonzero(relevant)])
        ranked = torch.empty(25)
        ranked[torch.from_numpy(order)] = torch.linspace(1, 0.1, 25)
        for name, reference in REFERENCES.items():
            value = reference(ranked, torch.from_numpy(relevant), top_k=min(k, 25))
            expected[name].append(value.item() * (25 / k if name == "precision_at_k" and k > 25 else 1))
    result = metrics.compute(predictions=found, references=wanted, k=k)
    assert result == {name: pytest.approx(np.mean(values), abs=1e-6) for name, values in expected.items()}


def test_what_is_found_twice_counts_once(metrics):
    result = metrics.compute(predictions=[["a", "a", "b"]], references=[["a", "b"]], k=2)
    assert result == pytest.approx(
        {"precision_at_k": 0.5, "recall_at_k": 0.5, "mrr_at_k": 1.0, "ndcg_at_k": 1 / (1 + 1 / np.log2(3))}
    )


def test_what_cannot_be_scored_is_an_error(metrics):
    with pytest.raises(ValueError, match="Query 1 has nothing relevant"):
        metrics.compute(predictions=[["a"], ["b"]], references=[["a"], []])
    with pytest.raises(ValueError, match="k must be 1 or more"):
        metrics.compute(predictions=[["a"]], references=[["a"]], k=0)
