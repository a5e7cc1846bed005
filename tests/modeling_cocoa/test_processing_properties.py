# SPDX-License-Identifier: Apache-2.0
"""Whatever a user writes, it is plain text; whatever is cut, an input stays whole where it matters."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modeling_cocoa.inputs import ROLES
from modeling_cocoa.media import load_image
from modeling_cocoa.processing_cocoa import CocoaInputError, CocoaProcessor
from tests.modeling_cocoa.conftest import TEXTS, make_image
from trainers.recipes.tiny_processor import SPECIAL_TOKENS, build_tiny_processor

PICTURE = make_image(32, 16)  # two image tokens
CONTROL = (*SPECIAL_TOKENS, "<|mask|>", "<|placeholder|>")
# Pieces of control tokens, and characters that Unicode normalisation joins, splits or turns into ASCII.
PIECES = (
    "<",
    "|",
    ">",
    "<|",
    "|>",
    "im_end",
    "<|im_",
    "end|>",
    "mask",
    " ",
    "\n",
    "\u0338",
    "\u226e",
    "\u212a",
    "\u037e",
)
PIECES += (
    "e\u0301",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\x00",
    "{{",
    "{%",
    "'",
    '"',
    "\\n",
    "\U0001f913",
    "\ue000",
    "\uf8ff",
)
texts = st.lists(st.sampled_from((*CONTROL, *PIECES)) | st.text(max_size=6), min_size=1, max_size=8).map("".join)
written = texts.filter(str.strip)


@pytest.fixture(scope="module")
def tiny() -> CocoaProcessor:
    return build_tiny_processor(TEXTS, vocab_size=400, max_length=10_000)


def counts(processor, ids) -> dict[str, int]:
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    return {token: tokens.count(token) for token in processor.tokenizer.get_added_vocab() if token in tokens}


@given(text=written)
def test_text_holds_no_control_token(tiny, text):
    ids = tiny.preprocess([{"text": text}])[0]["input_ids"].tolist()
    assert counts(tiny, ids) == {"<|im_start|>": 1, "<|im_end|>": 1}
    assert ids[-1] == tiny.eos_token_id


@given(text=written)
def test_text_without_control_tokens_is_not_changed(tiny, text):
    assume(not any(token in text for token in CONTROL))
    ids = tiny.preprocess([{"text": text}])[0]["input_ids"][:-1]
    assert tiny.tokenizer.decode(ids) == f"<|im_start|>user\n{unicodedata.normalize('NFC', text)}"


@given(text=written, images=st.integers(0, 2), prompt=st.none() | written, role=st.sampled_from(ROLES))
def test_a_text_is_put_where_the_template_puts_it(tiny, text, images, prompt, role):
    """The template is filled in once for all inputs of one form; here for each."""
    messages = [{"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]
    system = [{"role": "system", "content": prompt}] if prompt else []
    expected = tiny.processor.apply_chat_template(system + messages, tokenize=False)
    assert tiny._render([messages, messages], prompt) == [expected] * 2


@given(parts=st.lists(written, min_size=1, max_size=4), prompt=written)
def test_text_split_over_parts_beside_an_image_holds_no_control_token(tiny, parts, prompt):
    content = [{"type": "text", "text": part} for part in parts]
    picture = {"type": "image", "image": PICTURE}
    items = [[{"role": "user", "content": content}], [{"role": "user", "content": [*content, picture, *content]}]]
    plain, shown = (row["input_ids"].tolist() for row in tiny.preprocess(items, prompt=prompt))
    assert counts(tiny, plain) == {"<|im_start|>": 2, "<|im_end|>": 2}
    vision = {"<|vision_start|>": 1, "<|image_pad|>": 2, "<|vision_end|>": 1}
    assert counts(tiny, shown) == {"<|im_start|>": 2, "<|im_end|>": 2, **vision}
    joined = tiny.preprocess(["".join(parts)] if not looks_like_media("".join(parts)) else [{"text": "".join(parts)}])
    assert plain[-len(joined[0]["input_ids"]) :] == joined[0]["input_ids"].tolist()


def looks_like_media(text: str) -> bool:
    return text.startswith(("data:", "http://", "https://"))


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(turns=st.lists(st.tuples(written, st.booleans()), min_size=1, max_size=3), limit=st.integers(1, 60))
def test_truncation_keeps_media_and_eos_and_drops_the_last_text(tiny, turns, limit):
    content = []
    for text, with_image in turns:
        content += [{"type": "image", "image": PICTURE}] * with_image + [{"type": "text", "text": text}]
    item = [{"role": "user", "content": content}]
    whole = tiny.preprocess([item])[0]["input_ids"].tolist()
    vision = {tiny.tokenizer.convert_tokens_to_ids(token) for token in ("<|vision_start|>", "<|vision_end|>")}
    vision.add(tiny.image_token_id)
    media = [token for token in whole if token in vision]
    if len(whole) > limit and len(media) + 1 > limit:
        with pytest.raises(CocoaInputError, match="Item 0: .*exceed max_length"):
            tiny.preprocess([item], max_length=limit)
        return
    ids = tiny.preprocess([item], max_length=limit)[0]["input_ids"].tolist()
    assert len(ids) == min(len(whole), limit)
    assert ids[-1] == tiny.eos_token_id
    assert [token for token in ids if token in vision] == media
    kept = [token for token in ids[:-1] if token not in vision]
    assert kept == [token for token in whole[:-1] if token not in vision][: len(kept)]
    # Media stay where they were among the text that is left.
    assert is_subsequence(ids, whole)


def is_subsequence(short, long) -> bool:
    rest = iter(long)
    return all(token in rest for token in short)


@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]))
def test_a_damaged_file_is_read_or_named(data, kind):
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        image = load_image({"bytes": damaged, "path": None})
    except CocoaInputError:
        return
    assert image.mode == "RGB" and image.getextrema()
