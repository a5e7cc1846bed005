# SPDX-License-Identifier: Apache-2.0
"""Stages 1 and 2 on real rows: they learn, they resume bit for bit, and they say what is wrong."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import BitsAndBytesConfig

from modeling_cocoa.attention import SOURCE, TARGET
from modeling_cocoa.auto import load_backbone
from modeling_cocoa.losses import normalize_patches
from modeling_cocoa.reconstruction import HEADS_FILE, CocoaForReconstruction
from modeling_cocoa.saving import save_cocoa
from trainers.adapters import PARTS, part_of
from trainers.data.collators import DIRECTIONS, model_arguments
from trainers.reconstruction_config import CocoaReconstructionConfig
from trainers.reconstruction_trainer import CocoaReconstructionTrainer


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "max_steps": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 2,
        "check_data": False,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
    }
    return CocoaReconstructionConfig(output_dir=str(folder), **{**defaults, **options})


def trainer_of(model, processor, dataset, folder, peft_config=None, **options):
    return CocoaReconstructionTrainer(
        model,
        arguments(folder, **options),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def best_constant_losses(batch):
    """The losses of the best prediction that does not look at its input: token frequencies, and the mean unit."""
    labels = batch["labels"]
    segments = batch["segment_ids"]
    losses = {}
    for name, segment in (("text_source", SOURCE), ("text_target", TARGET)):
        chosen = labels[(labels != -100) & (segments == segment)]
        if len(chosen):
            share = torch.bincount(chosen).float() / len(chosen)
            losses[name] = float(-(share[chosen]).log().mean())
    if "unit_mask" in batch and batch["unit_mask"].any():
        patches = batch["pixel_labels"].view(-1, 4, batch["pixel_labels"].shape[1])[batch["unit_mask"]]
        units = normalize_patches(patches)
        losses["image"] = float(((units - units.mean(0)) ** 2).mean())
    return losses


def losses_of(model, batch):
    with torch.no_grad():
        return {name: float(value) for name, value in model.eval()(**model_arguments(batch)).losses.items()}


ALL = dict.fromkeys(DIRECTIONS, 1.0)
STAGES = [
    ("warmup", "layerwise", 400, {}),
    ("bridge", "layerwise", 300, {}),
    *(
        pytest.param("bridge", *stage, marks=pytest.mark.slow)
        for stage in (
            ("layerwise", 600, {"direction_weights": ALL, "source_mask_ratio": 0.15, "eos_sees_target": False}),
            ("embedding", 600, {"direction_weights": ALL, "source_mask_ratio": 0.15}),
        )
    ),
]


@pytest.mark.parametrize(("stage", "bridge", "steps", "options"), STAGES)
def test_each_stage_learns_64_rows_beyond_any_constant(
    tmp_path, model, processor, emoji, stage, bridge, steps, options
):
    """And in the bridge, another row's EOS in front of a target makes its losses worse."""
    trainer = trainer_of(
        model,
        processor,
        emoji,
        tmp_path,
        stage=stage,
        bridge=bridge,
        max_steps=steps,
        image_loss_weight=1.0,
        logging_steps=10,
        **options,
    )
    trainer.train()
    collator = trainer.data_collator
    rows = [{**emoji[index], "index": index, "seed": (3, 0, index)} for index in range(64)]
    examples = [collator.example(row) for row in rows]
    batch = collator.collate(examples)
    trained, constant = losses_of(trainer.model, batch), best_constant_losses(batch)
    assert set(trained) == set(constant)
    for name, loss in trained.items():
        assert loss < constant[name], (name, trained, constant)
    if stage == "bridge":
        by_direction = {}
        for index, example in enumerate(examples):
            by_direction.setdefault(example.direction, []).append(index)
        for members in by_direction.values():
            for here, there in zip(members, members[1:] + members[:1], strict=True):
                examples[here] = type(examples[here])(
                    examples[here].direction, collator.example(rows[there]).source, examples[here].target
                )
        swapped = losses_of(trainer.model, collator.collate(examples))
        assert swapped["text_target"] > trained["text_target"] + 0.02, (swapped, trained)
        assert "image" not in trained or swapped["image"] > trained["image"], (swapped, trained)
        for kind, least in (("text", 0.02), ("image", 0.0)):
            if kind == "image" and "image" not in trained:
                continue
            name = f"eos_information_{kind}"
            logged = [entry[name] for entry in trainer.state.log_history if name in entry]
            assert abs(logged[0]) < 0.01 and np.mean(logged[-10:]) > least, (logged[0], np.mean(logged[-10:]))


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, model, processor, emoji, stage, stop_at):
    """16 of 64 rows a step: step 4 ends an epoch, step 2 is in the middle of one."""
    options = {"stage": stage, "max_steps": 7, "save_strategy": "steps", "save_steps": stop_at}
    whole = trainer_of(copy.deepcopy(model), processor, emoji, tmp_path / "whole", **options)
    whole.train()

    class Killed(Exception):
        pass

    first = trainer_of(copy.deepcopy(model), processor, emoji, tmp_path / "killed", **options)
    step = first.training_step

    def killed_later(*args, **kwargs):
        if first.state.global_step == stop_at + 1:
            raise Killed
        return step(*args, **kwargs)

    first.training_step = killed_later
    with pytest.raises(Killed):
        first.train()
    # A checkpoint that was cut off while it was written is passed over.
    (tmp_path / "killed" / f"checkpoint-{stop_at + 1}").mkdir()
    second = trainer_of(copy.deepcopy(model), processor, emoji, tmp_path / "killed", **options)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.zero_()
    second.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 0.6}])
def test_a_run_that_had_ended_makes_no_further_step(tmp_path, model, processor, emoji, length):
    """In the middle of an epoch, and with a learning rate that would show in the weights."""
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant", **length}
    whole = trainer_of(copy.deepcopy(model), processor, emoji, tmp_path, **options)
    whole.train()
    assert whole.state.global_step == 3
    again = trainer_of(copy.deepcopy(model), processor, emoji, tmp_path, **options)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    longer = trainer_of(copy.deepcopy(model), processor, emoji, tmp_path, **{**options, "max_steps": 5})
    assert longer.train(resume_from_checkpoint=True).global_step == 5


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path, model, processor, emoji):
    def weights(seed):
        trainer = trainer_of(copy.deepcopy(model), processor, emoji, tmp_path, seed=seed, max_steps=2)
        trainer.train()
        return (
            trainer.model.unit_mask_embedding.detach().clone(),
            trainer.model.model.language_model.norm.weight.clone(),
        )

    first, second, third = weights(1), weights(1), weights(2)
    assert torch.equal(first[1], second[1]) and torch.equal(first[0], second[0])
    assert not torch.equal(first[1], third[1])


def test_a_saved_stage_loads_in_every_way(tmp_path, model, processor, emoji):
    trainer = trainer_of(model, processor, emoji, tmp_path / "run", stage="warmup")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    files = {path.name for path in (tmp_path / "final").rglob("*") if path.is_file()}
    assert HEADS_FILE in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    again = CocoaForReconstruction.from_pretrained(tmp_path / "final")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    vectors = SentenceTransformer(str(tmp_path / "final"), device="cpu").encode([emoji[0]["text"]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1.0, rtol=1e-5)
    # The next stage starts from the folder, by name.
    following = CocoaReconstructionTrainer(
        str(tmp_path / "final"), arguments(tmp_path / "next", stage="bridge", max_steps=1), train_dataset=emoji
    )
    assert following.model.model.cocoa.mask_token_id == processor.mask_token_id
    following.train()


def test_losses_are_logged_and_evaluated_by_name(tmp_path, model, processor, emoji):
    trainer = CocoaReconstructionTrainer(
        model,
        arguments(tmp_path, stage="bridge", eval_strategy="steps", eval_steps=4, direction_weights=ALL),
        train_dataset=emoji,
        eval_dataset=emoji.select(range(8)),
        processing_class=processor,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    by_name = {"loss_text_target", "loss_image", "token_accuracy", "eos_information_text", "eos_information_image"}
    by_direction = {"text_image_to_text", "token_accuracy_image_to_text", "pixel_text_to_image"}
    assert logs and all(by_name | by_direction <= set(entry) for entry in logs)
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in {"loss", *by_name}} <= set(metrics)
    assert metrics == pytest.approx(
        {**trainer.evaluate(), **{k: metrics[k] for k in metrics if "runtime" in k or "per_second" in k}}
    ), "evaluation masks are always the same"
    names = sorted(path.name for path in (tmp_path / "reconstructions").iterdir())
    assert names == ["step-4.png", "step-4.txt"]
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "reconstruction.png").read_bytes() == (
        tmp_path / "reconstructions" / "step-4.png"
    ).read_bytes()
    assert "reconstruction.png" in (tmp_path / "final" / "README.md").read_text()


def test_lora_trains_adapters_and_heads_and_saves_plain_weights(tmp_path, model, processor, emoji):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"stage": "warmup", "save_strategy": "steps", "save_steps": 2}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def lora_trainer():
        torch.manual_seed(11)
        return CocoaReconstructionTrainer(
            copy.deepcopy(model),
            arguments(tmp_path, **options),
            train_dataset=emoji,
            processing_class=processor,
            peft_config=config,
        )

    trainer = lora_trainer()
    trainer.train()
    base = {n.replace(".base_layer", ""): p for n, p in trainer.model.model.named_parameters() if "lora_" not in n}
    for name, value in base.items():
        assert torch.equal(value, before[name]), f"{name} is frozen"
    trainer.save_model(str(tmp_path / "final"))
    merged = load_backbone(tmp_path / "final").eval()
    inputs = processor([emoji[0]["image"], emoji[1]["text"]])
    kept = {name: value for name, value in inputs.items() if not name.startswith("num_")}
    with torch.no_grad():
        expected = trainer.model.model.eval()(**kept).pooler_output
        torch.testing.assert_close(merged(**kept).pooler_output, expected, atol=1e-5, rtol=0)
    resumed = lora_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_mask_ratio": 0.0}, r"text_mask_ratio must be in \(0, 1\]; got 0.0"),
        ({"target_mask_ratio": 2.0}, r"target_mask_ratio must be in \(0, 1\]"),
        ({"stage": "contrastive"}, "stage must be one of"),
        ({"bridge": "none"}, "bridge must be one of"),
        ({"image_loss_weight": -1.0}, "image_loss_weight must be 0 or more"),
        ({"on_bad_row": "drop"}, "on_bad_row must be one of"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_wrong_columns_are_named(tmp_path, model, processor):
    dataset = Dataset.from_dict({"caption": ["a"]})
    with pytest.raises(ValueError, match=r"'image', 'images', 'text', .*\['caption'\]"):
        trainer_of(model, processor, dataset, tmp_path)


@pytest.mark.parametrize("kind", [Image(), Image(decode=False)], ids=["decoded", "raw"])
def test_bad_rows_stop_before_the_first_step_or_are_left_out_and_counted(tmp_path, model, processor, emoji, kind):
    corrupt = {"bytes": b"not a picture", "path": None}
    features = Features({"image": kind, "text": Value("string")})
    rows = {"image": [None, corrupt, None, None], "text": ["one", "two", "  ", "four"]}
    dataset = Dataset.from_dict(rows, features=features)
    with pytest.raises(ValueError, match="Row 1 of the training data .*: .*image cannot be read.*on_bad_row"):
        trainer_of(model, processor, dataset, tmp_path, check_data=True)
    skipping = {"on_bad_row": "skip", "per_device_train_batch_size": 4, "logging_steps": 1}
    trainer = trainer_of(model, processor, dataset, tmp_path, **skipping)
    trainer.train()
    assert [entry["skipped_rows"] for entry in trainer.state.log_history if "loss" in entry] == [2.0] * 4
    trainer = trainer_of(model, processor, dataset, tmp_path, check_data=True, **skipping)
    assert trainer.train_dataset.kept[""].tolist() == [0, 3] and trainer.train_dataset[1]["text"] == "four"
    trainer.train()
    assert [entry["skipped_rows"] for entry in trainer.state.log_history if "loss" in entry] == [0.0] * 4


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_corrupt_picture_is_found_whatever_direction_is_drawn(tmp_path, model, processor, on_bad_row):
    dataset = Dataset.from_dict(
        {"image": [{"bytes": b"not a picture", "path": None}], "text": ["one"]},
        features=Features({"image": Image(), "text": Value("string")}),
    )
    with pytest.raises(ValueError, match="Row 0 of the training data .*: the image cannot be read"):
        trainer_of(
            model, processor, dataset, tmp_path, check_data=True, on_bad_row=on_bad_row, stage="bridge",
            direction_weights={"text_to_text": 1.0},
        )  # fmt: skip


def test_a_model_in_memory_needs_its_processor(tmp_path, model, emoji):
    with pytest.raises(ValueError, match="processing_class"):
        CocoaReconstructionTrainer(model, arguments(tmp_path), train_dataset=emoji)


def test_a_folder_that_is_not_qwen2_vl_is_refused(tmp_path, emoji):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        CocoaReconstructionTrainer(str(tmp_path), arguments(tmp_path / "run"), train_dataset=emoji)


def test_a_loss_is_finite_for_a_picture_of_one_colour(tmp_path, model, processor):
    from PIL import Image as PIL

    dataset = Dataset.from_dict({"image": [PIL.new("RGB", (64, 64), "red")] * 2, "text": ["red"] * 2})
    trainer = trainer_of(model, processor, dataset, tmp_path, max_steps=2, per_device_train_batch_size=2)
    assert math.isfinite(trainer.train().training_loss)


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path, model, processor, emoji):
    """With the rows' numbers, and the last checkpoint as it was."""
    trainer = trainer_of(
        model, processor, emoji, tmp_path, save_strategy="steps", save_steps=1, per_device_train_batch_size=4
    )
    forward = trainer.model.forward

    def breaks(*args, **kwargs):
        output = forward(*args, **kwargs)
        if trainer.state.global_step == 2:
            output.loss = output.loss * float("nan")
        return output

    trainer.model.forward = breaks
    with pytest.raises(FloatingPointError, match=r"nan at step 3, of the rows \[\d+, \d+, \d+, \d+\].*checkpoint-2"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    kept = CocoaForReconstruction.from_pretrained(tmp_path / "checkpoint-2")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    assert not (tmp_path / "checkpoint-3").exists()


MERGED_THROUGH = {"stock": {}, "remote code": {"trust_remote_code": True}}


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        (r"language_model\..*\.(q_proj|down_proj)", ["language_model"]),
        (r"visual\.blocks\..*\.(qkv|fc1)", ["visual"]),
        ("all-linear", ["language_model", "visual"]),
    ],
)
def test_adapters_of_named_parts_merge_to_the_same_vectors_through_both_loaders(
    tmp_path, model, processor, emoji, targets, trained
):
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    trainer = CocoaReconstructionTrainer(
        model, arguments(tmp_path, stage="bridge"), train_dataset=emoji, processing_class=processor, peft_config=config
    )
    adapted = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert sorted(adapted) == trained
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    items = [emoji[0]["text"], {"text": emoji[2]["text"], "image": emoji[2]["image"]}, emoji[1]["image"]]
    inputs = {name: value for name, value in processor(items).items() if not name.startswith("num_")}
    with torch.no_grad():
        unmerged = trainer.model.model.eval()(**inputs).pooler_output.numpy()
    for loader, options in MERGED_THROUGH.items():
        merged = SentenceTransformer(str(tmp_path / "final"), device="cpu", **options).encode(items)
        np.testing.assert_allclose(merged, unmerged, atol=1e-5, err_msg=loader)


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("frozen", [["vision_tower"], ["vision_tower", "merger"], ["language_model"]])
def test_frozen_parts_stay_as_they_are(tmp_path, model, processor, emoji, frozen, peft):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if peft else None
    trainer = CocoaReconstructionTrainer(
        model, arguments(tmp_path, stage="bridge", freeze_parts=frozen, learning_rate=1e-2), train_dataset=emoji,
        processing_class=processor, peft_config=config,
    )  # fmt: skip
    assert not any("lora_" in name and part_of(name) in frozen for name, _ in model.named_parameters())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    after = load_backbone(tmp_path / "final").state_dict()
    changed = {part_of(name) for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == set(PARTS) - set(frozen)


def test_excluded_modules_have_no_adapters_beside_frozen_parts(tmp_path, model, processor, emoji):
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=r".*_proj")
    trainer_of(model, processor, emoji, tmp_path, peft_config=config, freeze_parts=["vision_tower"])
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == {"visual.merger.mlp.0", "visual.merger.mlp.2"}


def test_nothing_left_to_train_is_said(tmp_path, model, processor, emoji):
    with pytest.raises(ValueError, match="Nothing of the backbone is left to train"):
        trainer_of(model, processor, emoji, tmp_path, freeze_parts=list(PARTS))
    with pytest.raises(ValueError, match="freeze_parts must be of .*'tower'"):
        arguments(tmp_path, freeze_parts=["tower"])


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_over_quantized_weights_train_and_merge_to_plain_ones(tmp_path, model, processor, emoji, bits):
    """QLoRA: the saved folder holds numbers again, and its vectors are those of the quantized model."""
    pytest.importorskip("bitsandbytes")
    save_cocoa(model, processor, tmp_path / "start")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    quantized = CocoaForReconstruction.from_pretrained(
        tmp_path / "start", dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
    )
    layers = {type(module).__name__ for module in quantized.model.modules() if isinstance(module, torch.nn.Linear)}
    assert layers == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    config = LoraConfig(r=4, target_modules=r"language_model\..*\.(q_proj|down_proj)", init_lora_weights=False)
    trainer = trainer_of(quantized, processor, emoji, tmp_path, stage="bridge", peft_config=config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    items = [emoji[0]["text"], emoji[1]["image"]]
    inputs = {name: value for name, value in processor(items).items() if not name.startswith("num_")}
    with torch.no_grad():
        expected = trainer.model.model.eval()(**inputs).pooler_output.numpy()
    tolerance = 1e-5 if bits == 4 else 1e-2  # in 8 bits the activations are rounded as well
    for loader, options in MERGED_THROUGH.items():
        found = SentenceTransformer(str(tmp_path / "final"), device="cpu", **options).encode(items)
        np.testing.assert_allclose(found, expected, atol=tolerance, err_msg=loader)


@pytest.mark.parametrize(
    ("stage", "bridge"), [("warmup", "layerwise"), ("bridge", "layerwise"), ("bridge", "embedding")]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_adapters_and_heads_of_a_half_precision_base_train_in_float32(
    tmp_path, model, processor, emoji, stage, bridge, attention
):
    """In bfloat16 a step of 1e-4 leaves a norm of ones as it is."""
    model.to(torch.bfloat16).set_attn_implementation({"text_config": attention})
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options = {"stage": stage, "bridge": bridge, "learning_rate": 1e-4, "max_steps": 3, "warmup_steps": 0}
    options["direction_weights"] = ALL
    trainer = trainer_of(model, processor, emoji, tmp_path, peft_config=config, **options)
    trained = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert trainer.model.model.dtype == torch.bfloat16
    trainer.train()
    now = dict(trainer.model.named_parameters())
    moved = {name for name, value in trained.items() if not torch.equal(now[name], value)}
    assert "image_decoder.norm.weight" in moved and any("lora_B" in name for name in moved)
    trainer.save_model(str(tmp_path / "final"))
    assert SentenceTransformer(str(tmp_path / "final"), device="cpu").encode(["a"]).shape == (1, 64)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["norm"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": {"embed_tokens": [0]}},
    ],
    ids=str,
)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, model, processor, emoji, options):
    config = LoraConfig(r=4, target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=f"asks for .*{next(iter(options))}.*cannot be merged"):
        trainer_of(model, processor, emoji, tmp_path, peft_config=config)


def test_a_batch_in_which_nothing_trains_is_no_error(tmp_path, model, processor):
    """Texts alone, with the language model frozen."""
    texts = Dataset.from_dict({"text": ["a face with tears of joy", "a cat that smiles"]})
    options = {"stage": "warmup", "freeze_parts": ["language_model"], "max_steps": 1, "per_device_train_batch_size": 2}
    trainer_of(model, processor, texts, tmp_path, **options).train()


def test_a_folder_is_a_model_only_when_its_heads_are_there(tmp_path, model, processor, emoji, monkeypatch):
    trainer = trainer_of(model, processor, emoji, tmp_path, stage="warmup")
    replace = os.replace

    def killed(source, target):
        if Path(target) == tmp_path / "final":
            assert (Path(source) / HEADS_FILE).is_file()
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()
