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


def test_samples_of_words_are_drawn_anew_for_every_variant_and_the_same_in_every_run(source):
    data = {
        "reconstruction": [{"image": "noto", "text": "{name}: {keywords:sample}", "variants": 3}],
        "contrastive": {"words": {"query": "{keywords:sample}", "positive": "noto", "variants": 4}},
    }
    pairs = contrastive_data(source, data, seed=1)
    assert list(pairs) == ["words", "words_2", "words_3", "words_4"]
    assert pairs["words_3"][5]["positive"].tobytes() == source[5]["noto"].tobytes()
    for row, keywords in enumerate(source["keywords"]):
        samples = [pairs[name][row]["query"].split(", ") for name in pairs]
        assert all(len(set(sample)) == len(sample) and set(sample) <= set(keywords) for sample in samples)
    queries = {name: list(part["query"]) for name, part in pairs.items()}
    assert len(set(map(tuple, queries.values()))) == 4
    assert {name: list(part["query"]) for name, part in contrastive_data(source, data, seed=1).items()} == queries
    assert list(contrastive_data(source, data, seed=2)["words"]["query"]) != queries["words"]
    rows = reconstruction_data(source, data)
    assert len(rows) == 36 and rows[13]["text"].startswith(f"{source[1]['name']}: ")
    assert rows[13]["image"].tobytes() == source[1]["noto"].tobytes()
    assert list(contrastive_data(source, data, with_variants=False)) == ["words"]
    with pytest.raises(ValueError, match="variants must be a whole number.*words has 0"):
        contrastive_data(source, {"contrastive": {"words": {"query": "name", "positive": "noto", "variants": 0}}})
    with pytest.raises(ValueError, match="{column:sample}; got {column:first}"):
        column_texts(source, "{keywords:first}")


def test_augmented_variants_change_pictures_and_nothing_else(source):
    data = {"contrastive": {"pairs": {"query": "noto", "positive": "name", "variants": 3, "augment": True}}}
    pairs = contrastive_data(source, data, seed=1)
    pictures = [[row["query"].convert("RGB").tobytes() for row in part] for part in pairs.values()]
    assert pictures[0] == [picture.convert("RGB").tobytes() for picture in source["noto"]]
    assert all(len(set(versions)) == 3 for versions in zip(*pictures, strict=True))
    assert all(list(part["positive"]) == list(source["name"]) for part in pairs.values())
    assert all(row["query"].size == (64, 64) for row in pairs["pairs_3"])
    del data["contrastive"]["pairs"]["variants"]
    with pytest.raises(ValueError, match="augment leaves the first variant.*pairs"):
        contrastive_data(source, data)
    data["contrastive"]["pairs"]["variants"] = 3
    again = contrastive_data(source, data, seed=1)["pairs_2"]
    assert [row["query"].convert("RGB").tobytes() for row in again] == pictures[1]


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
