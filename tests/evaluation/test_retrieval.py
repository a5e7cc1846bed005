# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evaluation.retrieval import bootstrap_interval, recall_at, target_ranks


def slow_rank(scores, target):
    """Sort the candidates by hand, the right one last among its equals."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index == target))
    return order.index(target) + 1


@settings(deadline=None)
@given(data=st.data(), queries=st.integers(1, 8), candidates=st.integers(1, 9))
def test_ranks_are_those_of_a_sort_with_ties_against_us(data, queries, candidates):
    # Few values, so that ties abound.
    similarity = data.draw(arrays(np.float32, (queries, candidates), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])))
    targets = data.draw(arrays(np.int64, queries, elements=st.integers(0, candidates - 1)))
    ranks = target_ranks(similarity, targets)
    assert ranks.tolist() == [slow_rank(row, target) for row, target in zip(similarity.tolist(), targets, strict=True)]
    for k in (1, 2, candidates):
        assert recall_at(ranks, k).value == pytest.approx(sum(rank <= k for rank in ranks) / queries)


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    assert target_ranks(np.ones((5, 5))).tolist() == [5] * 5


def test_two_copies_of_a_picture_are_never_first():
    vectors = np.eye(3)[[0, 1, 1, 2]]
    assert target_ranks(vectors @ vectors.T).tolist() == [1, 2, 2, 1]


def test_what_cannot_be_ranked_is_refused():
    similarity = np.ones((3, 4))
    similarity[1, 2] = np.nan
    with pytest.raises(ValueError, match="query 1"):
        target_ranks(similarity)
    with pytest.raises(ValueError, match="one target a query"):
        target_ranks(np.ones((3, 4)), np.array([0, 1]))
    with pytest.raises(ValueError, match="outside the 4"):
        target_ranks(np.ones((3, 4)), np.array([0, 1, 4]))
    with pytest.raises(ValueError, match="no queries"):
        bootstrap_interval(np.array([]))


def test_the_interval_holds_the_mean_and_is_as_wide_as_theory_says():
    hits = np.arange(400) % 4 == 0
    low, high = bootstrap_interval(hits)
    assert low < hits.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 400), rel=0.1)
    narrow = bootstrap_interval(np.tile(hits, 16))
    assert (narrow[1] - narrow[0]) == pytest.approx((high - low) / 4, rel=0.2)
    assert bootstrap_interval(hits, confidence=0.5)[0] > low
    assert bootstrap_interval(np.ones(7)) == (1.0, 1.0)


def test_the_interval_depends_on_its_seed_alone():
    hits = np.random.default_rng(1).random(50) < 0.4
    assert bootstrap_interval(hits) == bootstrap_interval(hits)
    assert bootstrap_interval(hits) != bootstrap_interval(hits, seed=1)
