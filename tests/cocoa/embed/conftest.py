# SPDX-License-Identifier: Apache-2.0
"""Collections of real images, and an engine that runs in the test's own process."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cocoa.embed import local, worker
from cocoa.embed.embedder import CocoaEmbedder

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "checkpoints" / "cocoa-tiny")


def emoji(count: int) -> list[tuple[str, bytes]]:
    """Names and PNG files of the first emoji."""
    table = pq.read_table(ROOT / "data" / "emoji.parquet", columns=["name", "noto"]).slice(0, count)
    return [(row["name"], row["noto"]["bytes"]) for row in table.to_pylist()]


@pytest.fixture
def images(tmp_path) -> Callable[[int], Path]:
    """Makes a folder of that many images, some of them in a folder within."""

    def make(count: int, names: bool = False) -> Path:
        folder = tmp_path / "images"
        (folder / "more").mkdir(parents=True, exist_ok=True)
        rows = [("file_name", "text")]
        for number, (name, content) in enumerate(emoji(count)):
            place = f"{'more/' if number % 3 == 0 else ''}{number:03d}.png"
            Image.open(io.BytesIO(content)).convert("RGB").resize((32, 32)).save(folder / place)
            rows.append((place, name))
        if names:
            with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)
        return folder

    return make


class HereEngine:
    """
    Workers in this process, one after the other. A shard in `deadly` kills the worker as often as it says.
    """

    deadly: dict[int, int] = {}
    loaded: dict[tuple, CocoaEmbedder] = {}

    def __init__(self, job, workers=None, threads=None, address=None) -> None:
        self.job, self.workers, self.threads = job, workers or 1, threads or 1
        self.answers: list[tuple] = []
        self.number = 0

    def start(self):
        self.number += 1
        self.send(each := (self.number, worker.ShardWorker(self.job, self.threads, "cpu")), None)
        return each

    def send(self, each, shard):
        self.answers.append((each, shard))

    def wait(self):
        each, shard = self.answers.pop(0)
        if self.deadly.get(shard, 0) > 0:
            self.deadly[shard] -= 1
            yield each, "died", "exit code -9"
            return
        yield each, *each[1].run(shard)

    def close(self):
        self.answers.clear()


@pytest.fixture
def here(monkeypatch) -> type[HereEngine]:
    """`engine="local"` without processes; a model is loaded once."""

    def load(*args, **kwargs):
        key = (args, *sorted((name, value) for name, value in kwargs.items() if name not in ("device", "threads")))
        if key not in HereEngine.loaded:
            HereEngine.loaded[key] = CocoaEmbedder(*args, **kwargs)
        return HereEngine.loaded[key]

    monkeypatch.setattr("cocoa.embed.embedder.CocoaEmbedder", load)
    monkeypatch.setattr("cocoa.embed.search.CocoaEmbedder", load)
    monkeypatch.setattr(local, "LocalEngine", HereEngine)
    monkeypatch.setattr(HereEngine, "deadly", {})
    return HereEngine
