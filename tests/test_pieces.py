# SPDX-License-Identifier: Apache-2.0
"""A file that is cut and joined is the same file; one that is not whole is not written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "pieces.py"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def pieces(tmp_path) -> Path:
    content = bytes(range(256)) * 100
    (tmp_path / "a.whl").write_bytes(content)
    assert run("cut", tmp_path / "a.whl", "--into", tmp_path / "pieces", "--mib", 0.005).returncode == 0
    return tmp_path / "pieces"


def test_pieces_make_the_file_again_in_any_order(pieces, tmp_path):
    folders = sorted(pieces.iterdir(), reverse=True)
    assert len(folders) == 5
    assert run("join", *folders, "--into", tmp_path / "there").returncode == 0
    assert (tmp_path / "there" / "a.whl").read_bytes() == (tmp_path / "a.whl").read_bytes()
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["a.whl"]


def test_a_missing_piece_and_a_damaged_one_are_named(pieces, tmp_path):
    folders = sorted(pieces.iterdir())
    assert "one is missing" in run("join", *folders[:-1], "--into", tmp_path / "there").stderr
    assert "file.json" in run("join", *folders[1:], "--into", tmp_path / "there").stderr
    piece = folders[2] / "002.piece"
    piece.write_bytes(bytes(len(piece.read_bytes())))
    assert "damaged" in run("join", *folders, "--into", tmp_path / "there").stderr
    assert not (tmp_path / "there").exists()
