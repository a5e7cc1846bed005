# SPDX-License-Identifier: Apache-2.0
"""What all trainers refuse: checkpoints without a model in them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.distributed.fsdp import StateDictType
from transformers import TrainingArguments

from modeling_cocoa import CocoaTransformer
from modeling_cocoa.saving import save_cocoa
from tests.trainers.conftest import TEXT_CONFIG, VISION_CONFIG
from trainers import (
    CocoaContrastiveConfig,
    CocoaContrastiveTrainer,
    CocoaReconstructionConfig,
    CocoaReconstructionTrainer,
)
from trainers.recipes.from_scratch import build_model


@pytest.fixture
def trainer(tmp_path, model, processor, emoji):
    args = CocoaReconstructionConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", check_data=False, disable_tqdm=True
    )
    return CocoaReconstructionTrainer(model, args, train_dataset=emoji, processing_class=processor)


def test_weights_saved_in_parts_are_refused(trainer, monkeypatch):
    trainer.is_fsdp_enabled = True
    whole = {"state_dict_type": StateDictType.FULL_STATE_DICT, "cpu_ram_efficient_loading": False}
    for change, message in (
        ({}, None),
        ({"state_dict_type": StateDictType.SHARDED_STATE_DICT}, "must be FULL_STATE_DICT, not SHARDED.*fsdp2.yaml"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading must be false"),
    ):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**whole, **change}))
        monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            trainer.check_sharding()


def test_a_model_that_was_not_put_together_is_not_saved(trainer, tmp_path):
    """transformers only warns, and would leave a checkpoint without weights."""
    trainer.save_model(str(tmp_path / "whole"))
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save"):
        trainer._save(str(tmp_path / "parts"), state_dict={})
    assert (tmp_path / "whole" / "modules.json").exists() and not (tmp_path / "parts").exists()


@pytest.mark.parametrize("kind", ["reconstruction", "contrastive"])
def test_several_gpus_of_one_process_are_refused(tmp_path, model, processor, emoji, monkeypatch, kind):
    config, trainer, columns = {
        "reconstruction": (CocoaReconstructionConfig, CocoaReconstructionTrainer, {}),
        "contrastive": (CocoaContrastiveConfig, CocoaContrastiveTrainer, {"text": "query", "image": "positive"}),
    }[kind]
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", check_data=False)
    with pytest.raises(ValueError, match="2 GPUs are in sight of one process: .* `accelerate launch`"):
        trainer(model, args, train_dataset=emoji.rename_columns(columns), processing_class=processor)


@pytest.mark.parametrize(("saved", "asked", "expected"), [(128, None, 128), (32768, None, 1280), (128, 512, 512)])
def test_the_longest_input_is_the_checkpoint_s_where_none_is_asked_for(tmp_path, processor, saved, asked, expected):
    processor = copy.deepcopy(processor)
    processor.tokenizer.model_max_length = saved
    processor.save_pretrained(tmp_path / "saved")
    args = CocoaReconstructionConfig(output_dir=str(tmp_path), use_cpu=True, max_length=asked)
    assert args.load_processor(tmp_path / "saved").max_length == expected


@pytest.mark.parametrize("first", ["warmup", "bridge", "contrastive"])
def test_the_eos_is_the_processor_s_from_the_first_stage_on(tmp_path, processor, emoji, first):
    """A base checkpoint's configuration names <|endoftext|>, and inputs are closed with <|im_end|>."""
    other = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model = build_model(processor, TEXT_CONFIG, VISION_CONFIG)
    config = copy.deepcopy(model.config)
    config.text_config.eos_token_id, config.cocoa = other, None
    model = type(model)(config)
    assert model.cocoa.eos_token_id == other != processor.eos_token_id
    with pytest.raises(ValueError, match="The processor closes inputs with"):
        save_cocoa(model, processor, tmp_path / "start")
    folder = tmp_path / "start"
    model.save_pretrained(folder)  # as a base checkpoint comes: its files side by side
    processor.save_pretrained(folder)
    pairs = emoji.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})
    options = {"use_cpu": True, "report_to": "none", "check_data": False, "max_steps": 1, "disable_tqdm": True}
    for stage in [first] if first == "contrastive" else [first, "contrastive"]:
        options.update(output_dir=str(tmp_path / stage), per_device_train_batch_size=4, save_strategy="no")
        if stage == "contrastive":
            trainer = CocoaContrastiveTrainer(str(folder), CocoaContrastiveConfig(**options), pairs)
        else:
            args = CocoaReconstructionConfig(stage=stage, **options)
            trainer = CocoaReconstructionTrainer(str(folder), args, train_dataset=pairs)
        trainer.train()
        folder = tmp_path / stage / "final"
        trainer.save_model(str(folder))
    assert CocoaTransformer(str(folder)).encode(["a cat"]).shape == (1, TEXT_CONFIG["hidden_size"])
    model.cocoa = replace(model.cocoa, mask_token_id=processor.mask_token_id)
    with pytest.raises(ValueError, match=f"trained with EOS token {other}, the processor has"):
        CocoaReconstructionTrainer(model, args if first != "contrastive" else None, processing_class=processor)


@pytest.mark.parametrize("config", [CocoaReconstructionConfig, CocoaContrastiveConfig])
@pytest.mark.parametrize(("before", "now"), [("raise", "error"), ("skip", "skip")])
def test_the_former_name_of_on_bad_row_warns_and_does_the_same(tmp_path, config, before, now):
    with pytest.warns(FutureWarning, match="on_bad_row") as warned:
        args = config(output_dir=str(tmp_path), use_cpu=True, on_bad_sample=before)
    assert args.on_bad_row == now and warned[0].filename == __file__
    assert replace(args, seed=1).on_bad_row == now
