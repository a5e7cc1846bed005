# SPDX-License-Identifier: Apache-2.0
"""Both models train on the ablation's rows, and the table has every form of their vectors."""

import json

import pytest

from benchmarks import matryoshka


@pytest.mark.slow
def test_both_ways_are_trained_and_scored(tmp_path, capsys):
    matryoshka.measure(tmp_path / "runs", tmp_path / "results.json", seed=0, max_steps=3)
    found = json.loads((tmp_path / "results.json").read_text())["recall"]
    assert set(found) == {"not trained for it", "Matryoshka"}
    forms = [f"{dim} {form}" for dim in (128, 64, 32, 16) for form in ("float32", "int8", "binary")]
    for scores in found.values():
        assert list(scores) == forms
        assert scores["32 int8"]["bytes"] == 32 and 0 <= scores["32 float32"]["recall@1"][0] <= 1
    weights = [(tmp_path / "runs" / way / "contrastive" / "final") for way in ("plain", "matryoshka")]
    assert len({(folder / "model.safetensors").read_bytes() for folder in weights}) == 2
    printed = capsys.readouterr().out
    assert "| 128 float32 | 512 |" in printed and "(100 %)" in printed
