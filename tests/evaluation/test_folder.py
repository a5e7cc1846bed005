# SPDX-License-Identifier: Apache-2.0
"""`cocoa eval folder`: recall on images and captions, by hand, and what it says of folders that are wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from cocoa.cli import app
from evaluation.assets import asset_path
from evaluation.emoji import load_emoji
from evaluation.folder import read_images
from evaluation.folder_report import folder_report
from evaluation.mmeb.scores import Scores, TaskScore
from hub_cards import write_card
from hub_cards.results import add_result
from modeling_cocoa.saving import save_cocoa

TINY = asset_path("checkpoints/cocoa-tiny")
COUNT = 40
LEFT_OUT = {
    "cut.png,a picture that is cut off": "cut.png",
    "gone.png,a picture that is not there": "there is no image file gone.png",
    "cut.png,": "it has no caption",
    "0.png,another caption": "an earlier row names the same image",
    ",a caption of nothing": "it names no image",
}
"""Lines of metadata.csv that are left out, and why."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Emoji, two of which share a caption, and rows that cannot be asked about."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = load_emoji().select(range(0, 1500, 1500 // COUNT)).select(range(COUNT))
    names = list(rows["name"])
    names[1] = names[0]
    lines = ["file_name,caption"]
    for place, row in enumerate(rows):
        row["noto"].convert("RGB").save(folder / f"{place}.png")
        lines.append(f'{place}.png,"{names[place]}"')
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:80])
    (folder / "metadata.csv").write_text("\n".join([*lines, *LEFT_OUT]), encoding="utf-8")
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
    assert (by_text.queries, by_text.candidates, by_text.skipped_rows) == (COUNT, COUNT, len(LEFT_OUT))
    assert by_text.chance == pytest.approx(np.mean([100 / (COUNT - (place < 2)) for place in range(COUNT)]))
    low, high = by_text.interval
    assert low < by_text.precision_at_1 < high
    assert by_image.candidates == COUNT + 1, "39 captions, and those of images that are cut off or not there"
    page = next(tmp_path.glob("*/pages/Caption-to-image.html")).read_text()
    assert "Misses" in page and "(chance 2.5 %)" in page
    report = (tmp_path / "report.md").read_text()
    assert f"Caption to image: {COUNT} queries, {COUNT} candidates" in report
    assert "| chance | 2.5 | 12.5 | 25.0 | | |" in report and "queries are few" in report
    assert f"({low:.0f}–{high:.0f})" in report and report.count(f" | {len(LEFT_OUT)} |") == 2
    lines = (file.parent / "queries" / "Caption-to-image.jsonl").read_text(encoding="utf-8").splitlines()
    skipped = {line["row"]: line["skipped"] for line in map(json.loads, lines) if "skipped" in line}
    assert list(skipped) == [COUNT + place for place in range(len(LEFT_OUT))]
    for reason, told in zip(LEFT_OUT.values(), skipped.values(), strict=True):
        assert reason in told and str(folder) not in told


def test_a_card_shows_the_recall_on_a_folder_as_that(pictures, tmp_path):
    """With queries, interval and chance; not as means of a benchmark, in tables, chart or the Hub's metadata."""
    folder, _ = pictures
    evaluate(folder, "--model", TINY, "--output-dir", tmp_path)
    (file,) = tmp_path.glob("*/scores.json")
    scores = Scores.read(file)
    for score in scores.tasks:
        score.skipped_rows = 0  # partial scores are left out of the metadata anyway
    scores.write(file)
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("evaluation", "README.md"))
    stale = model / "evaluation" / f"images-and-captions-of-{folder.name}.png"
    stale.parent.mkdir()
    stale.touch()
    assert add_result(model, file).benchmark == f"Images and captions of {folder.name}"
    card = ModelCard.load(write_card(model))
    assert not card.data.eval_results and not stale.exists() and not (tmp_path / "chart.png").exists()
    low, high = Scores.read(file).tasks[0].interval
    for words in (
        f"### Images and captions of {folder.name}",
        f"#### Caption to image: {COUNT} queries, {COUNT} candidates",
        f"({low:.0f}–{high:.0f})",
        "| chance | 2.5 |",
        "this is not checked",
    ):
        assert words in card.text
    assert "OOD" not in card.text and "Overall" not in card.text


def test_ties_that_lose_are_shown():
    """A model whose vectors are all the same finds everything first, where ties are won."""
    tied = TaskScore("Caption-to-image", "retrieval", False, 100, 0, 60, 100, 100, 100, 100, 60, 60, 120)
    tied.interval = [100, 100]
    other = replace(tied, task="Image-to-caption", precision_at_1_ties_against=100)
    report = folder_report([Scores("Images", "same", 2, {}, [tied, other])])
    assert "| R@1 if ties lose |\n" in report and "| same | 100.0 (100–100) | 100.0 | 100.0 | 100.0 | 0.0 |" in report
    assert report.count("ties") == 1 and "few" not in report and "left out" not in report


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
