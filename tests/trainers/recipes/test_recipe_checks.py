# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a recipe is said before its first step, wherever it stands."""

from __future__ import annotations

import copy
import shutil

import pytest
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from cocoa.cli import app as cocoa_app
from evaluation.assets import find_file
from modeling_cocoa.saving import save_cocoa
from trainers.contrastive_config import CocoaContrastiveConfig
from trainers.recipes.options import parse_options
from trainers.recipes.recipe import Recipe, run_recipe
from trainers.reconstruction_config import CocoaReconstructionConfig


@pytest.fixture
def values(tmp_path, model, processor, emoji):
    """A recipe of three stages, as YAML has it."""
    save_cocoa(model, processor, tmp_path / "start")
    emoji.select(range(16)).select_columns(["text", "image", "twemoji"]).to_parquet(str(tmp_path / "rows.parquet"))
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": str(tmp_path / "start")},
        "data": {
            "sources": {"rows": {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}},
            "contrastive": {"rows": {"query": "text", "positive": "image"}},
        },
        "stages": {stage: dict(options) for stage in ("warmup", "bridge", "contrastive")},
    }


def load(tmp_path, values):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return Recipe.load(tmp_path / "recipe.yaml")


def empty_caption(values):
    """An empty text in one row."""
    file = values["data"]["sources"]["rows"]["data_files"]
    rows = Dataset.from_parquet(file).to_dict()
    rows["text"][3] = " "
    Dataset.from_dict(rows).to_parquet(file)


def set_in(*path):
    """What sets a value of a recipe: the names on the way to it, and the value."""

    def change(values):
        *names, last, value = path
        for name in names:
            values = values[name]
        values[last] = value

    return change


LAST = ("stages", "contrastive")
ROWS = ("data", "contrastive", "rows")
WRONG = {
    "a missing column": (set_in(*ROWS, "query", "texts"), r"contrastive rows: .*no column \['texts'\].*mean text\?"),
    "a column's name": (set_in(*ROWS, "positve", "text"), r"contrastive rows: .*'positve'.*did you mean positive\?"),
    "no text for a column": (set_in(*ROWS, "query", 3), "contrastive rows: query must be a column .*got 3"),
    "no entry": (set_in("data", "contrastive", "rows", "text"), "contrastive rows must have names .*'text'"),
    "a source": (set_in(*ROWS, "source", "row"), r"source 'row' \(did you mean rows\?\)"),
    "an empty text": (empty_caption, "stage '.*': Row 3 of 'rows' .*: column 'query' is empty"),
    "an option": (set_in(*LAST, "max_stpes", 1), r"stage 'contrastive': unknown option 'max_stpes'.*mean max_steps\?"),
    "no number": (set_in(*LAST, "learning_rate", "fast"), "'contrastive': learning_rate must be a number; got 'fast'"),
    "no whole number": (
        set_in(*LAST, "max_steps", "one"),
        "max_steps must be a whole number; got 'one'",
    ),
    "half a step": (set_in(*LAST, "max_steps", 1.5), "max_steps must be a whole number; got 1.5"),
    "no truth value": (set_in(*LAST, "symmetric", 2), "symmetric must be true or false; got 2"),
    "no list": (set_in(*LAST, "matryoshka_dims", 32), "matryoshka_dims must be a list or null; got 32"),
    "a number in a list": (
        set_in(*LAST, "matryoshka_dims", [64, "x"]),
        r"matryoshka_dims\[1\] must be a whole",
    ),
    "nothing": (set_in(*LAST, "learning_rate", None), "learning_rate must be a number; got None"),
    "a value": (set_in(*LAST, "temperature", 0.0), "stage 'contrastive': temperature must be above 0"),
    "a choice": (set_in(*LAST, "lr_scheduler_type", "linaer"), "stage 'contrastive': .*linaer"),
    "negatives": (set_in(*LAST, "num_hard_negatives", 2), "stage 'contrastive': .*has 0 negatives a row"),
    "a prompt": (set_in(*LAST, "query_prompt", {"row": "a"}), r"stage 'contrastive': .*name the datasets \['row'\]"),
    "a weight": (set_in("stages", "bridge", "dataset_weights", {"row": 1}), "stage 'bridge': dataset_weights must"),
    "a teacher": (set_in(*LAST, "teacher", "./no/folder"), "stage 'contrastive': teacher: ./no/folder is neither"),
    "a teacher's weight": (set_in(*LAST, "distillation_weight", 0.7), "stage 'contrastive': .*there is no teacher"),
    "retrieval": (set_in(*LAST, "evaluate_retrieval", True), "stage 'contrastive': evaluate_retrieval needs an eval"),
    "one pair": (set_in(*LAST, "per_device_train_batch_size", 1), "'contrastive': per_device_train_batch_size is 1"),
    "a GPU": (lambda v: v["stages"]["bridge"].update(bf16=True, use_cpu=False), "'bridge': bf16: true needs a GPU"),
    "half precision": (set_in("stages", "bridge", "fp16", True), "'bridge': fp16: true needs a GPU"),
    "flash": (set_in("model", "attn_implementation", "flash_attention_2"), "flash_attention_2 needs a GPU"),
    "a data file": (set_in("data", "sources", "rows", "data_files", "no.parquet"), "no file no.parquet"),
    "a model's folder": (set_in("model", "model_name_or_path", "./nofolder"), "[Tt]here is no .*folder .*nofolder"),
    "a model's option": (set_in("model", "lora_rank", 4), r"model: unknown option 'lora_rank'"),
    "a model's type": (set_in("model", "lora_r", "four"), "model: lora_r must be a whole number; got 'four'"),
    "precision": (set_in("model", "dtype", "float12"), "model: dtype must be a name such as float32"),
    "output": (set_in("output_dir", "/proc/x/y"), "output_dir: cannot write to /proc/x/y"),
    "sections": (set_in("stages", "bridge"), "stages must have names with values"),
    "a stage": (set_in(*LAST, [1]), r"stages.contrastive must be a mapping of names .*got \[1\]"),
    "adapters alone": (
        lambda v: (v["model"].update(use_peft=True), v["stages"]["bridge"].update(save_adapters="adapter")),
        "stage 'bridge': save_adapters='adapter' saves no merged model, from which the stage 'contrastive' could",
    ),
    "seed": (set_in("seed", "many"), "seed must be a whole number; got 'many'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_is_said_before_the_first_step(tmp_path, values, case, monkeypatch):
    change, message = WRONG[case]
    change(values)
    monkeypatch.setattr("trainers.recipes.recipe.run_stage", lambda *args: pytest.fail("a stage was trained"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)

    with pytest.raises((ValueError, OSError), match=message) as error:
        run_recipe(load(tmp_path, values), find_file)
    assert "\n" not in str(error.value), "one line"


def test_numbers_written_as_text_are_numbers():
    """YAML 1.1 reads 5e-4 as a text, and `no` as false."""
    options = yaml.safe_load(
        "{learning_rate: 5e-4, max_steps: '1e3', save_steps: 0.5, eval_strategy: no, bf16: 'false', output_dir: x, "
        "matryoshka_dims: ['64', 32], learning_rate_mapping: {log_scale: 1e-3}, image_resolution: 336, "
        "report_to: none, use_cpu: true, freeze_parts: merger, seed: 3.0}"
    )
    assert options["learning_rate"] == "5e-4"
    args = parse_options(CocoaContrastiveConfig, options, "stage 'contrastive'")
    assert (args.learning_rate, args.max_steps, args.eval_strategy, args.bf16) == (5e-4, 1000, "no", False)
    assert args.matryoshka_dims == [64, 32] and args.learning_rate_mapping == {"log_scale": 1e-3}
    assert (args.image_resolution, args.freeze_parts, args.seed) == ("336", ["merger"], 3)
    weights = {"a": "5e-1", "b": 2}
    args = parse_options(
        CocoaReconstructionConfig, {"output_dir": "x", "use_cpu": True, "dataset_weights": weights}, "stage"
    )
    assert args.dataset_weights == {"a": 0.5, "b": 2}


def test_broken_yaml_is_one_line(tmp_path):
    (tmp_path / "broken.yaml").write_text("output_dir: x\nstages: {warmup: [}\n")
    result = CliRunner().invoke(cocoa_app, ["train", str(tmp_path / "broken.yaml")])
    assert result.exit_code == 1
    _, line = [line for line in result.output.splitlines() if line]
    assert "broken.yaml is not valid YAML" in line and "line 2" in line


def test_a_changed_recipe_in_a_used_folder_is_an_error(tmp_path, values, caplog):
    def run(changed=None):
        recipe = copy.deepcopy(values)
        if changed is not None:
            changed(recipe)
        return run_recipe(load(tmp_path, recipe), lambda name: name)

    final = run()
    assert run() == final
    for change, message in (
        (set_in(*LAST, "learning_rate", 1e-2), "run/contrastive had ended.*learning_rate was 2e-05, is 0.01"),
        (set_in("stages", "warmup", "max_steps", 2), "run/warmup had ended.*max_steps was 1, is 2"),
        (set_in(*ROWS, "query", "a {text}"), "run/warmup had ended.*data rows was"),
        (set_in("seed", 5), "seed was 42, is 5"),
        (set_in("model", "lora_r", 3), "model lora_r was None, is 3"),
        (set_in("data", "sources", "rows", "split", "train[:8]"), "16 rows.*8 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            run(change)
    assert run(set_in(*LAST, "logging_steps", 1)) == final
    shutil.rmtree(tmp_path / "run" / "warmup")
    with pytest.raises(ValueError, match="bridge/final was trained from another model of the stage 'warmup'"):
        run()


def test_a_stage_without_options_has_its_defaults(tmp_path, values):
    values["stages"] = {"contrastive": None}
    assert load(tmp_path, values).stages == {"contrastive": {}}
