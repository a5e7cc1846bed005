# SPDX-License-Identifier: Apache-2.0
"""Rows of every form become the same texts and images, and train alike."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from modeling_cocoa.inputs import CocoaInputError
from trainers.batching import count_row_tokens
from trainers.collators import ReconstructionCollator
from trainers.datasets import ReconstructionDataset
from trainers.rows import parts_of


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
        ({"text": 3}, "its text is a int"),
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
