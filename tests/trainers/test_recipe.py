# SPDX-License-Identifier: Apache-2.0
"""Recipes: what they may say, how their data is read, and a whole run of one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

import cocoa
from trainers.recipe import (
    Recipe,
    assemble,
    column_texts,
    contrastive_data,
    find_recipe,
    reconstruction_data,
    run_recipe,
    select_rows,
)

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "trainers" / "recipes").glob("*.yaml"))


@pytest.fixture
def source():
    rows = Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet"))
    return rows.select(range(12))


def small(recipe):
    """The tiny recipe, with fewer and smaller steps."""
    for stage in recipe.stages.values():
        stage.update(max_steps=2, per_device_train_batch_size=4, use_cpu=True, save_steps=1, dataloader_num_workers=0)
        stage.update(disable_tqdm=True)
    recipe.model["from_scratch"]["text_config"].update(hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    recipe.model["from_scratch"]["vision_config"].update(depth=1, embed_dim=16, num_heads=1)
    recipe.data["train"] = {"split": "train", "subgroup": "cat-face"}
    recipe.data["eval"] = {"split": ["train", "validation", "test"], "subgroup": "monkey-face"}
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read(path):
    recipe = Recipe.load(path)
    assert find_recipe(path.stem) == path and recipe.stages


def test_a_recipe_runs_through_its_stages_and_only_once(tmp_path):
    threads = torch.get_num_threads()
    recipe = small(Recipe.load(find_recipe("tiny")))
    recipe.output_dir = str(tmp_path / "one")
    again = copy.deepcopy(recipe)
    again.output_dir = str(tmp_path / "two")
    try:
        final = run_recipe(recipe, lambda name: ROOT / name)
        run_recipe(again, lambda name: ROOT / name)
    finally:
        torch.set_num_threads(threads)
    assert final == str(tmp_path / "one" / "contrastive" / "final")
    for stage in ("warmup", "bridge", "contrastive"):
        one, two = (load_file(tmp_path / run / stage / "final" / "model.safetensors") for run in ("one", "two"))
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert torch.equal(value, two[name]), (stage, name)
    stamp = (tmp_path / "one" / "warmup" / "final" / "model.safetensors").stat().st_mtime_ns
    run_recipe(recipe, lambda name: ROOT / name)
    assert (tmp_path / "one" / "warmup" / "final" / "model.safetensors").stat().st_mtime_ns == stamp


def test_rows_are_chosen_by_columns(source):
    chosen = select_rows(source, {"split": "train", "name": [source["name"][0], source["name"][2]]})
    assert chosen["name"] == [source["name"][0]]
    with pytest.raises(ValueError, match="no column .'colour'.*'keywords'"):
        select_rows(source, {"colour": "red"})
    with pytest.raises(ValueError, match="No row of the data has"):
        select_rows(source, {"split": "nowhere"})


def test_texts_are_columns_or_made_of_columns(source):
    assert column_texts(source, "name") == list(source["name"])
    first = source[4]
    assert column_texts(source, "{name}: {keywords}")[4] == f"{first['name']}: {', '.join(first['keywords'])}"
    with pytest.raises(ValueError, match="no column .'caption'"):
        column_texts(source, "{caption}")


def test_datasets_keep_pictures_and_rows_together(source):
    data = {
        "reconstruction": [{"image": "noto", "text": "name"}, {"image": "twemoji"}],
        "contrastive": {"pairs": {"query": "name", "positive": "noto"}},
    }
    rows = reconstruction_data(source, data)
    assert len(rows) == 24 and rows[3]["text"] == source[3]["name"] and rows[15]["text"] is None
    assert rows[15]["image"].tobytes() == source[3]["twemoji"].tobytes()
    pairs = contrastive_data(source, data)["pairs"]
    assert pairs.column_names == ["query", "positive"]
    assert pairs[5]["positive"].tobytes() == source[5]["noto"].tobytes()
    assert assemble(source, {"text": "name"}).column_names == ["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(extra=1), "unknown sections .'extra'"),
        (lambda values: values.pop("data"), "missing .'data'"),
        (lambda values: values["stages"].update(fourth={}), "unknown stages .'fourth'"),
        (lambda values: values.update(evaluate="all"), "evaluate must be"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(tmp_path, change, message):
    values = yaml.safe_load(find_recipe("tiny").read_text())
    change(values)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        Recipe.load(path)


def test_an_unknown_setting_of_a_stage_is_named(tmp_path):
    recipe = small(Recipe.load(find_recipe("tiny")))
    recipe.output_dir = str(tmp_path)
    recipe.stages["warmup"]["mask_ratio"] = 0.5
    with pytest.raises(ValueError, match="mask_ratio"):
        run_recipe(recipe, lambda name: ROOT / name)


def test_the_command_says_what_is_wrong():
    result = CliRunner().invoke(cocoa.app, ["train", "nowhere.yaml"])
    assert result.exit_code == 1
    assert "no recipe 'nowhere.yaml'" in result.output and "tiny" in result.output
