# SPDX-License-Identifier: Apache-2.0
"""MMEB-train as published: markers, instructions, images in a folder, rows with an empty side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from modeling_cocoa.inputs import input_parts
from modeling_cocoa.saving import save_cocoa
from trainers import (
    CocoaContrastiveConfig,
    CocoaContrastiveTrainer,
    CocoaReconstructionConfig,
    CocoaReconstructionTrainer,
)
from trainers.data.mmeb import mmeb_pairs, places_of
from trainers.data.rows import without_image_decoding
from trainers.recipes.recipe import Recipe, run_recipe
from trainers.recipes.recipe_data import contrastive_data, reconstruction_data

FOLDER = Path("images")
ROWS = {  # one of each meta-task, and one to drop
    "qry": [
        "<|image_1|>\nRepresent the given image for classification\n",
        "<|image_1|>\nRepresent the given image with the following question: What is it?\n",
        "Find me an everyday image that matches the given caption: A cat.\n",
        '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "cat"\n',
        "Nothing to find.",
    ],
    "qry_image_path": ["a/0.png", "a/1.png", "", "a/2.png", ""],
    "pos_text": [
        "cat",
        "A cat's face",
        "<|image_1|>\nRepresent the given image.\n",
        "<|image_1|>\nRepresent the given cropped image of the object\n",
        "",
    ],
    "pos_image_path": ["", "", "b/0.png", "b/1.png", ""],
    "neg_text": ["dog", "", "", "", ""],
    "neg_image_path": ["", "", "", "", ""],
}


@pytest.fixture
def folder(tmp_path, emoji):
    """The rows' images, as files."""
    for place, name in enumerate(["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        emoji[place]["image"].save(path)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("<|image_1|>\nRead it.\n", "a.jpg", [("images/a.jpg", None), (None, "\nRead it.\n")]),
        ("Read <|image_1|> aloud", "a.jpg", [(None, "Read "), ("images/a.jpg", None), (None, " aloud")]),
        ("Read it: <|image_1|>", "a.jpg", [(None, "Read it: "), ("images/a.jpg", None)]),
        ("<|image_1|>", "a.jpg", [("images/a.jpg", None)]),
        (" <|image_1|>\n", "a.jpg", [(None, " "), ("images/a.jpg", None), (None, "\n")]),
        ("a caption", "b/a.jpg", [("images/b/a.jpg", None), (None, "a caption")]),
        ("a caption", None, [(None, "a caption")]),
        (None, "a.jpg", [("images/a.jpg", None)]),
        (" \n", "", []),
    ],
)
def test_the_marker_is_where_the_image_stands(text, path, expected):
    assert places_of(text, path, FOLDER) == expected


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("<|image_1|> a", "", "marks an image, and the row names none"),
        ("<|image_1|> and <|image_2|>", "a.jpg", "marks 2 images"),
        ("a", "/etc/a.jpg", "leads out of the folder"),
        ("a", "../a.jpg", "leads out of the folder"),
    ],
)
def test_what_does_not_fit_is_said(text, path, message):
    with pytest.raises(ValueError, match=message):
        places_of(text, path, FOLDER)


def test_a_stream_of_pairs_is_conversations(folder):
    """Its rows are those of the dataset that is not streamed, without negatives."""
    pairs = Dataset.from_dict(ROWS)
    rows = [row for row in mmeb_pairs(pairs.to_iterable_dataset(), folder)]
    whole = mmeb_pairs(pairs, folder)
    whole = whole.cast(without_image_decoding(whole.features))
    assert len(rows) == len(whole) == 4 and set(rows[0]) == {"query", "positive"}
    for streamed, row in zip(rows, whole, strict=True):
        for name in streamed:
            assert [part["type"] for part in streamed[name][0]["content"]] == [
                part["type"] for part in input_parts(row[name])
            ]
            assert [part["text"] for part in streamed[name][0]["content"]] == [
                part.get("text") for part in input_parts(row[name])
            ]


def test_a_layout_that_is_another_is_named(folder):
    with pytest.raises(ValueError, match="'pos_image_path'. are not in"):
        mmeb_pairs(Dataset.from_dict(ROWS).remove_columns("pos_image_path"), folder)
    with pytest.raises(ValueError, match="no folder .*nowhere of images"):
        mmeb_pairs(Dataset.from_dict(ROWS), "nowhere")
    with pytest.raises(ValueError, match="Row 1 of MMEB-train .*: .*names none"):
        list(mmeb_pairs(Dataset.from_dict({**ROWS, "qry_image_path": ["a/0.png"] + 4 * [""]}), folder))


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_a_trainer_reads_it_by_recipe(tmp_path, folder, model, processor, stage):
    """And names the row whose image is missing."""
    Dataset.from_dict(ROWS).to_parquet(str(tmp_path / "original.parquet"))
    source = {"path": "parquet", "data_files": "original.parquet", "layout": "mmeb_train", "image_dir": str(folder)}
    data = {"sources": {"mmeb": source}, "contrastive": {"mmeb": {}}}
    args = CocoaReconstructionConfig(
        output_dir=str(tmp_path / "out"), stage=stage, max_steps=1, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = reconstruction_data(data, lambda name: tmp_path / name)
    trainer = CocoaReconstructionTrainer(model, args, train_dataset=rows, processing_class=processor)
    assert trainer.train().training_loss > 0
    (folder / "a/0.png").unlink()
    with pytest.raises(ValueError, match=r"Row 0 of the training .mmeb. data .*: there is no image file .*0\.png"):
        CocoaReconstructionTrainer(model, args, train_dataset=rows, processing_class=processor)


def published(folder, **subsets):
    """A copy of MMEB-train as a snapshot of it lies on disk: a folder a subset, and a card that lists them."""
    card = ["---", "configs:"]
    for name, rows in subsets.items():
        (folder / name).mkdir(parents=True)
        pairs = Dataset.from_dict(rows)
        for split in ("original", "diverse_instruction"):
            pairs.to_parquet(str(folder / name / f"{split}-00000-of-00001.parquet"))
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ("original", "diverse_instruction"):
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return str(folder)


def only(*places):
    return {name: [values[place] for place in places] for name, values in ROWS.items()}


HARD = {  # two classes and their pictures, with negatives as mmE5 and MoCa write them
    "qry": 2 * ["<|image_1|>\nName it.\n"] + ["a cat", "a dog"],
    "qry_image_path": ["a/0.png", "a/1.png", "", ""],
    "pos_text": ["cat", "dog", "<|image_1|>\nLook.\n", "<|image_1|>\nLook.\n"],
    "pos_image_path": ["", "", "b/0.png", "b/1.png"],
    "neg_text": ["['dog', \"a cat's tail\", '[bird]']", "['cat']", "['<|image_1|>', '']", "[]"],
    "neg_image_path": ["['', '', '']", "['']", "['b/1.png', 'a/0.png']", "['a/2.png']"],
}


def texts_of(cell):
    if cell is None or isinstance(cell, str):
        return cell
    (message,) = cell
    assert message["role"] == "user"
    parts = []
    for part in message["content"]:
        assert part["type"] == ("text" if part["image"] is None else "image")
        parts.append(part["text"] if part["image"] is None else Path(part["image"]["path"]).name)
    return parts


def test_pairs_become_rows_of_contrastive_training(folder):
    rows = mmeb_pairs(Dataset.from_dict(ROWS), folder)
    rows = rows.cast(without_image_decoding(rows.features))
    assert rows.column_names == ["query", "positive", "negative_1"] and len(rows) == 4
    assert texts_of(rows[0]["query"]) == ["0.png", "\nRepresent the given image for classification\n"]
    assert texts_of(rows[0]["positive"]) == ["cat"]
    assert texts_of(rows[2]["query"]) == [ROWS["qry"][2]]
    assert texts_of(rows[3]["positive"]) == ["1.png", "\nRepresent the given cropped image of the object\n"]
    negatives = [texts_of(row["negative_1"]) for row in rows]
    assert negatives[0] == ["dog"] and negatives[3] == ["cat"], "another row's positive where there is none"
    texts = mmeb_pairs(Dataset.from_dict(only(0, 1)), folder)
    assert texts["positive"] == ["cat", "A cat's face"], "a column without images is of texts"


def test_hard_negatives_are_read_as_they_are_written(folder):
    rows = mmeb_pairs(Dataset.from_dict(HARD), folder)
    rows = rows.cast(without_image_decoding(rows.features))
    assert rows.column_names == ["query", "positive", "negative_1", "negative_2", "negative_3"]
    negatives = [[texts_of(row[f"negative_{number}"]) for number in (1, 2, 3)] for row in rows]
    assert negatives == [
        [["dog"], ["a cat's tail"], ["[bird]"]],
        [["cat"], ["cat"], ["cat"]],
        [["1.png"], ["0.png"], ["1.png"]],
        [["2.png"], ["2.png"], ["2.png"]],
    ]
    paths = ["['a/0.png']", *HARD["neg_image_path"][1:]]
    with pytest.raises(ValueError, match="3 texts of negatives and 1 images"):
        mmeb_pairs(Dataset.from_dict({**HARD, "neg_image_path": paths}), folder)


def test_subsets_train_end_to_end_by_recipe(tmp_path, folder, model, processor):
    """One row of each meta-task, instructions and negatives in place, through `run_recipe` and both loaders."""
    path = published(tmp_path / "MMEB-train", ImageNet_1K=HARD, CIRR=HARD)
    save_cocoa(model, processor, tmp_path / "start")
    stage = {"max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    stage.update(mini_batch_num_tokens=40, evaluate_retrieval=True, eval_strategy="steps", eval_steps=3)
    stage.update(num_hard_negatives=2, query_prompt={"mmeb_CIRR": "Find the changed one."}, learning_rate=1e-3)
    mmeb = {"path": path, "name": ["ImageNet_1K", "CIRR"], "split": "original", "eval": {"split": "original[:2]"}}
    mmeb.update(layout="mmeb_train", image_dir=str(folder))
    recipe = Recipe(
        output_dir=str(tmp_path / "run"),
        model={"model_name_or_path": str(tmp_path / "start")},
        data={"sources": {"mmeb": mmeb}, "contrastive": {"mmeb": {"source": "mmeb"}}},
        stages={"contrastive": stage},
    )
    trainers = []
    final = run_recipe(recipe, Path, lambda stage, trainer: trainers.append(trainer))
    (trainer,) = trainers
    assert list(trainer.train_dataset) == ["mmeb_ImageNet_1K", "mmeb_CIRR"]
    assert trainer.train_dataset["mmeb_CIRR"].column_names == ["query", "positive", "negative_1", "negative_2"]
    logs = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_mmeb_CIRR_cosine_recall@1", "eval_mmeb_ImageNet_1K_cosine_ndcg@10"} <= logs
    item = [{"role": "user", "content": [{"type": "image", "image": str(folder / "a/0.png")}]}]
    stock = SentenceTransformer(final, device="cpu").encode(item)
    np.testing.assert_allclose(stock, trainer.model.encode(item), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ["CIRR", "CIRRR"]}, r"CIRRR.* not found. Available: \['CIRR', 'WebQA'\]"),
        ({"name": "WebQA"}, "WebQA.*no data"),
        ({"split": "test"}, "test.*original"),
        ({"image_dir": "nowhere"}, "no folder nowhere of images"),
        ({"layout": "mmeb"}, r"one of \['mmeb_train'\]"),
    ],
)
def test_what_does_not_exist_is_said_with_what_does(tmp_path, folder, change, message):
    path = published(tmp_path / "MMEB-train", CIRR=HARD, WebQA={name: [] for name in HARD})
    source = {"path": path, "name": "CIRR", "split": "original", "layout": "mmeb_train", "image_dir": str(folder)}
    with pytest.raises(ValueError, match=message):
        contrastive_data({"sources": {"mmeb": {**source, **change}}, "contrastive": {"mmeb": {}}}, Path)


def test_a_missing_image_names_the_row(tmp_path, folder, model, processor):
    rows = mmeb_pairs(Dataset.from_dict(HARD), folder)
    (folder / "a/0.png").unlink()
    args = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args.update(max_steps=1, save_strategy="no", per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"Row 0 of the training data .*: there is no image file .*0\.png"):
        CocoaContrastiveTrainer(model, CocoaContrastiveConfig(**args), rows, processing_class=processor)
    options = CocoaContrastiveConfig(**args, on_bad_row="skip")
    trainer = CocoaContrastiveTrainer(model, options, rows, processing_class=processor)
    assert len(trainer.train_dataset) == 2
    trainer.train()
