# SPDX-License-Identifier: Apache-2.0
"""
FSDP2 and DeepSpeed's ZeRO-3 by the configurations that are shipped: two processes that share out the weights train
what one process does.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from modeling_cocoa.saving import save_cocoa
from tests.trainers.conftest import ROOT, run_python
from trainers.adapter_files import ADAPTER_FILE

CONFIGS = ROOT / "trainers" / "accelerate_configs"

SCRIPT = """
import json, os, sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

# accelerate shares weights out between GPUs only; torch and DeepSpeed do so between CPUs as well.
initialise = AcceleratorState.__init__


def shard_on_cpu(self, *args, **options):
    plugin = options.get("fsdp_plugin") or AcceleratorState._shared_state.get("fsdp_plugin")
    initialise(self, *args, **options)
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


AcceleratorState.__init__ = shard_on_cpu
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    PartialState._prepare_backend = lambda self, *args, **options: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))

from datasets import Dataset, Features, Value
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule

from trainers.data.collators import DIRECTIONS
from trainers import (
    CocoaContrastiveConfig, CocoaContrastiveTrainer, CocoaReconstructionConfig, CocoaReconstructionTrainer
)

kind, model, folder, batch_size, steps = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
optimizer = dict(optim="adamw_torch", learning_rate=1e-2) if "adam" in kind else dict(optim="sgd", learning_rate=0.3)
rows = Dataset.from_parquet(os.path.join(model, "rows.parquet"))
options = dict(
    output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, **optimizer,
    max_grad_norm=1e9, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_steps=1,
    report_to="none", use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ, disable_tqdm=True,
    check_data=False, dataloader_drop_last=True,
    gradient_checkpointing="bridge" in kind,
)
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"]) if "lora" in kind else None
if "contrastive" in kind:
    size = 2 if "cached" in kind else None
    args = CocoaContrastiveConfig(
        gather_across_devices=True, symmetric=True, temperature=0.1, mini_batch_size=size, **options
    )
    data = rows.rename_columns({"text": "query", "image": "positive"}).select_columns(["query", "positive"])
    data = data.filter(lambda row: row["query"] is not None and row["positive"] is not None)
    if "cached" in kind:
        data = Dataset.from_list(
            [{"query": row, "positive": f"number {place}"} for place, row in enumerate(rows)],
            features=Features({"query": dict(rows.features), "positive": Value("string")}),
        )
    if "mixed" in kind:  # a picture among the answers of one process, which takes them in passes of their own
        pictured = next(place for place, row in enumerate(rows) if row["image"] is not None)
        answers = [row if place == pictured else {"text": f"number {place}"} for place, row in enumerate(rows)]
        text = Value("string")
        data = Dataset.from_list(
            [{"query": f"of {i}", "positive": answer, "negative_1": f"not {i}"} for i, answer in enumerate(answers)],
            features=Features({"query": text, "positive": dict(rows.features), "negative_1": text}),
        )
    trainer = CocoaContrastiveTrainer(model, args, train_dataset=data, peft_config=lora)
else:
    args = CocoaReconstructionConfig(stage="bridge", direction_weights=dict.fromkeys(DIRECTIONS, 1.0), **options)
    trainer = CocoaReconstructionTrainer(model, args, train_dataset=rows, eval_dataset=rows, peft_config=lora)
trainer.train(resume_from_checkpoint=True)
if trainer.eval_dataset is not None:
    trainer.evaluate()
trainer.save_model(os.path.join(folder, "final"))
if trainer.is_world_process_zero():
    with open(os.path.join(folder, "log.json"), "w") as file:
        sharded = "fsdp2" if trainer.is_fsdp_enabled else "deepspeed_zero3" if trainer.is_deepspeed_enabled else None
        pieces = sum(isinstance(module, FSDPModule) for module in trainer.model_wrapped.modules())
        json.dump([sharded, pieces, trainer.state.log_history], file)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # all is saved; threads of torch's sharding, left running on a CPU, may abort an ordinary exit
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


def train(kind, start, folder, batch_size, steps=2, sharded=None):
    script = folder.parent / "train.py"
    script.write_text(SCRIPT)
    launcher = []
    if sharded:
        config = folder.parent / f"{sharded}.yaml"
        shipped = yaml.safe_load((CONFIGS / config.name).read_text())
        on_cpu = {"num_processes": 2, "mixed_precision": "no", "use_cpu": sharded == "fsdp2"}
        config.write_text(yaml.safe_dump({**shipped, **on_cpu}))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    run_python(script, kind, start, folder, batch_size, steps, launcher=launcher, DS_ACCELERATOR="cpu")
    found, pieces, logs = json.loads((folder / "log.json").read_text())
    assert found == sharded
    if sharded == "fsdp2":
        assert pieces > 3, "layer by layer, and not the whole model at once"
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


def ways(kind):
    """A kind of run with FSDP2, which is always tested, and with DeepSpeed where it is installed, when asked for."""
    zero3 = pytest.param(kind, "deepspeed_zero3", marks=pytest.mark.slow)
    return [(kind, "fsdp2"), zero3] if kind in QUICK else [pytest.param(kind, "fsdp2", marks=pytest.mark.slow), zero3]


QUICK = ("bridge", "lora mixed contrastive")


def check_like_one_process(kind, sharded, start, tmp_path):
    before = load_file(start / "model.safetensors")
    one, one_logs = train(kind, start, tmp_path / "one", 8)
    two, two_logs = train(kind, start, tmp_path / "two", 4, sharded=sharded)
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


@pytest.fixture(autouse=True)
def needs_deepspeed(request):
    if request.node.callspec.params["sharded"] == "deepspeed_zero3":
        pytest.importorskip("deepspeed")


@pytest.mark.parametrize(("kind", "sharded"), [*ways("bridge"), *ways("lora bridge")])
def test_pre_training_with_shared_out_weights_is_what_one_process_does(tmp_path, start, kind, sharded):
    """Images on one process and texts on the other."""
    check_like_one_process(kind, sharded, start, tmp_path)


@pytest.mark.parametrize(("kind", "sharded"), [*ways("contrastive"), *ways("lora contrastive")])
def test_contrastive_training_with_shared_out_weights_is_what_one_process_does(tmp_path, pairs, kind, sharded):
    check_like_one_process(kind, sharded, pairs, tmp_path)


@pytest.mark.parametrize(("kind", "sharded"), [*ways("cached contrastive")[:1], *ways("lora mixed contrastive")])
def test_mini_batches_of_images_on_one_process_and_of_texts_on_the_other(tmp_path, start, kind, sharded):
    check_like_one_process(kind, sharded, start, tmp_path)


@pytest.mark.parametrize(("kind", "sharded"), [*ways("adam bridge"), *ways("adam lora bridge")])
def test_a_run_with_shared_out_weights_goes_on_to_the_same_weights(tmp_path, start, kind, sharded):
    whole, _ = train(kind, start, tmp_path / "whole", 4, sharded=sharded)
    train(kind, start, tmp_path / "parts", 4, steps=1, sharded=sharded)
    parts, _ = train(kind, start, tmp_path / "parts", 4, sharded=sharded)
    assert (tmp_path / "parts" / "final" / ADAPTER_FILE).exists() == ("lora" in kind)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6, msg=name)
