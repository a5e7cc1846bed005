# SPDX-License-Identifier: Apache-2.0
"""Rankings by hand: ties, the same candidate twice, and how sure a mean of them is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evaluation.ranking import bootstrap_interval, rank, recall_at, target_ranks


def ranked(scores, names=None, **options):
    """Candidates whose dot product with the query is the score."""
    candidates = np.array([[score, 0.0] for score in scores], dtype=np.float32)
    names = names or [f"c{place}" for place in range(len(scores))]
    return rank(np.array([1.0, 0.0], dtype=np.float32), candidates, names, **options)


def test_without_ties():
    found = ranked([0.5, 0.9, 0.1])
    assert (found.rank, found.ties, found.rank_ties_against) == (2, 0, 2)
    assert found.found == ("c1", "c0", "c2") and found.scores == pytest.approx((0.9, 0.5, 0.1))
    assert found.right_score == pytest.approx(0.5)


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.1, 0.5], [0.5, 0.50000003, 0.1, 0.49999997]])
def test_ties_are_counted_and_may_go_against(scores):
    found = ranked(scores)
    assert (found.ties, found.rank_ties_against) == (2, 3)
    first = ranked([0.5, 0.5, 0.1, 0.5], first_wins=True)
    assert (first.rank, first.ties, first.rank_ties_against) == (1, 2, 3), "as argmax has it"


def test_a_difference_beyond_rounding_is_no_tie():
    assert ranked([0.5, 0.499995]).ties == 0


def test_the_right_candidate_twice_is_no_tie_and_is_right_in_either_place():
    for first_wins in (False, True):
        found = ranked([0.5, 0.9, 0.5, 0.1], names=["a", "b", "a", "c"], first_wins=first_wins)
        assert (found.rank, found.ties, found.rank_ties_against) == (2, 0, 2)


def test_the_order_is_that_of_the_benchmarks_evaluators():
    generator = np.random.default_rng(0)
    for count in (3, 40):
        candidates = generator.integers(-2, 3, size=(count, 4)).astype(np.float32)  # many ties
        query = generator.integers(-2, 3, size=4).astype(np.float32)
        names = [str(place) for place in range(count)]
        order = np.argsort(-np.dot(query, candidates.T))
        assert rank(query, candidates, names, depth=count).found == tuple(names[place] for place in order)
        best = int(np.argmax(np.dot(candidates, query)))
        assert rank(query, candidates, names, first_wins=True).found[0] == names[best]


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
