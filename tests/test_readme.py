# SPDX-License-Identifier: Apache-2.0
"""The README's code runs as it stands, on a small model and a folder of real pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from transformers import Qwen2VLForConditionalGeneration

from tests.trainers.conftest import TEXT_CONFIG, VISION_CONFIG
from trainers.from_scratch import build_model
from trainers.tiny_processor import build_tiny_processor

ROOT = Path(__file__).parent.parent


def snippet(containing: str) -> str:
    """The README's Python block with a text in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


@pytest.fixture
def generative(tmp_path, monkeypatch):
    """A tiny generative Qwen2-VL checkpoint under the name that the README uses, and a folder of pictures."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet")).select(range(16))
    processor = build_tiny_processor(list(rows["name"]), vocab_size=300, patch_size=14, max_length=64)
    config = build_model(processor, TEXT_CONFIG, VISION_CONFIG).config
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen2-VL-2B-Instruct"
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    pictures = tmp_path / "my_pictures"
    pictures.mkdir()
    lines = ["file_name,text"]
    for index, row in enumerate(rows):
        row["noto"].convert("RGB").save(pictures / f"{index}.png")
        lines.append(f'{index}.png,"{row["name"]}"')
    (pictures / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_three_stages(generative, tmp_path):
    code = snippet("CocoaReconstructionTrainer(")
    # 28 x 28 pixels make one token: a small model needs small pictures.
    code = code.replace("256 * 28 * 28", "1 * 28 * 28").replace("1024 * 28 * 28", "4 * 28 * 28")
    code = code.replace('"bf16": True', '"bf16": True, "use_cpu": True')
    exec(compile(code, "README.md", "exec"), {})
    model = SentenceTransformer(str(tmp_path / "runs" / "contrastive" / "final"), device="cpu")
    assert model.encode(["a cat"]).shape == (1, 64)
