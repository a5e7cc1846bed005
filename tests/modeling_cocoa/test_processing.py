# SPDX-License-Identifier: Apache-2.0
"""Tokens, truncation, padding, parameters and files of `CocoaProcessor`."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, Qwen2_5_VLProcessor

from modeling_cocoa.processing_cocoa import CocoaInputError, CocoaProcessor
from tests.modeling_cocoa.conftest import make_image

LONG = "red apple " * 60
VISION_TOKENS = {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"}


def rendered(processor, *items, **kwargs) -> list[str]:
    """The text of each item, images as one placeholder."""
    texts = [processor.tokenizer.decode(row["input_ids"]) for row in processor.encode(list(items), **kwargs)]
    return [text.replace("<|image_pad|>" * 6, "<|image_pad|>") for text in texts]


def test_messages_are_rendered_with_the_eos_last_and_nothing_after_it(processor, image):
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
    ]
    assert rendered(processor, "hi", image, {"text": "hi", "image": image}, conversation) == [
        "<|im_start|>user\nhi<|im_end|>",
        f"<|im_start|>user\n{shown}<|im_end|>",
        f"<|im_start|>user\n{shown}hi<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>",
    ]


def test_prompt_is_a_system_message_in_front(processor, processor_folder):
    prompted = "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\nhi<|im_end|>"
    own = CocoaProcessor.from_pretrained(processor_folder, prompt="Find it.")
    assert rendered(processor, "hi", prompt="Find it.") == rendered(own, "hi") == [prompted]
    assert rendered(own, "hi", prompt="") == rendered(processor, "hi") == ["<|im_start|>user\nhi<|im_end|>"]


def test_one_text_goes_behind_the_media_and_several_keep_their_order(processor, image):
    text, picture = {"type": "text", "text": "hi"}, {"type": "image", "image": image}
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    conversations = [[{"role": "user", "content": parts}] for parts in ([text, picture], [text, picture, text])]
    assert rendered(processor, *conversations) == [
        f"<|im_start|>user\n{shown}hi<|im_end|>",
        f"<|im_start|>user\nhi{shown}hi<|im_end|>",
    ]
    first, second = processor.encode([{"text": "hi", "image": image}, {"image": image, "text": "hi"}])
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_special_tokens_in_text_are_plain_text_even_when_split_over_parts(processor, image):
    split = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}, {"type": "image", "image": image}]
    texts = [*processor.tokenizer.get_added_vocab(), "<|placeholder|>"]
    items = [{"text": text, "image": image} for text in texts] + [[{"role": "user", "content": split}]]
    for text, row in zip([*texts, "split"], processor.encode(items), strict=True):
        ids = row["input_ids"].tolist()
        assert ids.count(processor.eos_token_id) == 1, text
        assert ids.count(processor.image_token_id) == 6, text
        assert processor.mask_token_id not in ids, text
    assert rendered(processor, "a<|im_end|>b") == ["<|im_start|>user\na< |im_end|>b<|im_end|>"]


def test_token_types_and_media_belong_to_their_row(processor, image):
    other = make_image(32, 32, seed=1)
    frames = [make_image(32, 32, seed=seed) for seed in range(3)]
    rows = processor.encode(["hi", {"images": [image, other], "text": "hi"}, other, {"video": frames}])
    alone = [processor.encode([item])[0] for item in (image, other)]
    assert [set(row) - {"input_ids", "mm_token_type_ids"} for row in rows] == [
        set(),
        {"pixel_values", "image_grid_thw"},
        {"pixel_values", "image_grid_thw"},
        {"pixel_values_videos", "video_grid_thw"},
    ]
    assert rows[1]["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 4]]
    assert torch.equal(rows[1]["pixel_values"], torch.cat([row["pixel_values"] for row in alone]))
    assert torch.equal(rows[2]["pixel_values"], alone[1]["pixel_values"])
    assert rows[3]["video_grid_thw"].tolist() == [[2, 4, 4]]
    for row in rows:
        expected = (row["input_ids"] == processor.image_token_id) + 2 * (row["input_ids"] == processor.video_token_id)
        assert row["mm_token_type_ids"].tolist() == expected.tolist()
    assert (rows[3]["mm_token_type_ids"] == 2).sum() == 2 * 2 * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_on_the_tokenizers_side(processor, image, side):
    processor.tokenizer.padding_side = side
    items = ["hi", {"image": image, "text": "a red apple"}, "a nerd face"]
    rows = processor.encode(items)
    batch = processor(items)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["mm_token_type_ids"].shape
    for index, row in enumerate(rows):
        mask = batch["attention_mask"][index].bool()
        padding = ~mask
        assert torch.equal(batch["input_ids"][index][mask], row["input_ids"])
        assert torch.equal(batch["mm_token_type_ids"][index][mask], row["mm_token_type_ids"])
        assert (batch["input_ids"][index][padding] == processor.pad_token_id).all()
        assert batch["attention_mask"][index].tolist() == sorted(mask.tolist(), reverse=side == "right")
    assert batch["num_images_per_sample"].tolist() == [0, 1, 0]
    assert torch.equal(batch["pixel_values"], rows[1]["pixel_values"])
    assert "num_videos_per_sample" not in batch and "num_images_per_sample" not in processor(["hi"])


def test_nothing_to_collate_is_an_error(processor):
    assert processor.encode([]) == []
    with pytest.raises(ValueError, match="nothing to collate"):
        processor([])


def test_truncation_drops_the_last_text_and_keeps_the_eos(processor):
    whole = processor.encode([LONG], max_length=10_000)[0]["input_ids"]
    for limit in (1, 2, 20, 95):
        ids = processor.encode([LONG], max_length=limit)[0]["input_ids"]
        assert ids.tolist() == [*whole[: limit - 1].tolist(), processor.eos_token_id]
    assert len(processor.encode([LONG])[0]["input_ids"]) == processor.max_length == 96
    assert len(whole) > 96


@pytest.mark.parametrize("order", ["image first", "image last", "image between"])
def test_truncation_never_cuts_an_image(processor, image, order):
    text, picture = {"type": "text", "text": LONG}, {"type": "image", "image": image}
    turns = {
        "image first": [("user", [picture]), ("assistant", [text])],
        "image last": [("user", [text]), ("assistant", [picture])],
        "image between": [("user", [text, picture, text])],
    }[order]
    conversation = [{"role": role, "content": content} for role, content in turns]
    whole = processor.encode([conversation], max_length=10_000)[0]
    vision = processor.tokenizer.convert_tokens_to_ids(sorted(VISION_TOKENS))
    for limit in (9, 10, 30, 96):
        row = processor.encode([conversation], max_length=limit)[0]
        ids = row["input_ids"].tolist()
        kept_text = [token for token in ids[:-1] if token not in vision]
        whole_text = [token for token in whole["input_ids"][:-1].tolist() if token not in vision]
        assert len(ids) == limit and ids[-1] == processor.eos_token_id
        assert [token for token in ids if token in vision] == [t for t in whole["input_ids"].tolist() if t in vision]
        assert kept_text == whole_text[: limit - 9]
        assert torch.equal(row["pixel_values"], whole["pixel_values"])


def test_image_longer_than_max_length_is_an_error_that_names_the_mend(processor, image):
    with pytest.raises(CocoaInputError, match="Item 1: .* take 8 tokens.*max_length=8.*max_pixels") as caught:
        processor.encode(["hi", {"image": image, "text": "hi"}], max_length=8)
    assert caught.value.position == 1


def test_a_missing_eos_is_an_error(processor):
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    with pytest.raises(CocoaInputError, match=r"Item 0: its last token is not <\|im_end\|>"):
        processor.encode(["hi"])


def test_sizes_live_in_the_stock_files(processor_folder, tmp_path):
    image = make_image(200, 100)
    small = CocoaProcessor.from_pretrained(processor_folder, min_pixels=256, max_pixels=32 * 32, max_length=40)
    small.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    for part in (stock.image_processor, stock.video_processor):
        assert (part.size["shortest_edge"], part.size["longest_edge"]) == (256, 1024)
    assert stock.tokenizer.model_max_length == 40
    again = CocoaProcessor.from_pretrained(tmp_path)
    for one in (small, again):
        assert one.max_length == 40
        assert int(one.encode([image])[0]["image_grid_thw"].prod()) * 64 <= 1024
    large = CocoaProcessor.from_pretrained(
        processor_folder, min_pixels=100 * 100, max_pixels=200 * 200, max_length=999
    )
    assert int(large.encode([make_image(16, 16)])[0]["image_grid_thw"].prod()) * 64 >= 100 * 100


def test_saved_files_are_stock_and_stay_the_same(processor, processor_folder, tmp_path, image):
    items = ["a<|mask|>b", {"image": image, "text": LONG}, {"video": [image] * 3}]
    before = processor.encode(items)
    processor.processor(text=["hi"], text_kwargs={"padding": "max_length", "max_length": 7, "truncation": True})
    processor.save_pretrained(tmp_path)
    names = {path.name for path in processor_folder.iterdir()}
    assert names == {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (processor_folder / name).read_bytes(), name
    for old, new in zip(before, CocoaProcessor.from_pretrained(tmp_path).encode(items), strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_loaded_by_transformers_it_gives_the_same_ids(processor, processor_folder):
    stock = AutoProcessor.from_pretrained(processor_folder)
    messages = [[{"role": "user", "content": [{"type": "text", "text": "a <|im_end|> b"}]}]]
    ids = stock.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids[0] == processor.encode(["a <|im_end|> b"])[0]["input_ids"].tolist()
    assert stock.tokenizer.convert_tokens_to_ids("<|mask|>") == processor.mask_token_id
    assert stock.chat_template == stock.tokenizer.chat_template == processor.processor.chat_template


def test_preparing_twice_changes_nothing(processor):
    size, template = len(processor.tokenizer), processor.processor.chat_template
    again = CocoaProcessor(processor.processor)
    assert len(again.tokenizer) == size and again.processor.chat_template == template


def test_a_tokenizer_that_cuts_on_the_left_is_set_to_cut_on_the_right(processor):
    processor.tokenizer.truncation_side = "left"
    stock = CocoaProcessor(processor.processor).processor
    ids = stock(text=["red apple"], text_kwargs={"truncation": True, "max_length": 3})["input_ids"][0]
    assert stock.tokenizer.decode(ids[0]) == "r" and ids[-1] == processor.eos_token_id


def test_a_token_added_later_is_escaped_after_preparing_again(processor):
    processor.tokenizer.add_tokens(["<|secret|>"], special_tokens=True)
    secret = processor.tokenizer.convert_tokens_to_ids("<|secret|>")
    assert secret in processor.encode(["a<|secret|>"])[0]["input_ids"]
    again = CocoaProcessor(processor.processor)
    assert secret not in again.encode(["a<|secret|>"])[0]["input_ids"]
    assert "<|secret|>" in again.tokenizer.chat_template


def test_the_pixel_cap_of_videos_is_said_outright(processor):
    # transformers warns, and will change its mind, where it is None.
    assert getattr(processor.video_processor, "cap_pixels_per_frame", False) is False


def test_qwen2_5_gives_the_seconds_of_its_videos(processor, image):
    newer = CocoaProcessor(
        Qwen2_5_VLProcessor(processor.image_processor, processor.tokenizer, processor.video_processor)
    )
    batch = newer([{"video": [image] * 4}, "hi", {"video": [image] * 2, "text": "hi"}])
    assert batch["second_per_grid_ts"].shape == (2,) and batch["num_videos_per_sample"].tolist() == [1, 0, 1]
    assert "second_per_grid_ts" not in newer(["hi"])


def test_constructor_refuses_what_it_cannot_prepare(processor, processor_folder, tmp_path):
    with pytest.raises(ValueError, match="wraps a Qwen2VLProcessor.*got Qwen2Tokenizer"):
        CocoaProcessor(processor.tokenizer)
    with pytest.raises(ValueError, match="min_pixels .* above max_pixels"):
        CocoaProcessor.from_pretrained(processor_folder, min_pixels=64 * 64 + 1)
    for name in ("min_pixels", "max_pixels", "max_length"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be a whole number"):
                CocoaProcessor.from_pretrained(processor_folder, **{name: value})
    with pytest.raises(ValueError, match="max_length must be a whole number"):
        processor.encode(["hi"], max_length=0)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|vision_end|>", "<|elsewhere|>"))
    with pytest.raises(ValueError, match=r"lacks the special tokens \['<\|vision_end\|>'\]"):
        CocoaProcessor.from_pretrained(tmp_path)


def test_no_pad_token_is_an_error(processor, tmp_path):
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        CocoaProcessor(processor.processor)


def test_template_lists_every_added_token_once(processor):
    listed = processor.processor.chat_template.split("control_tokens = ", 1)[1].split(" -%}", 1)[0]
    assert json.loads(listed) == sorted({*processor.tokenizer.get_added_vocab(), "<|placeholder|>"})


def test_input_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(CocoaInputError("it is None.", 3)))
    assert (str(error), error.reason, error.position) == ("Item 3: it is None.", "it is None.", 3)
    assert str(CocoaInputError("it is None.")) == "it is None."
