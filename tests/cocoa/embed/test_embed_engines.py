# SPDX-License-Identifier: Apache-2.0
"""Other engines find in the files of `cocoa embed` what `cocoa search` finds; the examples run as they stand."""

from __future__ import annotations

import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from cocoa.embed.run import embed_dataset
from cocoa.embed.search import VectorFolder
from tests.cocoa.embed.conftest import ROOT, TINY, emoji

QUERY = emoji(8)[7][0]


@pytest.fixture(params=["float32", "float16"])
def vectors(request, images, tmp_path, here) -> Path:
    folder = images(30)
    (folder / "bad.png").write_bytes(b"")
    embed_dataset(str(folder), TINY, tmp_path / "out", dtype=request.param, rows_per_shard=16, show_progress_bar=False)
    return tmp_path / "out"


def run_example(monkeypatch, name: str, *options: object) -> list[tuple[str, float]]:
    """Ids and scores that an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    with redirect_stdout(printed := StringIO()):
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    lines = [line.split() for line in printed.getvalue().splitlines()]
    return [(row, float(score)) for score, row in lines]


def check(found: list[tuple[str, float]], vectors: Path) -> None:
    expected = VectorFolder(vectors).search({"text": QUERY}, top_k=5)
    assert [row for row, _ in found] == [hit.id for hit in expected]
    np.testing.assert_allclose([score for _, score in found], [hit.score for hit in expected], atol=2e-3)


@pytest.mark.parametrize("engine", ["duckdb", "lancedb", "qdrant"])
def test_examples_find_what_cocoa_search_finds(vectors, tmp_path, monkeypatch, engine):
    pytest.importorskip({"qdrant": "qdrant_client"}.get(engine, engine))
    options = [] if engine == "duckdb" else ["--database", tmp_path / "database"]
    for _ in range(2):  # the second call finds the database there
        check(run_example(monkeypatch, f"search_with_{engine}.py", vectors, QUERY, *options), vectors)


def test_lance_files_are_a_table_of_lancedb(images, tmp_path, here, monkeypatch):
    pytest.importorskip("lancedb")
    options = {"format": "lance", "rows_per_shard": 16, "show_progress_bar": False}
    folder = images(30)
    embed_dataset(str(folder), TINY, tmp_path / "out", **options)
    (folder / "bad.png").write_bytes(b"")
    summary = embed_dataset(str(folder), TINY, tmp_path / "out", **options)
    assert summary.rows == 31 and summary.errors == 1
    check(run_example(monkeypatch, "search_with_lancedb.py", tmp_path / "out", QUERY), tmp_path / "out")


def test_datasets_loads_the_files_and_faiss_searches_them(vectors, tmp_path):
    pytest.importorskip("faiss")
    rows = load_dataset("parquet", data_files=f"{vectors}/shard-*.parquet", split="train", cache_dir=str(tmp_path))
    rows = rows.filter(lambda error: error is None, input_columns="error")
    assert len(rows) == 30
    rows.add_faiss_index("embedding", metric_type=0)
    embedder = VectorFolder(vectors).embedder
    scores, found = rows.get_nearest_examples("embedding", embedder.embed([{"text": QUERY}])[0][0], k=5)
    check(list(zip(found["id"], map(float, scores), strict=True)), vectors)


@pytest.mark.slow
def test_ray_data_maps_batches_with_two_actors_on_two_cpus(tmp_path):
    """Under a time limit: with actors that take whole CPUs it would hang."""
    ray = pytest.importorskip("ray")
    import subprocess

    from tests.cocoa.embed.test_embed_processes import ENVIRONMENT

    texts = [name for name, _ in emoji(40)]
    pq.write_table(pa.table({"id": range(40), "text": texts}), tmp_path / "rows.parquet", row_group_size=10)
    code = f"""
import os
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from cocoa import CocoaEmbedder
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
rows = ray.data.read_parquet({str(tmp_path / "rows.parquet")!r}).map_batches(
    CocoaEmbedder, fn_constructor_args=[{TINY!r}], fn_constructor_kwargs={{"text": "text"}}, concurrency=2,
    num_cpus=0.5, batch_size=10,
)
rows.write_parquet({str(tmp_path / "out")!r})
"""
    assert ray.__version__
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=240, capture_output=True)
    table = pa.concat_tables([pq.read_table(file) for file in (tmp_path / "out").glob("*.parquet")])
    rows = sorted(table.to_pylist(), key=lambda row: row["id"])
    assert [row["text"] for row in rows] == texts and not any(row["error"] for row in rows)
    from cocoa import CocoaTransformer

    expected = CocoaTransformer(TINY).eval().encode([{"text": text} for text in texts])
    np.testing.assert_allclose(np.stack([row["embedding"] for row in rows]), expected, atol=1e-6)
