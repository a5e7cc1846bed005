# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers' own module, on the saved files, gives the tensors that `CocoaProcessor` gives."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from sentence_transformers.base.modules.transformer import Transformer
from transformers import Qwen2VLConfig, Qwen2VLModel

from modeling_cocoa.processing_cocoa import CocoaInputError, CocoaProcessor
from tests.modeling_cocoa.conftest import make_image

LONG = "red apple " * 60
PICTURE = make_image(48, 32)
FRAMES = [make_image(32, 32, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory, processor_folder):
    """The processor's files beside a stock model of a few weights."""
    folder = tmp_path_factory.mktemp("stock")
    shutil.copytree(processor_folder, folder, dirs_exist_ok=True)
    vocab_size = len(CocoaProcessor.from_pretrained(folder).tokenizer)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": vocab_size, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(stock_folder) -> Transformer:
    """sentence-transformers' module over that folder."""
    return Transformer(str(stock_folder))


def image_file(folder, name, **kwargs) -> str:
    path = folder / name
    PICTURE.save(path, **kwargs)
    return str(path)


def alpha(image):
    image = image.copy()
    image.putalpha(100)
    return image


def chat(*turns) -> list[dict]:
    return [
        {"role": role, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}
        for role, content in turns
    ]


TEXT, SHOWN = {"type": "text", "text": "a nerd face"}, {"type": "image", "image": PICTURE}
BATCHES = {
    "texts": ["a red apple", "a nerd face with glasses"],
    "long text": [LONG, "a red apple"],
    "control tokens": ["a <|im_end|> b <|image_pad|> <|mask|> <|vision_start|> <|placeholder|>", "c"],
    "images": [PICTURE, make_image(32, 48, seed=1), alpha(PICTURE)],
    "arrays": [np.array(PICTURE), torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)],
    "text, image": [{"text": "a nerd face", "image": PICTURE}],
    "image, text": [{"image": PICTURE, "text": "a nerd face"}, {"image": PICTURE, "text": "a cat"}],
    "both orders": [{"text": "a nerd face", "image": PICTURE}, {"image": PICTURE, "text": "a cat"}],
    "long text and image": [{"text": LONG, "image": PICTURE}, {"text": "a cat", "image": PICTURE}],
    "two images": [{"image": [PICTURE, FRAMES[0]], "text": "a nerd face"}],
    "link as text": [{"text": "https://a.org/cat.png"}],
    "mixed": ["a red apple", PICTURE, {"text": "a nerd face", "image": PICTURE}],
    "frames": [{"video": FRAMES, "text": "a cat"}],
    "film as array": [np.stack([np.array(frame) for frame in FRAMES])],
    "film and image": [{"video": FRAMES, "image": PICTURE}],
    "message": [{"role": "user", "content": [TEXT]}, {"role": "user", "content": [SHOWN, TEXT]}],
    "conversations": [
        chat(("system", "Be kind."), ("user", [TEXT, SHOWN]), ("assistant", "a <|im_end|> b")),
        chat(("user", [SHOWN, TEXT, SHOWN]), ("assistant", [TEXT, SHOWN, TEXT])),
    ],
    "long conversation": [chat(("user", LONG), ("assistant", "a cat")), chat(("user", [SHOWN]), ("assistant", LONG))],
    "text None": [{"text": None, "image": PICTURE}, {"text": "a cat", "image": PICTURE}],
    "image None": [{"text": "a cat", "image": None}, {"text": "a red apple", "image": None}],
    "None in parts": [
        chat(("user", [{**TEXT, "image": None}, {**SHOWN, "text": None}, {"type": "text", "text": None}]))
    ],
}


def check(stock, processor, batch, **kwargs) -> None:
    expected = stock.preprocess(batch, **kwargs)
    expected.pop("modality")
    actual = processor(batch, **kwargs)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("prompt", [None, "Find <|im_end|> it."])
@pytest.mark.parametrize("name", BATCHES)
def test_same_tensors(stock, processor, name, prompt):
    check(stock, processor, BATCHES[name], prompt=prompt)


def test_same_tensors_of_str_contents(stock, processor):
    conversation = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a cat"}]
    check(stock, processor, [conversation, {"role": "user", "content": "a red apple"}], prompt="Find it.")


@pytest.mark.parametrize("limit", [1, 2, 9, 20])
def test_same_truncation(stock, processor, limit):
    check(stock, processor, [LONG, "a"], max_length=limit)
    check(stock, processor, [LONG, "a"], max_length=limit, prompt="Find it.")
    check(stock, processor, [{"text": LONG, "image": PICTURE}], max_length=limit + 20)


def test_same_left_padding(stock_folder, processor):
    left = Transformer(str(stock_folder))
    left.tokenizer.padding_side = processor.tokenizer.padding_side = "left"
    check(left, processor, ["a", LONG, "a red apple"])
    check(left, processor, ["a red apple", PICTURE])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "turned.jpg", "palette.png"])
def test_same_pixels_of_files(stock, processor, tmp_path, name):
    if name == "turned.jpg":
        exif = PICTURE.copy().getexif()  # of its own: another test's picture would lie on its side
        exif[0x0112] = 6
        path = image_file(tmp_path, name, exif=exif)
    elif name == "palette.png":
        path = str(tmp_path / name)
        PICTURE.convert("P").save(path)
    else:
        path = image_file(tmp_path, name)
    check(stock, processor, [path, {"image": path, "text": "a cat"}])


def test_a_stock_batch_that_would_lose_content_raises(stock, processor):
    conversation = chat(("user", "a red apple"))
    with pytest.raises(TemplateError, match="message is no type.*in a call of their own"):
        stock.preprocess([conversation, "a cat"])
    assert processor([conversation, "a cat"])["input_ids"].shape[0] == 2
    with pytest.raises(TemplateError, match="audio is no type.*1 or 2 dimensions"):
        stock.preprocess([np.zeros((8, 8), np.uint8)])
    with pytest.raises(TemplateError, match="a message has no content"):
        stock.preprocess([{"text": None, "image": None}])
    with pytest.raises(TemplateError, match="a text must be a string"):
        stock.preprocess([{"text": 5, "image": PICTURE}])


def test_a_role_cannot_hold_a_control_token(stock):
    text = stock.processor.apply_chat_template(chat(("<|im_end|>", "a cat")), tokenize=False)
    assert text == "<|im_start|>< |im_end|>\na cat"


def test_both_refuse_to_cut_an_image(stock, processor):
    batch = [{"text": LONG, "image": PICTURE}]
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        stock.preprocess(batch, max_length=8)
    with pytest.raises(CocoaInputError, match="Item 0: .*exceed max_length=8"):
        processor(batch, max_length=8)


def test_query_and_document_pairs_of_the_stock_loader_render(stock):
    assert stock.input_formatter.message_format == "structured"
    assert stock.input_formatter.pair_roles_failure() is None
    features = stock.preprocess([("a cat", PICTURE)])
    assert stock.tokenizer.decode(features["input_ids"][0]).startswith("<|im_start|>query\na cat<|im_end|>\n")


def test_long_text_is_cut_without_a_warning(processor, caplog):
    with caplog.at_level(logging.WARNING):
        processor([LONG * 3])
    assert not caplog.records
