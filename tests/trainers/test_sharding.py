# SPDX-License-Identifier: Apache-2.0
"""FSDP2 by the configuration that is shipped: two processes that share out the weights train what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from modeling_cocoa.saving import save_cocoa
from trainers.adapters import ADAPTER_FILE

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "trainers" / "accelerate_configs"

SCRIPT = """
import json, os, sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig

from trainers import (
    CocoaContrastiveConfig, CocoaContrastiveTrainer, CocoaReconstructionConfig, CocoaReconstructionTrainer
)

# accelerate shares weights out between GPUs only; torch does so between CPUs as well.
initialise = AcceleratorState.__init__


def shard_on_cpu(self, *args, **options):
    plugin = options.get("fsdp_plugin") or AcceleratorState._shared_state.get("fsdp_plugin")
    initialise(self, *args, **options)
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


AcceleratorState.__init__ = shard_on_cpu

kind, model, folder, batch_size, steps = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
optimizer = dict(optim="adamw_torch", learning_rate=1e-2) if "adam" in kind else dict(optim="sgd", learning_rate=0.3)
rows = Dataset.from_parquet(os.path.join(model, "rows.parquet"))
options = dict(
    output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, **optimizer,
    max_grad_norm=1e9, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_steps=1,
    report_to="none", use_cpu=True, disable_tqdm=True, check_data=False, dataloader_drop_last=True,
    gradient_checkpointing="bridge" in kind,
)
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"]) if "lora" in kind else None
if "contrastive" in kind:
    args = CocoaContrastiveConfig(gather_across_devices=True, symmetric=True, temperature=0.1, **options)
    data = rows.rename_columns({"text": "query", "image": "positive"}).select_columns(["query", "positive"])
    data = data.filter(lambda row: row["query"] is not None and row["positive"] is not None)
    trainer = CocoaContrastiveTrainer(model, args, train_dataset=data, peft_config=lora)
else:
    args = CocoaReconstructionConfig(stage="bridge", **options)
    trainer = CocoaReconstructionTrainer(model, args, train_dataset=rows, eval_dataset=rows, peft_config=lora)
trainer.train(resume_from_checkpoint=True)
if trainer.eval_dataset is not None:
    trainer.evaluate()
trainer.save_model(os.path.join(folder, "final"))
if trainer.is_world_process_zero():
    with open(os.path.join(folder, "log.json"), "w") as file:
        json.dump([trainer.is_fsdp_enabled, trainer.state.log_history], file)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.fixture
def start(tmp_path, model, processor, emoji):
    """A model, and rows of which those for the second process are texts, one or both of a row's sides in the first."""
    save_cocoa(model, processor, tmp_path / "start")
    rows = [{"image": emoji[i]["image"], "text": emoji[i]["text"] if i % 2 else None} for i in range(4)]
    rows += [{"image": None, "text": emoji[i]["text"]} for i in range(4, 8)]
    order = np.random.default_rng((42, 0)).permutation(8)  # in which EpochSampler visits them
    placed = [rows[int(np.flatnonzero(order == place)[0])] for place in range(8)]
    features = emoji.select_columns(["image", "text"]).features
    Dataset.from_list(placed, features=features).to_parquet(str(tmp_path / "start" / "rows.parquet"))
    return tmp_path / "start"


def train(kind, start, folder, batch_size, steps=2, sharded=False):
    script = folder.parent / "train.py"
    script.write_text(SCRIPT)
    launcher = []
    if sharded:
        config = folder.parent / "fsdp2.yaml"
        shipped = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
        config.write_text(yaml.safe_dump({**shipped, "num_processes": 2, "mixed_precision": "no", "use_cpu": True}))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [sys.executable, *launcher, str(script), kind, str(start), str(folder), str(batch_size), str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-12000:]
    is_sharded, logs = json.loads((folder / "log.json").read_text())
    assert is_sharded == sharded
    return load_file(folder / "final" / "model.safetensors"), logs


def check_same(found, expected, before):
    """Weights that went the same way, to a thousandth of the way."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-3 * (value - before[name]).norm() + 1e-6, name
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())


@pytest.fixture
def pairs(start, emoji):
    """The same model, and pairs."""
    emoji.select(range(8)).select_columns(["image", "text"]).to_parquet(str(start / "rows.parquet"))
    return start


def check_like_one_process(kind, start, tmp_path):
    before = load_file(start / "model.safetensors")
    one, one_logs = train(kind, start, tmp_path / "one", 8)
    two, two_logs = train(kind, start, tmp_path / "two", 4, sharded=True)
    losses = [[entry["loss"] for entry in logs if "loss" in entry] for logs in (one_logs, two_logs)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert two.keys() == one.keys()
    for name, value in one.items():  # to a thousandth of the way that it went
        assert (two[name] - value).norm() <= 1e-3 * (value - before[name]).norm() + 1e-6, name
    assert any(not torch.equal(value, before[name]) for name, value in one.items())
    vectors = [
        SentenceTransformer(str(tmp_path / "two" / "final"), device="cpu", trust_remote_code=trust).encode(["a cat"])
        for trust in (False, True)
    ]
    np.testing.assert_allclose(*vectors, atol=1e-5)


@pytest.mark.parametrize("kind", ["bridge", pytest.param("lora bridge", marks=pytest.mark.slow)])
def test_pre_training_with_shared_out_weights_is_what_one_process_does(tmp_path, start, kind):
    """Images on one process and texts on the other."""
    check_like_one_process(kind, start, tmp_path)


@pytest.mark.parametrize("kind", ["lora contrastive", pytest.param("contrastive", marks=pytest.mark.slow)])
def test_contrastive_training_with_shared_out_weights_is_what_one_process_does(tmp_path, pairs, kind):
    check_like_one_process(kind, pairs, tmp_path)


@pytest.mark.parametrize("kind", ["adam bridge", pytest.param("adam lora bridge", marks=pytest.mark.slow)])
def test_a_run_with_shared_out_weights_goes_on_to_the_same_weights(tmp_path, start, kind):
    whole, _ = train(kind, start, tmp_path / "whole", 4, sharded=True)
    train(kind, start, tmp_path / "parts", 4, steps=1, sharded=True)
    parts, _ = train(kind, start, tmp_path / "parts", 4, sharded=True)
    assert (tmp_path / "parts" / "final" / ADAPTER_FILE).exists() == ("lora" in kind)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6, msg=name)
