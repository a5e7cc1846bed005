# SPDX-License-Identifier: Apache-2.0
"""A collection to a folder of vectors: every id once, with its own vector, or with the reason why it has none."""

from __future__ import annotations

import errno
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cocoa import cli
from cocoa.embed.embedder import CocoaEmbedder
from cocoa.embed.output import Output
from cocoa.embed.run import embed_dataset
from modeling_cocoa import CocoaTransformer
from tests.cocoa.embed.conftest import TINY


def embed(source, output, **options):
    settings = {"rows_per_shard": 8, "workers": 1, "show_progress_bar": False, **options}
    return embed_dataset(str(source), TINY, output, **settings)


def rows_of(output: Path) -> dict[str, dict]:
    """All rows by id; fails where one comes twice."""
    rows = [row for file in sorted(output.glob("shard-*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def files_of(output: Path) -> dict[str, tuple]:
    """Content and time of each shard."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in output.glob("shard-*")}


@pytest.fixture(scope="module")
def module():
    return CocoaTransformer(TINY).eval()


def test_each_row_has_the_vector_of_its_own_input(images, tmp_path, here, module):
    folder = images(20)
    summary = embed(folder, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert summary.rows == len(rows) == 20 and summary.errors == 0 and summary.lost == []
    for name, row in rows.items():
        expected = module.encode([{"image": str(folder / name)}])[0]
        np.testing.assert_allclose(row["embedding"], expected, atol=1e-6, rtol=0)
        assert row["error"] is None
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dim"] == module.get_embedding_dimension() and manifest["rows"] == 20
    assert manifest["threads"] == 1 and manifest["libraries"]["torch"] == torch.__version__.split("+")[0]


def test_a_table_keeps_its_ids_and_the_columns_that_are_asked_for(tmp_path, here, module):
    texts = [f"a red apple {number}" for number in range(11)]
    table = pa.table({"key": pa.array(range(11), pa.int32()), "words": texts, "size": [n / 2 for n in range(11)]})
    pq.write_table(table, tmp_path / "rows.parquet")
    embed(tmp_path / "rows.parquet", tmp_path / "out", text="words", id="key", keep=["size"])
    read = pa.concat_tables([pq.read_table(file) for file in sorted((tmp_path / "out").glob("shard-*.parquet"))])
    assert read.schema.names == ["id", "embedding", "error", "size"] and read.schema.field("id").type == pa.int32()
    assert read["id"].to_pylist() == list(range(11)) and read["size"].to_pylist() == table["size"].to_pylist()
    vectors = np.stack(read["embedding"].to_pylist())
    np.testing.assert_allclose(vectors, module.encode([{"text": text} for text in texts]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("format", ["parquet", "lance"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_vectors_of_each_type_and_format(images, tmp_path, here, module, dtype, format):
    if format == "lance":
        pytest.importorskip("lance")
    folder = images(6)
    (folder / "bad.png").write_bytes(b"")
    embed(folder, tmp_path / "out", dtype=dtype, truncate_dim=32, format=format, rows_per_shard=4)
    output = Output(tmp_path / "out", format)
    table = pa.concat_tables([output.read(0), output.read(1)])
    kind = table.schema.field("embedding").type
    assert kind.list_size == (4 if dtype == "binary" else 32)
    assert (
        str(kind.value_type) == {"float32": "float", "float16": "halffloat", "int8": "int8", "binary": "uint8"}[dtype]
    )
    for row in table.to_pylist():
        if row["id"] == "bad.png":
            assert row["embedding"] is None and "cannot be read" in row["error"]
            continue
        expected = module.encode([str(folder / row["id"])])[0][:32]
        expected /= np.linalg.norm(expected)
        found = np.asarray(row["embedding"], dtype=np.uint8 if dtype == "binary" else np.float32)
        if dtype == "binary":
            assert (np.unpackbits(found) == (expected > 0)).mean() > 0.95
        else:
            found = found / np.linalg.norm(found) if dtype == "int8" else found
            np.testing.assert_allclose(found, expected, atol={"float32": 1e-6, "float16": 1e-3, "int8": 5e-3}[dtype])
    if format == "lance":
        import lance

        assert lance.dataset(str(tmp_path / "out" / "vectors.lance")).count_rows() == 7


def test_finished_shards_are_left_alone_and_their_input_is_not_opened(images, tmp_path, here, monkeypatch):
    folder = images(20)
    embed(folder, tmp_path / "whole")
    embed(folder, tmp_path / "out")
    (tmp_path / "out" / "shard-00001.parquet").unlink()
    (tmp_path / "out" / "shard-00002.parquet").write_bytes(b"PAR1 of another machine")
    before = files_of(tmp_path / "out")
    opened = opened_images(monkeypatch)
    embed(folder, tmp_path / "out")
    after, whole = files_of(tmp_path / "out"), files_of(tmp_path / "whole")
    assert after["shard-00000.parquet"] == before["shard-00000.parquet"]
    assert {name: content for name, (content, _) in after.items()} == {
        name: value for name, (value, _) in whole.items()
    }
    assert len(opened) == 12 and not set(opened) & set(rows_in(tmp_path / "out", 0))


def opened_images(monkeypatch) -> list[str]:
    """Ids of the images that are opened from now on."""
    from modeling_cocoa import inputs

    opened, load = [], inputs.load_image
    monkeypatch.setattr(
        inputs, "load_image", lambda value: opened.append(str(value).split("images/")[-1]) or load(value)
    )
    return opened


def rows_in(output: Path, shard: int) -> list[str]:
    return pq.read_table(output / f"shard-{shard:05d}.parquet")["id"].to_pylist()


def test_a_collection_that_grew_gets_new_shards(images, tmp_path, here, monkeypatch):
    folder = images(12)
    embed(folder, tmp_path / "out")
    before = files_of(tmp_path / "out")
    shutil.copy(folder / "001.png", folder / "000-new.png")
    opened = opened_images(monkeypatch)
    assert embed(folder, tmp_path / "out").rows == 13
    assert opened == ["000-new.png"] and before.items() <= files_of(tmp_path / "out").items()
    assert len(rows_of(tmp_path / "out")) == 13
    # A file that changes takes its vector along.
    shutil.copy(folder / "002.png", folder / "000-new.png")
    embed(folder, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    np.testing.assert_allclose(rows["000-new.png"]["embedding"], rows["002.png"]["embedding"], atol=1e-6)
    (folder / "001.png").unlink()
    embed(folder, tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 12


def test_bad_rows_are_named_exactly_and_tried_again(images, tmp_path, here, monkeypatch):
    folder = images(40)
    paths = sorted(folder.rglob("*.png"))
    kept = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    embed(folder, tmp_path / "whole")
    bad = list(kept)[2:20:4]
    for place, name in enumerate(bad):
        (folder / name).write_bytes([b"", b"not an image", kept[name][:60]][place % 3])
    summary = embed(folder, tmp_path / "out")
    assert [row for row, _ in summary.bad_rows()] == sorted(bad) and summary.errors == len(bad)
    rows, whole = rows_of(tmp_path / "out"), rows_of(tmp_path / "whole")
    for name, row in rows.items():
        assert (row["embedding"] is None) == (row["error"] is not None) == (name in bad)
        if name not in bad:
            np.testing.assert_allclose(row["embedding"], whole[name]["embedding"], atol=1e-6, rtol=0)
    # Told not to, they are left alone; otherwise they alone are opened.
    opened = opened_images(monkeypatch)
    assert embed(folder, tmp_path / "out", retry_errors=False).errors == len(bad) and opened == []
    embed(folder, tmp_path / "out")
    assert sorted(opened) == sorted(bad)
    assert set(rows_of(tmp_path / "out")) == set(kept)
    # Repaired, they are files that have changed.
    for name in bad:
        (folder / name).write_bytes(kept[name])
    assert embed(folder, tmp_path / "out").errors == 0
    check_same_rows(tmp_path / "out", tmp_path / "whole")


def check_same_rows(found: Path, expected: Path) -> None:
    """The same ids and, where batches may have been others, the same vectors but for rounding."""
    rows, whole = rows_of(found), rows_of(expected)
    assert set(rows) == set(whole)
    for name, row in rows.items():
        np.testing.assert_allclose(row["embedding"], whole[name]["embedding"], atol=1e-6, rtol=0)


def test_rows_that_failed_for_a_while_take_their_places_when_they_are_tried_again(images, tmp_path, here, monkeypatch):
    folder = images(24)
    embed(folder, tmp_path / "whole")
    from modeling_cocoa import inputs

    load = inputs.load_image
    names = [rows_in(tmp_path / "whole", shard)[row] for shard, row in ((0, 1), (0, 2), (0, 7), (1, 0), (2, 5))]

    def fail(value):
        if str(value).split("images/")[-1] in names:
            raise inputs.CocoaInputError("the network is down.")
        return load(value)

    monkeypatch.setattr(inputs, "load_image", fail)
    assert sorted(row for row, _ in embed(folder, tmp_path / "out").bad_rows()) == sorted(names)
    still_bad = names[1]
    names[:] = [still_bad]
    assert [row for row, _ in embed(folder, tmp_path / "out").bad_rows()] == [still_bad]
    names.clear()
    opened = opened_images(monkeypatch)
    assert embed(folder, tmp_path / "out").errors == 0 and opened == [still_bad]
    check_same_rows(tmp_path / "out", tmp_path / "whole")
    for shard in range(3):
        assert rows_in(tmp_path / "out", shard) == rows_in(tmp_path / "whole", shard)


@pytest.mark.slow
def test_a_hundred_bad_files_among_five_thousand_are_named_exactly(tmp_path, here, module):
    (folder := tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(5000):
        few = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        few.resize((28, 28)).save(folder / f"{number:04d}.png")
    bad = sorted(f"{number:04d}.png" for number in generator.choice(5000, 100, replace=False))
    for place, name in enumerate(bad):
        content = (folder / name).read_bytes()
        if place % 5 == 4:  # too large: the size in its header, with the checksum of it
            header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + content[24:29]
            content = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
        (folder / name).write_bytes([b"", b"no image", content[:50], b"\xff\xd8\xff\xe0", content][place % 5])
    summary = embed(folder, tmp_path / "out", rows_per_shard=1024)
    found = dict(summary.bad_rows())
    assert sorted(found) == bad and summary.rows == 5000 and summary.errors == 100
    assert "is too large" in found[bad[4]]
    rows = rows_of(tmp_path / "out")
    good = sorted(rows.keys() - set(bad))
    vectors = np.stack([rows[name]["embedding"] for name in good])
    expected = module.encode([str(folder / name) for name in good])
    np.testing.assert_allclose(vectors, expected, atol=1e-6, rtol=0)


def test_a_bad_row_can_be_an_error(images, tmp_path, here):
    folder = images(12)
    (folder / "005.png").write_bytes(b"")
    with pytest.raises(ValueError, match="005.png: .*cannot be read as an image"):
        embed(folder, tmp_path / "out", on_bad_row="error")


def test_rows_of_tables_that_are_empty_missing_or_too_large(tmp_path, here, images):
    path = str(images(1) / "more" / "000.png")
    lines = [
        {"id": "good", "text": "a cat", "image": path},
        {"id": "empty", "text": " ", "image": None},
        {"id": "nothing", "text": None, "image": None},
        {"id": "gone", "text": None, "image": "gone.png"},
        {"id": None, "text": "no id", "image": None},
        {"id": "link", "text": None, "image": "https://example.com/a.png"},
        {"id": "also good", "text": "a dog", "image": None},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = embed(tmp_path / "rows.jsonl", tmp_path / "out", text="text", image="image")
    found = dict(summary.bad_rows())
    assert set(found) == {"empty", "nothing", "gone", None, "link"}
    assert "its id is missing" in found[None] and "nothing is downloaded" in found["link"]


def test_a_batch_that_fails_is_split_until_the_row_is_found(images, tmp_path, here, monkeypatch, module):
    folder = images(9)
    embed(folder, tmp_path / "warm")
    forward = here_model(here).forward
    bad = module.processor.preprocess([str(folder / "004.png")])[0]
    features = module.model.encode_images(bad["pixel_values"], bad["image_grid_thw"])[0]

    def fail(**batch):
        given = batch["image_features"]
        if any(torch.allclose(part, features, atol=1e-4) for part in given.split(len(features))):
            raise RuntimeError("a shape that the kernel does not take")
        return forward(**batch)

    monkeypatch.setattr(here_model(here), "forward", fail)
    summary = embed(folder, tmp_path / "out")
    assert list(summary.bad_rows()) == [("004.png", "RuntimeError: a shape that the kernel does not take")]
    assert len(rows_of(tmp_path / "out")) == 9


def here_model(here) -> torch.nn.Module:
    """The model of the worker in this process."""
    return next(embedder.module.model for (name, *_), embedder in here.loaded.items() if name == (TINY,))


def test_a_model_that_fails_at_everything_is_an_error_and_not_rows(images, tmp_path, here, monkeypatch):
    folder = images(4)
    embed(folder, tmp_path / "warm")

    def fail(**batch):
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr(here_model(here), "forward", fail)
    with pytest.raises(RuntimeError, match="The model embeds nothing. RuntimeError: CUDA error"):
        embed(folder, tmp_path / "out")


def test_a_vector_that_is_not_finite_is_an_error(images, tmp_path, here, monkeypatch):
    folder = images(4)
    embed(folder, tmp_path / "warm")
    forward = here_model(here).forward

    def spoil(**batch):
        output = forward(**batch)
        output.pooler_output[0] = float("nan")
        return output

    monkeypatch.setattr(here_model(here), "forward", spoil)
    summary = embed(folder, tmp_path / "out")
    assert summary.errors == 1 and "not finite" in next(summary.bad_rows())[1]


def test_a_shard_that_kills_three_workers_is_reported_and_the_rest_goes_on(images, tmp_path, here):
    folder = images(24)
    here.deadly |= {1: 3, 2: 2}
    summary = embed(folder, tmp_path / "out")
    assert summary.lost == [1] and summary.rows == 16 and len(rows_of(tmp_path / "out")) == 16
    assert embed(folder, tmp_path / "out").lost == [] and len(rows_of(tmp_path / "out")) == 24


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "int8"}, "with dtype 'float32', and not 'int8'"),
        ({"format": "lance"}, "with format 'parquet', and not 'lance'"),
        ({"rows_per_shard": 5}, "with rows_per_shard 8, and not 5"),
        ({"truncate_dim": 16}, "with dim "),
        ({"prompt_name": "query"}, "with prompt None, and not 'Find: '"),
        ({"source": "other"}, "with source "),
        ({"model": "other"}, "by another model"),
    ],
)
def test_another_model_prompt_or_type_into_the_same_folder_is_refused(images, tmp_path, here, changed, message):
    folder = images(3)
    (other := tmp_path / "other").mkdir()
    shutil.copy(folder / "001.png", other)
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    settings = json.loads((model / "config_sentence_transformers.json").read_text())
    settings["prompts"]["query"] = "Find: "
    (model / "config_sentence_transformers.json").write_text(json.dumps(settings))
    options = {"source": str(folder), "model": str(model), "rows_per_shard": 8, "show_progress_bar": False}
    embed_dataset(output=tmp_path / "out", **options)
    before = files_of(tmp_path / "out")
    if "model" in changed:
        changed = {"model": str(other_model(model, tmp_path / "other-model"))}
    if "source" in changed:
        changed = {"source": str(other)}
    with pytest.raises(ValueError, match=message):
        embed_dataset(output=tmp_path / "out", **{**options, **changed})
    assert files_of(tmp_path / "out") == before


def other_model(model: Path, folder: Path) -> Path:
    """The same model, with one weight changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_columns_that_are_kept_stay_those_of_the_first_call(images, tmp_path, here):
    """As in an output from before captions were kept."""
    folder = images(3, names=True)
    embed(folder, tmp_path / "out", keep=[])
    before = files_of(tmp_path / "out")
    embed(folder, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"'keep': \[\].*and not .*'keep': \['text'\]"):
        embed(folder, tmp_path / "out", keep=["text"])


def test_libraries_that_changed_are_named(images, tmp_path, here):
    folder = images(3)
    embed(folder, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["libraries"]["torch"] = "1.0"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"made with torch 1.0 \(now "):
        embed(folder, tmp_path / "out")


def test_a_full_disk_is_one_clear_error_and_what_is_done_stays(images, tmp_path, here, monkeypatch):
    folder = images(24)
    write = Output.write

    def full(self, shard, table, about):
        if shard == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path(shard)))
        write(self, shard, table, about)

    monkeypatch.setattr(Output, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        embed(folder, tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == ["shard-00000.parquet", "shard-00001.parquet"]
    monkeypatch.setattr(Output, "write", write)
    embed(folder, tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 24


def test_a_source_that_vanishes_is_one_clear_error_and_not_a_million_bad_rows(images, tmp_path, here, monkeypatch):
    folder = images(24)
    write = Output.write

    def vanish(self, shard, table, about):
        write(self, shard, table, about)
        folder.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(Output, "write", vanish)
    with pytest.raises(FileNotFoundError, match="is not there any more; what is embedded is kept"):
        embed(folder, tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == ["shard-00000.parquet"]


def test_an_output_that_cannot_be_written_is_one_line(images, tmp_path, here):
    folder = images(2)
    (tmp_path / "file").touch()
    words = ["embed", str(folder), "--model", TINY, "--output-dir", str(tmp_path / "file" / "out")]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "Not a directory" in result.output.splitlines()[-1] and len(result.output.splitlines()) == 2


def test_the_command_counts_and_names(images, tmp_path, here):
    folder = images(12)
    (folder / "bad.png").write_bytes(b"")
    words = ["embed", str(folder), "--model", TINY, "--output-dir", str(tmp_path / "out"), "--rows-per-shard", "8"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0 and f"12 of 13 rows are embedded in {tmp_path / 'out'}." in result.output
    assert "1 have an error" in result.output and "  bad.png: " in result.output
    here.deadly |= {None: 3}
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1 and "cocoa embed: Workers die while they load the model" in result.output
    here.deadly |= {0: 3}
    (tmp_path / "out" / "shard-00000.parquet").unlink()
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1 and "Shards [0] are missing" in result.output


def test_an_output_in_its_own_source_is_refused(images, here):
    folder = images(2)
    for output in (folder, folder / "out"):
        with pytest.raises(ValueError, match="is in the source"):
            embed(folder, output)
    assert len(list(folder.rglob("*"))) == 3


def test_shards_without_a_manifest_are_not_ours(images, tmp_path, here):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-00000.parquet").touch()
    with pytest.raises(ValueError, match="holds shards without a manifest.json"):
        embed(images(2), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_batches_of_ray_data_keep_their_columns(images, dtype):
    folder = images(3)
    embedder = CocoaEmbedder(TINY, image="path", dtype=dtype)
    paths = np.array([str(folder / name) for name in ("001.png", "none.png", "002.png")])
    batch = embedder({"path": paths, "n": np.arange(3)})
    assert list(batch) == ["path", "n", "embedding", "error"]
    assert batch["error"][0] is None and "none.png" in batch["error"][1]
    assert batch["embedding"][1] is None if dtype == "int8" else np.isnan(batch["embedding"][1]).all()
    expected = embedder.embed([{"image": str(folder / "002.png")}])[0][0]
    np.testing.assert_allclose(batch["embedding"][2], expected, atol=1e-6)
