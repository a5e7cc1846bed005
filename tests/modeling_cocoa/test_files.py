# SPDX-License-Identifier: Apache-2.0
"""A file is written whole, or stays as it was."""

from __future__ import annotations

import pytest

from modeling_cocoa.files import atomic_write


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
