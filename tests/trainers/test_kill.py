# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, at any moment, ends with the weights of the run that was left alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from modeling_cocoa.reconstruction import HEADS_FILE
from modeling_cocoa.saving import save_cocoa
from trainers.contrastive_losses import TEMPERATURE_FILE

ROOT = Path(__file__).parents[2]
STEPS, SAVE_STEPS = 12, 3

SCRIPT = f"""
import sys
import torch
from datasets import Dataset, DatasetDict
from trainers import (
    CocoaContrastiveConfig, CocoaContrastiveTrainer, CocoaReconstructionConfig, CocoaReconstructionTrainer
)

start, folder, stage = sys.argv[1:]
torch.set_num_threads(1)
options = dict(
    max_steps={STEPS}, save_steps={SAVE_STEPS}, learning_rate=1e-3, logging_steps=1, check_data=False,
    report_to="none", use_cpu=True, disable_tqdm=True,
)
rows = Dataset.from_parquet(start + "/rows.parquet")
if stage == "contrastive":
    args = CocoaContrastiveConfig(
        folder, per_device_train_batch_size=12, mini_batch_num_tokens=120, learnable_temperature=True,
        no_duplicates=True, sampling_alpha=0.5, **options,
    )
    pairs = rows.rename_columns({{"text": "query", "image": "positive"}}).select_columns(["query", "positive"])
    data = DatasetDict({{"all": pairs, "few": pairs.select(range(20))}})
    trainer = CocoaContrastiveTrainer(start, args, train_dataset=data)
else:
    args = CocoaReconstructionConfig(folder, stage=stage, per_device_train_batch_num_tokens=500, **options)
    trainer = CocoaReconstructionTrainer(start, args, train_dataset=rows)
print("ready", flush=True)
trainer.train(resume_from_checkpoint=True)
trainer.save_model(folder + "/final")
"""


@pytest.fixture
def start(tmp_path, model, processor, emoji):
    save_cocoa(model, processor, tmp_path / "start")
    emoji.select_columns(["image", "text"]).to_parquet(str(tmp_path / "start" / "rows.parquet"))
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "start"


def launch(start: Path, folder: Path, stage: str) -> subprocess.Popen:
    """Start or go on with the run, and wait until it is about to train."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(start.parent / "train.py"), str(start), str(folder), stage]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line == "ready\n", process.communicate()[1][-4000:]
    return process


def finish(process: subprocess.Popen) -> None:
    """Wait for the end of a run that is left alone."""
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-4000:]


def kill_while_training(process: subprocess.Popen, folder: Path, seconds: float) -> None:
    """Kill the run so long after it began to train."""
    time.sleep(seconds)
    process.kill()
    process.wait()


def kill_while_saving(process: subprocess.Popen, folder: Path, seconds: float) -> bool:
    """Kill the run so long after it began to write a checkpoint; whether that checkpoint was cut off."""
    known = set(folder.glob("*checkpoint*"))
    while process.poll() is None:
        new = set(folder.glob("*checkpoint*")) - known
        if new:
            time.sleep(seconds)
            process.kill()
            process.wait()
            new = set(folder.glob("*checkpoint*")) - known
            return not all((path / TRAINER_STATE_NAME).is_file() for path in new)
        time.sleep(0.0005)
    return False


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a saved model, its heads or its temperature among them."""
    files = [folder / name for name in ("model.safetensors", HEADS_FILE, TEMPERATURE_FILE)]
    found = [load_file(file) for file in files if file.is_file()]
    assert len(found) == 2
    return found[0] | found[1]


def check_kills(tmp_path: Path, start: Path, stage: str, kills: int, seed: int) -> None:
    """Kill one run many times, in turn while it trains and while it saves, and compare it with one left alone."""
    whole = launch(start, tmp_path / "whole", stage)
    began = time.monotonic()
    finish(whole)
    duration = time.monotonic() - began
    generator = random.Random(seed)
    cut_off = 0
    folder = tmp_path / "killed"
    for number in range(kills):
        process = launch(start, folder, stage)
        if number % 2:
            cut_off += kill_while_saving(process, folder, generator.uniform(0, 0.02))
        else:
            kill_while_training(process, folder, generator.uniform(0, 0.3 * duration))
    assert cut_off, "no kill fell into the writing of a checkpoint"
    finish(launch(start, folder, stage))
    expected = weights(tmp_path / "whole" / "final")
    found = weights(folder / "final")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    before = load_file(start / "model.safetensors")
    assert any(not torch.equal(expected[name], value) for name, value in before.items()), "the run trains"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["bridge", "contrastive"])
def test_two_kills(tmp_path, start, stage):
    check_kills(tmp_path, start, stage, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["bridge", "contrastive"])
def test_twenty_kills_at_random_moments(tmp_path, start, stage):
    """Ten while it trains, ten while it saves."""
    check_kills(tmp_path, start, stage, kills=20, seed=int(time.time()))
