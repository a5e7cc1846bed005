# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of small models: Qwen2's pipeline, the same each time, and whole after saving."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor, Qwen2VLProcessor

from modeling_cocoa.processing_cocoa import CocoaProcessor
from tests.modeling_cocoa.conftest import TEXTS, make_image
from trainers.recipes.tiny_processor import SPECIAL_TOKENS, build_tiny_processor

ODD = "naïve Ωmega\u2126 e\u0301 12345 don't\n\n  りんご 🤓"


@pytest.fixture(scope="module")
def tiny() -> CocoaProcessor:
    return build_tiny_processor(TEXTS, vocab_size=320)


def test_same_texts_give_the_same_files(tmp_path):
    for name in ("first", "second"):
        build_tiny_processor(iter(TEXTS), vocab_size=320).save_pretrained(tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_vocabulary_is_bytes_merges_special_tokens_and_mask(tiny):
    tokenizer = tiny.tokenizer
    assert len(tokenizer) == 320 == len(tokenizer.get_vocab())
    assert tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, "<|mask|>"]) == list(range(305, 320))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer.tokenize("a nerd face with glasses")) < 16
    assert len(build_tiny_processor(["ab"], vocab_size=320).tokenizer) == 256 + 1 + 15


def test_any_text_comes_back_normalised(tiny):
    ids = tiny.tokenizer(ODD, add_special_tokens=False)["input_ids"]
    assert tiny.tokenizer.decode(ids) == "naïve ΩmegaΩ é 12345 don't\n\n  りんご 🤓"


def test_text_is_split_before_merging_as_qwen2_does():
    words = build_tiny_processor(["ab12ab12 ab12"] * 9, vocab_size=400).tokenizer.get_vocab()
    assert "ab" in words and "Ġab" in words
    assert not any("b1" in word or "12" in word for word in words if not word.startswith("<"))


def test_saved_and_loaded_by_transformers_it_gives_the_same_ids(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    assert type(stock) is Qwen2VLProcessor
    assert stock.tokenizer.get_added_vocab() == tiny.tokenizer.get_added_vocab()
    for text in (ODD, "a <|mask|> b"):
        ids = stock.tokenizer(text)["input_ids"]
        assert ids == tiny.tokenizer(text)["input_ids"] and ids[-1] == tiny.eos_token_id
    image = make_image(48, 48)
    for row, again in zip(tiny.preprocess([ODD, image]), CocoaProcessor(stock).preprocess([ODD, image]), strict=True):
        assert row.keys() == again.keys() and all(torch.equal(row[key], again[key]) for key in row)


def test_sizes(tiny):
    assert (tiny.image_processor.patch_size, tiny.image_processor.merge_size, tiny.max_length) == (8, 2, 256)
    assert tiny.image_processor.temporal_patch_size == 2
    other = build_tiny_processor(TEXTS, patch_size=16, min_pixels=32 * 32, max_pixels=96 * 96, max_length=32)
    grids = [row["image_grid_thw"].tolist() for row in other.preprocess([make_image(64, 64), make_image(960, 960)])]
    assert grids == [[[1, 4, 4]], [[1, 6, 6]]] and other.max_length == 32
    video = other.preprocess([{"video": [make_image(960, 960)] * 2}])[0]
    assert video["video_grid_thw"].tolist() == [[1, 6, 6]]


def test_too_small_a_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="vocab_size must be at least 271.*got 270"):
        build_tiny_processor(TEXTS, vocab_size=270)
    assert len(build_tiny_processor(TEXTS, vocab_size=271).tokenizer) == 271
