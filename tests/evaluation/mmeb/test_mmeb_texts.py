# SPDX-License-Identifier: Apache-2.0
"""Texts of MMEB-V1, newline by newline, as the benchmark's evaluator makes them; and which tasks there are."""

from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from evaluation.assets import asset_path
from evaluation.mmeb.tasks import KINDS, MMEB_V1, PUBLISHED, find_tasks
from evaluation.mmeb.texts import query_text, target_name, target_texts
from modeling_cocoa.inputs import CocoaInputError, Conversation
from modeling_cocoa.processing_cocoa import CocoaProcessor
from tests.evaluation.conftest import read

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


INSTRUCT = {  # of each form, as ziyjiang/MMEB_Test_Instruct has it: qry_inst, qry_text, tgt_inst, tgt_text
    "classification": ("VOC2007", "<|image_1|>\nIdentify the object", "", "", ["red"]),
    "question": ("GQA", "<|image_1|>\nAnswer:", "Which?", "", ["red\n"]),
    "image_to_text": ("MSCOCO_i2t", "<|image_1|> Find a caption. ", "", "", ["A cat."]),
    "text_to_image": ("MSCOCO_t2i", "Find it:", "A cat.", "<|image_1|>\nRepresent it.", [""]),
    "image_to_image": ("NIGHTS", "<|image_1|> Find it.", "", "<|image_1|>\nRepresent it.", [""]),
    "with captions": ("RefCOCO-Matching", "<|image_1|>\nSelect", "red", "<|image_1|> Represent", ["blue"]),
}
V1 = {  # and as TIGER-Lab/MMEB-eval has it: qry_text, tgt_text
    "classification": ("<|image_1|>\nIdentify the object\n", ["red"]),
    "question": ("<|image_1|>\nAnswer: Which?\n", ["red\n"]),
    "image_to_text": ("<|image_1|>  Find a caption. \n", ["A cat."]),
    "text_to_image": ("Find it: A cat.\n", ["<|image_1|>\nRepresent it.\n"]),
    "image_to_image": ("<|image_1|>\nFind it.\n", ["<|image_1|>\nRepresent it."]),
    "with captions": ("<|image_1|>\nSelect red\n", ["<|image_1|>  Represent blue\n"]),
}
IMAGE, TARGET = ("images/a.png", None), ("images/b.png", None)
PLACES = {  # what the benchmark's evaluator shows: the image's token, and this
    "classification": ([IMAGE, (None, "\nIdentify the object\n")], [(None, "red")]),
    "question": ([IMAGE, (None, "\nAnswer: Which?\n")], [(None, "red\n")]),
    "image_to_text": ([IMAGE, (None, "  Find a caption. \n")], [(None, "A cat.")]),
    "text_to_image": ([(None, "Find it: A cat.\n")], [TARGET, (None, "\nRepresent it.\n")]),
    "image_to_image": ([IMAGE, (None, "\nFind it.\n")], [TARGET, (None, "\nRepresent it.")]),
    "with captions": ([IMAGE, (None, "\nSelect red\n")], [TARGET, (None, "  Represent blue\n")]),
}


@pytest.mark.parametrize("form", INSTRUCT)
@pytest.mark.parametrize("layout", ["instruct", "v1"])
def test_what_a_model_is_shown(tmp_path, monkeypatch, form, layout):
    """The marker goes, and nothing else: no space and no newline around it."""
    name, *instruct = INSTRUCT[form]
    images = {"qry_img_path": "" if form == "text_to_image" else "a.png"}
    images["tgt_img_path"] = ["b.png" if "image" in form.split("_")[-1] or form == "with captions" else ""]
    columns = ("qry_inst", "qry_text", "tgt_inst", "tgt_text") if layout == "instruct" else ("qry_text", "tgt_text")
    row = dict(zip(columns, instruct if layout == "instruct" else V1[form], strict=True)) | images
    (tmp_path / name).mkdir()
    Dataset.from_list([row]).to_parquet(str(tmp_path / name / "test.parquet"))
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    data = read(TASKS[name], str(tmp_path), "images")
    asked, shown = PLACES[form]
    assert list(data.queries[0].places) == asked
    assert [list(item.places) for item in data.candidates.values()] == [shown]


@pytest.mark.parametrize(
    "text",
    ["\nIdentify the object\n", "  Find a caption. \n", " \n", "\n\n", "\tx", " "],
)
def test_the_processor_keeps_white_space_beside_an_image(text):
    """In an evaluation and from a row of training data alike."""
    processor = CocoaProcessor.from_pretrained(asset_path("checkpoints/cocoa-tiny"))
    image = Image.new("RGB", (56, 56), "red")
    rendered = Conversation(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], [image]
    )
    row = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image, "text": None},
                {"type": "text", "text": text, "image": None},
            ],
        }
    ]
    evaluated, trained = processor.preprocess([rendered, row])
    assert processor.tokenizer.decode(evaluated["input_ids"]).split("<|vision_end|>")[1] == f"{text}<|im_end|>"
    assert evaluated["input_ids"].tolist() == trained["input_ids"].tolist()


def test_white_space_alone_is_no_input():
    processor = CocoaProcessor.from_pretrained(asset_path("checkpoints/cocoa-tiny"))
    for parts in ([" \n"], ["\n", " "], [""], ["a", ""]):
        content = [{"type": "text", "text": text} for text in parts]
        with pytest.raises(CocoaInputError, match="the text is empty"):
            processor.preprocess([[{"role": "user", "content": content}]])


def test_there_are_the_36_tasks():
    kinds = [task.kind for task in MMEB_V1]
    assert [kinds.count(kind) for kind in ("classification", "vqa", "retrieval", "grounding")] == [10, 10, 12, 4]
    assert sum(task.in_domain for task in MMEB_V1) == 20 and len(TASKS) == 36
    assert {task.name for task in MMEB_V1 if task.form == "text_to_image"} == set(
        "VisDial MSCOCO_t2i VisualNews_t2i WebQA EDIS Wiki-SS-NQ".split()
    )
    assert {task.name for task in MMEB_V1 if task.form == "image_to_text"} == {"MSCOCO_i2t", "VisualNews_i2t"}


def test_tasks_are_found_by_name_and_kind():
    assert [task.name for task in find_tasks(["grounding", "CIRR"], MMEB_V1)] == [
        "CIRR",
        "MSCOCO",
        "RefCOCO",
        "RefCOCO-Matching",
        "Visual7W-Pointing",
    ]
    assert find_tasks(None, MMEB_V1) == list(MMEB_V1)
    with pytest.raises(ValueError, match="no task 'ImageNet' .did you mean ImageNet-R.*there are ImageNet-1K"):
        find_tasks(["ImageNet", "CIRR"], MMEB_V1)


OFF_BY_MORE = {
    ("VLM2Vec (Qwen2-VL-2B, LoRA, high resolution)", "kinds"): "59.3 on the leaderboard, whose kinds make 60.07",
    ("VLM2Vec (Qwen2-VL-2B, LoRA, high resolution)", "domains"): "the authors of CoCoA repeat 59.3 beside 60.04",
    ("CoCoA (Qwen2-VL-2B)", "kinds"): "the table has 66.0, its kinds make 66.18; its domains make 65.98",
}
"""Means that are not, as published, those of their parts to within rounding; they stay as published."""


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.model)
def test_a_published_mean_is_that_of_its_parts(model):
    """A figure mistyped would show."""
    parts = {"kinds": [(sum(task.kind == kind for task in MMEB_V1), getattr(model, kind)) for kind in KINDS]}
    if model.in_domain is not None:
        parts["domains"] = [(20, model.in_domain), (16, model.out_of_domain)]
    for name, means in parts.items():
        weighed = sum(tasks * mean for tasks, mean in means) / 36
        is_near = abs(weighed - model.overall) < 0.15
        assert is_near != ((model.model, name) in OFF_BY_MORE), (name, weighed)


def test_every_published_figure_has_a_source_and_stands_once():
    assert all(model.source.strip() and model.billions > 0 for model in PUBLISHED)
    assert len({model.model for model in PUBLISHED}) == len(PUBLISHED) == 20
    for model in PUBLISHED:
        assert (model.in_domain is None) == (model.out_of_domain is None)
    assert {model for model, _ in OFF_BY_MORE} <= {model.model for model in PUBLISHED}


def test_the_documentation_shows_published_figures_as_they_are():
    page = (Path(__file__).parents[3] / "docs" / "method.md").read_text(encoding="utf-8")
    table = [line for line in page.partition("## Published results")[2].splitlines() if line.startswith("|")]
    _, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    known = {model.model: model for model in PUBLISHED}
    names = [*KINDS, "in_domain", "out_of_domain", "overall"]
    assert len(rows) == 14
    for title, *cells in rows:
        values = [getattr(known[title], name) for name in names]
        assert cells == ["–" if value is None else f"{value:.1f}" for value in values], title
