# SPDX-License-Identifier: Apache-2.0
"""Rows of every form become the same texts and images, and train alike."""

from __future__ import annotations

import zipfile

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from modeling_cocoa import CocoaTransformer
from modeling_cocoa.inputs import CocoaInputError
from trainers.data.batching import count_row_tokens
from trainers.data.collators import ReconstructionCollator
from trainers.data.contrastive_rows import ContrastiveCollator
from trainers.data.datasets import ReconstructionDataset
from trainers.data.rows import open_images, parts_of


def kinds(parts):
    return [part.get("text", "image") for part in parts]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": 1, "text": "a"}, ["image", "a"]),
        ({"image": None, "text": "a"}, ["a"]),
        ({"images": [1, 2], "text": " "}, ["image", "image"]),
        ({"image": 1, "images": [2, None], "text": None}, ["image", "image"]),
        ({"texts": ["a", None, "b", "c"], "images": [None, 1, None, None]}, ["a", "image", "b\nc"]),
        ({"texts": ["a", "b"]}, ["a\nb"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["a\nb"]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "a"}]},
                    {"role": "user", "content": [{"type": "image", "image": 2}, {"type": "image"}]},
                ],
                "images": [1, 3],
            },
            ["image", "a", "image", "image"],
        ),
    ],
)
def test_every_form_is_texts_and_images_in_order(row, expected):
    assert kinds(parts_of(row)) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": None, "text": ""}, "neither an image nor a text"),
        ({}, "neither an image nor a text"),
        ({"text": 3}, "its text is of type int"),
        ({"texts": ["a"], "images": [None, 1]}, "2 images and 1 texts"),
        ({"texts": ["a"], "images": [1]}, "place 0 .* holds both"),
        ({"texts": ["a"], "text": "b"}, "texts and a text"),
        ({"messages": [{"role": "user", "content": "a"}], "text": "b"}, "messages and a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "more image parts"),
        ({"messages": [{"role": "user", "content": "a"}], "images": [1]}, "1 of its images"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "'video'"),
        ({"messages": [{"role": "user"}]}, "no content"),
    ],
)
def test_rows_whose_columns_do_not_fit_are_refused(row, reason):
    with pytest.raises(CocoaInputError, match=reason):
        parts_of(row)


def in_forms(emoji):
    """The same rows, one image and one text each, in every form that a dataset can have them in."""
    pictures, texts = [row["image"] for row in emoji], list(emoji["text"])
    images = List(ImageFeature())
    content = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": content})
    turns = [
        [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": text}]}]
        for text in texts
    ]
    lists = [[picture] for picture in pictures]
    return {
        "plain": Dataset.from_dict({"image": pictures, "text": texts}),
        "images": Dataset.from_dict(
            {"images": lists, "text": texts}, features=Features({"images": images, "text": Value("string")})
        ),
        "interleaved": Dataset.from_dict(
            {"images": [[picture, None] for picture in pictures], "texts": [[None, text] for text in texts]},
            features=Features({"images": images, "texts": List(Value("string"))}),
        ),
        "messages": Dataset.from_dict(
            {"images": lists, "messages": turns}, features=Features({"images": images, "messages": messages})
        ),
    }


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_the_same_rows_in_any_form_are_the_same_batch(processor, emoji, stage):
    collator = ReconstructionCollator(processor, stage=stage)
    batches, counts = {}, {}
    for form, dataset in in_forms(emoji.select(range(6))).items():
        rows = ReconstructionDataset(dataset, seed=1)
        batches[form] = collator([rows[index] for index in range(6)])
        counts[form] = count_row_tokens(rows.parts[""], processor).tolist()
    for form, batch in batches.items():
        assert counts[form] == counts["plain"]
        for name, value in batches["plain"].items():
            same = torch.equal(value, batch[name]) if isinstance(value, torch.Tensor) else value == batch[name]
            assert same, (form, name)


def test_an_interleaved_document_keeps_its_order(processor, emoji):
    row = {
        "images": [None, emoji[0]["image"], None, emoji[1]["image"]],
        "texts": ["before", None, "between", None],
        "index": 0,
        "seed": 3,
    }
    warmup = ReconstructionCollator(processor, stage="warmup").example(row)
    ids = torch.where(warmup.source.labels != -100, warmup.source.labels, warmup.source.input_ids)
    assert processor.tokenizer.decode(ids).count("<|image_pad|>") == 8
    text = processor.tokenizer.decode(ids[ids != processor.image_token_id])
    ends = "<|vision_start|><|vision_end|>"
    assert text == f"<|im_start|>user\nbefore{ends}between{ends}<|im_end|>"
    bridge = ReconstructionCollator(processor, stage="bridge", direction_weights={"image_to_text": 1}).example(row)
    labels = bridge.target.labels
    target = torch.where(labels != -100, labels, bridge.target.input_ids)
    assert processor.tokenizer.decode(target) == "before\nbetween"
    assert len(bridge.source.image_grid_thw) == 2 and bridge.target.image_grid_thw is None


MISSING = ["nope.png", "~/nope.png", "file:///nope.jpg", "nope.mp4"]


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("side", ["query", "positive"])
def test_a_str_that_ends_like_a_file_and_is_none_is_a_bad_row(processor, model, missing, side):
    """In both kinds of training; as the text of a dict it is a text."""
    row = {"query": "a cat", "positive": "a dog", side: missing}
    contrastive = ContrastiveCollator(CocoaTransformer(model, processor).preprocess)
    with pytest.raises(
        ValueError, match=f"A row of this batch cannot be read: there is no .*{missing}.*meant as text"
    ):
        contrastive([row])
    assert contrastive.check([{**row, side: {"text": missing}}])
    for stage in ("warmup", "bridge"):
        collator = ReconstructionCollator(processor, stage=stage)
        with pytest.raises(CocoaInputError, match=f"there is no .*{missing}.*meant as text"):
            collator.check({**row, "index": 0, "seed": 0})
        collator.check({**row, side: {"text": missing}, "index": 0, "seed": 0})
        collator.check({"text": missing, "index": 0, "seed": 0})


@pytest.mark.parametrize("form", ["bytes", "path", "PIL"])
@pytest.mark.parametrize("size", [None, (16, 24)])
def test_every_collator_sees_a_transparent_picture_on_white(processor, model, tmp_path, form, size):
    """One whose colours lie hidden under full transparency: black from files, if they were not put on white."""
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    cell = {
        "bytes": {"bytes": (tmp_path / "clear.png").read_bytes(), "path": None},
        "path": {"bytes": None, "path": str(tmp_path / "clear.png")},
        "PIL": clear,
    }[form]
    (expected,) = processor.preprocess([Image.new("RGB", size or (32, 32), "white")])
    preprocess = CocoaTransformer(model, processor).preprocess
    batch = ContrastiveCollator(preprocess, image_size=size)([{"query": "a cat", "positive": cell}])
    assert torch.equal(batch["positive_pixel_values"], expected["pixel_values"])
    for row in ({"image": cell}, {"query": cell, "positive": "a cat"}):
        example = ReconstructionCollator(processor, stage="warmup", image_size=size).example(
            {**row, "index": 0, "seed": 0}
        )
        labels = example.source.pixel_labels  # the pixels that were masked
        assert len(labels) and torch.equal(labels, expected["pixel_values"][:1].expand_as(labels))


def test_an_image_that_lies_elsewhere_is_fetched(tmp_path):
    """As a streamed dataset names it: inside an archive, here."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.write(tmp_path / "red.png", "red.png")
    cell = {"bytes": None, "path": f"zip://red.png::{tmp_path / 'pictures.zip'}"}
    (message,) = open_images({"image": cell, "text": "a"})
    assert message["content"][0]["image"]["bytes"] == (tmp_path / "red.png").read_bytes()
    with pytest.raises(CocoaInputError, match="its image zip://no.png::.* cannot be fetched"):
        open_images({"bytes": None, "path": f"zip://no.png::{tmp_path / 'pictures.zip'}"})
