# SPDX-License-Identifier: Apache-2.0
"""An output folder belongs to one run: to its settings, its data and its base model."""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from tests.trainers.conftest import ROOT, TEXT_CONFIG, VISION_CONFIG
from trainers import (
    CocoaContrastiveConfig,
    CocoaContrastiveTrainer,
    CocoaReconstructionConfig,
    CocoaReconstructionTrainer,
)
from trainers.recipes.from_scratch import build_model
from trainers.run_folder import differences, fingerprint_data, fingerprint_weights, locked

BASIC = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "disable_tqdm": True,
    "check_data": False,
    "report_to": "none",
    "use_cpu": True,
}
KINDS = ("reconstruction", "contrastive")


@pytest.fixture(autouse=True)
def heard():
    """The library's warnings reach the test."""
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    yield
    logger.propagate = before


def trainer_of(kind, folder, model, processor, rows, peft_config=None, **options):
    if kind == "contrastive":
        config, trainer = CocoaContrastiveConfig, CocoaContrastiveTrainer
        rows = rows.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})
    else:
        config, trainer = CocoaReconstructionConfig, CocoaReconstructionTrainer
        rows = rows.select_columns(["text", "image"])
    return trainer(
        copy.deepcopy(model),
        config(str(folder), **{**BASIC, **options}),
        train_dataset=rows,
        processing_class=processor,
        peft_config=peft_config,
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def changed_row(rows):
    """The same rows with one letter changed."""
    values = rows.to_dict()
    values["text"][5] += "!"
    return Dataset.from_dict(values, features=rows.features)


CHANGES = {
    "learning rate": ({"learning_rate": 2e-3}, "learning_rate was 0.001, is 0.002"),
    "shorter": ({"max_steps": 2}, "max_steps was 3, is 2"),
    "batch": ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 8, is 4"),
    "seed": ({"seed": 1}, "seed was 42, is 1"),
    "drop last": ({"dataloader_drop_last": True}, "dataloader_drop_last was False, is True"),
    "fewer rows": ("rows", "data rows was '64 rows .*, is '32 rows"),
    "other rows": ("row", "data rows was '64 rows .*, is '64 rows"),
    "base model": ("model", "the base model has other weights"),
    "adapters": ("adapters", "adapters peft_type was None, is 'LORA'"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_ended_run_with_other_settings_is_an_error_that_names_them(tmp_path, model, processor, emoji, kind):
    trainer = trainer_of(kind, tmp_path, model, processor, emoji)
    trainer.train()
    for change, message in CHANGES.values():
        options = change if isinstance(change, dict) else {}
        rows = emoji.select(range(32)) if change == "rows" else changed_row(emoji) if change == "row" else emoji
        base = build_model(processor, TEXT_CONFIG, VISION_CONFIG, seed=7) if change == "model" else model
        peft_config = LoraConfig(r=2, target_modules=["q_proj"]) if change == "adapters" else None
        again = trainer_of(kind, tmp_path, base, processor, rows, peft_config, **options)
        with pytest.raises(ValueError, match=f"had ended at step 3 .*{message}.*another output_dir, or delete"):
            again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ended_run_with_equal_settings_says_so(tmp_path, model, processor, emoji, kind, caplog):
    first = trainer_of(kind, tmp_path, model, processor, emoji)
    first.train()
    free = {"logging_steps": 1, "save_steps": 1, "per_device_eval_batch_size": 3, "dataloader_num_workers": 1}
    again = trainer_of(kind, tmp_path, model, processor, emoji, **free)
    again.train(resume_from_checkpoint=True)
    assert f"{tmp_path} had ended at step 3; nothing was trained." in caplog.text
    for name, value in weights(first).items():
        assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_its_own_settings_only(tmp_path, model, processor, emoji, kind):
    """It may be made longer, and logged, saved and evaluated otherwise."""
    trainer_of(kind, tmp_path, model, processor, emoji).train()
    with pytest.raises(ValueError, match="checkpoint-3 is of a run with other settings: learning_rate was 0.001"):
        trainer_of(kind, tmp_path, model, processor, emoji, max_steps=5, learning_rate=1e-2).train(True)
    with pytest.raises(ValueError, match="data rows was"):
        trainer_of(kind, tmp_path, model, processor, changed_row(emoji), max_steps=5).train(True)
    longer = trainer_of(kind, tmp_path, model, processor, emoji, max_steps=5, logging_steps=1, save_steps=1)
    assert longer.train(resume_from_checkpoint=True).global_step == 5
    again = trainer_of(kind, tmp_path, model, processor, emoji, max_steps=5)
    assert again.train(resume_from_checkpoint=True).global_step == 5, "ended, with the longer run's settings"


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_without_a_checkpoint_says_so_and_starts_anew(tmp_path, model, processor, emoji, kind, caplog):
    trainer = trainer_of(kind, tmp_path, model, processor, emoji)
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    assert caplog.text.count(f"{tmp_path} holds no complete checkpoint to resume from: training starts anew.") == 1


@pytest.mark.parametrize("resume", [None, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_used_folder_is_not_trained_into_anew(tmp_path, model, processor, emoji, kind, resume):
    trainer_of(kind, tmp_path, model, processor, emoji).train()
    again = trainer_of(kind, tmp_path, model, processor, emoji, max_steps=1)
    with pytest.raises(ValueError, match=r"earlier run \(checkpoint-3\).*resume_from_checkpoint=True.*or delete"):
        again.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_optimizer_cannot_be_gone_on_from(tmp_path, model, processor, emoji, kind):
    """It would begin with the learning rate of step 0."""
    options = {"save_only_model": True, "save_steps": 2, "max_steps": 3}
    trainer_of(kind, tmp_path, model, processor, emoji, **{**options, "max_steps": 2}).train()
    with pytest.raises(ValueError, match="checkpoint-2 has no state of the optimizer.*save_only_model=True.*another"):
        trainer_of(kind, tmp_path, model, processor, emoji, **options).train(resume_from_checkpoint=True)
    ended = trainer_of(kind, tmp_path, model, processor, emoji, **{**options, "max_steps": 2})
    assert ended.train(resume_from_checkpoint=True).global_step == 2, "an end has nothing to go on with"


def test_other_adapters_are_named_on_resuming(tmp_path, model, processor, emoji):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer_of("contrastive", tmp_path, model, processor, emoji, config).train()
    for other, message in (
        (LoraConfig(r=4, target_modules=["q_proj"]), "adapters r was 2, is 4"),
        (LoraConfig(r=2, target_modules=["v_proj"]), "adapters target_modules was"),
        (None, "adapters .* was"),
    ):
        again = trainer_of("contrastive", tmp_path, model, processor, emoji, other, max_steps=5)
        with pytest.raises(ValueError, match=message):
            again.train(resume_from_checkpoint=True)


HOLDER = """
import sys, time
from trainers.run_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder_are_one_error_and_a_killed_run_leaves_it_free(tmp_path, model, processor, emoji):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        trainer = trainer_of("reconstruction", tmp_path, model, processor, emoji)
        with pytest.raises(BlockingIOError, match=f"Another run is training in {tmp_path} .process {holder.pid} on"):
            trainer.train()
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path), pytest.raises(BlockingIOError, match="this process"):
        trainer.train()
    assert trainer.train().global_step == 3


def test_a_run_that_makes_no_step_is_an_error(tmp_path, model, processor, emoji):
    few = emoji.select(range(5))
    for kind in KINDS:
        with pytest.raises(ValueError, match="step"):
            trainer_of(kind, tmp_path / kind, model, processor, few, dataloader_drop_last=True, max_steps=-1).train()
        with pytest.raises(ValueError, match="does not make a single step"):
            trainer_of(kind, tmp_path / kind, model, processor, few, num_train_epochs=0, max_steps=-1).train()
        assert not list((tmp_path / kind).glob("checkpoint-*"))


def test_a_warm_up_of_all_steps_is_told(tmp_path, model, processor, emoji, caplog):
    for place, (options, is_told) in enumerate(
        (
            ({"max_steps": 1}, True),
            ({"max_steps": 2, "warmup_steps": 2}, True),
            ({"max_steps": 2}, False),
            ({"max_steps": 1, "warmup_steps": 0}, False),
            ({"max_steps": 1, "lr_scheduler_type": "constant"}, False),
        )
    ):
        for kind in KINDS:
            caplog.clear()
            trainer = trainer_of(kind, tmp_path / f"{kind}-{place}", model, processor, emoji, **options)
            trainer.create_optimizer()
            trainer.create_scheduler(trainer.args.max_steps)
            assert ("the first has a rate of 0" in caplog.text) == is_told, (kind, options)


def test_interrupted_training_says_where_it_can_go_on(tmp_path, model, processor, emoji, caplog):
    trainer = trainer_of("reconstruction", tmp_path, model, processor, emoji, save_steps=2)
    step = trainer.training_step

    def interrupted(*args, **kwargs):
        if trainer.state.global_step == stops[-1]:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    trainer.training_step = interrupted
    stops = []
    for stop, message in ((0, "there is no checkpoint to go on from"), (2, "the last checkpoint is .*checkpoint-2")):
        stops.append(stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert re.search(f"Stopped at step {stop}; {message}", caplog.text)


def test_fingerprints_follow_the_content(tmp_path, emoji, model):
    rows = emoji.select_columns(["text", "image"])
    expected = fingerprint_data(rows)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    again = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert fingerprint_data(again) == expected, "from another file"
    assert fingerprint_data(rows.shuffle(seed=1)) != expected
    assert list(fingerprint_data(DatasetDict({"a": rows, "b": rows.select(range(3))}))) == ["a", "b"]
    streamed = fingerprint_data(rows.to_iterable_dataset())
    assert streamed == fingerprint_data(again.to_iterable_dataset())
    assert streamed != fingerprint_data(changed_row(emoji).select_columns(["text", "image"]).to_iterable_dataset())
    other = copy.deepcopy(model)
    assert fingerprint_weights(other) == fingerprint_weights(model)
    with torch.no_grad():
        other.language_model.norm.weight.mul_(1.01)
    assert fingerprint_weights(other) != fingerprint_weights(model)


def test_settings_of_another_version_are_not_compared():
    before, now = {"settings": {"old": 1, "same": 1}, "data": {}}, {"settings": {"new": 2, "same": 1}, "model": {}}
    assert differences(before, now) == []
