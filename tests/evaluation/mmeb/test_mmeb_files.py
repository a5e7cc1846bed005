# SPDX-License-Identifier: Apache-2.0
"""The files of MMEB-V1's tasks: what is missing, broken or of another type is said, with the task and the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets.load
import pytest
from datasets import Dataset

from evaluation.mmeb.data import load_tasks
from tests.evaluation.conftest import ROWS, TASKS, V1_ROWS
from tests.evaluation.conftest import read as read_task
from tests.loopback_hub import LoopbackHub


@pytest.fixture
def source(tmp_path):
    """A folder with a file of VOC2007: rows, or what is in it."""
    (tmp_path / "images").mkdir()

    def write(content, ending="jsonl"):
        path = tmp_path / "data" / "VOC2007" / f"test.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == "parquet" and not isinstance(content, bytes):
            Dataset.from_list(content).to_parquet(str(path))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(tmp_path / "data")

    return write


def read(source, **options):
    return read_task(TASKS["VOC2007"], source, source.replace("/data", "/images"), **options)


def test_both_formats_are_read_alike_and_parts_as_one(source):
    lines = read(source(ROWS["VOC2007"]))
    folder = source(ROWS["VOC2007"], "parquet")
    Dataset.from_list(ROWS["VOC2007"][:1]).to_parquet(f"{folder}/VOC2007/test-2.parquet")
    Dataset.from_list(ROWS["VOC2007"]).select([]).to_parquet(f"{folder}/VOC2007/test-3.parquet")
    parts = read(folder)
    assert [parts.queries[row] for row in (0, 1, 2)] == [lines.queries[row] for row in (0, 0, 1)]
    assert parts.candidates == lines.candidates and len(parts.queries) == 3


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_are_read_without_telling_anybody(source, monkeypatch, ending):
    def tell(*_, **__):
        raise AssertionError("a request was made")

    monkeypatch.setattr(datasets.load, "increase_load_count", tell)
    assert len(read(source(ROWS["VOC2007"], ending)).queries) == 2


@pytest.mark.parametrize(
    ("content", "ending", "reason"),
    [
        (b"no parquet", "parquet", "ArrowInvalid"),
        (b"", "parquet", "ArrowInvalid"),
        (b'{"qry_text": "a"}\nnot json\n', "jsonl", "JSON parse error"),
        (b'{"qry_text": "\\ud800"}\n', "jsonl", "surrogate"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(source, content, ending, reason):
    message = f"VOC2007 in .*VOC2007/test.{ending} cannot be read .*{reason}.*; fix it, or download it again"
    with pytest.raises(ValueError, match=message):
        read(source(content, ending))


@pytest.mark.parametrize(("content", "ending"), [(b"", "jsonl"), (b" \n\n", "jsonl"), ([], "parquet")])
def test_a_file_without_rows_is_said(source, content, ending):
    if content == []:
        folder = source(ROWS["VOC2007"], ending)
        Dataset.from_list(ROWS["VOC2007"]).select([]).to_parquet(f"{folder}/VOC2007/test.parquet")
    else:
        folder = source(content, ending)
    with pytest.raises(ValueError, match="VOC2007 in .* has no rows; download it again"):
        read(folder)


@pytest.mark.parametrize("layout", [ROWS, V1_ROWS], ids=["instruct", "v1"])
@pytest.mark.parametrize(
    ("ending", "column", "value", "holds"),
    [
        (
            "parquet",
            "tgt_text",
            "red",
            "string.*where each row has a list of texts.*a single candidate as a list of one",
        ),
        ("jsonl", "tgt_img_path", "", "string.*where each row has a list of texts"),
        ("parquet", "tgt_text", [3, 4, 5], "int64.*where each row has a list of texts; .*numbers as texts"),
        ("jsonl", "tgt_text", ["red", 3, "blue"], "where each row has a list of texts"),
        ("jsonl", "qry_text", 3, "int64.*where each row has a text"),
        ("parquet", "qry_img_path", ["a.png"], "where each row has a text"),
    ],
)
def test_a_column_of_another_type_is_named(source, layout, ending, column, value, holds):
    rows = [{**row, column: value} for row in layout["VOC2007"]]
    with pytest.raises(ValueError, match=f"The column {column} of VOC2007 in .*test.{ending} holds .*{holds}"):
        read(source(rows, ending))


def test_what_is_missing_altogether_is_a_column_too(source):
    """None all over: as Arrow has a column of which nothing is known."""
    rows = [{**row, "tgt_img_path": [None] * 3, "tgt_inst": None} for row in ROWS["VOC2007"]]
    assert read(source(rows)).queries.keys() == {0, 1}


@pytest.mark.parametrize("missing", ["tgt_inst", "qry_inst"])
def test_one_column_of_instructions_is_enough(source, missing):
    """The other counts as empty: the benchmark's current evaluator does not ask for it where targets are texts."""
    rows = [{name: value for name, value in row.items() if name != missing} for row in ROWS["VOC2007"]]
    found = read(source(rows, "parquet"))
    expected = "\nIdentify the object\n" if missing == "tgt_inst" else " \n"
    assert found.has_instructions and {query.text for query in found.queries.values()} == {expected}
    assert list(found.candidates) == ["red", "blue", "green"]


def test_what_is_not_there_is_said(source):
    folder = source(ROWS["VOC2007"], "parquet")
    with pytest.raises(FileNotFoundError, match=r"no rows of SUN397 in .*Its folders are \['VOC2007'\]"):
        read_task(TASKS["SUN397"], folder, folder)
    Dataset.from_dict({"qry": ["a"]}).to_parquet(f"{folder}/VOC2007/test.parquet")
    with pytest.raises(
        ValueError, match=r"VOC2007 in .*test.parquet lacks the columns \['qry_text'.*it has \['qry'\]"
    ):
        read(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be 1 or more rows of a task; got 0"),
        ({"limit": -1}, "got -1"),
        ({"on_bad_row": "drop"}, "on_bad_row must be 'error' or 'skip'; got 'drop'"),
    ],
)
def test_options_that_mean_nothing_are_an_error(source, options, message):
    with pytest.raises(ValueError, match=message):
        read(source(ROWS["VOC2007"]), **options)


def test_the_state_of_the_data_is_that_of_its_files(source, tmp_path):
    folder = source(ROWS["VOC2007"])
    state = load_tasks([TASKS["VOC2007"]], folder, tmp_path / "images").revision
    assert state == load_tasks([TASKS["VOC2007"]], folder, tmp_path).revision
    assert state != load_tasks([TASKS["VOC2007"]], source(ROWS["VOC2007"][:1]), tmp_path).revision


FROM_THE_HUB = """
import sys
from evaluation.mmeb.data import load_tasks, read_task
from evaluation.mmeb.tasks import MMEB_V1, find_tasks

name, images = sys.argv[1:]
data = load_tasks(find_tasks(["VOC2007", "GQA"], MMEB_V1), name, images)
print(data.revision)
task, rows = next(iter(data.rows.items()))
print(len(read_task(task, rows, data.image_dir).queries))
for task, source in (("SUN397", name), ("GQA", "org/none")):
    try:
        load_tasks(find_tasks([task], MMEB_V1), source, images)
    except (OSError, ValueError) as error:
        print(error)
"""


def test_data_come_from_the_hub_by_commit(tmp_path, data):
    """And from its cache when offline."""
    folder = Path(data(ROWS))
    configs = [f"- {{config_name: {name}, data_files: [{{split: test, path: {name}/*}}]}}" for name in ROWS]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]))
    with LoopbackHub() as hub:
        hub_settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "hub")}
        settings = {**os.environ, **hub_settings, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}
        publish = "import sys; from huggingface_hub import HfApi; api = HfApi(); "
        publish += "api.create_repo('org/mmeb', repo_type='dataset'); "
        publish += "print(api.upload_folder(repo_id='org/mmeb', repo_type='dataset', folder_path=sys.argv[1]).oid)"

        def run(code, *arguments, offline="0"):
            found = subprocess.run(
                [sys.executable, "-c", code, *map(str, arguments)], env={**settings, "HF_HUB_OFFLINE": offline},
                capture_output=True, text=True, cwd=Path(__file__).parents[3],
            )  # fmt: skip
            assert found.returncode == 0, found.stderr[-3000:]
            return found.stdout.splitlines()

        (commit,) = run(publish, folder)
        found = run(FROM_THE_HUB, "org/mmeb", tmp_path / "images")
        assert found[:2] == [commit, "2"]
        assert found[2].startswith("org/mmeb has no SUN397 (BuilderConfig 'SUN397' not found. Available: ['VOC2007'")
        assert found[3].startswith("org/none is neither a folder nor a dataset that can be had from the Hub")
    assert run(FROM_THE_HUB, "org/mmeb", tmp_path / "images", offline="1")[:2] == [commit, "2"]
