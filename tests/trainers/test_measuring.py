# SPDX-License-Identifier: Apache-2.0
"""What only measures a run does not change it, and does not depend on how it is measured."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn

from modeling_cocoa.saving import save_cocoa
from tests.trainers.conftest import run_python
from trainers import (
    CocoaContrastiveConfig,
    CocoaContrastiveTrainer,
    CocoaReconstructionConfig,
    CocoaReconstructionTrainer,
)
from trainers.data.collators import DIRECTIONS
from trainers.measuring import measuring

BASIC = {
    "per_device_train_batch_size": 8,
    "max_steps": 5,
    "save_strategy": "no",
    "disable_tqdm": True,
    "check_data": False,
    "report_to": "none",
    "use_cpu": True,
}
BRIDGE = {"stage": "bridge", "direction_weights": dict.fromkeys(DIRECTIONS, 1.0)}


def reconstruction(folder, model, processor, rows, peft_config=None, eval_rows=None, **options):
    return CocoaReconstructionTrainer(
        copy.deepcopy(model),
        CocoaReconstructionConfig(str(folder), **{**BASIC, **options}),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
    )


def measured(metrics):
    """Metrics without the clock's."""
    return {name: value for name, value in metrics.items() if "per_second" not in name and "time" not in name}


def test_measuring_leaves_modes_and_random_numbers_as_they_were():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with pytest.raises(KeyError), measuring(model):
        assert not any(module.training for module in model.modules())
        torch.rand(7), np.random.rand(), random.random()
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(), random.random()) == expected[1:]


@pytest.mark.parametrize("stage", [{"stage": "warmup"}, BRIDGE], ids=["warmup", "bridge"])
def test_every_loss_is_a_mean_over_the_complete_evaluation_set(tmp_path, model, processor, emoji, stage):
    """Texts of very different lengths, some rows without a picture: batches of other sizes weigh them otherwise."""
    rows = emoji.select(range(23)).to_dict()
    rows["text"] = [text * (1 + number % 4) for number, text in enumerate(rows["text"])]
    rows["image"] = [image if number % 3 else None for number, image in enumerate(rows["image"])]
    rows = Dataset.from_dict(rows, features=emoji.features)
    trainer = reconstruction(tmp_path, model, processor, emoji, eval_rows=rows, **stage)
    found = {}
    for size in (1, 4, 24):
        trainer.args.per_device_eval_batch_size = size
        found[size] = measured(trainer.evaluate())
    assert {"eval_loss", "eval_loss_image", "eval_token_accuracy"} <= set(found[1])
    assert stage["stage"] == "warmup" or {"eval_eos_information_text", "eval_eos_information_image"} <= set(found[1])
    for size in (4, 24):
        assert found[size] == pytest.approx(found[1], abs=1e-5), size
    names = ("eval_loss_text_source", "eval_loss_text_target")
    expected = sum(found[1].get(name, 0.0) for name in names) + 0.5 * found[1]["eval_loss_image"]
    assert found[1]["eval_loss"] == pytest.approx(expected)


def test_predict_gives_the_losses_of_any_rows(tmp_path, model, processor, emoji):
    trainer = reconstruction(tmp_path, model, processor, emoji, eval_rows=emoji.select(range(5)), **BRIDGE)
    evaluated = measured(trainer.evaluate())
    predicted = trainer.predict(emoji.select(range(5)))
    assert predicted.predictions is None
    for name, value in predicted.metrics.items():
        if name.startswith("test_") and name in {key.replace("eval_", "test_") for key in evaluated}:
            assert value == pytest.approx(evaluated[name.replace("test_", "eval_")]), name
    assert "test_loss_text_target" in predicted.metrics


@pytest.mark.parametrize(
    "often",
    [
        {"logging_steps": 1},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"save_strategy": "steps", "save_steps": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["warmup", "bridge", "contrastive"])
def test_how_often_one_measures_does_not_change_the_weights(tmp_path, model, processor, emoji, stage, often):
    """Adapters with dropout, which draws from the run's random numbers."""

    def weights(folder, **options):
        options = {"logging_steps": 5, "learning_rate": 1e-2, **options}
        config = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
        if stage == "contrastive":
            pairs = emoji.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})
            trainer = CocoaContrastiveTrainer(
                copy.deepcopy(model),
                CocoaContrastiveConfig(str(folder), evaluate_retrieval=True, **{**BASIC, **options}),
                train_dataset=pairs,
                eval_dataset=pairs.select(range(12)),
                processing_class=processor,
                peft_config=config,
            )
        else:
            options.update(BRIDGE if stage == "bridge" else {"stage": stage})
            trainer = reconstruction(folder, model, processor, emoji, config, emoji.select(range(12)), **options)
        trainer.train()
        return trainer.model.state_dict()

    seldom, frequent = weights(tmp_path / "seldom"), weights(tmp_path / "often", **often)
    for name, value in seldom.items():
        assert torch.equal(frequent[name], value), name


PROCESSES = """
import json, sys
from datasets import Dataset
from trainers import CocoaReconstructionConfig, CocoaReconstructionTrainer

start, folder = sys.argv[1:]
args = CocoaReconstructionConfig(
    folder, stage="bridge", use_cpu=True, report_to="none", check_data=False, per_device_eval_batch_size=4,
    disable_tqdm=True, direction_weights={"image_to_text": 1.0, "text_to_image": 1.0},
)
rows = Dataset.from_parquet(start + "/rows.parquet")
trainer = CocoaReconstructionTrainer(start, args, eval_dataset=rows)
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    print(json.dumps(metrics))
"""


def test_two_processes_evaluate_as_one(tmp_path, model, processor, emoji):
    """Of 13 rows some are read twice, to fill up the last batches."""
    save_cocoa(model, processor, tmp_path / "start")
    emoji.select(range(13)).to_parquet(str(tmp_path / "start" / "rows.parquet"))
    (tmp_path / "evaluate.py").write_text(PROCESSES)
    found = []
    for processes in (1, 2):
        printed = run_python(
            tmp_path / "evaluate.py", tmp_path / "start", tmp_path / f"run{processes}", processes=processes
        )
        found.append(measured(json.loads(printed.strip().splitlines()[-1])))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
