# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, on real pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer

from tests.trainers.conftest import EMOJI, ROOT, run_python


def write_pictures(folder: Path, split: str, count: int) -> list[str]:
    """Emoji as a folder of pictures and captions."""
    folder.mkdir()
    rows = Dataset.from_parquet(str(EMOJI)).filter(lambda value: value == split, input_columns="split")
    rows = rows.select(range(count))
    lines = ["file_name,text"]
    for place, row in enumerate(rows):
        row["noto"].convert("RGB").save(folder / f"{place}.png")
        lines.append(f'{place}.png,"{row["name"]}"')
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return list(rows["name"])


def test_finetuning_on_a_folder_of_pictures(tmp_path):
    """Concepts that the tiny model has never seen become findable; a second call has nothing left to train."""
    names = write_pictures(tmp_path / "pictures", "test", 120)
    script = ROOT / "examples" / "finetune_on_your_images.py"
    options = ["--model", "tiny", "--output", tmp_path / "model", "--epochs", 4, "--query", names[0]]
    printed = run_python(script, tmp_path / "pictures", *options)
    before, after = (int(number) for number in re.search(r"(\d+)% before, (\d+)% after", printed).groups())
    assert 0 <= before <= 100 and after >= before, "the checkpoint that did best is kept"
    found = [line.split("  ")[-1] for line in printed.splitlines() if re.match(r"  -?0\.\d\d  ", line)]
    assert len(found) == 3 and names[0] in found
    assert (tmp_path / "model" / "final" / "modules.json").is_file()
    assert run_python(script, tmp_path / "pictures", *options).splitlines()[-3:] == printed.splitlines()[-3:]


def test_a_checkpoint_is_scored_by_mteb(tmp_path):
    """Recall@10 and nDCG@10 are those of the vectors; the result says who the model is."""
    pytest.importorskip("mteb")
    names = write_pictures(tmp_path / "pictures", "train", 60)
    folder = ROOT / "checkpoints" / "cocoa-tiny"
    options = ["--model", folder, "--pictures", tmp_path / "pictures", "--output", tmp_path / "results"]
    printed = run_python(ROOT / "examples" / "evaluate_with_mteb.py", *options, "--name", "org/cocoa-tiny")
    score = float(re.search(r"PicturesByText: ndcg_at_10 (\d+\.\d+)", printed).group(1))
    model = SentenceTransformer(str(folder), device="cpu")
    pictures = [Image.open(tmp_path / "pictures" / f"{place}.png") for place in range(60)]
    similarity = model.encode_query(names) @ model.encode_document(pictures).T
    ranks = (similarity >= similarity.diagonal()[:, None]).sum(1)
    expected = 100 * sum(1 / np.log2(rank + 1) for rank in ranks if rank <= 10) / 60
    assert score == pytest.approx(expected, abs=0.02) and score > 50
    (file,) = (tmp_path / "results").rglob("PicturesByText.json")
    found = json.loads(file.read_text())["scores"]["test"][0]
    assert found["recall_at_10"] == pytest.approx((ranks <= 10).mean(), abs=1e-4)
    assert "org__cocoa-tiny" in str(file)
