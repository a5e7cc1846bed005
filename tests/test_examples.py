# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, on real pictures."""

from __future__ import annotations

import re
from pathlib import Path

from datasets import Dataset

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
