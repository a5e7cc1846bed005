# SPDX-License-Identifier: Apache-2.0
"""Rankings by hand: ties, and the same candidate twice."""

import numpy as np
import pytest

from evaluation.ranking import rank


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
