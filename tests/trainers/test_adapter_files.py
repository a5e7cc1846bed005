# SPDX-License-Identifier: Apache-2.0
"""Folders of adapters load on their base, and on no other, in PEFT, sentence-transformers and here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import Qwen2VLModel

from modeling_cocoa import CocoaTransformer
from modeling_cocoa.adapter_base import BASE_FILE
from modeling_cocoa.auto import load_backbone
from modeling_cocoa.saving import save_cocoa
from tests.trainers.conftest import VISION_CONFIG
from tests.trainers.test_adapters import disturb
from tests.trainers.test_run_folder import BASIC, trainer_of
from trainers import CocoaContrastiveConfig, CocoaContrastiveTrainer
from trainers.adapters import merge_adapters
from trainers.recipes.from_scratch import build_model

LINEAR = {"target_modules": ["q_proj", "down_proj", "fc1"]}
KINDS = {
    "LoRA": LoraConfig(r=4, **LINEAR),
    "DoRA": LoraConfig(r=4, use_dora=True, **LINEAR),
    "LoHa": LoHaConfig(r=2, **LINEAR),
    "IA3": IA3Config(feedforward_modules=["down_proj", "fc1"], **LINEAR),
}
TEXT_CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
INPUTS = ["a cat with a hat", "two dogs"]
COCOA_FILES = ("*.py", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "README.md")


@pytest.fixture(scope="module")
def bases(tmp_path_factory, processor):
    """The same weights as a CoCoA checkpoint, and as one that reads in one direction."""
    folder = tmp_path_factory.mktemp("bases")
    save_cocoa(build_model(processor, TEXT_CONFIG, VISION_CONFIG, seed=3), processor, folder / "cocoa")
    shutil.copytree(folder / "cocoa", folder / "stock")
    config = json.loads((folder / "stock" / "config.json").read_text())
    for name in ("cocoa", "auto_map", "is_causal"):
        config.pop(name, None)
    config["text_config"].pop("is_causal")
    (folder / "stock" / "config.json").write_text(json.dumps(config))
    for pattern in COCOA_FILES:
        for path in (folder / "stock").glob(pattern):
            path.unlink()
    return folder


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def least_cosine(vectors, others):
    return float((np.asarray(vectors) * np.asarray(others)).sum(1).min())


def trained(base, folder, emoji, kind, **options):
    """A trainer with adapters that a long training could leave, and the vectors of the merged model."""
    pairs = emoji.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})
    args = CocoaContrastiveConfig(str(folder), **{**BASIC, "max_steps": 1, **options})
    trainer = CocoaContrastiveTrainer(str(base), args, train_dataset=pairs, peft_config=KINDS[kind])
    disturb(trainer.backbone)
    return trainer, CocoaTransformer(merge_adapters(trainer.backbone), trainer.processor).encode(INPUTS)


@pytest.mark.parametrize(
    ("kind", "base"), [("LoRA", "cocoa"), ("LoRA", "stock"), ("DoRA", "stock"), ("LoHa", "stock"), ("IA3", "cocoa")]
)
def test_a_folder_of_adapters_loads_everywhere(tmp_path, bases, emoji, kind, base):
    trainer, expected = trained(bases / base, tmp_path / "run", emoji, kind, save_adapters="adapter")
    folder = tmp_path / "adapters"
    trainer.save_model(str(folder))
    assert (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    assert json.loads((folder / BASE_FILE).read_text())["name_or_path"] == str(bases / base)
    assert least_cosine(CocoaTransformer(str(folder)).encode(INPUTS), expected) >= 1 - 1e-5
    assert least_cosine(SentenceTransformer(str(folder)).encode(INPUTS), expected) >= 1 - 1e-5
    plain = merge_adapters(trainer.backbone).state_dict()
    for loaded in (Qwen2VLModel.from_pretrained(bases / base), load_backbone(bases / base)):
        merged = PeftModel.from_pretrained(loaded, folder).merge_and_unload().state_dict()
        assert merged.keys() == plain.keys()
        for name, value in merged.items():
            torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=0)


def test_both_are_the_merged_model_with_its_adapters_in_a_folder(tmp_path, bases, emoji):
    trainer, expected = trained(bases / "stock", tmp_path / "run", emoji, "DoRA", save_adapters="both")
    trainer.save_model(str(tmp_path / "final"))
    adapters = tmp_path / "final" / "adapter"
    for folder in (tmp_path / "final", adapters):
        assert least_cosine(SentenceTransformer(str(folder)).encode(INPUTS), expected) >= 1 - 1e-5
    assert size_of(adapters) < 0.05 * (size_of(tmp_path / "final") - size_of(adapters))


@pytest.mark.parametrize("kind", ["reconstruction", "contrastive"])
@pytest.mark.parametrize("saved", ["adapter", "both"])
def test_a_run_that_saves_adapters_resumes(tmp_path, bases, processor, emoji, kind, saved):
    options = {"save_adapters": saved, "save_steps": 2, "lr_scheduler_type": "constant"}

    def run(folder, max_steps):
        model = load_backbone(bases / "cocoa")
        folder = tmp_path / folder
        return trainer_of(kind, folder, model, processor, emoji, KINDS["DoRA"], max_steps=max_steps, **options)

    whole = run("whole", 4)
    whole.train()
    run("parts", 2).train()
    resumed = run("parts", 4)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(resumed.backbone.state_dict()[name], value), name


def test_a_base_with_other_weights_is_an_error(tmp_path, bases, emoji):
    shutil.copytree(bases / "cocoa", tmp_path / "base")
    trainer, _ = trained(tmp_path / "base", tmp_path / "run", emoji, "LoRA", save_adapters="adapter")
    trainer.save_model(str(tmp_path / "adapters"))
    load_backbone(tmp_path / "adapters", dtype=torch.bfloat16)
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if name.endswith("layers.2.mlp.up_proj.weight"))] += 0.01
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds adapters of .*base, which has other weights now"):
        CocoaTransformer(str(tmp_path / "adapters"))


def test_a_base_without_a_name_is_an_error(tmp_path, model, processor, emoji):
    with pytest.raises(ValueError, match="was not loaded from a folder or the Hub: save it with save_cocoa"):
        trainer_of("contrastive", tmp_path, model, processor, emoji, KINDS["LoRA"], save_adapters="adapter")
    trainer_of("contrastive", tmp_path, model, processor, emoji, save_adapters="adapter")  # it has no adapters


def test_adapters_of_a_local_folder_are_not_pushed(tmp_path, bases, emoji):
    with pytest.raises(ValueError, match="would publish adapters of the local folder .*cocoa"):
        trained(
            bases / "cocoa", tmp_path, emoji, "LoRA", save_adapters="both", push_to_hub=True, hub_model_id="org/name"
        )


def test_adapters_in_the_place_of_a_model_leave_nothing_of_it(tmp_path, bases, emoji):
    trainer, expected = trained(bases / "cocoa", tmp_path / "run", emoji, "LoRA")
    trainer.save_model(str(tmp_path / "final"))
    trainer, expected = trained(bases / "cocoa", tmp_path / "run2", emoji, "LoRA", save_adapters="adapter")
    trainer.save_model(str(tmp_path / "final"))
    assert least_cosine(SentenceTransformer(str(tmp_path / "final")).encode(INPUTS), expected) >= 1 - 1e-5
    trainer.args.save_adapters = "merged"
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "adapter_config.json").exists()
    assert least_cosine(SentenceTransformer(str(tmp_path / "final")).encode(INPUTS), expected) >= 1 - 1e-5


def test_reconstruction_saves_its_heads_beside_the_adapters(tmp_path, bases, processor, emoji):
    trainer = trainer_of(
        "reconstruction",
        tmp_path,
        load_backbone(bases / "cocoa"),
        processor,
        emoji,
        KINDS["LoRA"],
        save_adapters="adapter",
    )
    disturb(trainer.backbone)
    trainer.save_model(str(tmp_path / "final"))
    expected = CocoaTransformer(merge_adapters(trainer.backbone), processor).encode(INPUTS)
    assert (tmp_path / "final" / "reconstruction.safetensors").is_file()
    assert least_cosine(CocoaTransformer(str(tmp_path / "final")).encode(INPUTS), expected) >= 1 - 1e-5
