# SPDX-License-Identifier: Apache-2.0
"""Adapters of every kind that is merged into layers train and merge; of others one hears before the first step."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from modeling_cocoa.auto import load_backbone
from modeling_cocoa.modeling_cocoa_qwen2_vl import CocoaQwen2VLModel
from modeling_cocoa.saving import save_cocoa
from tests.trainers.test_run_folder import trainer_of
from trainers.adapter_files import load_checkpoint, save_adapter
from trainers.adapters import dequantized_state_dict, merge_adapters, prepare_parts

LINEAR = {"target_modules": ["q_proj", "down_proj", "fc1"]}
KINDS = {
    "LoRA": LoraConfig(r=4, **LINEAR),
    "DoRA": LoraConfig(r=4, use_dora=True, **LINEAR),
    "LoHa": LoHaConfig(r=4, **LINEAR),
    "LoKr": LoKrConfig(r=4, **LINEAR),
    "IA3": IA3Config(feedforward_modules=["down_proj", "fc1"], **LINEAR),
    "OFT": OFTConfig(oft_block_size=8, r=0, **LINEAR),
    "norms": LNTuningConfig(target_modules=["norm", "input_layernorm"]),
    "patch embedding": LoraConfig(r=4, target_modules=r"visual\.patch_embed\.proj"),
    "embeddings": LoraConfig(r=4, target_modules=["embed_tokens"]),
}


@pytest.fixture
def inputs(processor, emoji):
    """A text and a picture."""
    found = processor([emoji[0]["text"], emoji[1]["image"]])
    return {name: value for name, value in found.items() if not name.startswith("num_")}


def vectors(backbone, inputs):
    with torch.no_grad():
        return backbone.eval()(**inputs).pooler_output


def disturb(backbone):
    """Adapters as a long training could leave them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_is_merged_trains_is_saved_and_resumes(tmp_path, model, processor, emoji, inputs, kind):
    before = vectors(copy.deepcopy(model), inputs)
    trainer = trainer_of("contrastive", tmp_path, model, processor, emoji, KINDS[kind], warmup_steps=0)
    trained = {name for name, value in trainer.backbone.named_parameters() if value.requires_grad}
    assert trained and not any(".base_layer." in name for name in trained)
    trainer.train()
    disturb(trainer.backbone)
    expected = vectors(trainer.backbone, inputs)
    assert (expected - before).abs().max() > 1e-4
    trainer.save_model(str(tmp_path / "final"))
    torch.testing.assert_close(vectors(load_backbone(tmp_path / "final"), inputs), expected, atol=1e-5, rtol=0)
    again = trainer_of("contrastive", tmp_path, model, processor, emoji, KINDS[kind], max_steps=4, warmup_steps=0)
    assert again.train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VeraConfig(r=4, **LINEAR), "of the kind VERA, which .*Use LoRA"),
        (AdaLoraConfig(total_step=9, **LINEAR), "of the kind ADALORA.*called between steps"),
        (PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4), "of the kind PROMPT_TUNING"),
        (LoraConfig(target_modules=["input_layernorm"]), "Target module .*RMSNorm.* is not supported"),
        (LoraConfig(target_modules=["qproj"]), "arget modules .*qproj"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", ["reconstruction", "contrastive"])
def test_other_kinds_and_modules_are_refused_at_the_start(tmp_path, model, processor, emoji, kind, config, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(kind, tmp_path, model, processor, emoji, config)


def test_adapters_of_embeddings_that_are_the_text_head_are_refused(tmp_path, model, processor, emoji):
    with pytest.raises(ValueError, match="adapts embed_tokens, which is the text head"):
        trainer_of("reconstruction", tmp_path, model, processor, emoji, KINDS["embeddings"])


def test_adapters_where_a_batch_has_nothing_for_them_are_no_error(tmp_path, model, processor):
    texts = Dataset.from_dict({"text": ["a cat", "a dog"] * 8, "image": [None] * 16})
    trainer_of("reconstruction", tmp_path, model, processor, texts, KINDS["patch embedding"]).train()


@pytest.fixture
def saved(tmp_path, model):
    """A folder of adapters that peft wrote, and the model that they were trained in."""
    base = copy.deepcopy(model)
    adapted = get_peft_model(copy.deepcopy(model), KINDS["LoRA"])
    disturb(adapted)
    adapted.save_pretrained(tmp_path / "adapters")
    return base, adapted, tmp_path / "adapters"


@pytest.mark.parametrize("kind", ["reconstruction", "contrastive"])
def test_loaded_adapters_go_on_training_or_are_merged(tmp_path, processor, emoji, inputs, saved, kind):
    base, adapted, folder = saved
    expected, fresh = vectors(adapted, inputs), copy.deepcopy(base)
    base.load_adapter(str(folder))
    torch.testing.assert_close(vectors(merge_adapters(base), inputs), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"do not train: load them with load_adapter\(..., is_trainable=True\)"):
        trainer_of(kind, tmp_path, base, processor, emoji)
    with pytest.raises(ValueError, match=r"has the adapters \['default'\] already"):
        trainer_of(kind, tmp_path, base, processor, emoji, KINDS["LoRA"])
    fresh.load_adapter(str(folder), is_trainable=True)
    trainer = trainer_of(kind, tmp_path, fresh, processor, emoji, learning_rate=0.0)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    torch.testing.assert_close(vectors(load_backbone(tmp_path / "final"), inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".language_model.layers.", ".model.layers."),
        lambda name: name.replace(".language_model.", ".model.language_model.").replace(".visual.", ".model.visual."),
    ],
    ids=["model.layers", "model.language_model"],
)
def test_adapters_of_other_layouts_find_their_places(inputs, saved, rename):
    """VLM2Vec's and ColQwen2's; before, the vectors were the base's."""
    base, adapted, folder = saved
    file = folder / "adapter_model.safetensors"
    weights = {rename(name): value for name, value in load_file(file).items()}
    assert any("base_model.model.model." in name for name in weights)
    save_file(weights, file)
    info = base.load_adapter(str(folder))
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(vectors(base, inputs), vectors(adapted, inputs))


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_adapters_that_do_not_fit_are_an_error_and_leave_the_model_as_it_was(inputs, saved, change):
    base, _, folder = saved
    expected = vectors(copy.deepcopy(base), inputs)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights[sorted(weights)[0]]
    else:
        weights["base_model.model.custom_text_proj.lora_A.weight"] = torch.zeros(4, 64)
    save_file(weights, file)
    with pytest.raises(ValueError, match="lacks 1 weights" if change == "missing" else "unknown 1 weights"):
        base.load_adapter(str(folder))
    torch.testing.assert_close(vectors(base, inputs), expected)


@pytest.mark.parametrize("kind", ["reconstruction", "contrastive"])
def test_what_peft_wrapped_or_wrote_is_no_model(tmp_path, processor, emoji, saved, kind):
    _, adapted, folder = saved
    with pytest.raises(ValueError, match="is a PeftModel: give model.merge_and_unload()"):
        trainer_of(kind, tmp_path, adapted, processor, emoji)
    with pytest.raises(ValueError, match=r"holds adapters \(adapter_config.json\), not a model.*load_adapter"):
        trainer_of(kind, tmp_path, str(folder), None, emoji)
    with pytest.raises(ValueError, match="holds no model: it has no config.json"):
        trainer_of(kind, tmp_path, str(tmp_path), None, emoji)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint folder nofolder"):
        trainer_of(kind, tmp_path, "nofolder", None, emoji)


def test_a_checkpoint_of_other_adapters_is_named(tmp_path, model):
    def adapted(config):
        backbone = copy.deepcopy(model)
        prepare_parts(backbone, [], config)
        return backbone

    (tmp_path / "one").mkdir()
    save_adapter(adapted(KINDS["LoRA"]), tmp_path / "one")
    for other, message in (
        (LoraConfig(r=8, **LINEAR), "not those of this run's peft_config; they differ in .*lora_A"),
        (LoraConfig(r=4, target_modules=["v_proj"]), "not those of this run's peft_config"),
        (None, "has adapters, and this run has none"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(adapted(other) if other else model, tmp_path / "one")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no adapters, and this run has some"):
        load_checkpoint(adapted(KINDS["LoRA"]), tmp_path / "none")


@pytest.mark.parametrize("load", [load_backbone, CocoaQwen2VLModel.from_pretrained], ids=["load_backbone", "class"])
def test_four_bit_weights_stay_what_they_were_through_an_evaluation(tmp_path, model, processor, emoji, inputs, load):
    """On a CPU with AVX512-BF16 bitsandbytes would pack them anew at the first forward in evaluation mode."""
    pytest.importorskip("bitsandbytes")
    save_cocoa(model, processor, tmp_path / "start")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    backbone = load(tmp_path / "start", dtype=torch.float32, quantization_config=config)
    before = dequantized_state_dict(backbone)
    prepare_parts(backbone, [], KINDS["LoRA"])
    expected = vectors(backbone, inputs)
    after = {name.replace(".base_layer", ""): value for name, value in dequantized_state_dict(backbone).items()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    torch.testing.assert_close(vectors(merge_adapters(backbone), inputs), expected, atol=1e-5, rtol=0)
