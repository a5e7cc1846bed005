# SPDX-License-Identifier: Apache-2.0
"""A file is written whole, or stays as it was."""

from __future__ import annotations

import pytest

from modeling_cocoa.files import atomic_folder, atomic_write


def test_what_was_finished_takes_the_name(tmp_path):
    with atomic_write(tmp_path / "report.json") as path:
        path.write_text("one")
        assert not (tmp_path / "report.json").exists() and path.suffix == ".json"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_what_was_not_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "report.json") as path:
        path.write_text("half of a new")
        raise KeyError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.json", "old")]


@pytest.mark.parametrize("written", [["model.bin", "last"], ["part-1.bin"], ["other"]])
def test_a_folder_has_the_files_of_one_save_of_each_kind(tmp_path, written):
    folder = tmp_path / "folder"
    before = {"model.bin", "last", "mine"}
    for names in (before, written):
        with atomic_folder(folder, last="last", stale=("model.bin", "part-*.bin")) as staging:
            for name in names:
                (staging / name).write_text("".join(written))
    expected = before | set(written)
    if "part-1.bin" in written:
        expected -= {"model.bin"}
    assert {path.name for path in folder.iterdir()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_stays_as_it_was_where_writing_fails(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder", last="last") as staging:
        (staging / "model.bin").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
