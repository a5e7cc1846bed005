# SPDX-License-Identifier: Apache-2.0
"""Many inputs to vectors: the same as one by one, whatever the batches."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from PIL import Image

from modeling_cocoa import encoding, processing_cocoa
from modeling_cocoa.inputs import CocoaInputError, read_input
from modeling_cocoa.sentence_transformer import CocoaTransformer
from modeling_cocoa.threads import map_ahead, read_ahead
from tests.conftest import CLASSES
from tests.modeling_cocoa.conftest import make_image
from tests.modeling_cocoa.test_saving import random_model
from tests.modeling_cocoa.test_sentence_transformer import mixture, module_of


@pytest.fixture(params=list(CLASSES))
def module(request, processor):
    return module_of(processor, request.param)[0].eval()


def counted(module, monkeypatch):
    """Rows and tokens of each forward pass."""
    calls, forward = [], module.model.forward

    def count(**batch):
        calls.append((len(batch["input_ids"]), int(batch["attention_mask"].sum())))
        return forward(**batch)

    monkeypatch.setattr(module.model, "forward", count)
    return calls


def counted_images(module, monkeypatch):
    """Images of each pass through the vision tower."""
    calls, read = [], module.model.get_image_features

    def count(pixel_values, image_grid_thw, **options):
        calls.append(len(image_grid_thw))
        return read(pixel_values, image_grid_thw, **options)

    monkeypatch.setattr(module.model, "get_image_features", count)
    return calls


@pytest.mark.parametrize("options", [{}, {"batch_num_tokens": 30}, {"batch_num_tokens": 1}, {"batch_size": 2}])
def test_any_batches_give_the_vectors_of_one_by_one(module, image, tmp_path, options):
    items = mixture(image, tmp_path)
    vectors = module.encode(items, **options)
    for item, vector in zip(items, vectors, strict=True):
        np.testing.assert_allclose(module.encode([item])[0], vector, atol=1e-5, rtol=0)


def test_batches_keep_to_their_tokens(module, monkeypatch):
    calls = counted(module, monkeypatch)
    texts = ["a cat"] * 3 + [f"a red apple {number}" for number in range(9)] + ["a nerd face with glasses " * 20]
    module.encode(texts, batch_num_tokens=40)
    assert all(tokens <= 40 or rows == 1 for rows, tokens in calls)
    assert any(tokens > 40 for _, tokens in calls), "an input beyond the budget runs alone"
    assert len(calls) < 9


def test_the_same_input_is_computed_once(module, image, monkeypatch):
    monkeypatch.setattr(encoding, "INPUTS_AT_ONCE", 3)
    calls = counted(module, monkeypatch)
    vectors = module.encode(["a cat", image, "a cat", image.copy(), "a cat", "a dog"])
    assert sum(rows for rows, _ in calls) == 3
    assert np.array_equal(vectors[0], vectors[2]) and np.array_equal(vectors[0], vectors[4])
    assert np.array_equal(vectors[1], vectors[3])
    assert np.abs(vectors[0] - vectors[5]).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}])
def test_an_image_of_several_inputs_passes_the_vision_tower_once(module, image, monkeypatch, options):
    other = make_image(48, 32, seed=5)
    items = [{"image": image, "text": text} for text in ("what is it?", "which colour?")]
    items += [{"image": other, "text": "what is it?"}, {"images": [image, other]}]
    expected = np.concatenate([module.encode([item]) for item in items])
    calls = counted_images(module, monkeypatch)
    np.testing.assert_allclose(module.encode(items, **options), expected, atol=1e-5, rtol=0)
    assert sum(calls) == 2


def test_the_features_of_the_last_images_are_kept(module, monkeypatch):
    """From one part of the inputs to the next, but no more than so many tokens of them."""
    monkeypatch.setattr(encoding, "INPUTS_AT_ONCE", 2)
    images = [make_image(40, 40, seed=number) for number in range(4)]
    items = [
        {"image": images[number], "text": f"{place} what is it?"} for place, number in enumerate([0, 1, 0, 2, 0, 1])
    ]
    tokens = int(module.processor.preprocess(images[:1])[0]["mm_token_type_ids"].sum())
    expected = np.concatenate([module.encode([item]) for item in items])
    calls = counted_images(module, monkeypatch)
    np.testing.assert_allclose(module.encode(items, batch_num_tokens=2 * tokens), expected, atol=1e-5, rtol=0)
    assert calls == [2, 1], "0 and 1, then 2"
    calls.clear()
    monkeypatch.setattr(encoding, "IMAGE_BATCHES_AT_ONCE", 1)
    np.testing.assert_allclose(module.encode(items, batch_num_tokens=2 * tokens), expected, atol=1e-5, rtol=0)
    assert calls == [2, 1, 1], "1 was let go for 2, then read again beside 0, which is kept"


@torch.no_grad()
def test_the_padded_reference_knows_shared_images_too(module, image, monkeypatch):
    items = [{"image": image, "text": text} for text in ("what is it?", "which colour?")]
    expected = module.encode(items)
    module.model.set_attn_implementation("eager")
    monkeypatch.setattr(module.model, "run_packed", None)
    np.testing.assert_allclose(module.encode(items), expected, atol=1e-5, rtol=0)


def test_large_images_come_a_few_at_a_time(module, monkeypatch):
    """However many inputs, few are held as tensors at once: counted by their images' pixels."""
    images = [make_image(40, 40, seed=number) for number in range(7)]
    expected = module.encode(images)
    read, make_tensors = [], module.processor.make_tensors
    monkeypatch.setattr(
        module.processor, "make_tensors", lambda part, **options: read.append(len(part)) or make_tensors(part)
    )
    windows, run = [], encoding.Embedder.run
    monkeypatch.setattr(
        encoding.Embedder, "run", lambda self, items, *args: windows.append(len(items)) or run(self, items, *args)
    )
    tokens = 1600 // module.processor.token_pixels
    monkeypatch.setattr(encoding, "CPU_PART_TOKENS", 2 * tokens)
    monkeypatch.setattr(encoding, "IMAGE_BATCHES_AT_ONCE", 2)
    np.testing.assert_allclose(module.encode(images, batch_num_tokens=2 * tokens), expected, atol=1e-5, rtol=0)
    assert read == [2, 2, 2, 1]
    assert windows == [2, 2, 4, 2, 1, 3], "images part by part, then the inputs that share batches"


def test_images_count_at_the_size_that_they_are_scaled_to(processor, image):
    """An image of 4 x 4 pixels may take as much room as one of 40 x 40."""
    tiny, large = Image.new("RGB", (4, 4)), Image.new("RGB", (100, 100))
    video = np.zeros((6, 10, 20, 3), dtype=np.uint8)
    (conversation,) = processor.read([{"images": [tiny, Image.new("RGB", (30, 30)), large], "video": video}])
    assert conversation.pixels(400, 1600) == 400 + 900 + 1600 + 6 * 400


def test_a_number_of_inputs_is_that_number(module, monkeypatch):
    calls = counted(module, monkeypatch)
    monkeypatch.setattr(encoding, "CPU_BATCH_TOKENS", 10)
    module.encode([f"a red apple {number}" for number in range(9)], batch_size=4)
    assert [rows for rows, _ in calls] == [4, 4, 1]
    calls.clear()
    module.encode([f"a red apple {number}" for number in range(9)], batch_size=4, batch_num_tokens=40)
    assert all(rows <= 4 and tokens <= 40 for rows, tokens in calls)


@pytest.mark.parametrize("options", [{}, {"batch_num_tokens": 30}, {"batch_size": 2}])
def test_reading_in_threads_changes_nothing(module, image, tmp_path, monkeypatch, options):
    """As for a GPU: parts of few images, inputs that occur again, files and images that are decoded late."""
    image.save(tmp_path / "late.png")
    late = Image.open(tmp_path / "late.png")
    items = [*mixture(image, tmp_path), late, {"image": late, "text": "it"}, late, "a cat", tmp_path / "late.png"] * 3
    expected = module.encode(items, **options)
    monkeypatch.setattr(encoding, "CPU_READERS", 3)
    monkeypatch.setattr(encoding, "CPU_PART_TOKENS", 4)
    monkeypatch.setattr(encoding, "PARTS_AHEAD", 2)
    np.testing.assert_allclose(module.encode(iter(items), **options), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bad", "reason"), [("", "the text is empty"), (np.zeros((9, 9, 3)), "uint8")])
def test_threads_name_the_input_that_cannot_be_read(module, image, monkeypatch, bad, reason):
    monkeypatch.setattr(encoding, "CPU_READERS", 3)
    monkeypatch.setattr(encoding, "INPUTS_AT_ONCE", 4)
    before = threading.active_count()
    with pytest.raises(CocoaInputError, match=f"Item 9: .*{reason}"):
        module.encode([*(f"text {number}" for number in range(9)), bad, *[image] * 20])
    assert threading.active_count() == before, "nothing goes on behind the error"


def test_an_image_that_is_opened_late_is_decoded_once(tmp_path, processor):
    """Pillow reads one file; threads that decode it together would mix their places in it."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    expected = Image.open(tmp_path / "a.png").convert("RGB").tobytes()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            late = Image.open(tmp_path / "a.png")
            found = list(processor.read([late] * 8, pool))
            assert all(conversation.images[0].tobytes() == expected for conversation in found)


def test_mapping_ahead_keeps_the_order_and_is_so_many_ahead():
    asked: list[int] = []

    def items():
        for number in range(20):
            asked.append(number)
            yield number

    with ThreadPoolExecutor(4) as pool:
        for place, square in enumerate(map_ahead(pool, lambda number: number**2, items(), 3)):
            assert square == place**2
            assert len(asked) <= place + 4
    assert len(asked) == 20


def test_reading_ahead_keeps_the_order_and_the_error():
    assert list(read_ahead(iter(range(1, 6)))) == [1, 2, 3, 4, 5]

    def failing():
        yield 1
        raise CocoaInputError("the text is empty", 7)

    ahead = read_ahead(failing())
    assert next(ahead) == 1
    with pytest.raises(CocoaInputError, match="Item 7"):
        next(ahead)


@pytest.mark.parametrize(
    "change",
    [
        lambda item: {**item, "text": "what is it? "},
        lambda item: {**item, "image": item["image"].transpose(0)},
        lambda item: {**item, "images": [item["image"]]},
        lambda item: {"image": item["image"]},
        lambda item: [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
    ],
)
def test_a_digest_tells_inputs_apart(processor, image, change):
    item = {"image": image, "text": "what is it?"}
    same, again, other = processor.read([item, {**item, "image": image.copy()}, change(item)])
    assert same.digest == again.digest != other.digest


@pytest.mark.parametrize("mode", ["P", "PA"])
def test_a_digest_sees_the_colours_of_a_palette(processor, mode):
    """Two drawings with the same indices into different palettes."""
    first, second = Image.new("P", (32, 32), 1), Image.new("P", (32, 32), 1)
    first.putpalette([0, 0, 0, 255, 0, 0])
    second.putpalette([0, 0, 0, 0, 255, 0])
    first, second = first.convert(mode), second.convert(mode)
    assert first.tobytes() == second.tobytes()
    red, green = processor.read([first, second])
    assert red.digest != green.digest


def test_a_digest_sees_when_the_frames_of_a_video_were(processor, image):
    frames = np.stack([np.asarray(image)] * 4)
    one, two = processor.read([{"video": frames}, {"video": frames.copy()}])
    assert one.digest == two.digest
    ((frames, metadata),) = two.videos
    slow = replace(two, videos=[(frames, replace(metadata, fps=0.5))])
    assert slow.digest != one.digest


@pytest.mark.parametrize("one", ["a cat", {"text": "a cat"}, Path("cat.png")])
def test_one_input_is_no_list_of_inputs(module, one):
    with pytest.raises(TypeError, match="list of inputs.*Put it in a list"):
        module.encode(one)


def test_nothing_to_encode_is_no_vectors(module):
    assert module.encode([]).shape == (0, 64)


def test_a_bad_input_is_named_by_its_place_in_the_call(module, monkeypatch):
    monkeypatch.setattr(encoding, "INPUTS_AT_ONCE", 2)
    with pytest.raises(CocoaInputError, match="Item 4.*empty"):
        module.encode(["a", "b", "c", "d", " "])
    with pytest.raises(ValueError, match="batch_num_tokens must be 1 or more; got 0"):
        module.encode(["a"], batch_num_tokens=0)


def test_the_former_name_of_the_token_budget_warns(module, monkeypatch):
    calls = counted(module, monkeypatch)
    with pytest.warns(FutureWarning, match="now called batch_num_tokens"):
        module.encode(["a cat", "a dog"], batch_tokens=1)
    assert len(calls) == 2


def test_inputs_are_read_once_and_made_tensors_once(module, image, monkeypatch):
    """Neither checked again on their way, nor digested again, nor kept with their pixels."""
    read = []
    monkeypatch.setattr(
        processing_cocoa, "read_input", lambda item, *rest: read.append(item) or read_input(item, *rest)
    )
    items = ["a cat", image, {"image": image, "text": "it"}]
    module.encode(items)
    assert len(read) == len(items)


def test_too_little_memory_halves_the_batches(module, monkeypatch, caplog):
    """The error is torch's own; that a GPU raises it is tested in tests/gpu."""
    texts = [f"a red apple {number}" for number in range(8)]
    expected = module.encode(texts)
    forward = module.model.forward

    def with_little_memory(**batch):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(**batch)

    monkeypatch.setattr(module.model, "forward", with_little_memory)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(module.encode(texts), expected, atol=1e-5, rtol=0)
    assert "memory does not suffice" in caplog.text


def modes(module):
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("trained", ["all", "none", "some", "wrapper"])
def test_encode_leaves_the_mode_of_every_module(module, trained):
    """And its vectors are those of evaluation mode."""
    module.eval()
    expected = module.encode(["a cat", "a red apple"])
    for layer in module.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    if trained == "all":
        module.train()
    elif trained == "some":
        module.model.language_model.layers[0].train()
    elif trained == "wrapper":
        module.training = True
    before = modes(module)
    np.testing.assert_array_equal(module.encode(["a cat", "a red apple"]), expected)
    assert modes(module) == before
    with pytest.raises(CocoaInputError):
        module.encode([" "])
    assert modes(module) == before


@pytest.mark.parametrize("is_training", [False, True])
def test_encode_does_not_touch_a_forward_of_another_thread(module, is_training):
    """Neither one in evaluation mode nor one in training mode, whose dropout stays; nor other calls of encode."""
    for layer in module.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    module.eval()
    texts = [f"a red apple {number}" for number in range(6)]
    expected = module.encode(texts)
    features = module.preprocess(texts)
    module.model.train(is_training)

    def look(number):
        return all(part.training is is_training for part in module.model.modules())

    def forward(number):
        with torch.no_grad():
            return module.forward(dict(features))["sentence_embedding"].numpy()

    with ThreadPoolExecutor(8) as pool:
        encoded = [pool.submit(module.encode, texts, batch_size=2) for _ in range(12)]
        looked = [pool.submit(look, number) for number in range(50)]
        forwarded = [pool.submit(forward, number) for number in range(12)]
        for future in encoded:
            np.testing.assert_allclose(future.result(), expected, atol=1e-5, rtol=0)
        assert all(future.result() for future in looked)
        off = [np.abs(future.result() - expected).max() for future in forwarded]
    assert min(off) > 1e-3 if is_training else max(off) < 1e-5


def test_a_model_that_accelerate_placed_is_embedded_without_dropout(module):
    """Its modules' forwards are attributes that accelerate bound to them."""
    expected = module.encode(["a cat"])
    for layer in module.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
        add_hook_to_module(layer, ModelHook())
    add_hook_to_module(module.model, ModelHook())
    module.train()
    np.testing.assert_allclose(module.encode(["a cat"]), expected, atol=1e-6, rtol=0)
    assert all(modes(module))


TEXTS = ["a cat", "a dog", "a cat", "a red apple"]
ITERABLES = {
    "tuple": tuple,
    "generator": iter,
    "map": lambda items: map(str, items),
    "values of a dict": lambda items: dict(enumerate(items)).values(),
    "deque": deque,
    "Series": lambda items: pd.Series(items, index=[3, 1, 2, 0]),
    "Series of categories": lambda items: pd.Series(items, dtype="category"),
    "array of objects": lambda items: np.array(items, dtype=object),
    "array of str": np.array,
    "column of datasets": lambda items: Dataset.from_dict({"text": items})["text"],
    "rows of datasets": lambda items: Dataset.from_dict({"text": items}),
}


@pytest.mark.parametrize("kind", ITERABLES)
def test_inputs_may_be_anything_that_gives_them_one_by_one(module, kind, monkeypatch):
    monkeypatch.setattr(encoding, "INPUTS_AT_ONCE", 2)
    vectors = module.encode(ITERABLES[kind](TEXTS))
    np.testing.assert_allclose(vectors, module.encode(TEXTS), atol=1e-6, rtol=0)
    assert len(module.processor.preprocess(ITERABLES[kind](TEXTS))) == len(TEXTS)


def test_a_generator_of_images_is_read_as_it_is_needed(module, monkeypatch):
    monkeypatch.setattr(encoding, "INPUTS_AT_ONCE", 2)
    images = [make_image(40, 40, seed=number) for number in range(7)]
    np.testing.assert_allclose(module.encode(iter(images)), module.encode(images), atol=1e-6, rtol=0)
    assert module.encode(iter([])).shape == (0, 64)


@pytest.mark.parametrize(
    "one",
    ["a cat", b"", {"text": "a"}, np.zeros((8, 8)), np.zeros((2, 8, 8, 3)), torch.zeros(8, 8), pd.DataFrame(), 5],
)
def test_what_is_one_input_or_a_table_is_refused(module, one):
    with pytest.raises(TypeError, match="inputs must be a list of inputs; got one"):
        module.encode(one)


def test_vectors_are_float32_whatever_the_default(module, image):
    expected = module.encode(["a cat", image])
    torch.set_default_dtype(torch.float64)
    try:
        vectors = module.encode(["a cat", image])
    finally:
        torch.set_default_dtype(torch.float32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_pace", [False, True])
def test_many_short_videos_in_a_batch(processor, with_pace):
    """More of them than a row has tokens; with the processor of Qwen2-VL their pace is not known."""
    module = module_of(processor, "qwen2_5_vl" if with_pace else "qwen2_vl")[0].eval()
    if not with_pace:
        module = CocoaTransformer(random_model(processor, "qwen2_5_vl"), processor).eval()
    videos = [{"video": [make_image(16, 16, seed=2 * number + place) for place in range(2)]} for number in range(60)]
    features = module.preprocess(videos[:1])
    assert len(videos) > features["input_ids"].shape[1]
    one_by_one = np.concatenate([module.encode([video]) for video in videos])
    np.testing.assert_allclose(module.encode(videos), one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("at_once", [1024, 2])
def test_inputs_that_cannot_be_embedded_are_told_apart(module, image, monkeypatch, at_once):
    """Unreadable, too long, one of which the model fails, and its repetition; the rest has its vectors."""
    monkeypatch.setattr(encoding, "INPUTS_AT_ONCE", at_once)
    wide = make_image(90, 90, seed=3)
    too_long = {"images": [wide] * 400}
    fails = {"text": "what is it?", "image": make_image(60, 60, seed=9)}
    items = ["a cat", " ", image, too_long, fails, "a dog", fails, b"no image", {"image": image, "text": "a"}]
    good = [0, 2, 5, 8]
    expected = module.encode([items[place] for place in good])
    module.processor.tokenizer.model_max_length = 2000
    row = module.processor.preprocess([fails])[0]["input_ids"]
    embed = encoding.Embedder.embed

    def fail(self, window, batch):
        if any(torch.equal(window.rows[position]["input_ids"], row) for position in batch):
            raise RuntimeError("the kernel fails")
        return embed(self, window, batch)

    monkeypatch.setattr(encoding.Embedder, "embed", fail)
    failed = {}
    vectors = encoding.encode_inputs(module.model, module.processor, items, failed=failed)
    assert vectors.shape[0] == len(items) and set(failed) == {1, 3, 4, 6, 7}
    assert "the text is empty" in failed[1] and "exceed max_length" in failed[3]
    assert failed[4] == failed[6] == "RuntimeError: the kernel fails" and "cannot be read" in failed[7]
    np.testing.assert_allclose(vectors[good], expected, atol=1e-5, rtol=0)
    assert torch.isnan(vectors[list(failed)]).all()
    with pytest.raises(CocoaInputError, match="Item 1: the text is empty"):
        encoding.encode_inputs(module.model, module.processor, items)


def test_an_image_of_which_the_vision_tower_fails_takes_its_inputs_along(module, image, monkeypatch):
    other = make_image(60, 60, seed=9)
    items = [{"image": image, "text": "a"}, {"image": other}, "a cat", {"images": [image, other]}]
    expected = module.encode([items[0], items[2]])
    read = module.model.encode_images
    patches = module.processor.preprocess([other])[0]["pixel_values"]

    def fail(pixels, grids):
        if any(torch.equal(pixels[place : place + len(patches)], patches) for place in range(len(pixels))):
            raise RuntimeError("the kernel fails")
        return read(pixels, grids)

    monkeypatch.setattr(module.model, "encode_images", fail)
    failed = {}
    vectors = encoding.encode_inputs(module.model, module.processor, items, failed=failed)
    assert failed == {1: "RuntimeError: the kernel fails", 3: "RuntimeError: the kernel fails"}
    np.testing.assert_allclose(vectors[[0, 2]], expected, atol=1e-5, rtol=0)
