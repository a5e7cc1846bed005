# SPDX-License-Identifier: Apache-2.0
"""`cocoa eval folder`: recall on images and captions, by hand, and what it says of folders that are wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from cocoa.cli import app
from evaluation.assets import asset_path
from evaluation.emoji import load_emoji
from evaluation.folder import read_images
from evaluation.mmeb.scores import Scores
from hub_cards.results import add_result
from modeling_cocoa.saving import save_cocoa

TINY = asset_path("checkpoints/cocoa-tiny")
COUNT = 40


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Emoji, two of which share a caption, and one file that is cut off."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = load_emoji().select(range(0, 1500, 1500 // COUNT)).select(range(COUNT))
    names = list(rows["name"])
    names[1] = names[0]
    lines = ["file_name,caption"]
    for place, row in enumerate(rows):
        row["noto"].convert("RGB").save(folder / f"{place}.png")
        lines.append(f'{place}.png,"{names[place]}"')
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:80])
    (folder / "metadata.csv").write_text("\n".join([*lines, "cut.png,a picture that is cut off"]), encoding="utf-8")
    return folder, names


def evaluate(*arguments):
    """What the command prints."""
    result = CliRunner().invoke(app, ["eval", "folder", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_recall_is_that_of_the_vectors(pictures, tmp_path):
    """Both directions, with the images of one caption apart from each other; the results go into a card."""
    folder, names = pictures
    evaluate(folder, "--model", TINY, "--output-dir", tmp_path)
    (file,) = tmp_path.glob("*/scores.json")
    by_text, by_image = Scores.read(file).tasks
    model = SentenceTransformer(str(TINY), device="cpu")
    images = model.encode_document([str(folder / f"{place}.png") for place in range(COUNT)])
    similarity = model.encode_query([{"text": name} for name in names]) @ images.T
    similarity[0, 1] = similarity[1, 0] = -1  # right, too, and left out
    ranks = (similarity > similarity.diagonal()[:, None]).sum(1) + 1
    assert by_text.precision_at_1 == pytest.approx(100 * (ranks == 1).mean())
    assert by_text.recall_at_10 == pytest.approx(100 * (ranks <= 10).mean())
    assert (by_text.queries, by_text.candidates, by_text.skipped_rows) == (COUNT, COUNT, 1)
    assert by_text.chance == pytest.approx(np.mean([100 / (COUNT - (place < 2)) for place in range(COUNT)]))
    low, high = by_text.interval
    assert low < by_text.precision_at_1 < high
    assert by_image.candidates == COUNT, "39 captions, and that of the image that is cut off"
    page = next(tmp_path.glob("*/pages/Caption-to-image.html")).read_text()
    assert "Misses" in page and "(chance 2.5 %)" in page
    report = (tmp_path / "report.md").read_text()
    assert f"Caption to image: {COUNT} queries, {COUNT} candidates" in report
    assert "| chance | 2.5 | 12.5 | 25.0 | |" in report and "queries are few" in report
    shutil.copytree(TINY, tmp_path / "model")
    assert add_result(tmp_path / "model", file).benchmark == f"Images and captions of {folder.name}"


def test_the_models_own_prompts_are_used(pictures, tmp_path):
    """A model with prompts gives other vectors than without, and they are not mixed up in the store."""
    from modeling_cocoa import CocoaProcessor, load_backbone

    folder, _ = pictures
    prompts = {"query": "Find the drawing of this: ", "document": "A drawing: "}
    save_cocoa(load_backbone(TINY), CocoaProcessor.from_pretrained(TINY), tmp_path / "model", prompts=prompts)
    evaluate(folder, "--model", tmp_path / "model", "--baseline", tmp_path / "model", "--output-dir", tmp_path / "out")
    first, second = (json.loads(file.read_text()) for file in sorted((tmp_path / "out").glob("*/scores.json")))
    values = [
        [task[name] for task in scores["tasks"] for name in ("precision_at_1", "mrr_at_10")]
        for scores in (first, second)
    ]
    assert values[0] == pytest.approx(values[1])
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert model.prompts["query"] == prompts["query"]
    files = [str(folder / f"{place}.png") for place in range(COUNT)]
    similarity = model.encode_query([{"text": name} for name in pictures[1]]) @ model.encode_document(files).T
    similarity[0, 1] = similarity[1, 0] = -1
    ranks = (similarity > similarity.diagonal()[:, None]).sum(1) + 1
    assert values[0][0] == pytest.approx(100 * (ranks == 1).mean())


def test_what_is_wrong_with_a_folder(pictures, tmp_path):
    folder, _ = pictures
    for arguments, message in (
        ((folder, "--caption", "captoin"), "(did you mean caption?)"),
        ((tmp_path,), "has no captions"),
    ):
        result = CliRunner().invoke(app, ["eval", "folder", *map(str, arguments), "--output-dir", str(tmp_path)])
        assert result.exit_code == 1 and message in result.output
    assert read_images(folder)["text"][0] is not None
    with pytest.raises(ValueError, match="contains no images"):
        read_images(tmp_path)
