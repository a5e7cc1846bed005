# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from modeling_cocoa.pooling import EosPooler

EOS_ID = 7


@pytest.fixture
def hidden():
    return torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


def test_takes_the_last_token_whichever_side_is_padded(hidden):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    ids = torch.tensor([[1, EOS_ID, 2, EOS_ID], [1, EOS_ID, 0, 0], [0, 0, 1, EOS_ID]])
    pooled = EosPooler(EOS_ID)(hidden, mask, ids)
    expected = torch.stack([hidden[0, 3], hidden[1, 1], hidden[2, 3]])
    torch.testing.assert_close(pooled, expected / expected.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(3))


def test_names_the_row_that_does_not_end_in_the_eos(hidden):
    ids = torch.tensor([[1, 2, 3, EOS_ID], [1, 2, EOS_ID, 4], [1, 2, 3, EOS_ID]])
    with pytest.raises(ValueError, match=r"Row 1 .*token 4.*EOS \(7\)"):
        EosPooler(EOS_ID)(hidden, torch.ones(3, 4), ids)


def test_names_the_row_that_is_padding_only(hidden):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="Row 2 .*padding only"):
        EosPooler(EOS_ID)(hidden, mask)


def test_without_a_mask_every_token_counts(hidden):
    torch.testing.assert_close(EosPooler(EOS_ID)(hidden), torch.nn.functional.normalize(hidden[:, -1], dim=-1))
