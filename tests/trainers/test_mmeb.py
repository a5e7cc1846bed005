# SPDX-License-Identifier: Apache-2.0
"""MMEB-train as published: markers, instructions, images in a folder, rows with an empty side."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from trainers import CocoaReconstructionConfig, CocoaReconstructionTrainer
from trainers.mmeb import pairs_as_documents, places_of
from trainers.recipe_data import reconstruction_data
from trainers.rows import undecoded

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
        ("<|image_1|>\nRead it.\n", "a.jpg", [("images/a.jpg", None), (None, "Read it.\n")]),
        ("Read <|image_1|> aloud", "a.jpg", [(None, "Read"), ("images/a.jpg", None), (None, "aloud")]),
        ("Read it: <|image_1|>", "a.jpg", [(None, "Read it:"), ("images/a.jpg", None)]),
        ("<|image_1|>", "a.jpg", [("images/a.jpg", None)]),
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


@pytest.mark.parametrize("is_streamed", [False, True])
def test_pairs_become_documents_and_empty_sides_are_dropped(folder, is_streamed):
    pairs = Dataset.from_dict(ROWS)
    documents = pairs_as_documents(pairs.to_iterable_dataset() if is_streamed else pairs, folder)
    rows = list(documents.cast(undecoded(documents.features)))
    for row in rows:  # in a stream the paths themselves
        row["images"] = [image["path"] if isinstance(image, dict) else image for image in row["images"]]
    assert len(rows) == 4
    assert rows[0] == {
        "images": [str(folder / "a/0.png"), None, None],
        "texts": [None, "Represent the given image for classification\n", "cat"],
    }
    assert rows[2]["texts"] == [ROWS["qry"][2], None, "Represent the given image.\n"]
    assert rows[2]["images"] == [None, str(folder / "b/0.png"), None]
    assert [image is not None for image in rows[3]["images"]] == [True, False, True, False]


def test_a_layout_that_is_another_is_named(folder):
    with pytest.raises(ValueError, match="'pos_image_path'. are not in"):
        pairs_as_documents(Dataset.from_dict(ROWS).remove_columns("pos_image_path"), folder)
    with pytest.raises(ValueError, match="no folder .*nowhere of images"):
        pairs_as_documents(Dataset.from_dict(ROWS), "nowhere")
    with pytest.raises(ValueError, match="Row 1 of MMEB-train: .*names none"):
        list(pairs_as_documents(Dataset.from_dict({**ROWS, "qry_image_path": ["a/0.png"] + 4 * [""]}), folder))


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_a_trainer_reads_it_by_recipe(tmp_path, folder, model, processor, stage):
    """And names the row whose image is missing."""
    Dataset.from_dict(ROWS).to_parquet(str(tmp_path / "original.parquet"))
    source = {"path": "parquet", "data_files": "original.parquet", "layout": "mmeb_train", "image_dir": str(folder)}
    data = {"sources": {"mmeb": source}, "reconstruction": {"mmeb": {"images": "images", "texts": "texts"}}}
    args = CocoaReconstructionConfig(
        output_dir=str(tmp_path / "out"), stage=stage, max_steps=1, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = reconstruction_data(data, lambda name: tmp_path / name)
    trainer = CocoaReconstructionTrainer(model, args, train_dataset=rows, processing_class=processor)
    assert trainer.train().training_loss > 0
    (folder / "b/1.png").unlink()
    with pytest.raises(ValueError, match=r"Row 3 of the training data: .*image cannot be read .*No such file.*1\.png"):
        CocoaReconstructionTrainer(model, args, train_dataset=rows, processing_class=processor)
