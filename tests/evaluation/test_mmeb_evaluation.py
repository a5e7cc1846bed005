# SPDX-License-Identifier: Apache-2.0
"""MMEB-V1 end to end: files in both published layouts, scores by hand, kills, bad rows, the command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from typer.testing import CliRunner

import cocoa
from evaluation import mmeb, vectors
from evaluation.assets import asset_path
from evaluation.emoji_tasks import EMOJI_TASKS, write_emoji_tasks
from evaluation.encoders import Encoder
from evaluation.mmeb import evaluate_model
from evaluation.mmeb_data import BadRowError, read_task
from evaluation.mmeb_report import markdown_report
from evaluation.mmeb_tasks import MMEB_V1, PUBLISHED, find_tasks

TINY = "checkpoints/cocoa-tiny"
MARKER = "<|image_1|>"
TASKS = {task.name: task for task in MMEB_V1}

ROWS = {  # one task of each kind, as ziyjiang/MMEB_Test_Instruct has them
    "VOC2007": [
        {
            "qry_inst": f"{MARKER}\nIdentify the object", "qry_text": "", "qry_img_path": "a.png", "tgt_inst": "",
            "tgt_text": ["red", "blue", "red"], "tgt_img_path": ["", "", ""],
        },
        {
            "qry_inst": f"{MARKER}\nIdentify the object", "qry_text": "", "qry_img_path": "b.png", "tgt_inst": "",
            "tgt_text": ["blue", "red", "green"], "tgt_img_path": ["", "", ""],
        },
    ],
    "GQA": [
        {
            "qry_inst": f"{MARKER}\nAnswer:", "qry_text": "Which?", "qry_img_path": "a.png", "tgt_inst": "",
            "tgt_text": ["red", "blue"], "tgt_img_path": ["", ""],
        },
    ],
    "MSCOCO_t2i": [
        {
            "qry_inst": "Find it:", "qry_text": "red", "qry_img_path": "", "tgt_inst": f"{MARKER}\nRepresent it.",
            "tgt_text": ["", ""], "tgt_img_path": ["a.png", "b.png"],
        },
    ],
    "RefCOCO-Matching": [
        {
            "qry_inst": f"{MARKER}\nSelect", "qry_text": "'red'", "qry_img_path": "a.png",
            "tgt_inst": f"{MARKER}\nRepresent", "tgt_text": ["'red'", "'blue'"], "tgt_img_path": ["a.png", "a.png"],
        },
    ],
}  # fmt: skip
V1_ROWS = {  # the same as TIGER-Lab/MMEB-eval has them
    "VOC2007": [
        {
            "qry_text": f"{MARKER}\nIdentify the object\n", "qry_img_path": path,
            "tgt_text": texts, "tgt_img_path": [""] * 3,
        }
        for path, texts in (("a.png", ["red", "blue", "red"]), ("b.png", ["blue", "red", "green"]))
    ],
    "GQA": [
        {
            "qry_text": f"{MARKER}\nAnswer: Which?\n", "qry_img_path": "a.png",
            "tgt_text": ["red", "blue"], "tgt_img_path": ["", ""],
        }
    ],
    "MSCOCO_t2i": [
        {
            "qry_text": "Find it: red\n", "qry_img_path": "",
            "tgt_text": [f"{MARKER}\nRepresent it.\n"] * 2, "tgt_img_path": ["a.png", "b.png"],
        }
    ],
    "RefCOCO-Matching": [
        {
            "qry_text": f"{MARKER}\nSelect 'red'\n", "qry_img_path": "a.png",
            "tgt_text": [f"{MARKER}\nRepresent 'red'\n", f"{MARKER}\nRepresent 'blue'\n"],
            "tgt_img_path": ["a.png", "a.png"],
        }
    ],
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Writes rows below a folder, and pictures."""
    images = tmp_path / "images"
    images.mkdir()
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), color).save(images / f"{name}.png")

    def write(rows, name="data"):
        for task, of_task in rows.items():
            (tmp_path / name / task).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(of_task).to_parquet(str(tmp_path / name / task / "test-00000-of-00001.parquet"))
        return str(tmp_path / name)

    return write


class Fixed:
    """An encoder with a given vector for each input, that counts."""

    name, fingerprint, weights, resolution = "fixed", "f" * 64, "w" * 64, None

    def __init__(self, table):
        self.table, self.seen = table, []

    def __call__(self, items):
        self.seen += items
        keys = [(item.image and Path(item.image).name, item.text.strip() or None) for item in items]
        return np.array([self.table[key] for key in keys], dtype=np.float32)


RED, BLUE, BOTH = [1.0, 0.0], [0.0, 1.0], [2**-0.5, 2**-0.5]
VECTORS = {
    (None, "red"): RED,
    (None, "blue"): BLUE,
    (None, "green"): BLUE,  # ties with blue
    ("a.png", "Identify the object"): RED,
    ("b.png", "Identify the object"): BLUE,
    ("a.png", "Answer: Which?"): BLUE,  # wrong
    (None, "Find it: red"): RED,
    ("a.png", "Represent it."): RED,
    ("b.png", "Represent it."): BOTH,
    ("a.png", "Select 'red'"): BOTH,  # a tie of both candidates
    ("a.png", "Represent 'red'"): RED,
    ("a.png", "Represent 'blue'"): BLUE,
}


@pytest.mark.parametrize(("rows", "layout"), [(ROWS, "instruct"), (V1_ROWS, "v1")])
def test_scores_are_those_worked_out_by_hand(tmp_path, data, rows, layout):
    encoder = Fixed(VECTORS)
    tasks = find_tasks(list(ROWS), MMEB_V1)
    scores = evaluate_model(
        encoder, tasks, data(rows), tmp_path / "images", tmp_path / "out", of_tasks=36, show_progress_bar=False
    )
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
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written == scores.to_dict() and written["settings"]["layouts"] == dict.fromkeys(by_task, layout)
    lines = [json.loads(line) for line in (tmp_path / "out" / "queries" / "GQA.jsonl").read_text().splitlines()]
    assert lines[0]["rank"] == 2 and lines[0]["query_image"] == "a.png" and lines[0]["scores"] == [1.0, 0.0]
    assert lines[0]["query"] == "Answer: Which?\n"


def test_both_layouts_are_the_same_inputs(tmp_path, data):
    folders = data(ROWS), data(V1_ROWS, "v1")
    for name in ROWS:
        one, other = (read_task(TASKS[name], folder, tmp_path / "images") for folder in folders)
        assert one.queries == other.queries
        assert set(one.candidates.values()) == set(other.candidates.values())


def test_candidates_of_one_name_are_the_first_of_them(tmp_path, data):
    """As the benchmark's evaluator has it: of two captions of one picture, the first."""
    rows = [dict(ROWS["MSCOCO_t2i"][0], tgt_text=[f"{text} one", f"{text} two"]) for text in "xy"]
    found = read_task(TASKS["WebQA"], data({"WebQA": rows}), tmp_path / "images")
    assert set(found.candidates) == {"a.png", "b.png"}
    assert found.candidates["a.png"].text == "Represent it. x one\n"


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
    where = [TASKS["VOC2007"]], source, tmp_path / "images"
    with pytest.raises(BadRowError, match=f"Row 1 of VOC2007: .*{message}.*--on-bad-row skip"):
        evaluate_model(encoder, *where, tmp_path / "raise", **options)
    scores = evaluate_model(encoder, *where, tmp_path / "skip", on_bad_row="skip", **options)
    assert (scores.tasks[0].queries, scores.tasks[0].skipped_rows, scores.is_partial) == (1, 1, True)
    assert "1 rows skipped" in markdown_report([scores]) and "**Partial**" in markdown_report([scores])
    lines = (tmp_path / "skip" / "queries" / "VOC2007.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["row"] == 1 and str(tmp_path) not in lines[1]


def test_what_is_not_there_is_said(tmp_path, data):
    source = data(ROWS)
    with pytest.raises(FileNotFoundError, match=r"no rows of SUN397 in .*Its folders are \['GQA'"):
        read_task(TASKS["SUN397"], source, tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="no folder .*pictures of images; name it with --images"):
        read_task(TASKS["GQA"], source, tmp_path / "pictures")
    empty = tmp_path / "data" / "CIRR" / "test.parquet"
    empty.parent.mkdir()
    Dataset.from_list(ROWS["GQA"]).select([]).to_parquet(str(empty))
    with pytest.raises(ValueError, match="CIRR in .* has no rows"):
        read_task(TASKS["CIRR"], source, tmp_path / "images")
    Dataset.from_dict({"qry": ["a"]}).to_parquet(str(empty))
    with pytest.raises(ValueError, match=r"CIRR .*lacks the columns \['qry_text'.*it has \['qry'\]"):
        read_task(TASKS["CIRR"], source, tmp_path / "images")
    result = CliRunner().invoke(
        cocoa.app, ["eval", "mmeb", "--data", source, "--images", str(tmp_path), "--model", "x", "--tasks", "VOC"]
    )
    assert result.exit_code == 1 and "no task 'VOC'; there are ImageNet-1K" in result.output


def test_a_score_beside_the_published_ones(tmp_path, data):
    scores = evaluate_model(
        Fixed(VECTORS), [TASKS["GQA"]], data(ROWS), tmp_path / "images", tmp_path, of_tasks=36, show_progress_bar=False
    )
    report = markdown_report([scores, scores], PUBLISHED)
    assert "| fixed | – | **0.0** | – | – | – | **0.0** | **0.0** | measured; 1 of 36 tasks, partial |" in report
    assert "| B3 Qwen2-VL-2B (2.21B) | 67.0 | 61.2 | 70.8 | 79.9 | – | – | 68.1 |" in report
    assert "| GQA | VQA | OOD | 0.0 | 0.0 |" in report and "as of November 2026" in report


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return write_emoji_tasks(tmp_path_factory.mktemp("emoji") / "data", queries=6)


def test_the_emoji_tasks_ask_what_can_be_answered(emoji):
    """Each query has its right candidate first, once, and no other candidate that shows the same."""
    for task in EMOJI_TASKS:
        data = read_task(task, str(emoji), emoji / "images")
        assert 4 <= len(data.queries) <= 6 and not data.bad_rows
        digests = mmeb.digest_images({item.image for item in data.candidates.values() if item.image})
        for names in data.lists.values():
            assert names.count(names[0]) == 1 and len(names) > 10
            shown = [digests.get(data.candidates[name].image, name) for name in names]
            assert shown.count(shown[0]) == 1
    styles = read_task(EMOJI_TASKS[4], str(emoji), emoji / "images")
    for row, query in styles.queries.items():
        right = styles.candidates[styles.lists[row][0]].image
        assert query.image.replace("/noto/", "/twemoji/") == right and "in Twemoji style" in query.text
    before = (emoji / "emoji_tasks.json").stat().st_mtime_ns
    assert write_emoji_tasks(emoji, queries=6) == emoji
    assert (emoji / "emoji_tasks.json").stat().st_mtime_ns == before


def test_the_command_on_emoji_with_a_baseline(tmp_path):
    """Our own way and the stock one give the same scores for the same checkpoint."""
    path = str(asset_path(TINY))
    command = ["eval", "emoji", "--model", path, "--baseline", path, "--queries", "5", "--output-dir", str(tmp_path)]
    result = CliRunner().invoke(cocoa.app, [*command, "--tasks", "Emoji-Style", "--tasks", "Emoji-German"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "chart.png").stat().st_size > 10_000 and "partial" in (tmp_path / "report.md").read_text()
    ours, stock = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("*/scores.json")))
    assert ours["tasks"] == stock["tasks"] and ours["settings"]["fingerprint"] != stock["settings"]["fingerprint"]
    page = next(tmp_path.glob("*/pages/Emoji-Style.html")).read_text()
    assert page.count("<section") == 5 and "data:image/png" in page and "in Twemoji style" in page


def test_a_stretched_picture_and_a_small_one_are_what_the_benchmark_shows(tmp_path, data, monkeypatch):
    source = data({"VOC2007": ROWS["VOC2007"]})
    Image.new("RGB", (20, 90), "red").save(tmp_path / "images" / "a.png")
    sizes = []
    for resolution in (None, "low"):
        encoder = Encoder(str(asset_path(TINY)), resolution=resolution)
        read = type(encoder.model.processor).read

        def watched(self, inputs, read=read):
            for conversation in read(self, inputs):
                sizes.extend(image.size for image in conversation.images)
                yield conversation

        monkeypatch.setattr(type(encoder.model.processor), "read", watched)
        evaluate_model(
            encoder, [TASKS["VOC2007"]], source, tmp_path / "images", tmp_path / "out", show_progress_bar=False
        )
        monkeypatch.undo()
    assert list(dict.fromkeys(sizes)) == [(56, 56), (64, 64), (128, 128)] and len(sizes) == 8, "each read twice"
    assert len(list((tmp_path / "out" / "vectors").glob("*/VOC2007/*.safetensors"))) == 2, "kept apart"


KILLED = """
import sys
from evaluation import vectors
from evaluation.encoders import Encoder
from evaluation.emoji_tasks import EMOJI_TASKS
from evaluation.mmeb import evaluate_model

vectors.CHUNK = 16
model, data, output_dir = sys.argv[1:]
print("begun", flush=True)
evaluate_model(
    Encoder(model), EMOJI_TASKS[:4], data, data + "/images", output_dir, benchmark="Emoji", show_progress_bar=False
)
"""


def kill_and_compare(emoji, tmp_path, kills):
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    root = str(Path(__file__).parents[2])
    settings = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(folder):
        command = [sys.executable, str(script), str(asset_path(TINY)), str(emoji), str(tmp_path / folder)]
        process = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        return process

    whole = start("whole")
    begun = time.monotonic()  # since it has imported everything, as the others are waited for
    assert whole.wait(300) == 0, whole.stderr.read()
    seconds = time.monotonic() - begun
    killed = 0
    generator = np.random.default_rng(kills)
    for _ in range(kills):
        process = start("killed")
        time.sleep(generator.uniform(0.1, 0.5) * seconds)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    process = start("killed")
    assert process.wait(300) == 0, process.stderr.read()
    assert killed, "else this test says nothing"
    for name in ("scores.json", *(f"queries/{task.name}.jsonl" for task in EMOJI_TASKS[:4])):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "killed").rglob(".partial-*.json*"))


def test_a_killed_evaluation_ends_with_the_same_files(emoji, tmp_path):
    kill_and_compare(emoji, tmp_path, 2)


@pytest.mark.slow
def test_an_evaluation_killed_ten_times_ends_with_the_same_files(emoji, tmp_path):
    kill_and_compare(emoji, tmp_path, 10)


SHARED = """
import sys
from accelerate import PartialState
from evaluation import vectors
from evaluation.encoders import Encoder
from evaluation.emoji_tasks import EMOJI_TASKS
from evaluation.mmeb import evaluate_model

vectors.CHUNK = 16
state = PartialState(cpu=True)
model, data, output_dir = sys.argv[1:]
found = evaluate_model(
    Encoder(model), EMOJI_TASKS[:2], data, data + "/images", output_dir, benchmark="Emoji", show_progress_bar=False
)
assert (found is None) == (state.process_index > 0)
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_processes_share_an_evaluation(emoji, tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(SHARED)
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(script), str(asset_path(TINY)), str(emoji), str(tmp_path / "two")]
    result = subprocess.run([sys.executable, *launcher, *arguments], env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    monkeypatch.setattr(vectors, "CHUNK", 16)
    encoder = Encoder(str(asset_path(TINY)))
    evaluate_model(
        encoder, EMOJI_TASKS[:2], str(emoji), emoji / "images", tmp_path / "one", benchmark="Emoji",
        show_progress_bar=False,
    )  # fmt: skip
    ours, shared = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert ours["tasks"] == shared["tasks"]


def test_an_evaluation_takes_little_more_than_embedding(emoji, tmp_path):
    """The time outside of the model on a task, against the time in it; `make bench` has the ratio on more."""
    encoder, inside = Encoder(str(asset_path(TINY))), []

    class Timed:
        name, fingerprint, weights, resolution = encoder.name, encoder.fingerprint, encoder.weights, None

        def __call__(self, items):
            begun = time.monotonic()
            found = encoder(items)
            inside.append((len(items), time.monotonic() - begun))
            return found

    begun = time.monotonic()
    scores = evaluate_model(Timed(), EMOJI_TASKS[4:5], str(emoji), emoji / "images", tmp_path, show_progress_bar=False)
    whole = time.monotonic() - begun
    assert sum(count for count, _ in inside) == scores.tasks[0].inputs
    assert whole < 3 * sum(seconds for _, seconds in inside) + 1, "a bound for a busy machine"
