# SPDX-License-Identifier: Apache-2.0
"""Recipes: what they may say, how their data is read, and a whole run of one."""

from __future__ import annotations

import copy
import json
import logging
import math
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Image, Sequence
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from cocoa.cli import app as cocoa_app
from modeling_cocoa import CocoaTransformer
from modeling_cocoa.saving import save_cocoa
from tests.conftest import VISION
from tests.modeling_cocoa.test_saving import of_kind
from tests.trainers.conftest import ROOT, TEXT_CONFIG, run_python
from trainers.contrastive_config import CocoaContrastiveConfig
from trainers.recipes.from_scratch import build_model
from trainers.recipes.recipe import Recipe, find_recipe, prompts_for_variants, run_recipe
from trainers.recipes.recipe_data import read_source

RECIPES = sorted((ROOT / "trainers" / "recipes").glob("*.yaml"))


def small(recipe):
    """The tiny recipe, with fewer and smaller steps."""
    for stage in recipe.stages.values():
        stage.update(max_steps=2, per_device_train_batch_size=4, use_cpu=True, save_steps=1, dataloader_num_workers=0)
        stage.update(disable_tqdm=True)
    recipe.model["from_scratch"]["text_config"].update(hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    recipe.model["from_scratch"]["vision_config"].update(depth=1, embed_dim=16, num_heads=1)
    recipe.data["sources"]["emoji"].update(
        where={"split": "train", "subgroup": "cat-face"},
        eval={"where": {"split": ["train", "validation", "test"], "subgroup": "monkey-face"}},
    )
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read(path):
    recipe = Recipe.load(path)
    assert find_recipe(path.stem) == path and recipe.stages


def test_a_recipe_gives_what_differs_from_its_base(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("base: cocoa_qwen2_5_vl_3b\nstages: {bridge: {max_steps: 5}, contrastive: null}\nseed: 1\n")
    base, own = Recipe.load(find_recipe("cocoa_qwen2_5_vl_3b")), Recipe.load(path)
    assert own.model == base.model and own.data == base.data and own.seed == 1
    assert own.model["model_name_or_path"] == "Qwen/Qwen2.5-VL-3B-Instruct" and own.model["use_dora"]
    assert own.stages == {**base.stages, "bridge": {**base.stages["bridge"], "max_steps": 5}, "contrastive": {}}
    path.write_text("base: nowhere\n")
    with pytest.raises(FileNotFoundError, match="no recipe 'nowhere'"):
        Recipe.load(path)


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


RECIPE = """
output_dir: {folder}/run
model:
  model_name_or_path: {folder}/start
  use_peft: true
  lora_r: 4
  lora_target_modules: [q_proj, v_proj, qkv]
  load_in_4bit: {quantized}
data:
  sources:
    captions: {{path: parquet, data_files: captions.parquet, streaming: {streaming}}}
    talks: {{path: parquet, data_files: talks.parquet}}
    documents: {{path: parquet, data_files: documents.parquet}}
    mmeb: {{path: parquet, data_files: mmeb.parquet, layout: mmeb_train, image_dir: {folder}}}
  reconstruction:
    captions: {{source: captions, image: image, text: "a picture of {{text}}"}}
    talks: {{source: talks, messages: messages, images: images}}
    documents: {{source: documents, texts: texts, images: images}}
    mmeb: {{source: mmeb}}
    pairs: {{source: captions, query: image, positive: text}}
stages:
  {stage}:
    max_steps: 6
    per_device_train_batch_num_tokens: 160
    dataset_weights: {{captions: 2.0, talks: 1.0, documents: 1.0, mmeb: 0.5, pairs: 0.5}}
    shuffle_buffer_size: 16
    gradient_checkpointing: true
    check_data: {check_data}
    use_cpu: true
    disable_tqdm: true
    logging_steps: 1
"""


@pytest.mark.parametrize(
    ("stage", "streaming", "quantized"),
    [("warmup", "false", "false"), ("bridge", "false", "true"), ("bridge", "true", "false")],
)
def test_one_file_holds_data_of_every_form(tmp_path, model, processor, emoji, stage, streaming, quantized):
    """Captions, conversations, documents and MMEB-train, by weight, in batches by tokens, with LoRA or QLoRA."""
    if quantized == "true":
        pytest.importorskip("bitsandbytes")
    save_cocoa(model, processor, tmp_path / "start")
    emoji.select(range(20)).to_parquet(str(tmp_path / "captions.parquet"))
    pictures = [[emoji[place]["image"]] for place in range(20, 30)]
    turns = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is an emoji."}]},
    ]
    images = Sequence(Image())
    talks = Dataset.from_dict({"messages": [turns] * 10, "images": pictures})
    talks.cast_column("images", images).to_parquet(str(tmp_path / "talks.parquet"))
    documents = {"texts": [["one", None, "two"]] * 10, "images": [[None, *own, None] for own in pictures]}
    documents = Dataset.from_dict(documents).cast_column("images", images)
    documents.to_parquet(str(tmp_path / "documents.parquet"))
    emoji[40]["image"].save(tmp_path / "cat.png")
    pair = {"qry": "<|image_1|> Name it.", "qry_image_path": "cat.png", "pos_text": "a cat", "pos_image_path": ""}
    Dataset.from_list([pair] * 4).to_parquet(str(tmp_path / "mmeb.parquet"))
    recipe = tmp_path / "recipe.yaml"
    check_data = "false" if streaming == "true" else "true"
    options = {"stage": stage, "streaming": streaming, "quantized": quantized, "check_data": check_data}
    recipe.write_text(RECIPE.format(folder=tmp_path, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = CliRunner().invoke(cocoa_app, ["train", str(recipe)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    logs = json.loads((tmp_path / "run" / stage / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    losses = {"loss_image", "loss_text_source"} if stage == "warmup" else {"loss_text_target"}
    assert losses <= set().union(*logs)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "start", tmp_path / "run" / stage / "final")
    )
    assert before.keys() == after.keys() and all(value.is_floating_point() for value in after.values())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in changed if name.split(".")[-2] in ("q_proj", "v_proj", "qkv")}
    assert adapted and (adapted == changed) == (quantized == "false")


def test_two_processes_run_a_recipe_together(tmp_path, model, processor, emoji):
    """Stage after stage, as `accelerate launch -m cocoa train` starts them."""
    save_cocoa(model, processor, tmp_path / "start")
    emoji.select(range(16)).to_parquet(str(tmp_path / "rows.parquet"))
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    values = {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": str(tmp_path / "start")},
        "data": {
            "sources": {"rows": {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}},
            "reconstruction": {"rows": {"image": "image", "text": "text"}},
            "contrastive": {"rows": {"query": "text", "positive": "image"}},
        },
        "stages": {stage: options for stage in ("warmup", "bridge", "contrastive")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    printed = run_python("-m", "cocoa", "train", tmp_path / "recipe.yaml", processes=2)
    assert printed.count("The trained model is in") == 1, "said once"
    weights = [load_file(folder / "model.safetensors") for folder in sorted((tmp_path / "run").glob("*/final"))]
    assert len(weights) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(extra=1), "unknown section 'extra'; there are .*'stages'"),
        (lambda values: values.pop("data"), "missing section 'data'"),
        (lambda values: values["data"].pop("sources"), "data: missing part 'sources'"),
        (lambda values: values["data"].update(train={}), "data: unknown part 'train'; there are .*'contrastive'"),
        (lambda values: values["stages"].update(fourth={}), "stages: unknown stage 'fourth'; there are"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("processor"), "needs `processor: {text_columns"),
        (
            lambda parts: parts["processor"].update(pixels=3),
            "processor of from_scratch: .*'pixels'.*'max_pixels'",
        ),
        (lambda parts: parts.pop("vision_config"), "from_scratch: missing .*'vision_config'"),
        (lambda parts: parts.update(layers=3), "from_scratch: .*'layers'.*; there are .'text_config'"),
    ],
)
def test_what_is_wrong_with_a_model_from_scratch_is_said(tmp_path, change, message):
    recipe = small(Recipe.load(find_recipe("tiny")))
    recipe.output_dir = str(tmp_path)
    change(recipe.model["from_scratch"])
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe, lambda name: ROOT / name)


FOR_GPUS = [  # of a kind, one size in every run of the tests
    pytest.param(path, id=path.stem, marks=[] if path.stem.endswith(("2b", "3b")) else pytest.mark.slow)
    for path in RECIPES
    if path.stem.startswith("cocoa")
]
MMEB_PAIRS = [  # image to text, text to image (swapped in stage 2), image to image (left out of it), text to text
    ("<|image_1|>\nName it.", "0.png", "a face", ""),
    ("Find it: a face", "", "<|image_1|>\nRepresent the given image.\n", "1.png"),
    ("<|image_1|>\nFind one like it.", "2.png", "<|image_1|>\nRepresent the given image.\n", "3.png"),
    ("\nWhich animal purrs?", "", "\na cat\n", ""),
]


@pytest.mark.parametrize("path", FOR_GPUS)
def test_a_recipe_for_gpus_runs_as_it_is_on_a_tiny_model_of_its_kind(tmp_path, processor, emoji, path, caplog):
    """All three stages from pairs alone, adapters of each folded in before the next; and its result loads."""
    recipe = Recipe.load(path)
    assert list(recipe.stages) == ["warmup", "bridge", "contrastive"]
    kind = path.stem.removeprefix("cocoa_").rpartition("_")[0]
    vision = {"depth": 1, "num_heads": 2, **VISION[kind]}
    processor = of_kind(processor, kind)
    save_cocoa(build_model(processor, TEXT_CONFIG, vision, model_type=kind), processor, tmp_path / "start")
    assert kind.replace("qwen2_5", "qwen2.5").replace("_", "-") in recipe.model["model_name_or_path"].lower()
    recipe.model.update(model_name_or_path=str(tmp_path / "start"), dtype="float32")
    for number in range(4):
        emoji[number]["image"].save(tmp_path / f"{number}.png")
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path")
    Dataset.from_list([dict(zip(columns, row, strict=True)) for row in MMEB_PAIRS]).to_parquet(
        str(tmp_path / "pairs.parquet")
    )
    for name, source in recipe.data["sources"].items():
        assert source["layout"] == "mmeb_train" and len(set(source["name"])) == 20, name
        source.update(path="parquet", data_files="pairs.parquet", image_dir=str(tmp_path))
        source["split"] = source["split"].replace("original", "train")
        del source["name"]
    for stage in recipe.stages.values():
        stage.update(bf16=False, use_cpu=True, dataloader_num_workers=0, disable_tqdm=True, logging_steps=1)
        stage.update(per_device_train_batch_size=4, save_steps=1, warmup_steps=0, learning_rate=1e-2, max_length=128)
        if "max_steps" in stage:
            stage["max_steps"] = 2
    for stage, side in (("warmup", 336), ("bridge", 448)):
        assert recipe.stages[stage]["image_resolution"] == side
        recipe.stages[stage]["image_resolution"] = 32
    recipe.output_dir = str(tmp_path / "run")
    trainers = {}
    logging.getLogger("transformers").propagate = True
    final = run_recipe(recipe, lambda name: tmp_path / name, trainers.__setitem__)
    assert "1 of 'mmeb'" in caplog.text, "the pair without a text to rebuild"
    for stage, trainer in trainers.items():
        peft_config = trainer.backbone.peft_config["default"]
        assert peft_config.use_dora and (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout) == (
            8,
            64,
            0.1,
        )
        assert peft_config.init_lora_weights == "gaussian"
        names = {name for name, module in trainer.backbone.named_modules() if hasattr(module, "lora_A")}
        endings = {name.rsplit(".", 1)[-1] for name in names}
        assert set(recipe.model["lora_target_modules"]) == endings, stage
        assert any(name.startswith("visual.blocks") for name in names)
    starts = [tmp_path / "start", *(tmp_path / "run" / stage / "final" for stage in recipe.stages)]
    weights = [load_file(folder / "model.safetensors") for folder in starts]
    for before, after in pairwise(weights):
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[name], after[name]) for name in before), "the stage was trained"
    vectors = [
        SentenceTransformer(final, device="cpu").encode(["a face"]),
        SentenceTransformer(final, device="cpu", trust_remote_code=True).encode(["a face"]),
        SentenceTransformer(modules=[CocoaTransformer(final)], device="cpu").encode(["a face"]),
        CocoaTransformer(final).encode(["a face"]),
    ]
    for vector in vectors[1:]:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-5)


def test_quantized_weights_need_adapters(tmp_path, model, processor):
    save_cocoa(model, processor, tmp_path / "start")
    recipe = small(Recipe.load(find_recipe("tiny")))
    recipe.output_dir = str(tmp_path)
    recipe.model = {"model_name_or_path": str(tmp_path / "start"), "load_in_4bit": True}
    with pytest.raises(ValueError, match="4 or 8 bits do not train; set use_peft"):
        run_recipe(recipe, lambda name: ROOT / name)


def test_the_command_says_what_is_wrong(tmp_path):
    result = CliRunner().invoke(cocoa_app, ["train", "nowhere.yaml"])
    assert result.exit_code == 1
    assert "no recipe 'nowhere.yaml'" in result.output and "tiny" in result.output
    (tmp_path / "mine.yaml").touch()
    result = CliRunner().invoke(cocoa_app, ["train", str(tmp_path / "mien.yaml")])
    assert "(did you mean mine.yaml?)" in result.output


def test_a_prompt_by_dataset_is_for_all_of_its_variants():
    args = CocoaContrastiveConfig("unused", query_prompt={"name": "Find it.", "mmeb_A": "In A."}, use_cpu=True)
    prompts_for_variants(args, ["name", "name_2", "name_3", "kind", "mmeb_A", "mmeb_A_2", "mmeb_B_2", "other_2"])
    expected = dict.fromkeys(["name", "name_2", "name_3"], "Find it.") | dict.fromkeys(["mmeb_A", "mmeb_A_2"], "In A.")
    assert args.query_prompt == expected and args.target_prompt is None


def test_reading_reports_to_nobody_and_changes_no_setting(tmp_path, monkeypatch):
    """`datasets` counts what is read on the Hub by default."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a cat"}\n')
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    seen, load = [], datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda **options: seen.append(datasets.config.HF_UPDATE_DOWNLOAD_COUNTS) or load(**options),
    )
    read_source({"path": "json", "data_files": str(tmp_path / "rows.jsonl")}, str)
    assert seen == [False] and datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True
