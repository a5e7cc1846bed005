# SPDX-License-Identifier: Apache-2.0
"""Real rows, a processor trained on them, and a model that fits it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset

from modeling_cocoa.processing_cocoa import CocoaProcessor
from trainers.recipes.from_scratch import build_model
from trainers.recipes.tiny_processor import build_tiny_processor

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "data" / "emoji.parquet"
TEXT_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION_CONFIG = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2}


def run_python(*command: object, processes: int = 1, launcher: Sequence[str] = (), **environment: str) -> str:
    """
    Run Python with a command line, on one thread, and have it end well.

    Args:
        command: Arguments of Python.
        processes (`int`, defaults to 1): So many at once, that train together.
        launcher (`Sequence[str]`, *optional*): What starts them instead of `torch.distributed.run`.
        environment: Variables to set.

    Returns:
        `str`: What they printed.
    """
    if processes > 1 and not launcher:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    arguments = [sys.executable, *launcher, *map(str, command)]
    result = subprocess.run(arguments, env=settings, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-12000:]
    return result.stdout


@pytest.fixture(scope="session")
def emoji() -> Dataset:
    """The first 64 training rows: `image` (Noto), `twemoji` and `text`."""
    rows = Dataset.from_parquet(str(EMOJI))
    keep = [index for index, split in enumerate(rows["split"]) if split == "train"][:64]
    rows = rows.select(keep)
    texts = [f"{name}: {', '.join(words)}" for name, words in zip(rows["name"], rows["keywords"], strict=True)]
    return rows.select_columns(["noto", "twemoji"]).rename_column("noto", "image").add_column("text", texts)


@pytest.fixture(scope="session")
def processor(emoji) -> CocoaProcessor:
    """Of 16-pixel patches: a 64-pixel image is four tokens."""
    return build_tiny_processor(emoji["text"], vocab_size=600, patch_size=16, max_length=64)


@pytest.fixture
def model(processor):
    """A new tiny model, always the same."""
    return build_model(processor, TEXT_CONFIG, VISION_CONFIG, seed=1)
