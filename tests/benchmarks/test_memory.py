# SPDX-License-Identifier: Apache-2.0
"""The memory that is worked out: weights as published, tensors counted once, and the tables of the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.memory import RESULT, SHAPES, activations, bytes_kept, count_weights, markdown, needed, saved_bytes

PUBLISHED = {"Qwen2-VL-2B": 2.21, "Qwen2-VL-7B": 8.29, "Qwen2.5-VL-3B": 3.75, "Qwen2.5-VL-7B": 8.29}
PUBLISHED |= {"Qwen3-VL-2B": 2.13, "Qwen3-VL-4B": 4.44, "Qwen3-VL-8B": 8.77}
"""Billions, as the models' pages say."""


def test_a_tensor_that_is_kept_twice_counts_once_and_weights_do_not():
    layer = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Sigmoid())
    inputs = torch.randn(10, 64, requires_grad=True)
    # The product keeps its input, the sigmoid its output.
    assert saved_bytes(layer, lambda: layer(inputs)) == 4 * 10 * (64 + 32)
    assert saved_bytes(layer, lambda: layer(inputs) + layer[0](inputs)) == 4 * 10 * (64 + 32)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_published_model(name):
    weights = count_weights(SHAPES[name])
    assert (weights["backbone"] + weights["head"]) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.01)


def test_what_is_kept_does_not_depend_on_how_many_tokens_it_is_measured_with(monkeypatch):
    shape = SHAPES["Qwen2-VL-2B"]
    found = bytes_kept(shape, torch.bfloat16)
    monkeypatch.setattr("benchmarks.memory.TOKENS", 232)
    again = bytes_kept(shape, torch.bfloat16)
    assert again == {name: pytest.approx(value, rel=0.01) for name, value in found.items()}
    kept = json.loads(RESULT.read_text())["Qwen2-VL-2B"]["kept"]["bfloat16"]
    assert found == {name: pytest.approx(value, rel=0.01) for name, value in kept.items()}, "the committed numbers"


def test_less_of_everything_needs_less():
    shape, kept = SHAPES["Qwen2-VL-2B"], {"token": 1e5, "patch": 6e4}
    found = activations(shape, kept, 2)
    assert found["checkpointed"] < found["kept"] / 10
    gib = needed(shape, count_weights(shape), {"float32": kept, "bfloat16": kept})
    assert gib["QLoRA"] < gib["LoRA"] < gib["full, eight GPUs"] < gib["full, one GPU"]


def test_the_documentation_shows_what_was_measured():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    for table in markdown(json.loads(RESULT.read_text())).strip().split("\n\n"):
        assert table in text
