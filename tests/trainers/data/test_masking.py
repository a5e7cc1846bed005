# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.data.masking import check_ratios, choose, mask_text

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


def ratios_of(**values):
    names = ("text_mask_ratio", "image_mask_ratio", "source_mask_ratio", "target_mask_ratio")
    return SimpleNamespace(**{**dict.fromkeys(names, 0.5), **values})


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_ratio_out_of_range_is_named(ratio):
    with pytest.raises(ValueError, match=r"text_mask_ratio must be in \(0, 1\]"):
        check_ratios(ratios_of(text_mask_ratio=ratio))


def test_a_source_may_stay_unmasked():
    check_ratios(ratios_of(source_mask_ratio=0.0))
    assert not choose(5, 0.0, np.random.default_rng(0)).any()
    with pytest.raises(ValueError, match=r"source_mask_ratio must be in \[0, 1\]"):
        check_ratios(ratios_of(source_mask_ratio=-0.1))
