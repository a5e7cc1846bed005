# SPDX-License-Identifier: Apache-2.0
"""The ablation compares like with like, and its intervals mean something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from benchmarks import ablation
from benchmarks.ablation_emoji import MEASURES
from benchmarks.ablation_report import bootstrap, excludes_zero, markdown, plot, summarise
from benchmarks.causal import make_causal
from evaluation.assets import asset_path
from modeling_cocoa import CocoaTransformer


def made_up(share: float, seed: int) -> dict:
    """A run in which so many queries are answered right."""
    generator = np.random.default_rng(seed)
    ranks = {measure: np.where(generator.random((2, 200)) < share, 1, 99).tolist() for measure in MEASURES}
    return {"seed": seed, "ranks": ranks}


def test_every_arm_starts_from_the_recipe_and_changes_what_it_says():
    settings = ablation.Settings.load(ablation.SETTINGS)
    recipe = settings.recipe
    assert settings.reference in settings.arms and len(settings.arms) == 4
    for name, arm in settings.arms.items():
        made = ablation.arm_recipe(recipe, arm, 3, Path("runs"))
        assert list(made.stages) == arm.stages and made.seed == 3, name
        for stage, options in made.stages.items():
            changed = {key: value for key, value in options.items() if recipe["stages"][stage].get(key) != value}
            assert changed == arm.options.get(stage, {}), name
    assert [source["where"] for source in made.data["sources"].values()] == [{"split": "train"}]
    assert "twemoji" not in json.dumps(recipe), "the unseen style"


def test_a_settings_file_changes_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("task: emoji\nrecipe: {model: {a: 1, b: [2]}, data: {}}\n")
    (tmp_path / "few.yaml").write_text("base: base.yaml\nrecipe: {model: {b: [3], c: 4}}\n")
    assert ablation.read_settings(tmp_path / "few.yaml") == {
        "task": "emoji",
        "recipe": {"model": {"a": 1, "b": [3], "c": 4}, "data": {}},
    }
    for path in ablation.SETTINGS.parent.glob("ablation*.yaml"):
        settings = ablation.Settings.load(path)
        assert settings.task in ablation.TASKS and settings.reference in settings.arms, path


def test_the_causal_arm_sees_no_later_token():
    module = CocoaTransformer(asset_path("checkpoints/cocoa-tiny")).eval()
    inputs = module.processor(["a red heart"])
    other = inputs["input_ids"].clone()
    other[0, -2] = other[0, 4]

    def first_state(ids):
        with torch.no_grad():
            return module.model(input_ids=ids).last_hidden_state[0, 0]

    assert not torch.allclose(first_state(inputs["input_ids"]), first_state(other))
    make_causal(module.model)
    torch.testing.assert_close(first_state(inputs["input_ids"]), first_state(other), rtol=0, atol=0)
    # And it is what the stock model computes, padding and the EOS alone included.
    stock = type(module.model).__mro__[2].from_pretrained(asset_path("checkpoints/cocoa-tiny"))
    stock.language_model.config.is_causal = True
    inputs = module.processor(["a red heart", "a cat with heart eyes", "a", "two red hearts"])
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        expected = stock.eval()(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
        found = module.model(**inputs)
        eos = module.model(**inputs, eos_only=True).pooler_output
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(eos, found.pooler_output, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_is_kept_and_its_checkpoints_are_not(tmp_path):
    settings = yaml.safe_load(ablation.SETTINGS.read_text())
    for stage in settings["recipe"]["stages"].values():
        stage.update(max_steps=1, per_device_train_batch_size=4)
    for entry in settings["recipe"]["data"]["contrastive"].values():
        entry.update(variants=1, augment=False)
    path = tmp_path / "settings.yaml"
    options = ["--settings", path, "--results", tmp_path / "results", "--work", tmp_path / "work"]
    settings["arms"]["causal"] = {"title": "causal", "stages": ["contrastive"], "causal": True}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    for arm in ("causal", "bridge"):
        result = CliRunner().invoke(ablation.app, ["one", arm, "0", *map(str, options), "--split", "validation"])
        assert result.exit_code == 0, result.output
        run = json.loads((tmp_path / "results" / arm / "seed-0.json").read_text())
        assert set(run["ranks"]) == set(MEASURES)
        assert len(run["ranks"]["seen_style"][0]) == 750, "every other training concept"
        assert {len(ways) for ways in run["ranks"].values()} == {1, 2}
        assert len(run["ranks"]["held_out"][0]) == len(run["ranks"]["group"][1]) == 156
        assert list(run["seconds"]) == list(run["stages"]) == list(run["logs"])
        assert not (tmp_path / "work" / arm / "seed-0").exists()
    wrong = CliRunner().invoke(ablation.app, ["one", "nothing", "0", *map(str, options)])
    assert wrong.exit_code != 0 and "causal" in wrong.output


def test_runs_that_fail_or_take_too_long_do_not_spoil_the_others(tmp_path, monkeypatch):
    started = []

    def start(arm, seed, settings, results, work, split):
        log, path = ablation.log_path(work, arm, seed), ablation.result_path(results, arm, seed)
        log.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("it broke")
        if arm != "bridge":
            path.write_text(json.dumps(made_up(0.5, seed)))
        seconds = 60 if arm == "bridge_only" else 0
        code = f"import time; time.sleep({seconds}); raise SystemExit({int(arm == 'bridge')})"
        started.append(subprocess.Popen([sys.executable, "-c", code]))
        return started[-1]

    monkeypatch.setattr(ablation, "start_run", start)
    options = ["--seeds", "1", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    arms = [part for arm in ("bridge", "two_sided", "longer") for part in ("--only", arm)]
    result = CliRunner().invoke(ablation.app, ["run", "--jobs", "1", *arms, *options])
    assert result.exit_code == 1 and "bridge 0 failed" in str(result.exception) and "it broke" in str(result.exception)
    assert (tmp_path / "results" / "table.md").read_text().count("\n") == 4
    result = CliRunner().invoke(ablation.app, ["run", "--only", "bridge_only", "--minutes", "0.02", *options])
    assert result.exit_code == 0 and len(started) == 4 and started[-1].returncode != 0, "stopped"


def test_hits_are_the_share_of_ways_that_found_an_item():
    assert MEASURES["held_out"].hits({"held_out": [[1, 10, 11], [12, 10, 11]]}).tolist() == [0.5, 1.0, 0.0]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of scores with an effect of the run and one of the item, in 200 experiments; at least 90 % for a nominal 95."""
    generator = np.random.default_rng(0)
    held = 0
    for number in range(200):
        scores = generator.normal(0, 1, (8, 1)) + generator.normal(0, 1, 60) + generator.normal(0, 1, (8, 60))
        found = bootstrap(scores, seed=number, resamples=400)
        held += found.low <= 0 <= found.high
    assert held >= 0.88 * 200


def test_the_table_compares_the_same_seeds(tmp_path):
    runs = {
        "reference": {seed: made_up(0.4, seed) for seed in range(4)},
        "better": {seed: made_up(0.6, seed + 10) for seed in range(3)},
        "same": {seed: made_up(0.4, seed) for seed in range(2)},
    }
    summaries = summarise(runs, "reference", MEASURES)
    better = summaries["better"]["held_out"]
    assert better.seeds == 3 and better.difference.value == pytest.approx(20, abs=6)
    assert excludes_zero(better.difference)
    assert summaries["same"]["group"].difference.value == 0.0
    assert summaries["reference"]["group"].difference is None
    titles = {"reference": "plain", "better": "more", "same": "nothing new"}
    table = markdown(summaries, titles, MEASURES)
    assert table.count("\n") == 5 and "**+" in table and "| more | 3 |" in table
    plot(summaries, titles, "reference", MEASURES, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
