# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_cocoa.attention import (
    EOS,
    PADDING,
    SOURCE,
    TARGET,
    attention_mask_for,
    collaborative_mask,
    packed_block_mask,
)

# The method's table, written out by hand; whether the EOS sees the target is an option.
TABLE = {
    (SOURCE, SOURCE): True,
    (SOURCE, EOS): True,
    (SOURCE, TARGET): False,
    (EOS, SOURCE): True,
    (EOS, EOS): True,
    (EOS, TARGET): True,
    (TARGET, SOURCE): False,
    (TARGET, EOS): True,
    (TARGET, TARGET): True,
}
EITHER_EOS = pytest.mark.parametrize("eos_sees_target", [True, False])


def by_hand(segments, samples, eos_sees_target=True):
    table = {**TABLE, (EOS, TARGET): eos_sees_target}
    tokens = len(segments)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for query in range(tokens):
        for key in range(tokens):
            pair = segments[query], segments[key]
            mask[query, key] = PADDING not in pair and samples[query] == samples[key] and table[pair]
    return mask


def test_the_mask_of_one_row_is_the_one_written_out():
    """A A EOS B B and padding: each line is a token's view of the row."""
    segments = torch.tensor([[SOURCE, SOURCE, EOS, TARGET, TARGET, PADDING]])
    written = """
        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 1 1 0
        0 0 1 1 1 0
        0 0 1 1 1 0
        0 0 0 0 0 0
    """
    expected = torch.tensor([[int(cell) for cell in line.split()] for line in written.strip().splitlines()]).bool()
    assert torch.equal(collaborative_mask(segments)[0, 0], expected)
    expected[2, 3:5] = False
    assert torch.equal(collaborative_mask(segments, eos_sees_target=False)[0, 0], expected)


rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=24)


@given(rows, st.booleans())
@settings(max_examples=60, deadline=None)
def test_dense_mask_is_the_table(row, eos_sees_target):
    segments, samples = zip(*row, strict=True)
    mask = collaborative_mask(torch.tensor([segments]), torch.tensor([samples]), eos_sees_target)
    assert torch.equal(mask[0, 0], by_hand(segments, samples, eos_sees_target))


def test_each_row_is_one_sample_by_default():
    segments = torch.tensor([[SOURCE, EOS, TARGET, PADDING], [PADDING, SOURCE, SOURCE, EOS]])
    mask = collaborative_mask(segments)
    for row in range(2):
        assert torch.equal(mask[row, 0], by_hand(segments[row].tolist(), [0] * 4))


@EITHER_EOS
@pytest.mark.parametrize("tokens", [5, 128, 300])
def test_block_mask_of_a_packed_row_is_the_dense_mask(tokens, eos_sees_target):
    generator = torch.Generator().manual_seed(tokens)
    segments = torch.randint(1, 4, (tokens,), generator=generator)
    samples = torch.randint(0, 3, (tokens,), generator=generator).sort().values
    block = packed_block_mask(segments, samples, eos_sees_target)
    dense = collaborative_mask(segments[None], samples[None], eos_sees_target)[0, 0]
    query, key = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    assert torch.equal(block.mask_mod(torch.tensor(0), torch.tensor(0), query, key), dense)
    # Blocks left out of the computation must hold nothing that is visible.
    size = block.BLOCK_SIZE[0]
    blocks = block.to_dense()[0, 0].bool().repeat_interleave(size, 0).repeat_interleave(size, 1)
    assert not (dense & ~blocks[:tokens, :tokens]).any()


@EITHER_EOS
def test_additive_and_boolean_masks_agree_and_padding_rows_are_defined(eos_sees_target):
    segments = torch.tensor([[SOURCE, EOS, TARGET, PADDING]])
    boolean = attention_mask_for("sdpa", segments, None, torch.float32, eos_sees_target)
    additive = attention_mask_for("eager", segments, None, torch.float32, eos_sees_target)
    assert bool(boolean[0, 0, 1, 2]) == eos_sees_target
    assert torch.equal(boolean, additive == 0)
    assert boolean.any(-1).all(), "a softmax over nothing is NaN"
    assert not boolean[0, 0, :3, 3].any(), "padding is seen by nobody else"


def test_flash_attention_is_refused():
    with pytest.raises(ValueError, match="flash_attention_2.*sdpa"):
        attention_mask_for("flash_attention_2", torch.tensor([[SOURCE, EOS]]), None, torch.float32)
