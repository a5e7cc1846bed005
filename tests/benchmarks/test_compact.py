# SPDX-License-Identifier: Apache-2.0
"""Short and quantized vectors find what plain arithmetic finds."""

import numpy as np
import pytest

from benchmarks.compact import score_compact


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    candidates = generator.normal(size=(200, 64)).astype(np.float32)
    queries = candidates + generator.normal(size=(200, 64)).astype(np.float32)
    return [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (queries, candidates)]


def test_every_form_has_its_size_and_the_recall_of_plain_arithmetic(vectors):
    queries, candidates = vectors
    scores = {score.form: score for score in score_compact(*vectors)}
    assert [(form, score.size) for form, score in scores.items()] == [
        (f"{dim} {form}", size)
        for dim in (64, 32, 16, 8)
        for form, size in (("float32", 4 * dim), ("int8", dim), ("binary", dim // 8))
    ]

    def recall(similarity):
        return float(np.mean((similarity >= similarity.diagonal()[:, None]).sum(1) <= 1))

    assert scores["64 float32"].recall[1].value == recall(queries @ candidates.T)
    short = [part[:, :16] / np.linalg.norm(part[:, :16], axis=1, keepdims=True) for part in vectors]
    assert scores["16 float32"].recall[1].value == recall(short[0] @ short[1].T)
    signs = [np.sign(part) for part in vectors]
    assert scores["64 binary"].recall[1].value == recall(signs[0] @ signs[1].T)
    assert abs(scores["64 int8"].recall[1].value - scores["64 float32"].recall[1].value) <= 0.02
    assert scores["8 binary"].recall[10].value < scores["64 binary"].recall[10].value


def test_chosen_lengths(vectors):
    assert [score.form for score in score_compact(*vectors, dims=(12,))][3:] == ["12 float32", "12 int8", "12 binary"]
