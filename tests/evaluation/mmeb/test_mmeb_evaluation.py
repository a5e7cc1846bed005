# SPDX-License-Identifier: Apache-2.0
"""MMEB-V1 end to end: scores by hand in both published layouts, bad rows, what is kept, the command."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from cocoa.cli import app
from evaluation.assets import asset_path
from evaluation.emoji_tasks import write_emoji_tasks
from evaluation.encoders import Encoder
from evaluation.mmeb import data as benchmark_data
from evaluation.mmeb import evaluate
from evaluation.mmeb.data import BadRowError, load_tasks
from evaluation.mmeb.evaluate import evaluate_model
from evaluation.mmeb.report import markdown_report
from evaluation.mmeb.scores import Scores
from evaluation.mmeb.tasks import EMOJI_TASKS, MMEB_V1, PUBLISHED, find_tasks
from tests.evaluation.conftest import RED, ROWS, TASKS, TINY, V1_ROWS, VECTORS, Fixed, read


def results(folder):
    """The folder of the only results there are."""
    (path,) = folder.glob("*/scores.json")
    return path.parent


@pytest.mark.parametrize(("rows", "layout"), [(ROWS, "instruct"), (V1_ROWS, "v1")])
def test_scores_are_those_worked_out_by_hand(tmp_path, data, rows, layout):
    encoder = Fixed(VECTORS)
    tasks = find_tasks(list(ROWS), MMEB_V1)
    loaded = load_tasks(tasks, data(rows), tmp_path / "images")
    scores = evaluate_model(encoder, loaded, tmp_path / "out", of_tasks=36, show_progress_bar=False)
    by_task = {score.task: score for score in scores.tasks}
    found = {name: (s.precision_at_1_ties_against, s.ties, s.queries, s.candidates) for name, s in by_task.items()}
    assert found == {
        "VOC2007": (50.0, 1, 2, 3),
        "GQA": (0.0, 0, 1, 2),
        "MSCOCO_t2i": (100.0, 0, 1, 2),
        "RefCOCO-Matching": (0.0, 1, 1, 2),
    }
    assert by_task["VOC2007"].precision_at_1 == 100.0 and by_task["GQA"].precision_at_1 == 0.0
    assert by_task["GQA"].recall_at_5 == 100.0 and by_task["GQA"].mrr_at_10 == 50.0
    assert [s.inputs for s in scores.tasks] == [5, 3, 3, 3] and len(encoder.seen) == 14
    means = scores.means()
    assert means["classification"] == 100.0 and means["vqa"] == 0.0 and means["retrieval"] == 100.0
    assert means["in_domain"] == 100.0 and scores.is_partial, "VOC2007 and MSCOCO_t2i; 4 of 36 tasks"
    folder = results(tmp_path / "out")
    written = json.loads((folder / "scores.json").read_text())
    assert written == scores.to_dict() and written["settings"]["layouts"] == dict.fromkeys(by_task, layout)
    assert Scores.read(folder / "scores.json") == scores
    lines = [json.loads(line) for line in (folder / "queries" / "GQA.jsonl").read_text().splitlines()]
    assert lines[0]["rank"] == 2 and lines[0]["query_image"] == "a.png" and lines[0]["scores"] == [1.0, 0.0]
    assert lines[0]["query"] == "\nAnswer: Which?\n"


def test_both_layouts_are_the_same_inputs(tmp_path, data):
    folders = data(ROWS), data(V1_ROWS, "v1")
    for name in ROWS:
        one, other = (read(TASKS[name], folder, tmp_path / "images") for folder in folders)
        assert one.queries == other.queries
        assert set(one.candidates.values()) == set(other.candidates.values())


def test_candidates_of_one_name_are_the_first_of_them(tmp_path, data):
    """As the benchmark's evaluator has it: of two captions of one picture, the first."""
    rows = [dict(ROWS["MSCOCO_t2i"][0], tgt_text=[f"{text} one", f"{text} two"]) for text in "xy"]
    found = read(TASKS["WebQA"], data({"WebQA": rows}), tmp_path / "images")
    assert set(found.candidates) == {"a.png", "b.png"}
    assert found.candidates["a.png"].text == "\nRepresent it. x one\n"


def change(task="VOC2007", row=1, **values):
    rows = [dict(values) for values in ROWS[task]]
    rows[row].update(values)
    return {task: rows}


BAD = {
    "image": (change(qry_img_path="nowhere.png"), "there is no image file .*nowhere.png"),
    "candidates": (change(tgt_text=[], tgt_img_path=[]), "no candidates, and so not the right one"),
    "truth": (change(tgt_text=[" ", "red", "green"]), "the right candidate, its first, is empty"),
    "corrupt": (change(qry_img_path="corrupt.png"), "corrupt.png cannot be read as an image"),
    "outside": (change(qry_img_path="../a.png"), "leads out of the folder"),
    "query": (change(qry_img_path="", qry_inst="", qry_text=" "), "marks an image, and the row names none"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, data, name):
    rows, message = BAD[name]
    source, options = data(rows), {"show_progress_bar": False}
    (tmp_path / "images" / "corrupt.png").write_bytes(b"no picture")
    encoder = Encoder(str(asset_path(TINY)))
    loaded = load_tasks([TASKS["VOC2007"]], source, tmp_path / "images")
    with pytest.raises(BadRowError, match=f"Row 1 of VOC2007: .*{message}.*--on-bad-row skip"):
        evaluate_model(encoder, loaded, tmp_path / "error", **options)
    scores = evaluate_model(encoder, loaded, tmp_path / "skip", on_bad_row="skip", **options)
    assert (scores.tasks[0].queries, scores.tasks[0].skipped_rows, scores.is_partial) == (1, 1, True)
    assert "1 row skipped" in markdown_report([scores]) and "**Partial**" in markdown_report([scores])
    lines = (results(tmp_path / "skip") / "queries" / "VOC2007.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["row"] == 1 and str(tmp_path) not in lines[1]


def test_a_score_beside_the_published_ones(tmp_path, data):
    loaded = load_tasks([TASKS["GQA"]], data(ROWS), tmp_path / "images")
    scores = evaluate_model(Fixed(VECTORS), loaded, tmp_path, of_tasks=36, show_progress_bar=False)
    report = markdown_report([scores, scores], PUBLISHED)
    assert "| fixed | – | **0.0** | – | – | – | **0.0** | **0.0** | measured; 1 of 36 tasks, partial |" in report
    assert "| B3 Qwen2-VL-2B (2.21B) | 67.0 | 61.2 | 70.8 | 79.9 | – | – | 68.1 |" in report
    assert "| GQA | VQA | OOD | 0.0 | 0.0 |" in report and "as of November 2026" in report


def test_the_emoji_tasks_ask_what_can_be_answered(emoji):
    """Each query has its right candidate first, once, and no other candidate that shows the same."""
    for task in EMOJI_TASKS:
        data = read(task, str(emoji), emoji / "images")
        assert 4 <= len(data.queries) <= 6 and not data.bad_rows
        digests = evaluate.digest_images({item.image for item in data.candidates.values() if item.image})
        for names in data.lists.values():
            assert names.count(names[0]) == 1 and len(names) > 10
            shown = [digests.get(data.candidates[name].image, name) for name in names]
            assert shown.count(shown[0]) == 1
    styles = read(EMOJI_TASKS[4], str(emoji), emoji / "images")
    for row, query in styles.queries.items():
        right = styles.candidates[styles.lists[row][0]].image
        assert query.image.replace("/noto/", "/twemoji/") == right and "in Twemoji style" in query.text
    before = (emoji / "emoji_tasks.json").stat().st_mtime_ns
    assert write_emoji_tasks(emoji, queries=6) == emoji
    assert (emoji / "emoji_tasks.json").stat().st_mtime_ns == before


def test_the_command_on_emoji_with_a_baseline(tmp_path, monkeypatch):
    """Our own way and the stock one give the same scores for the same checkpoint, on files that are read once."""
    path, files, read_file = str(asset_path(TINY)), [], benchmark_data.read_file
    monkeypatch.setattr(benchmark_data, "read_file", lambda name, file: files.append(name) or read_file(name, file))
    command = ["eval", "emoji", "--model", path, "--baseline", path, "--queries", "5", "--output-dir", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--tasks", "Emoji-Style", "--tasks", "Emoji-German"])
    assert result.exit_code == 0, result.output
    assert files == ["Emoji-German", "Emoji-Style"]
    assert (tmp_path / "chart.png").stat().st_size > 10_000 and "partial" in (tmp_path / "report.md").read_text()
    ours, stock = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("*/scores.json")))
    assert ours["tasks"] == stock["tasks"] and ours["settings"]["fingerprint"] != stock["settings"]["fingerprint"]
    page = next(tmp_path.glob("*/pages/Emoji-Style.html")).read_text()
    assert page.count("<section") == 5 and "data:image/png" in page and "in Twemoji style" in page


def test_a_stretched_picture_and_a_small_one_are_what_the_benchmark_shows(tmp_path, data, monkeypatch):
    source = data({"VOC2007": ROWS["VOC2007"]})
    Image.new("RGB", (20, 90), "red").save(tmp_path / "images" / "a.png")
    loaded = load_tasks([TASKS["VOC2007"]], source, tmp_path / "images")
    sizes = []
    for resolution in (None, "low"):
        encoder = Encoder(str(asset_path(TINY)), image_resolution=resolution)
        read = type(encoder.model.processor).read

        def watched(*arguments, read=read):
            for conversation in read(*arguments):
                sizes.extend(image.size for image in conversation.images)
                yield conversation

        monkeypatch.setattr(type(encoder.model.processor), "read", watched)
        evaluate_model(encoder, loaded, tmp_path / "out", show_progress_bar=False)
        monkeypatch.undo()
    assert list(dict.fromkeys(sizes)) == [(56, 56), (64, 64), (128, 128)] and len(sizes) == 4, "each read once"
    assert len(list((tmp_path / "out" / "vectors").glob("*/VOC2007/*.safetensors"))) == 2, "kept apart"
    assert [path.parent.name.endswith("-low") for path in sorted((tmp_path / "out").glob("*/scores.json"))] == [0, 1]


def test_settings_are_kept_apart_and_tasks_are_added(tmp_path, data):
    """Nothing of an earlier call is lost or mixed with that of one with other settings, other data or other tasks."""
    source, options = data(ROWS), {"of_tasks": 3, "show_progress_bar": False}
    names = ["VOC2007", "GQA"]

    def run(names, encoder, source=source, **settings):
        loaded = load_tasks(find_tasks(names, MMEB_V1), source, tmp_path / "images")
        return evaluate_model(encoder, loaded, tmp_path / "out", **options, **settings)

    first = run(names, Fixed(VECTORS))
    apart = [
        run(["GQA"], Fixed(VECTORS, image_resolution="low")),
        run(["GQA"], Fixed(VECTORS), limit=1),
        run(["GQA"], Fixed(VECTORS), source=data({"GQA": ROWS["GQA"]}, "other")),
    ]
    assert all([task.task for task in scores.tasks] == ["GQA"] for scores in apart)
    known = Fixed({**VECTORS, ("a.png", "Answer: Which?"): RED})  # would be right now, had it to be embedded again
    added = run(["GQA", "MSCOCO_t2i"], known)
    assert [item.text for item in known.seen] == ["Find it: red\n", *["\nRepresent it.\n"] * 2]
    assert [task.task for task in added.tasks] == ["VOC2007", "GQA", "MSCOCO_t2i"] and not added.is_partial
    assert added.tasks[:2] == first.tasks and set(added.settings["layouts"]) == {*names, "MSCOCO_t2i"}
    written = {Scores.read(path) == added: path.parent for path in (tmp_path / "out").glob("*/scores.json")}
    assert len(list((tmp_path / "out").glob("*/scores.json"))) == 4
    assert sorted(path.stem for path in (written[True] / "queries").iterdir()) == ["GQA", "MSCOCO_t2i", "VOC2007"]
    states = [scores.settings["data"] for scores in (added, *apart)]
    assert states[0] == states[1] == states[2] and states[0]["revision"] != states[3]["revision"]
    assert states[0]["source"].endswith("/data") and str(tmp_path) not in json.dumps(states)
    report = markdown_report([added, apart[0]])
    assert "| VOC2007 | Classification | IND | 100.0 (50.0) | – |" in report


def test_an_empty_candidate_is_one_that_is_wrong(tmp_path, data):
    """It is embedded as an empty message, through both loaders, and takes no query away."""
    rows = {"VOC2007": [dict(row, tgt_text=[*row["tgt_text"], ""], tgt_img_path=[""] * 4) for row in ROWS["VOC2007"]]}
    source = data(rows)
    found = read(TASKS["VOC2007"], source, tmp_path / "images")
    empty = found.candidates[""]
    assert empty.places == ((None, ""),) and found.lists[0] == ["red", "blue", "red", ""] and not found.bad_rows
    ours, stock = (Encoder(str(asset_path(TINY)), is_cocoa=is_cocoa) for is_cocoa in (True, False))
    vectors = ours([empty, found.candidates["red"]])
    assert abs(vectors - stock([empty, found.candidates["red"]])).max() < 1e-5
    loaded = load_tasks([TASKS["VOC2007"]], source, tmp_path / "images")
    scores = evaluate_model(ours, loaded, tmp_path / "out", show_progress_bar=False)
    assert (scores.tasks[0].queries, scores.tasks[0].candidates, scores.tasks[0].skipped_rows) == (2, 4, 0)


def test_all_data_are_looked_at_before_a_model_is(tmp_path, data, monkeypatch):
    source = data({"VOC2007": ROWS["VOC2007"]})
    monkeypatch.setattr("evaluation.mmeb.evaluate.Encoder", None)
    command = ["eval", "mmeb", "--data", source, "--images", str(tmp_path / "images"), "--output-dir", str(tmp_path)]
    for options, message in (
        (["--model", TINY, "--tasks", "VOC2007", "--tasks", "GQA"], "no rows of GQA"),
        (["--model", TINY, "--tasks", "VOC2007", "--revision", "main"], f"{TINY} is a folder, and a revision is one"),
        (["--baseline", "/nowhere/at/all", "--tasks", "VOC2007"], "no checkpoint folder /nowhere/at/all"),
        (["--baseline", "no/where/x", "--tasks", "VOC2007"], "no checkpoint folder no/where/x"),
        (["--model", TINY, "--tasks", "VOC"], "no task 'VOC' (did you mean VOC2007?); there are ImageNet-1K"),
        (["--model", TINY, "--tasks", "VOC2007", "--images", "nowhere"], "no folder nowhere"),
    ):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code in (1, 2) and message in result.output.replace("\n", " "), result.output
