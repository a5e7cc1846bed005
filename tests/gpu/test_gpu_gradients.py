# SPDX-License-Identifier: Apache-2.0
"""Gradients of every stage's loss on a device are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modeling_cocoa.packed_attention import FLEX_ATTENTION
from modeling_cocoa.reconstruction import CocoaForReconstruction
from tests.gpu.conftest import gradients, lost, moved
from tests.modeling_cocoa.test_modeling import batch_of, rows, with_backend
from tests.modeling_cocoa.test_reconstruction import bridge_batch, reconstruction
from tests.modeling_cocoa.test_saving import of_kind, random_model
from trainers.data.collators import DIRECTIONS, ReconstructionCollator, model_arguments

pytestmark = pytest.mark.gpu
LOSSES = {
    "contrastive": {},
    "warmup": {"stage": "warmup"},
    "bridge": {"stage": "bridge"},
    "bridge, EOS without its target": {"stage": "bridge", "eos_sees_target": False},
    "bridge by the embedding": {"stage": "bridge", "bridge": "embedding"},
}


@pytest.fixture(params=LOSSES)
def step(request, model_type, processor, emoji):
    """Makes a step, on a device, with options of autocast and checkpointing: the loss, and gradients by name."""
    options = dict(LOSSES[request.param])
    stage = options.pop("stage", None)
    processor = of_kind(processor, model_type)
    if stage:
        collator = ReconstructionCollator(
            processor, stage=stage, source_mask_ratio=0.15, direction_weights=dict.fromkeys(DIRECTIONS, 1.0)
        )
        examples = [collator.example({**emoji[row], "index": row, "seed": (3, 0, row)}) for row in range(12)]
        batch = model_arguments(collator.collate(examples))
        torch.manual_seed(0)
        model = CocoaForReconstruction(random_model(processor, model_type), **options)
    else:
        batch = batch_of(rows(model_type), "left")
        model = with_backend(model_type, "sdpa")

    def make(device, dtype=None, checkpointing=None):
        model.to(device).train().zero_grad()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            (model.model if stage else model).enable_input_require_grads()
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
            output = model(**moved(batch, device))
            if stage:
                loss = output.loss
            else:
                vectors = output.pooler_output.float()
                scores = vectors @ vectors.roll(1, 0).T / 0.1
                loss = nn.functional.cross_entropy(scores, torch.arange(len(scores), device=device))
        loss.backward()
        return loss.item(), gradients(model)

    return make


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_gradients_are_those_of_the_cpu(step, device, checkpointing):
    """In float32, weight by weight: they differ by 1e-6 of their size, with TF32 by 1e-3."""
    expected_loss, expected = step("cpu")
    loss, found = step(device, checkpointing=checkpointing)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert lost(found, expected) < 2e-5
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-7 * whole, name


def test_gradients_under_autocast_are_close(step, device):
    expected_loss, expected = step("cpu")
    loss, found = step(device, torch.bfloat16)
    eps = torch.finfo(torch.bfloat16).eps
    assert loss == pytest.approx(expected_loss, rel=8 * eps)
    assert lost(found, expected) < 8 * eps


@pytest.mark.parametrize("direction", ["text_to_image", "both_to_both"])
@pytest.mark.parametrize("eos_sees_target", [True, False])
def test_gradients_of_flex_attention_are_those_of_the_cpu(cuda, direction, eos_sees_target):
    """It has no backward pass on a CPU; compiled, hence last."""
    batch = bridge_batch(direction)

    def step(implementation, device):
        model = reconstruction("qwen2_vl", "layerwise", implementation, eos_sees_target).train().to(device)
        model(**moved(batch, device)).loss.backward()
        return gradients(model)

    assert lost(step(FLEX_ATTENTION, cuda), step("eager", "cpu")) < 1e-4
