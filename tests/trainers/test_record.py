# SPDX-License-Identifier: Apache-2.0
"""A model's folder tells how it was trained, through all of its stages, and its card says so."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import PrinterCallback
from transformers.integrations import CodeCarbonCallback

from hub_cards import CocoaModelCardData
from hub_cards.training_record import RECORD_FILE, read_records, write_records
from tests.trainers.conftest import ROOT
from trainers import (
    CocoaContrastiveConfig,
    CocoaContrastiveTrainer,
    CocoaReconstructionConfig,
    CocoaReconstructionTrainer,
)
from trainers.record import measured_emissions

COMMON = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "logging_steps": 1}


@pytest.fixture
def trained(tmp_path, emoji):
    """A folder of a model that went through the bridge and the contrastive stage."""
    tiny = ROOT / "checkpoints" / "cocoa-tiny"
    start = str(shutil.copytree(tiny, tmp_path / "start", ignore=shutil.ignore_patterns("training.json")))
    args = CocoaReconstructionConfig(
        str(tmp_path / "bridge"), stage="bridge", per_device_train_batch_size=4, learning_rate=3e-4,
        direction_weights={"text_to_image": 1}, **COMMON,
    )  # fmt: skip
    data = emoji.select_columns(["image", "text"])
    bridge = CocoaReconstructionTrainer(start, args, train_dataset={"noto": data}, eval_dataset=data.select(range(4)))
    bridge.train()
    bridge.evaluate()
    bridge.save_model(str(tmp_path / "bridge" / "final"))
    args = CocoaContrastiveConfig(
        str(tmp_path / "contrastive"), per_device_train_batch_size=4, temperature=0.05, **COMMON
    )
    pairs = emoji.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})
    contrastive = CocoaContrastiveTrainer(
        str(tmp_path / "bridge" / "final"),
        args,
        train_dataset=pairs,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        card_data=CocoaModelCardData(license="apache-2.0", language="en", model_name="Birds", notes="Only birds."),
    )
    contrastive.train()
    contrastive.evaluate({"few": pairs.select(range(4)), "more": pairs.select(range(8))})
    contrastive.save_model(str(tmp_path / "final"))
    return tmp_path / "final"


def test_a_card_tells_all_stages_as_they_ran(trained, emoji):
    bridge, contrastive = read_records(trained)
    assert (bridge.stage, bridge.steps, bridge.processes, bridge.device) == ("bridge", 2, 1, "CPU")
    changed = {"learning_rate": 3e-4, "max_steps": 2, "per_device_train_batch_size": 4}
    changed["direction_weights"] = {"text_to_image": 1.0}
    assert bridge.settings == {**changed, "eos_sees_target": True}
    assert bridge.adapters == {}
    assert bridge.datasets == [{"name": "noto", "rows": len(emoji)}] and bridge.seconds > 0
    assert {"loss", "loss_image"} <= set(bridge.losses) and {"loss", "loss_image"} <= set(bridge.evaluation)
    assert contrastive.settings["temperature"] == 0.05 and contrastive.adapters["r"] == 4
    assert {"few_loss", "more_loss"} <= set(contrastive.evaluation), "of each evaluation set"
    assert not any("preparation_time" in name for name in contrastive.evaluation)
    assert contrastive.adapters["target_modules"] == ["q_proj", "v_proj"]
    assert 0 < contrastive.trained_parameters < bridge.trained_parameters
    assert bridge.base_model is None, "a folder is no name that others could load"
    card = ModelCard.load(trained / "README.md")
    assert card.data.license == "apache-2.0" and card.data.language == ["en"]
    assert card.text.count("Only birds.") == 1 and "# Birds" in card.text
    assert "|  | EOS bridge | contrastive |" in card.text and "| `temperature` |  | `0.05` |" in card.text
    assert f"noto ({len(emoji)} rows)" in card.text and "No evaluation is recorded" in card.text
    assert (trained / "reconstruction.png").is_file() and "](reconstruction.png)" in card.text
    assert str(trained.parent) not in card.content + (trained / RECORD_FILE).read_text()


def test_the_time_of_a_run_that_was_resumed_is_not_known(tmp_path, emoji):
    start = str(ROOT / "checkpoints" / "cocoa-tiny")
    data = emoji.select_columns(["image", "text"])
    for resume in (None, True):
        args = CocoaReconstructionConfig(
            str(tmp_path), stage="warmup", per_device_train_batch_size=4, save_steps=1, **COMMON | {"max_steps": 1}
        )
        args.max_steps = 1 if resume is None else 2
        trainer = CocoaReconstructionTrainer(start, args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(tmp_path / "final"))
    *_, record = read_records(tmp_path / "final")
    assert record.steps == 2 and record.seconds is None


def test_a_save_keeps_what_an_author_wrote_there(tmp_path, emoji, caplog):
    args = CocoaReconstructionConfig(str(tmp_path / "run"), stage="warmup", per_device_train_batch_size=4, **COMMON)
    trainer = CocoaReconstructionTrainer(
        str(ROOT / "checkpoints" / "cocoa-tiny"),
        args,
        train_dataset=emoji.select_columns(["image", "text"]),
        card_data=CocoaModelCardData(language="en"),
    )
    folder = tmp_path / "final"
    trainer.save_model(str(folder))
    (folder / "card.yaml").write_text("license: mit\n")
    trainer.save_model(str(folder))
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.language in ("en", ["en"])
    assert "license: mit" in (folder / "card.yaml").read_text()
    (folder / "README.md").write_text("# My own words\n")
    trainer.save_model(str(folder))
    assert (folder / "README.md").read_text() == "# My own words\n"
    assert "README.md was not written by this package, and stays as it is" in caplog.text


def test_a_record_that_is_none_is_named(tmp_path):
    assert read_records(tmp_path) == []
    for content in ("no JSON", json.dumps({"stages": [{"step": 3}]}), json.dumps([])):
        (tmp_path / RECORD_FILE).write_text(content)
        with pytest.raises(ValueError, match="does not hold the stages of a training"):
            read_records(tmp_path)
    write_records(tmp_path, [])
    assert read_records(tmp_path) == []


def test_emissions_are_what_codecarbon_measured():
    measured = {
        "emissions": 0.012,
        "energy_consumed": 0.03,
        "on_cloud": "N",
        "cpu_model": "a CPU",
        "ram_total_size": 24.0,
        "gpu_model": None,
    }
    callback = CodeCarbonCallback.__new__(CodeCarbonCallback)  # whose own way to begin asks for the package
    callback.tracker = None
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[PrinterCallback(), callback]))
    assert measured_emissions(trainer) == {}
    callback.tracker = SimpleNamespace(_prepare_emissions_data=lambda: SimpleNamespace(**measured))
    found = measured_emissions(trainer)
    assert (found["emissions"], found["energy_consumed"], found["source"]) == (12.0, 0.03, "codecarbon")


def test_a_new_stage_does_not_show_the_picture_of_its_base(tmp_path, emoji):
    """New heads rebuild otherwise; contrastive training, which rebuilds nothing, keeps the picture."""
    start = shutil.copytree(ROOT / "checkpoints" / "cocoa-tiny", tmp_path / "start")
    emoji[0]["image"].save(start / "reconstruction.png")
    data = emoji.select_columns(["image", "text"])
    options = {**COMMON, "max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    for stage in ("warmup", "bridge"):
        args = CocoaReconstructionConfig(str(tmp_path / stage), stage=stage, **options)
        trainer = CocoaReconstructionTrainer(str(start), args, train_dataset=data)
        trainer.train()
        trainer.save_model(str(tmp_path / stage / "final"))
        assert not (tmp_path / stage / "final" / "reconstruction.png").exists()
        assert "## Reconstructions" not in (tmp_path / stage / "final" / "README.md").read_text()
    pairs = data.rename_columns({"text": "query", "image": "positive"}).select_columns(["query", "positive"])
    trainer = CocoaContrastiveTrainer(
        str(start), CocoaContrastiveConfig(str(tmp_path / "contrastive"), **options), train_dataset=pairs
    )
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "reconstruction.png").read_bytes() == (start / "reconstruction.png").read_bytes()
