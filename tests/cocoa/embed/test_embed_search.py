# SPDX-License-Identifier: Apache-2.0
"""What is found is what a product of all vectors finds, whatever their type; the page shows the source's images."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cocoa import cli
from cocoa.embed.run import embed_dataset
from cocoa.embed.search import VectorFolder
from modeling_cocoa import CocoaTransformer
from tests.cocoa.embed.conftest import TINY, emoji

COUNT = 40


@pytest.fixture
def folder(images, tmp_path, here):
    folder = images(COUNT)
    (folder / "bad.png").write_bytes(b"")
    return folder


def embed(folder, output, **options):
    embed_dataset(str(folder), TINY, output, rows_per_shard=16, show_progress_bar=False, **options)


@pytest.mark.parametrize("format", ["parquet", "lance"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_the_nearest_are_those_of_a_product_of_all_vectors(folder, tmp_path, dtype, format):
    if format == "lance":
        pytest.importorskip("lance")
    embed(folder, tmp_path / "out", dtype=dtype, format=format)
    module = CocoaTransformer(TINY).eval()
    paths = sorted(path for path in folder.rglob("*.png") if path.name != "bad.png")
    vectors = module.encode([str(path) for path in paths])
    query = emoji(8)[7][0]
    scores = vectors @ module.encode([{"text": query}])[0]
    hits = VectorFolder(tmp_path / "out").search({"text": query}, top_k=5)
    exact = [str(paths[place].relative_to(folder)) for place in np.argsort(-scores)[:5]]
    assert hits[0].id == exact[0]
    if dtype != "binary":
        assert [hit.id for hit in hits] == exact
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=5e-3)
    assert len(hits) == 5 and sorted(hits, key=lambda hit: -hit.score) == hits
    # The image itself is its own nearest, and more hits than rows are all rows with a vector.
    assert VectorFolder(tmp_path / "out").search({"image": str(paths[3])}, 1)[0].id == str(
        paths[3].relative_to(folder)
    )
    found = VectorFolder(tmp_path / "out").search({"text": query}, top_k=1000)
    assert len({hit.id for hit in found}) == len(found) == COUNT


def test_the_command_prints_hits_and_writes_a_page(folder, tmp_path):
    embed(folder, tmp_path / "out")
    name = emoji(8)[7][0]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(cli.app, ["search", str(tmp_path / "out"), name, "--top-k", "3", "--html", str(page)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    expected = VectorFolder(tmp_path / "out").search({"text": name}, 3)
    assert [line.split() for line in lines[:3]] == [[f"{hit.score:.3f}", hit.id] for hit in expected]
    assert lines[3] == f"The page is {page}"
    text = page.read_text(encoding="utf-8")
    assert text.count("<img src=") == 3 and f"<title>Search: {name}</title>" in text
    assert all(f'alt="{hit.id}"' in text for hit in expected)
    for words in ([], [""], [" "]):
        result = CliRunner().invoke(cli.app, ["search", str(tmp_path / "out"), *words])
        assert result.exit_code == 2 and "give words to search for" in " ".join(result.output.split())
    # Without the source, there are no images.
    folder.rename(tmp_path / "elsewhere")
    result = CliRunner().invoke(cli.app, ["search", str(tmp_path / "out"), name, "--html", str(page)])
    assert result.exit_code == 0 and "<img src=" not in page.read_text(encoding="utf-8")


def test_texts_that_are_kept_are_printed(tmp_path, here):
    names = [name for name, _ in emoji(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": name, "id": name[::-1]}) for name in names))
    embed(tmp_path / "rows.jsonl", tmp_path / "out")
    hit = VectorFolder(tmp_path / "out").search({"text": names[4]})[0]
    assert hit.id == names[4][::-1] and hit.columns == {"text": names[4]} and hit.score == pytest.approx(1, abs=1e-5)


def test_captions_describe_the_images_of_a_page(images, tmp_path, here):
    folder = images(3, names=True)
    embed(folder, tmp_path / "out")
    vectors, query = VectorFolder(tmp_path / "out"), {"image": str(folder / "001.png")}
    hits = vectors.search(query)
    names = [name for name, _ in emoji(3)]
    assert hits[0].columns == {"text": names[1]}
    vectors.write_page(tmp_path / "page.html", query, hits)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>Search: 001.png</title>" in page and 'alt="001.png"' in page
    assert all(f'alt="{name}"' in page and f"<figcaption>{name}<" in page for name in names)


def test_vectors_of_another_model_are_refused(folder, tmp_path):
    embed(folder, tmp_path / "out")
    shutil.copytree(TINY, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    settings["image_processor"]["max_pixels"] = settings["image_processor"]["size"]["longest_edge"] = 32 * 32
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="were made by another model than"):
        VectorFolder(tmp_path / "out", model=str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match="has no manifest.json; make it with cocoa embed"):
        VectorFolder(tmp_path)


def test_a_search_reads_only_what_it_needs(folder, tmp_path, monkeypatch):
    """The vectors, a shard at a time, and the columns of the hits."""
    embed(folder, tmp_path / "out")
    read, calls = pq.ParquetFile.read, []
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self, columns: calls.append(columns) or read(self, columns))
    VectorFolder(tmp_path / "out").search({"text": "a cat"}, top_k=2)
    assert calls == [["embedding"]] * 3 + [["id"]] * 2
