# SPDX-License-Identifier: Apache-2.0
"""Shards stay as they are while their files do, whatever comes beside them."""

from __future__ import annotations

import os
import time

import pytest

from cocoa.embed.plan import make_plan
from cocoa.embed.source import find_source


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "out").mkdir()
    for number in range(10):
        (tmp_path / "files" / f"{number}.png").write_bytes(b"x")
    return tmp_path


def planned(folder, most=4):
    plan = make_plan(find_source(str(folder / "files")), folder / "out", most)
    return plan, [[os.path.basename(piece.path) for piece in plan.pieces(shard)] for shard in range(len(plan))]


def test_the_order_is_that_of_paths_and_the_same_each_time(folder):
    plan, shards = planned(folder)
    assert shards == [["0.png", "1.png", "2.png", "3.png"], ["4.png", "5.png", "6.png", "7.png"], ["8.png", "9.png"]]
    again, same = planned(folder)
    assert same == shards and again.digests == plan.digests and again.rows == [4, 4, 2]


def test_what_grew_gets_new_shards_and_what_changed_leaves_its_own(folder):
    plan, shards = planned(folder)
    for name in ("00.png", "55.png"):
        (folder / "files" / name).write_bytes(b"y")
    grown, found = planned(folder)
    assert found == [*shards, ["00.png", "55.png"]] and grown.digests[:3] == plan.digests
    (folder / "files" / "5.png").write_bytes(b"changed")
    (folder / "files" / "8.png").unlink()
    changed, found = planned(folder)
    assert found == [shards[0], ["4.png", "6.png", "7.png"], ["9.png"], ["00.png", "55.png"], ["5.png"]]
    assert changed.digests[0] == plan.digests[0] and changed.digests[3] == grown.digests[3]
    assert changed.digests[1] != plan.digests[1]
    # A shard of which nothing is left keeps its number.
    (folder / "files" / "9.png").unlink()
    assert planned(folder)[1] == [shards[0], ["4.png", "6.png", "7.png"], [], ["00.png", "55.png"], ["5.png"]]


def test_a_plan_of_many_files_is_quick(folder):
    for number in range(20_000):
        (folder / "files" / f"more-{number}.png").touch()
    start = time.monotonic()
    plan, _ = planned(folder, 1024)
    assert sum(plan.rows) == 20_010 and time.monotonic() - start < 20
