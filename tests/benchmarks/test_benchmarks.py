# SPDX-License-Identifier: Apache-2.0
"""The benchmarks count right, run, and compare things that agree."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks.encode import bench_encode
from benchmarks.evaluation import bench_evaluation
from benchmarks.measure import PeakMemory
from benchmarks.operations import embedding_operations, vision_operations
from benchmarks.shortcuts import SHORTCUTS, without_each
from benchmarks.train import bench_contrastive, bench_pretraining
from modeling_cocoa import CocoaTransformer

TINY = command.TINY


@pytest.fixture(scope="module")
def module():
    return CocoaTransformer(TINY)


def counted(module, run):
    """Multiplications and additions that torch itself counts in matrix products and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def test_operations_are_those_that_torch_counts(module):
    """Within 3 %: the counter does not know attention on a CPU, which is a small part of short texts."""
    rows = module.processor.preprocess(["a red apple", "a nerd face with glasses and a smile"])
    model = module.model

    def run():
        for row in rows:
            model(input_ids=row["input_ids"][None], eos_only=True)

    assert embedding_operations(model, rows) == pytest.approx(counted(module, run), rel=0.03)


def test_operations_of_images_are_those_that_torch_counts(module):
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.zeros(16, module.model.visual.patch_embed.proj.weight[0].numel())
    found = counted(module, lambda: module.model.get_image_features(pixels, grid))
    assert vision_operations(module.model, grid) == pytest.approx(found, rel=0.02)
    assert vision_operations(module.model, None) == 0


@pytest.mark.slow
def test_the_evaluation_is_measured_on_the_inputs_that_it_embeds():
    numbers = bench_evaluation(TINY, 2, 1)["held-out emoji tasks"]
    assert numbers["evaluation"]["inputs"] == numbers["embedding alone"]["inputs"] > 500
    assert 0 < numbers["ratio"]["seconds"] < 10


def test_peak_memory_is_seen():
    with PeakMemory() as memory:
        torch.ones(64 * 2**18).sum()  # 64 MiB
    assert 60 < memory.mib < 100


@pytest.mark.slow
def test_all_loaders_agree():
    report = bench_encode(TINY, 12, 1)
    assert set(report) == {"texts", "images", "image+text", "mixed list"}
    for loaders in report.values():
        assert len(loaders) == 4
        assert all(numbers["largest difference"] < 1e-5 for numbers in loaders.values())


def test_shortcuts_are_left_out_one_at_a_time(module, monkeypatch):
    entered = []
    for place, name in SHORTCUTS.values():
        shortcut = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, own=shortcut: entered.append(own.__name__) or own(*args))
    report = without_each(module, ["a red apple"], 1)
    assert len(report) == 2 + len(SHORTCUTS) and report["all"]["against all"] == 1
    runs = 4  # of each way: three before the measured one
    assert {name: entered.count(name) for _, name in SHORTCUTS.values()} == {
        name: runs * len(SHORTCUTS) for _, name in SHORTCUTS.values()
    }


@pytest.mark.parametrize("bench", [bench_pretraining, bench_contrastive])
def test_training_steps_agree(bench):
    (difference,) = bench(TINY, 4, 1)["relative difference"].values()
    assert difference["loss"] < 1e-4 and difference["gradients"] < 1e-4


def test_the_command_keeps_what_it_does_not_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "save_118m", lambda folder: None)
    monkeypatch.setattr(command, "bench_encode", lambda *args: {"texts": {"a loader": {"items a second": 5.0}}})
    output = tmp_path / "numbers.json"
    output.write_text('{"other": 1}')
    app = command.typer.Typer()
    app.command()(command.measure)
    result = CliRunner().invoke(app, ["--only", "encode", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "a loader" in result.output
    report = json.loads(output.read_text())
    assert report["other"] == 1 and report["encode"]["numbers"]["texts"]["a loader"]["items a second"] == 5.0
    unknown = CliRunner().invoke(app, ["--only", "speed", "--output", str(output)])
    assert unknown.exit_code == 2 and "growth" in unknown.output
