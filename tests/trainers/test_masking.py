# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.masking import check_ratio, choose, mask_text

ratios = st.floats(0.01, 1.0)


@given(st.integers(1, 200), ratios, st.integers(0, 5))
def test_as_many_as_asked_and_at_least_one(count, ratio, seed):
    chosen = choose(count, ratio, np.random.default_rng(seed))
    assert chosen.shape == (count,)
    assert int(chosen.sum()) == min(count, max(1, round(ratio * count)))


def test_nothing_to_choose_from():
    assert choose(0, 0.5, np.random.default_rng(0)).shape == (0,)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=40), ratios, st.integers(0, 5))
def test_masked_text_and_labels_make_the_text_again(tokens, ratio, seed):
    ids = torch.tensor([token for token, _ in tokens])
    maskable = torch.tensor([flag for _, flag in tokens])
    masked, labels = mask_text(ids, maskable, ratio, 99, np.random.default_rng(seed))
    hidden = labels != -100
    assert torch.equal(torch.where(hidden, labels, masked), ids)
    assert (masked[hidden] == 99).all()
    assert not (hidden & ~maskable).any()
    assert int(hidden.sum()) == (max(1, round(ratio * int(maskable.sum()))) if maskable.any() else 0)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_ratio_out_of_range_is_named(ratio):
    with pytest.raises(ValueError, match=r"text_mask_ratio must be in \(0, 1\]"):
        check_ratio("text_mask_ratio", ratio)
