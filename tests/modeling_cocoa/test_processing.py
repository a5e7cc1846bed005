# SPDX-License-Identifier: Apache-2.0
"""Tokens, truncation, padding, parameters and files of `CocoaProcessor`."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, ProcessorMixin, Qwen2_5_VLProcessor

from modeling_cocoa.processing_cocoa import CocoaInputError, CocoaProcessor
from tests.modeling_cocoa.conftest import make_image
from tests.modeling_cocoa.test_saving import of_kind

LONG = "red apple " * 60
VISION_TOKENS = {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"}


def rendered(processor, *items, **kwargs) -> list[str]:
    """The text of each item, images as one placeholder."""
    texts = [processor.tokenizer.decode(row["input_ids"]) for row in processor.preprocess(list(items), **kwargs)]
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
    first, second = processor.preprocess([{"text": "hi", "image": image}, {"image": image, "text": "hi"}])
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_special_tokens_in_text_are_plain_text_even_when_split_over_parts(processor, image):
    split = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}, {"type": "image", "image": image}]
    texts = [*processor.tokenizer.get_added_vocab(), "<|placeholder|>"]
    items = [{"text": text, "image": image} for text in texts] + [[{"role": "user", "content": split}]]
    for text, row in zip([*texts, "split"], processor.preprocess(items), strict=True):
        ids = row["input_ids"].tolist()
        assert ids.count(processor.eos_token_id) == 1, text
        assert ids.count(processor.image_token_id) == 6, text
        assert processor.mask_token_id not in ids, text
    assert rendered(processor, "a<|im_end|>b") == ["<|im_start|>user\na< |im_end|>b<|im_end|>"]


def test_token_types_and_media_belong_to_their_row(processor, image):
    other = make_image(32, 32, seed=1)
    frames = [make_image(32, 32, seed=seed) for seed in range(3)]
    rows = processor.preprocess(["hi", {"images": [image, other], "text": "hi"}, other, {"video": frames}])
    alone = [processor.preprocess([item])[0] for item in (image, other)]
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
    rows = processor.preprocess(items)
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
    assert processor.preprocess([]) == []
    with pytest.raises(ValueError, match="nothing to collate"):
        processor([])


def test_truncation_drops_the_last_text_and_keeps_the_eos(processor):
    whole = processor.preprocess([LONG], max_length=10_000)[0]["input_ids"]
    for limit in (1, 2, 20, 95):
        ids = processor.preprocess([LONG], max_length=limit)[0]["input_ids"]
        assert ids.tolist() == [*whole[: limit - 1].tolist(), processor.eos_token_id]
    assert len(processor.preprocess([LONG])[0]["input_ids"]) == processor.max_length == 96
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
    whole = processor.preprocess([conversation], max_length=10_000)[0]
    vision = processor.tokenizer.convert_tokens_to_ids(sorted(VISION_TOKENS))
    for limit in (9, 10, 30, 96):
        row = processor.preprocess([conversation], max_length=limit)[0]
        ids = row["input_ids"].tolist()
        kept_text = [token for token in ids[:-1] if token not in vision]
        whole_text = [token for token in whole["input_ids"][:-1].tolist() if token not in vision]
        assert len(ids) == limit and ids[-1] == processor.eos_token_id
        assert [token for token in ids if token in vision] == [t for t in whole["input_ids"].tolist() if t in vision]
        assert kept_text == whole_text[: limit - 9]
        assert torch.equal(row["pixel_values"], whole["pixel_values"])


def test_image_longer_than_max_length_is_an_error_that_names_the_remedy(processor, image):
    with pytest.raises(CocoaInputError, match="Item 1: .* take 8 tokens.*max_length=8.*max_pixels") as caught:
        processor.preprocess(["hi", {"image": image, "text": "hi"}], max_length=8)
    assert caught.value.position == 1


def test_a_missing_eos_is_an_error(processor):
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    with pytest.raises(CocoaInputError, match=r"Item 0: its last token is not <\|im_end\|>"):
        processor.preprocess(["hi"])


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
        assert int(one.preprocess([image])[0]["image_grid_thw"].prod()) * 64 <= 1024
    large = CocoaProcessor.from_pretrained(
        processor_folder, min_pixels=100 * 100, max_pixels=200 * 200, max_length=999
    )
    assert int(large.preprocess([make_image(16, 16)])[0]["image_grid_thw"].prod()) * 64 >= 100 * 100


def test_saved_files_are_stock_and_stay_the_same(processor, processor_folder, tmp_path, image):
    items = ["a<|mask|>b", {"image": image, "text": LONG}, {"video": [image] * 3}]
    before = processor.preprocess(items)
    processor.processor(text=["hi"], text_kwargs={"padding": "max_length", "max_length": 7, "truncation": True})
    processor.save_pretrained(tmp_path)
    names = {path.name for path in processor_folder.iterdir()}
    assert names == {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (processor_folder / name).read_bytes(), name
    for old, new in zip(before, CocoaProcessor.from_pretrained(tmp_path).preprocess(items), strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_loaded_by_transformers_it_gives_the_same_ids(processor, processor_folder):
    stock = AutoProcessor.from_pretrained(processor_folder)
    messages = [[{"role": "user", "content": [{"type": "text", "text": "a <|im_end|> b"}]}]]
    ids = stock.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids[0] == processor.preprocess(["a <|im_end|> b"])[0]["input_ids"].tolist()
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
    assert secret in processor.preprocess(["a<|secret|>"])[0]["input_ids"]
    again = CocoaProcessor(processor.processor)
    assert secret not in again.preprocess(["a<|secret|>"])[0]["input_ids"]
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
        processor.preprocess(["hi"], max_length=0)
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


STOCK_TENSORS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
STOCK_TENSORS += ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


def check_call(processor, items, conversations, **media):
    """The call of stock processors on filled templates gives the tensors of the same content as inputs."""
    text = processor.apply_chat_template(conversations)
    called = processor(text=text, padding=True, return_tensors="pt", **media)
    expected = processor(items)
    assert called.keys() == expected.keys() & set(STOCK_TENSORS)
    for key, value in called.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=key)
    assert (called["input_ids"][:, -1] == processor.eos_token_id).any()


def chat(*parts):
    return [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in parts]}]


def test_it_is_a_processor_of_transformers_and_is_called_as_one(processor, image):
    assert isinstance(processor, ProcessorMixin)
    other = make_image(32, 32, channels=1, seed=1)
    items = [{"image": image, "text": "a cat"}, "a red apple on a table", {"images": [other, image], "text": "two"}]
    conversations = [
        chat(("image", image), ("text", "a cat")),
        chat(("text", "a red apple on a table")),
        chat(("image", other), ("image", image), ("text", "two")),
    ]
    check_call(processor, items, conversations, images=[image, other, image])
    check_call(processor, items, conversations, images=[[image], [], [other, np.array(image)]])
    check_call(processor, items[1:2], conversations[1:2])
    check_call(processor, items[:1], conversations[:1], images=image)
    tokenized = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, padding=True)
    assert torch.equal(torch.as_tensor(tokenized["input_ids"]), processor(items)["input_ids"])
    assert processor.batch_decode(processor(["a cat"])["input_ids"]) == ["<|im_start|>user\na cat<|im_end|>"]
    assert set(processor.model_input_names) >= {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}


def test_a_call_reads_videos_as_inputs_are_read(processor, image, model_type):
    processor = of_kind(processor, model_type)
    film, array = [image] * 4, np.stack([np.array(make_image(32, 32))] * 2)
    items = [{"video": film, "text": "a cat"}, {"video": array, "image": image}]
    conversations = [chat(("video", film), ("text", "a cat")), chat(("video", array), ("image", image))]
    check_call(processor, items, conversations, videos=[film, array], images=[image])
    check_call(processor, items, conversations, videos=[[film], [array]], images=[[], [image]])
    check_call(processor, items[:1], conversations[:1], videos=film)


def test_a_call_reads_images_as_inputs_are_read(processor, tmp_path):
    """Transparency on white, and nothing is downloaded."""
    clear = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    for form in (clear, str(tmp_path / "clear.png")):
        check_call(processor, [{"image": clear}], [chat(("image", form))], images=[form])
    text = processor.apply_chat_template([chat(("image", clear))] * 2)
    with pytest.raises(CocoaInputError, match="Item 1 of the images: https://a.org/cat.png is a link"):
        processor(text=text, images=[clear, "https://a.org/cat.png"])
    with pytest.raises(TypeError, match="not both"):
        processor(["a cat"], text=["a cat"])


def test_the_former_name_of_preprocess_warns(processor):
    with pytest.warns(FutureWarning, match="now called preprocess"):
        rows = processor.encode(["a cat"], max_length=5)
    assert torch.equal(rows[0]["input_ids"], processor.preprocess(["a cat"], max_length=5)[0]["input_ids"])


def decoded(processor, item, **options):
    return processor.tokenizer.decode(processor.preprocess([item], **options)[0]["input_ids"])


def test_qwen3_writes_the_time_of_each_frame_and_never_cuts_it(processor, image):
    """As the published model was trained: `<0.2 seconds><|vision_start|>...<|vision_end|>`, nothing around all."""
    qwen3 = of_kind(processor, "qwen3_vl")
    film = {"video": {"array": [image] * 4, "video_metadata": {"fps": 2.0}}, "text": "a cat and a cow " * 9}
    frame = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    media = f"<|im_start|>user\n<0.2 seconds>{frame}<1.2 seconds>{frame}"
    assert decoded(qwen3, film).startswith(f"{media}a cat and a cow")
    shortest = len(qwen3.preprocess([{**film, "text": None}])[0]["input_ids"])
    assert decoded(qwen3, film, max_length=shortest) == f"{media}<|im_end|>"
    with pytest.raises(CocoaInputError, match="its images and videos take"):
        decoded(qwen3, film, max_length=shortest - len(qwen3.tokenizer("<|im_start|>user\n")["input_ids"]))
    # Without their rate, frames are 24 a second, as in transformers.
    assert "<0.0 seconds>" in decoded(qwen3, {"video": [image] * 4})


def test_the_rate_of_given_frames_reaches_the_model(processor, image):
    newer = of_kind(processor, "qwen2_5_vl")
    films = [{"video": {"array": [image] * 4, "video_metadata": {"fps": fps}}} for fps in (2.0, 8.0, None)]
    assert newer(films)["second_per_grid_ts"].tolist() == pytest.approx([1.0, 0.25, 2 / 24])


def test_the_published_prompt_of_qwen3_vl_embedding_is_a_prompt(processor, image):
    qwen3 = of_kind(processor, "qwen3_vl")
    units = "<|image_pad|>" * 6
    assert decoded(qwen3, {"image": image, "text": "a cat"}, prompt="Represent the user's input.") == (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{units}<|vision_end|>a cat<|im_end|>"
    )


def test_pixel_limits_of_qwen3_are_those_of_images(processor):
    qwen3 = of_kind(processor, "qwen3_vl")
    videos = dict(qwen3.video_processor.size)
    smaller = CocoaProcessor(qwen3.processor, max_pixels=1024)
    assert smaller.image_processor.size["longest_edge"] == 1024 and dict(smaller.video_processor.size) == videos


def test_content_alone_has_no_prompt(processor):
    (alone,) = processor.preprocess(["a cat"], add_special_tokens=False)
    prompted = CocoaProcessor(processor.processor, prompt="Find it:")
    for reader, options in ((processor, {"prompt": "Find it:"}), (prompted, {})):
        (row,) = reader.preprocess(["a cat"], add_special_tokens=False, **options)
        assert torch.equal(row["input_ids"], alone["input_ids"])
    assert processor.tokenizer.decode(alone["input_ids"]) == "a cat"
