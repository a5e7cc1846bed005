# SPDX-License-Identifier: Apache-2.0
"""Two processes train what one process with twice the batch does, and log the means of both."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from safetensors.torch import load_file

from modeling_cocoa.saving import save_cocoa
from tests.trainers.conftest import ROOT, run_python

SCRIPT = """
import json, os, sys
from datasets import Dataset
from trainers import (
    CocoaContrastiveConfig, CocoaContrastiveTrainer, CocoaReconstructionConfig, CocoaReconstructionTrainer
)

kind, model, folder, batch_size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
rows = Dataset.from_parquet(os.path.join(model, "rows.parquet"))
options = dict(
    output_dir=folder, max_steps=2, per_device_train_batch_size=batch_size, learning_rate=1.0, optim="sgd",
    max_grad_norm=1e9, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no",
    report_to="none", use_cpu=True, disable_tqdm=True, check_data=False, dataloader_drop_last=True,
)
if kind == "contrastive":
    args = CocoaContrastiveConfig(gather_across_devices=True, symmetric=True, temperature=0.1, **options)
    data = rows.rename_columns({"text": "query", "image": "positive"}).select_columns(["query", "positive"])
    trainer = CocoaContrastiveTrainer(model, args, train_dataset=data)
else:
    # A row's direction and masks follow from its seed; one direction, so that every process has each loss.
    args = CocoaReconstructionConfig(stage="bridge", direction_weights={"image_to_text": 1.0}, **options)
    trainer = CocoaReconstructionTrainer(model, args, train_dataset=rows)
trainer.train()
trainer.save_model(os.path.join(folder, "final"))
if trainer.is_world_process_zero():
    with open(os.path.join(folder, "log.json"), "w") as file:
        json.dump(trainer.state.log_history, file)
# Gloo's threads may still hold tensors of the last call, and crash a process that ends before they let go.
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.fixture
def start(tmp_path, model, processor, emoji):
    save_cocoa(model, processor, tmp_path / "start")
    emoji.select_columns(["image", "text"]).to_parquet(str(tmp_path / "start" / "rows.parquet"))
    return tmp_path / "start"


def train(kind, start, folder, processes, batch_size):
    script = folder.parent / "train.py"
    script.write_text(SCRIPT)
    run_python(script, kind, start, folder, batch_size, processes=processes)
    logs = json.loads((folder / "log.json").read_text())
    return load_file(folder / "final" / "model.safetensors"), [entry for entry in logs if "loss" in entry]


def test_negatives_are_gathered_with_their_gradients(tmp_path, start):
    one, one_logs = train("contrastive", start, tmp_path / "one", 1, 8)
    two, two_logs = train("contrastive", start, tmp_path / "two", 2, 4)
    before = load_file(start / "model.safetensors")
    for name, value in one.items():
        step = (value - before[name]).norm()
        assert (two[name] - value).norm() <= 1e-3 * step + 1e-6, name
    assert any(not torch.equal(value, before[name]) for name, value in one.items())
    assert [entry["loss"] for entry in two_logs] == pytest.approx([entry["loss"] for entry in one_logs], rel=1e-4)


def test_reconstruction_logs_the_means_of_all_processes(tmp_path, start):
    _, one = train("reconstruction", start, tmp_path / "one", 1, 8)
    _, two = train("reconstruction", start, tmp_path / "two", 2, 4)
    # Before the first step the weights are the same, and so is the share of tokens predicted right over all rows.
    assert two[0]["token_accuracy"] == pytest.approx(one[0]["token_accuracy"], abs=1e-6)
    assert two[0]["text_image_to_text"] == pytest.approx(one[0]["text_image_to_text"], rel=1e-4)


GRADIENTS = """
import json, os, sys
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback
from trainers import CocoaReconstructionConfig, CocoaReconstructionTrainer
from trainers.data.collators import DIRECTIONS

model, folder, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        model = getattr(model, "module", model)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        save_file(gradients, os.path.join(folder, "gradients.safetensors"))


args = CocoaReconstructionConfig(
    output_dir=folder, max_steps=1, max_grad_norm=1e9, logging_steps=1, save_strategy="no", report_to="none",
    use_cpu=True, disable_tqdm=True, check_data=False, ddp_find_unused_parameters=False,
    direction_weights=dict.fromkeys(DIRECTIONS, 1.0), **options,
)
rows = Dataset.from_parquet(os.path.join(model, "rows.parquet"))
trainer = CocoaReconstructionTrainer(model, args, train_dataset=rows, callbacks=[Keep()])
trainer.train()
if trainer.is_world_process_zero():
    with open(os.path.join(folder, "loss.json"), "w") as file:
        json.dump(trainer.state.log_history[0]["loss"], file)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


def gradients_of(start, folder, processes, code=GRADIENTS, **options):
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(code)
    run_python(script, start, folder, json.dumps(options), processes=processes)
    return load_file(folder / "gradients.safetensors"), json.loads((folder / "loss.json").read_text())


ROWS = """
import json, os, sys
from datasets import Dataset, DatasetDict
from trainers import CocoaContrastiveConfig, CocoaContrastiveTrainer

model, folder, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
stop = options.pop("stop", None)
rows = Dataset.from_parquet(os.path.join(model, "rows.parquet"))
data = rows.rename_columns({"text": "query", "image": "positive"}).select_columns(["query", "positive"])
data = DatasetDict({"one": data.select(range(24)), "other": data.select(range(24, 48))})
args = CocoaContrastiveConfig(
    output_dir=os.path.join(folder, "run"), per_device_train_batch_size=4, save_strategy="steps", report_to="none",
    use_cpu=True, disable_tqdm=True, check_data=False, seed=5, lr_scheduler_type="constant", **options
)
trainer = CocoaContrastiveTrainer(model, args, train_dataset=data)
seen = {}
step = trainer.training_step

def watched(model, inputs, *rest, **more):
    if trainer.state.global_step == stop:
        os._exit(0)
    seen[trainer.state.global_step] = inputs["query_input_ids"].tolist()
    return step(model, inputs, *rest, **more)

trainer.training_step = watched
trainer.train(resume_from_checkpoint=True)
with open(os.path.join(folder, f"rows-{args.process_index}.json"), "w") as file:
    json.dump(seen, file)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


def test_two_processes_that_stopped_in_a_later_epoch_go_on_with_its_rows(tmp_path, start):
    """Two datasets of 24 rows, 8 a step: six steps an epoch, stopped after the eighth."""
    found = []
    for name, runs in (("whole", [{}]), ("resumed", [{"stop": 9}, {}])):
        folder = tmp_path / name
        folder.mkdir()
        script = folder / "train.py"
        script.write_text(ROWS)
        for options in runs:
            options = json.dumps({"max_steps": 12, "save_steps": 8, **options})
            run_python(script, start, folder, options, processes=2)
        found.append([json.loads((folder / f"rows-{index}.json").read_text()) for index in range(2)])
    for whole, resumed in zip(*found, strict=True):
        assert list(resumed) == ["8", "9", "10", "11"]
        assert resumed == {step: whole[step] for step in resumed}
        assert whole["2"] != whole["8"], "else this test says nothing"


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_texts_on_one_process_and_images_on_the_other(tmp_path, start, emoji, stage):
    """The gradients of one process with all the rows, and of one that takes them in two batches."""
    rows = [{"image": emoji[i]["image"], "text": emoji[i]["text"] if i % 2 else None} for i in range(4)]
    rows += [{"image": None, "text": emoji[i]["text"]} for i in range(4, 8)]
    order = np.random.default_rng((42, 0)).permutation(8)  # in which EpochSampler visits them
    placed = [rows[int(np.flatnonzero(order == place)[0])] for place in range(8)]
    features = emoji.select_columns(["image", "text"]).features
    Dataset.from_list(placed, features=features).to_parquet(str(start / "rows.parquet"))
    options = {"stage": stage, "seed": 42}
    whole, loss = gradients_of(start, tmp_path / "whole", 1, per_device_train_batch_size=8, **options)
    parts, parts_loss = gradients_of(
        start, tmp_path / "parts", 1, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options
    )
    two, two_loss = gradients_of(start, tmp_path / "two", 2, per_device_train_batch_size=4, **options)
    assert (two_loss, parts_loss) == pytest.approx((loss, loss), rel=1e-5)
    assert any("visual" in name for name in whole) and set(parts) == set(whole)
    for name, gradient in two.items():
        expected = whole.get(name, torch.zeros_like(gradient))
        for found in (gradient, parts.get(name, expected)):
            assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


def test_batches_by_tokens_are_shared_between_processes(tmp_path, start):
    """Two batches of the budget have the gradients of the same rows in one process, taken in two batches."""
    options = {"stage": "warmup", "per_device_train_batch_num_tokens": 120}
    two, loss = gradients_of(start, tmp_path / "two", 2, **options)
    one, one_loss = gradients_of(start, tmp_path / "one", 1, gradient_accumulation_steps=2, **options)
    assert loss == pytest.approx(one_loss, rel=1e-5)
    for name, gradient in one.items():
        assert (two[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


CONTRASTIVE_GRADIENTS = """
import json, os, sys
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback
from trainers import CocoaContrastiveConfig, CocoaContrastiveTrainer

model, folder, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            gradients = {name: value.grad for name, value in trainer.loss.named_parameters() if value.grad is not None}
            gradients = {name.replace("module.", "").replace("loss.", ""): value for name, value in gradients.items()}
            save_file(gradients, os.path.join(folder, "gradients.safetensors"))


args = CocoaContrastiveConfig(
    output_dir=folder, max_steps=1, max_grad_norm=1e9, logging_steps=1, save_strategy="no", report_to="none",
    use_cpu=True, disable_tqdm=True, check_data=False, ddp_find_unused_parameters=False, gather_across_devices=True,
    temperature=0.1, **options,
)
rows = Dataset.from_parquet(os.path.join(model, "rows.parquet"))
trainer = CocoaContrastiveTrainer(model, args, train_dataset=rows, callbacks=[Keep()])
trainer.train()
if trainer.is_world_process_zero():
    with open(os.path.join(folder, "loss.json"), "w") as file:
        json.dump(trainer.state.log_history[0]["loss"], file)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": True},
        {"mini_batch_num_tokens": 30, "learnable_temperature": True, "matryoshka_dims": [64, 16]},
        {"mini_batch_size": 2, "false_negative_margin": 0.05},
        {"mini_batch_size": 2, "teacher": str(ROOT / "checkpoints" / "cocoa-tiny"), "distillation_weight": 2.0},
    ],
    ids=["plain", "cached", "false negatives", "teacher"],
)
def test_pairs_with_images_on_one_process_and_texts_on_the_other(tmp_path, start, emoji, options):
    """
    The gradients of one process with all pairs. The last forward pass of a step is of texts, on both processes.
    """
    kind = Features({"image": ImageFeature(), "text": Value("string")})
    rows = [{"image": emoji[i]["image"] if i < 4 else None, "text": None if i % 2 else "a"} for i in range(8)]
    rows = [{**row, "text": row["text"] or (None if row["image"] else str(i))} for i, row in enumerate(rows)]
    # A picture among the answers of the first process: the other one could take all its answers in one pass.
    answers = [{"image": emoji[8]["image"], "text": None}, *({"image": None, "text": f"is {i}"} for i in range(1, 8))]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()
    pairs = [{"query": rows[i], "positive": answers[i], "negative_1": f"not {i}"} for i in map(order.index, range(8))]
    features = Features({"query": kind, "positive": kind, "negative_1": Value("string")})
    Dataset.from_list(pairs, features=features).to_parquet(str(start / "rows.parquet"))
    (whole, loss), (two, two_loss) = (
        gradients_of(
            start,
            tmp_path / str(processes),
            processes,
            CONTRASTIVE_GRADIENTS,
            seed=42,
            per_device_train_batch_size=8 // processes,
            **options,
        )
        for processes in (1, 2)
    )
    assert two_loss == pytest.approx(loss, rel=1e-4)
    assert any("visual" in name for name in whole) and set(two) == set(whole)
    assert ("log_scale" in whole) == options.get("learnable_temperature", False)
    for name, gradient in two.items():
        assert (gradient - whole[name]).norm() <= 2e-5 * whole[name].norm() + 1e-8, name
