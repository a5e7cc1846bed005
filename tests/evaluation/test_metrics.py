# SPDX-License-Identifier: Apache-2.0
"""The modules of the `evaluate` library, held against torchmetrics on random scores with ties."""

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

FOLDER = Path(__file__).parents[2] / "evaluation" / "metrics"
REFERENCES = {
    "precision_at_k": retrieval_precision,
    "recall_at_k": retrieval_recall,
    "mrr_at_k": retrieval_reciprocal_rank,
    "ndcg_at_k": retrieval_normalized_dcg,
}


@pytest.fixture(scope="module", params=REFERENCES)
def metric(request):
    return request.param, evaluate.load(str(FOLDER / f"{request.param}.py"))


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_they_are_those_of_torchmetrics(metric, k):
    name, module = metric
    generator = np.random.default_rng(k)
    found, wanted, expected = [], [], []
    for _ in range(30):
        scores = generator.integers(0, 6, size=25) / 5  # many are equal; the ranking puts one before the other
        relevant = generator.random(25) < 0.2
        relevant[generator.integers(25)] = True
        order = np.argsort(-scores, kind="stable")
        found.append([f"d{place}" for place in order])
        wanted.append([f"d{place}" for place in np.flatnonzero(relevant)])
        ranked = torch.empty(25)
        ranked[torch.from_numpy(order)] = torch.linspace(1, 0.1, 25)
        value = REFERENCES[name](ranked, torch.from_numpy(relevant), top_k=min(k, 25))
        expected.append(value.item() * (25 / k if name == "precision_at_k" and k > 25 else 1))
    result = module.compute(predictions=found, references=wanted, k=k)
    assert result == {name: pytest.approx(np.mean(expected), abs=1e-6)}


def test_what_is_found_twice_counts_once(metric):
    name, module = metric
    result = module.compute(predictions=[["a", "a", "b"]], references=[["a", "b"]], k=2)
    assert result[name] == pytest.approx(
        {"precision_at_k": 0.5, "recall_at_k": 0.5, "mrr_at_k": 1.0, "ndcg_at_k": 1 / (1 + 1 / np.log2(3))}[name]
    )


def test_what_cannot_be_scored_is_an_error(metric):
    _, module = metric
    with pytest.raises(ValueError, match="Query 1 has nothing relevant"):
        module.compute(predictions=[["a"], ["b"]], references=[["a"], []])
    with pytest.raises(ValueError, match="k must be 1 or more"):
        module.compute(predictions=[["a"]], references=[["a"]], k=0)
