# SPDX-License-Identifier: Apache-2.0
"""Every stage trains on a device, whole or by adapters, and what it saves is the trained model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import BitsAndBytesConfig

from modeling_cocoa.auto import load_backbone
from modeling_cocoa.saving import save_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer
from tests.gpu.conftest import lost_cosine
from tests.trainers import test_contrastive_trainer as contrastive
from tests.trainers import test_reconstruction_trainer as pretraining
from trainers import CocoaContrastiveTrainer, CocoaReconstructionTrainer

pytestmark = pytest.mark.gpu
STAGES = {
    "warmup": {"stage": "warmup"},
    "bridge": {"stage": "bridge", "direction_weights": pretraining.ALL},
    "bridge by the embedding": {"stage": "bridge", "bridge": "embedding", "direction_weights": pretraining.ALL},
    "contrastive": {"mini_batch_size": None},
    "contrastive by tokens": {"mini_batch_num_tokens": 200},
}
STEPS = 8


def trainer_of(stage, model, processor, emoji, folder, device, peft_config=None, **options):
    """Train a stage on 16 rows, all of them in each step: the loss falls."""
    options = {"max_steps": STEPS, "logging_steps": 1, "use_cpu": device.type == "cpu", "bf16": True, **options}
    options |= STAGES[stage]
    emoji = emoji.select(range(16))
    if stage.startswith("contrastive"):
        kind, arguments = CocoaContrastiveTrainer, contrastive.arguments(folder, **options)
        emoji = emoji.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})
    else:
        kind, arguments = CocoaReconstructionTrainer, pretraining.arguments(folder, **options)
    return kind(model, arguments, train_dataset=emoji, processing_class=processor, peft_config=peft_config)


def train(trainer, device):
    """Steps of finite losses, the last ones smaller than the first; returns the weights that moved, by name."""
    before = {name: value.detach().cpu().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert next(trainer.backbone.parameters()).device.type == device.type
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert np.mean(losses[-2:]) < np.mean(losses[:2]), losses
    after = {name: value.detach().cpu() for name, value in trainer.model.named_parameters()}
    assert all(bool(value.isfinite().all()) for value in after.values())
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


def check_folder(trainer, processor, emoji, folder, device, check) -> None:
    """The saved folder has the vectors of the trained model through both loaders."""
    items = [emoji[0]["text"], emoji[1]["image"], {"text": emoji[2]["text"], "image": emoji[2]["image"]}]
    expected = CocoaTransformer(trainer.backbone, processor).encode(items)
    trainer.save_model(str(folder))
    for options in ({}, {"trust_remote_code": True}):
        found = SentenceTransformer(str(folder), device=str(device), **options)
        check(found.encode(items, convert_to_tensor=True).float().cpu().numpy(), expected)


def same(found, expected) -> None:
    """In float32, with adapters folded in or not."""
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def close(found, expected) -> None:
    """Where weights are rounded anew: adapters folded into bfloat16, or what 8 bits compute with."""
    assert lost_cosine(found, expected) < 0.01


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_in_bfloat16(tmp_path, model, processor, emoji, device, stage):
    trainer = trainer_of(stage, model, processor, emoji, tmp_path / "run", device)
    frozen = {name for name, value in trainer.model.named_parameters() if not value.requires_grad}
    moved = train(trainer, device)
    assert not frozen and len(moved) > 0.9 * len(list(trainer.model.named_parameters()))
    check_folder(trainer, processor, emoji, tmp_path / "final", device, same)


@pytest.mark.parametrize("stage", ["bridge", "contrastive"])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_adapters_train_and_are_folded_in(tmp_path, model, processor, emoji, device, stage, base):
    """Adapters and heads in float32 over a frozen base, with gradient checkpointing."""
    model.to(getattr(torch, base))
    config = LoraConfig(r=4, target_modules="all-linear")
    options = {"gradient_checkpointing": True, "learning_rate": 1e-2}
    trainer = trainer_of(stage, model, processor, emoji, tmp_path / "run", device, config, **options)
    moved = train(trainer, device)
    assert any("lora_B" in name for name in moved) and not any("base_layer" in name for name in moved)
    check_folder(trainer, processor, emoji, tmp_path / "final", device, same if base == "float32" else close)


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True}, {"learnable_temperature": True, "matryoshka_dims": [64, 16]}],
    ids=str,
)
def test_gradcache_gradients_are_those_without(tmp_path, model, processor, emoji, device, options):
    """In float64, so that a difference is an error: by inputs and by tokens."""
    options = {"use_cpu": device.type == "cpu", **options}
    rows = contrastive.mixed_rows(emoji)
    loss, expected = contrastive.gradients_of(model, processor, rows, tmp_path, mini_batch_size=None, **options)
    assert {gradient.device.type for gradient in expected.values()} == {device.type}
    for size in ({"mini_batch_size": 4}, {"mini_batch_num_tokens": 30}):
        cached_loss, cached = contrastive.gradients_of(model, processor, rows, tmp_path, **options, **size)
        assert abs(cached_loss - loss) < 1e-4, size
        contrastive.check_gradients(cached, expected)


@pytest.fixture
def bitsandbytes(device):
    """Skips where it is not installed, or has no kernels for the device."""
    functional = pytest.importorskip("bitsandbytes").functional
    try:
        functional.dequantize_4bit(*functional.quantize_4bit(torch.randn(64, 64, device=device), quant_type="nf4"))
        functional.int8_vectorwise_quant(torch.randn(64, 64, device=device, dtype=torch.float16))
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        pytest.skip(f"bitsandbytes does not work on {device}: {error}")


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stage", ["bridge", "contrastive"])
def test_adapters_over_quantized_weights_train_and_are_folded_in(
    tmp_path, model, processor, emoji, device, stage, bits
):
    """QLoRA: the saved folder holds plain weights, whose vectors are those of the quantized model."""
    save_cocoa(model, processor, tmp_path / "start")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    quantized = load_backbone(
        tmp_path / "start",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**options),
        device_map={"": str(device)},
    )
    kinds = {type(module).__name__ for module in quantized.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    config = LoraConfig(r=4, target_modules=r"language_model\..*_proj")
    trainer = trainer_of(
        stage, quantized, processor, emoji, tmp_path / "run", device, config, learning_rate=1e-2
    )  # fmt: skip
    moved = train(trainer, device)
    assert any("lora_B" in name for name in moved) and not any("base_layer" in name for name in moved)
    check_folder(trainer, processor, emoji, tmp_path / "final", device, same if bits == 4 else close)
