# SPDX-License-Identifier: Apache-2.0
"""Every kind of source gives the same rows, in pieces of any size; nothing is missing and nothing comes twice."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset_builder

from cocoa.embed import source as sources
from cocoa.embed.plan import make_plan
from cocoa.embed.source import find_source
from cocoa.embed.worker import items
from tests.cocoa.embed.conftest import emoji

COUNT = 23
TEXTS = [f'text {number}, with "quotes"\nand a line' for number in range(COUNT)]


def write(kind: str, folder) -> str:
    """The same rows as files of a kind, in two files where that is easy; returns the source."""
    folder.mkdir()
    rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    halves = {"a": rows[:10], "b": rows[10:]}
    if kind in ("parquet", "glob"):
        for name, half in halves.items():
            pq.write_table(pa.Table.from_pylist(half), folder / f"{name}.parquet", row_group_size=4)
        return str(folder / "*.parquet") if kind == "glob" else str(folder)
    if kind == "json":
        for name, half in halves.items():
            (folder / f"{name}.jsonl").write_text("\n\n".join(map(json.dumps, half)), encoding="utf-8")
    elif kind == "csv":
        for name, half in halves.items():
            with open(
                folder / f"{name}.csv", "w", encoding="utf-8-sig" if name == "a" else "utf-8", newline=""
            ) as file:
                writer = csv.DictWriter(file, ["id", "text"])
                writer.writeheader()
                writer.writerows(half)
    elif kind == "arrow file":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(folder / "a.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif kind == "datasets":
        Dataset.from_list(rows).save_to_disk(folder / "saved", num_shards=2)
        return str(folder / "saved")
    elif kind == "tar":
        for name, half in halves.items():
            with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                for row in half:
                    # A name of more than a header has room for, which takes more than one.
                    for ending, value in (("txt", row["text"]), ("json", json.dumps({"id": row["id"]}))):
                        content = value.encode()
                        member = tarfile.TarInfo(f"{'long' * 30}/{row['id']:06d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        return str(folder)
    elif kind == "lance":
        lance = pytest.importorskip("lance")
        for half in halves.values():
            lance.write_dataset(pa.Table.from_pylist(half), str(folder / "rows.lance"), mode="append")
        return str(folder / "rows.lance")
    return str(folder)


KINDS = ["parquet", "glob", "json", "csv", "arrow file", "datasets", "tar", "lance"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 3, 1000])
def test_every_row_comes_once_and_in_order(tmp_path, kind, most):
    options = {"text": "text", "id": "__key__"} if kind == "tar" else {}
    source = find_source(write(kind, tmp_path / "rows"), **options)
    (tmp_path / "out").mkdir()
    plan = make_plan(source, tmp_path / "out", most)
    found = [item for shard in range(len(plan)) for item in items(source, plan, shard)]
    assert [item.input["text"] for item in found] == TEXTS
    ids = [str(item.id).rpartition("/")[2] for item in found]
    assert ids == [f"{number:06d}" if kind == "tar" else str(number) for number in range(COUNT)]
    assert sum(plan.rows) == COUNT and max(plan.rows) <= most
    assert [item.kept["text"] for item in found] == TEXTS
    # Any row alone is the same row.
    again = [next(items(source, plan, shard, [row])) for shard in range(len(plan)) for row in range(plan.rows[shard])]
    assert again == found


def test_rows_without_ids_are_called_by_file_and_number(tmp_path):
    source = find_source(write("json", tmp_path / "rows"), text="text", id="text")
    source = sources.Source(**{**vars(source), "id": None})
    (tmp_path / "out").mkdir()
    plan = make_plan(source, tmp_path / "out", 4)
    found = [item.id for shard in range(len(plan)) for item in items(source, plan, shard)]
    assert found == [f"a.jsonl:{row}" for row in range(10)] + [f"b.jsonl:{row}" for row in range(13)]


def test_a_folder_of_images_with_and_without_metadata(images, tmp_path):
    folder = images(7)
    for has_names in (False, True):
        source = find_source(str(images(7, names=has_names)), text="text" if has_names else None)
        (out := tmp_path / f"out-{has_names}").mkdir()
        plan = make_plan(source, out, 3)
        found = [item for shard in range(len(plan)) for item in items(source, plan, shard)]
        expected = {f"{'more/' if number % 3 == 0 else ''}{number:03d}.png" for number in range(7)}
        assert {item.id for item in found} == expected and len(found) == 7
        assert all(item.input["image"] == str(folder / item.id) for item in found)
        assert not has_names or [item.input["text"] for item in found] == [name for name, _ in emoji(7)]


def test_captions_of_a_folder_are_kept_and_not_embedded(images, tmp_path):
    source = find_source(str(images(3, names=True)))
    (tmp_path / "out").mkdir()
    plan = make_plan(source, tmp_path / "out", 10)
    found = list(items(source, plan, 0))
    assert [item.kept for item in found] == [{"text": name} for name, _ in emoji(3)]
    assert all(set(item.input) == {"image"} for item in found)
    assert find_source(str(tmp_path / "images"), keep=[]).keep == ()


@pytest.mark.parametrize("is_path", [False, True])
def test_images_of_datasets_are_bytes_or_paths_beside_the_table(images, tmp_path, is_path):
    folder = images(3)
    content = (folder / "001.png").read_bytes()
    cell = {"bytes": None, "path": "001.png"} if is_path else {"bytes": content, "path": None}
    pq.write_table(pa.table({"id": ["x"], "image": [cell]}), folder / "table.parquet")
    source = find_source(str(folder / "table.parquet"))
    (piece,) = source.cut(str(folder / "table.parquet"), "1", 10)
    (item,) = source.read(piece)
    assert item.input["image"] == (str(folder / "001.png") if is_path else cell)


def test_files_beyond_this_machine(tmp_path):
    """By fsspec: a table in memory, and the image that it names beside it."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/images/a.png", emoji(1)[0][1])
    fs.pipe("/bucket/rows.jsonl", b'{"image": "images/a.png"}\n{"image": "images/none.png"}\n')
    source = find_source("memory://bucket/rows.jsonl")
    (tmp_path / "out").mkdir()
    plan = make_plan(source, tmp_path / "out", 10)
    first, second = items(source, plan, 0)
    assert first.input["image"]["bytes"] == emoji(1)[0][1]
    assert isinstance(second.input, ValueError) and "none.png" in str(second.input)


def test_a_dataset_by_name_is_read_where_its_files_are(tmp_path, monkeypatch):
    folder = write("parquet", tmp_path / "rows")
    monkeypatch.setattr("datasets.load_dataset_builder", lambda name: load_dataset_builder(folder))
    source = find_source("some/dataset")
    assert source.format == "parquet" and len(list(source.list())) == 2
    with pytest.raises(ValueError, match=r"--split: some/dataset has no split 'other'; it has \['train'\]"):
        find_source("some/dataset", split="other")


def test_bad_lines_are_rows_with_a_reason(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n[1]\n{"text": "b"}\n')
    (tmp_path / "a.csv").write_text("text,name\na,b\nc\nd,e\n")
    for name, reasons in (("a.jsonl", {1: "not JSON", 2: "not a JSON object"}), ("a.csv", {1: "1 values for 2"})):
        source = find_source(str(tmp_path / name))
        (piece,) = source.cut(str(tmp_path / name), "1", 100)
        found = list(source.read(piece))
        assert {row for row, item in enumerate(found) if isinstance(item.input, ValueError)} == set(reasons)
        for row, reason in reasons.items():
            assert reason in str(found[row].input) and found[row].id == f"{name}:{row}"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "There is no file or folder"),
        ("nothing/*.parquet", {}, "matches no file"),
        ("rows/a.parquet", {"text": "words"}, r"--text: .* has no column 'words'; it has \['id', 'text'\]"),
        ("rows/a.parquet", {"keep": ["words"]}, "--keep words: .* has no column"),
        ("rows/a.parquet", {"split": "train"}, "--split is for datasets of the Hub"),
        ("rows/a.parquet", {"image": "id", "text": "text", "keep": ["id2"]}, "no column 'id2'"),
        ("both.jsonl", {}, "Say which columns of .* to embed"),
        ("floats.jsonl", {}, "--id: the column 'id' holds double"),
        ("broken.parquet", {}, "broken.parquet cannot be read"),
        ("rows/a.parquet", {"text": "txet"}, r"no column 'txet' \(did you mean text\?\)"),
        ("row", {}, r"no file or folder row \(did you mean rows\?\)"),
        ("notes.txt", {}, "of an unknown kind: give a folder of images, or files of rows"),
        (
            "notes",
            {},
            r"notes holds nothing that can be embedded \(1 .txt\): give a folder of images, or files of rows",
        ),
        ("void", {}, r"void holds nothing that can be embedded \(it is empty\)"),
        (".", {}, r"files of several kinds \(.*2 .jsonl.*\): give files of one kind, such as './\*.parquet'"),
        (
            "mixed",
            {},
            r"\(1 .png, 1 .csv\): give .* 'mixed/\*.csv', a folder of the images alone, or call .* metadata.csv",
        ),
    ],
)
def test_a_wrong_source_is_one_clear_error(tmp_path, monkeypatch, name, options, message):
    write("parquet", tmp_path / "rows")
    (tmp_path / "both.jsonl").write_text('{"text": "a", "image": "b.png"}\n')
    (tmp_path / "floats.jsonl").write_text('{"text": "a", "id": 0.5}\n')
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "notes.txt").write_text("")
    for place in ("notes/a.txt", "mixed/a.png", "mixed/captions.csv", "void/.hidden"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_source(name, **options)
