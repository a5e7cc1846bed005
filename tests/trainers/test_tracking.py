# SPDX-License-Identifier: Apache-2.0
"""Losses by name and images arrive in the trackers that a run reports to, and in its output folder."""

from __future__ import annotations

import sqlite3
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers.integrations import WandbCallback

from evaluation.assets import asset_path
from evaluation.emoji import load_emoji
from tests.trainers.conftest import run_python
from trainers import (
    CocoaContrastiveConfig,
    CocoaContrastiveTrainer,
    CocoaReconstructionConfig,
    CocoaReconstructionTrainer,
)
from trainers.tracking import draw_found, log_image

COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 2,
    "eval_strategy": "steps",
}


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    rows = load_emoji().select(range(16)).select_columns(["name", "noto"])
    return rows.rename_columns({"name": "query", "noto": "positive"})


def trained(stage, output, pairs, report_to, **options):
    """A run of two steps."""
    parts = {"train_dataset": pairs.select(range(12)), "eval_dataset": pairs.select(range(12, 16))}
    common = {
        **COMMON,
        "report_to": report_to,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **options,
    }
    if stage == "contrastive":
        args = CocoaContrastiveConfig(str(output), evaluate_retrieval=True, mini_batch_size=None, **common)
        trainer = CocoaContrastiveTrainer(str(asset_path("checkpoints/cocoa-tiny")), args, **parts)
    else:
        args = CocoaReconstructionConfig(str(output), stage=stage, **common)
        trainer = CocoaReconstructionTrainer(str(asset_path("checkpoints/cocoa-tiny-bridge")), args, **parts)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("stage", "tag", "loss"), [("warmup", "reconstructions", "loss_image"), ("contrastive", "retrieval", "loss")]
)
def test_tensorboard_has_losses_and_images(tmp_path, pairs, monkeypatch, stage, tag, loss):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trained(stage, tmp_path / "run", pairs, "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    found = events.Tags()
    assert f"train/{loss}" in found["scalars"] and tag in found["images"]
    assert [event.step for event in events.Images(tag)] == [2]
    (picture,) = (tmp_path / "run" / tag).glob("*step-2.png")
    with Image.open(picture) as image:
        assert np.asarray(image).std() > 0


def test_trackio_has_losses_and_images_locally(tmp_path):
    """In its own folder, by a process of its own; nothing is sent."""
    pytest.importorskip("trackio")
    code = (
        "from pathlib import Path\n"
        "from tests.trainers.test_tracking import trained, load_emoji\n"
        "pairs = load_emoji().select(range(16)).select_columns(['name', 'noto'])\n"
        "pairs = pairs.rename_columns({'name': 'query', 'noto': 'positive'})\n"
        f"trained('bridge', Path({str(tmp_path / 'run')!r}), pairs, 'trackio', project='cocoa', run_name='bridge')\n"
    )
    run_python("-c", code, TRACKIO_DIR=str(tmp_path / "trackio"))
    (database,) = (tmp_path / "trackio").rglob("cocoa*.db")
    with sqlite3.connect(database) as connection:
        (text,) = zip(*connection.execute("SELECT metrics FROM metrics"), strict=True)
    logged = "\n".join(row if isinstance(row, str) else row.decode(errors="replace") for row in text)
    assert "train/loss_text_target" in logged and "eval/eos_information_text" in logged
    assert '"reconstructed_texts"' in logged and '"rebuilt":' in logged


def test_wandb_gets_the_image_at_the_step_of_the_run(monkeypatch):
    """By its own interface, which needs an account otherwise."""
    logged = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=logged.append, Image=lambda image: image.size))
    callback = WandbCallback.__new__(WandbCallback)
    trainer = SimpleNamespace(
        is_in_train=True,
        is_world_process_zero=lambda: True,
        state=SimpleNamespace(global_step=7),
        callback_handler=SimpleNamespace(callbacks=[callback]),
    )
    log_image(trainer, "reconstructions", Image.new("RGB", (3, 2)))
    assert logged == [{"reconstructions": (3, 2), "train/global_step": 7}]
    trainer.is_in_train = False
    log_image(trainer, "reconstructions", Image.new("RGB", (3, 2)))
    assert len(logged) == 1, "no run is open"


def test_what_is_right_is_framed():
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    grid = np.asarray(draw_found([("a red square", [(blue, False, 0.9), (red, True, 0.8), ("a text", False, 0.1)])]))
    found = [tuple(grid[70, 4 + column * 124 + 56]) for column in (1, 2)]
    assert found == [(0, 0, 255), (255, 0, 0)]
    frames = [tuple(grid[15, 4 + column * 124 + 56]) for column in (1, 2)]
    assert frames == [(208, 212, 218), (46, 158, 91)]
