# SPDX-License-Identifier: Apache-2.0
"""The checkpoints that come with the project: whole, up to date with the code, the same through every loader."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from hub_cards import write_card
from hub_cards.training_record import read_records
from modeling_cocoa.saving import repair_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "cocoa-tiny"
STAGES = {CHECKPOINT.name: ["warmup", "bridge", "contrastive"], f"{CHECKPOINT.name}-bridge": ["warmup", "bridge"]}


@pytest.mark.parametrize("name", STAGES)
def test_it_holds_safetensors_and_the_code_of_the_package(tmp_path, name):
    folder = CHECKPOINT.with_name(name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".py", ".md", ".yaml", ".png"}
    copy = shutil.copytree(folder, tmp_path / name)
    assert repair_cocoa(copy) == [], f"run modeling_cocoa.repair_cocoa('checkpoints/{name}')"


@pytest.mark.parametrize("name", STAGES)
def test_its_card_is_what_its_folder_says(tmp_path, name):
    folder = CHECKPOINT.with_name(name)
    copy = shutil.copytree(folder, tmp_path / name)
    write_card(copy)
    assert (copy / "README.md").read_text() == (folder / "README.md").read_text(), (
        f"run: cocoa card checkpoints/{name}"
    )
    assert [record.stage for record in read_records(folder)] == STAGES[name]


def test_every_loader_gives_the_same_vectors():
    rows = Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet")).select(range(0, 1900, 100))
    items = [*rows["name"], *(row["noto"] for row in rows), {"text": rows[0]["name"], "image": rows[0]["noto"]}]
    stock = SentenceTransformer(str(CHECKPOINT), device="cpu").encode(items)
    remote = SentenceTransformer(str(CHECKPOINT), device="cpu", trust_remote_code=True).encode(items)
    ours = SentenceTransformer(modules=[CocoaTransformer(CHECKPOINT)], device="cpu").encode(items)
    np.testing.assert_allclose(remote, stock, atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours, stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", ["noto", "twemoji"])
def test_it_finds_held_out_emoji_better_than_chance(style):
    """Twenty of each hundred held-out concepts among the first ten, where chance finds ten."""
    rows = Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet"))
    keep = [index for index, split in enumerate(rows["split"]) if split == "test"][:100]
    rows = rows.select(keep)
    model = SentenceTransformer(str(CHECKPOINT), device="cpu")
    scores = model.encode([row[style] for row in rows]) @ model.encode(list(rows["name"])).T
    ranks = (scores >= scores.diagonal()[:, None]).sum(1)
    assert (ranks <= 10).mean() >= 0.20
