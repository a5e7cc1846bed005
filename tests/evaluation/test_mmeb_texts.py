# SPDX-License-Identifier: Apache-2.0
"""Texts of MMEB-V1, newline by newline, as the benchmark's evaluator makes them; and which tasks there are."""

from pathlib import Path

import pytest

from evaluation.mmeb_tasks import MMEB_V1, PUBLISHED, find_tasks
from evaluation.mmeb_texts import places_of, query_text, target_name, target_texts

TASKS = {task.name: task for task in MMEB_V1}


@pytest.mark.parametrize(
    ("task", "instruction", "text", "expected"),
    [
        (
            "ImageNet-1K",
            "<|image_1|>\nRepresent the given image for classification",
            "",
            "<|image_1|>\nRepresent the given image for classification\n",
        ),
        (
            "HatefulMemes",
            "<|image_1|> Represent the given image for binary classification:",
            "a meme \nwith lines",
            "<|image_1|>  Represent the given image for binary classification: a meme\nwith lines\n",
        ),
        (
            "OK-VQA",
            "<|image_1|>\nRepresent the given image with the following question: ",
            "What is it?",
            "<|image_1|>\nRepresent the given image with the following question: What is it?\n",
        ),
        (
            "VisualNews_i2t",
            "<|image_1|> Find a caption for the news in the given photo. ",
            "",
            "<|image_1|>  Find a caption for the news in the given photo. \n",
        ),
        (
            "MSCOCO_t2i",
            "Find me an everyday image that matches the given caption.",
            "A cat.",
            "Find me an everyday image that matches the given caption. A cat.\n",
        ),
        (
            "VisDial",
            "Represent the given dialogue:",
            "Q: who? A: me",
            "Represent the given dialogue: Q: who? A: me\n\n",
        ),
        (
            "CIRR",
            "<|image_1|>\nGiven an image, find a similar everyday image with the described changes: ",
            "more dogs",
            "<|image_1|>\nGiven an image, find a similar everyday image with the described changes: more dogs\n",
        ),
        (
            "MSCOCO",
            "<|image_1|> Select the portion of the image that isolates the object labeled as",
            '"dog"',
            '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "dog"\n',
        ),
        ("NIGHTS", "<|image_1|> Find it.", "", "<|image_1|>\nFind it.\n"),
    ],
)
def test_queries(task, instruction, text, expected):
    assert query_text(TASKS[task], instruction, text) == expected


SHOWN = "<|image_1|> Represent the given image"


@pytest.mark.parametrize(
    ("task", "instruction", "texts", "expected"),
    [
        ("ImageNet-1K", "", ["tabby cat", " dog"], ["tabby cat", " dog"]),
        ("ChartQA", "unused", ["12", "14"], ["12", "14"]),
        ("MSCOCO_i2t", "", ["A cat.", "A dog.\n"], ["A cat.", "A dog.\n"]),
        ("VisualNews_t2i", SHOWN, ["", ""], ["<|image_1|>  Represent the given image\n"] * 2),
        ("MSCOCO_t2i", f"{SHOWN} \n", [" ", "x"], ["<|image_1|>  Represent the given image\n\n"] * 2),
        (
            "WebQA",
            f"{SHOWN} with the text:",
            ["one", "two"],
            [
                "<|image_1|>  Represent the given image with the text: one\n",
                "<|image_1|>  Represent the given image with the text: two\n",
            ],
        ),
        ("NIGHTS", "<|image_1|>\nRepresent it.", ["", ""], ["<|image_1|>\nRepresent it."] * 2),
        (
            "RefCOCO-Matching",
            "<|image_1|>\nRepresent the given object:",
            ['"a man"', '"a dog"'],
            [
                '<|image_1|>\nRepresent the given object: "a man"\n',
                '<|image_1|>\nRepresent the given object: "a dog"\n',
            ],
        ),
    ],
)
def test_targets(task, instruction, texts, expected):
    assert target_texts(TASKS[task], instruction, texts, ["a.jpg", "b.jpg"]) == expected


@pytest.mark.parametrize(
    ("task", "expected"),
    [("GQA", '"a"'), ("EDIS", "x.jpg"), ("RefCOCO-Matching", "x.jpg:a"), ("FashionIQ", "x.jpg:a")],
)
def test_names_of_candidates(task, expected):
    assert target_name(TASKS[task], '"a"', "x.jpg") == expected


def test_the_marker_says_where_the_image_stands():
    folder = Path("images")
    assert places_of("<|image_1|>\nFind it.\n", "a.jpg", folder) == [("images/a.jpg", None), (None, "Find it.\n")]
    assert places_of("Like <|image_1|> this", "a.jpg", folder) == [
        (None, "Like"),
        ("images/a.jpg", None),
        (None, "this"),
    ]


def test_there_are_the_36_tasks():
    kinds = [task.kind for task in MMEB_V1]
    assert [kinds.count(kind) for kind in ("classification", "vqa", "retrieval", "grounding")] == [10, 10, 12, 4]
    assert sum(task.in_domain for task in MMEB_V1) == 20 and len(TASKS) == 36
    assert {task.name for task in MMEB_V1 if task.form == "text_to_image"} == set(
        "VisDial MSCOCO_t2i VisualNews_t2i WebQA EDIS Wiki-SS-NQ".split()
    )
    assert {task.name for task in MMEB_V1 if task.form == "image_to_text"} == {"MSCOCO_i2t", "VisualNews_i2t"}
    assert len(PUBLISHED) == 11


def test_tasks_are_found_by_name_and_kind():
    assert [task.name for task in find_tasks(["grounding", "CIRR"], MMEB_V1)] == [
        "CIRR",
        "MSCOCO",
        "RefCOCO",
        "RefCOCO-Matching",
        "Visual7W-Pointing",
    ]
    assert find_tasks(None, MMEB_V1) == list(MMEB_V1)
    with pytest.raises(ValueError, match="no task 'ImageNet'; there are ImageNet-1K, .*grounding"):
        find_tasks(["ImageNet", "CIRR"], MMEB_V1)


def test_a_published_mean_is_near_that_of_its_kinds():
    """A figure mistyped would show."""
    for model in PUBLISHED:
        weighed = (10 * model.classification + 10 * model.vqa + 12 * model.retrieval + 4 * model.grounding) / 36
        assert abs(weighed - model.overall) < 2.1, model.model
