# SPDX-License-Identifier: Apache-2.0
"""What a run knows of itself, for the record and the card of the model that it saves."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import CodeCarbonCallback

from evaluation.digests import installed_version
from hub_cards.card_data import FIELDS_FILE, PICTURE, CocoaModelCardData, is_written_by_user, write_card
from hub_cards.training_record import StageRecord, read_records, write_records

from .run_folder import (
    ADAPTERS,
    BASE_MODEL,
    DATA,
    MODEL,
    PROCESSOR,
    SETTINGS,
    UNRELATED,
    as_json,
    fingerprint_data,
    fingerprint_weights,
    run_settings,
)

logger = logging.getLogger(__name__)

LIBRARIES = ("cocoa-embed", "torch", "transformers", "sentence-transformers", "accelerate", "datasets", "peft")
ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
UNRELATED_TO_ADAPTERS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
"""Fields of an adapter's configuration that do not change what is trained."""


class RunRecord:
    """
    What a run began with, and what it adds.

    `backbone` is as it was loaded (its configuration says from where), `train_dataset` as the trainer was given it,
    `card_data` what the run does not know. `recipe_model` is what a recipe says of its model, where the run is of one;
    `teacher` and `teacher_weights` are the name of a teacher and a digest of its weights, where there is one.
    """

    def __init__(
        self, backbone: PreTrainedModel, train_dataset: Any, card_data: CocoaModelCardData | None = None
    ) -> None:
        self.card_data = card_data if card_data is not None else CocoaModelCardData()
        self.datasets = describe_datasets(train_dataset)
        self.recipe_model: Mapping[str, Any] | None = None
        self.teacher: str | None = None
        self.teacher_weights: str | None = None
        self._train_dataset = train_dataset
        self._base_fingerprint = fingerprint_weights(backbone)
        source = backbone.config.name_or_path
        folder = Path(source) if source and os.path.isdir(source) else None
        self.earlier = [] if folder is None else read_records(folder)
        picture = None if folder is None else folder / PICTURE
        self._picture = picture.read_bytes() if picture is not None and picture.is_file() else None
        self._base_model = source if source and folder is None else None
        self._base_revision = getattr(backbone.config, "_commit_hash", None) if self._base_model else None

    def started_with(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """What decides what the run trains: settings, data, base model, adapters."""
        args, processor = trainer.args, trainer.processor
        parts = self._train_dataset
        parts = parts.values() if isinstance(parts, Mapping) else [parts]
        settings = run_settings(args, streamed=any(isinstance(part, IterableDataset) for part in parts))
        size = processor.image_processor.size
        peft_configs = getattr(trainer.backbone, "peft_config", {})
        facts = {
            SETTINGS: {**settings, "processes": args.world_size, "teacher_weights": self.teacher_weights},
            PROCESSOR: {
                "max_length": processor.max_length,
                "min_pixels": size["shortest_edge"],
                "max_pixels": size["longest_edge"],
                "prompt": processor.prompt,
            },
            DATA: fingerprint_data(self._train_dataset),
            BASE_MODEL: {"weights": self._base_fingerprint},
            ADAPTERS: {},
        }
        for config in peft_configs.values():
            values = {name: value for name, value in config.to_dict().items() if name not in UNRELATED_TO_ADAPTERS}
            facts[ADAPTERS] = as_json(values)
        if self.recipe_model is not None:
            facts[MODEL] = as_json(self.recipe_model)
        return facts

    def complete_folder(self, folder: Path, target: Path, trainer: Trainer) -> None:
        """
        Write the record, the picture and the card into a folder that a model is saved to. What an author said or wrote
        in `target`, where the folder goes to, stays.
        """
        self.write_stages(folder, trainer)
        if trainer.picture is not None:
            content: bytes | None = trainer.picture.read_bytes()
        else:
            # Pre-training begins with heads of its own, which that of the stage before does not show.
            content = None if hasattr(trainer.args, "stage") else self._picture
        if content is not None:
            (folder / PICTURE).write_bytes(content)
        if (target / FIELDS_FILE).is_file():
            shutil.copyfile(target / FIELDS_FILE, folder / FIELDS_FILE)
        card = write_card(folder, self.card_data)
        if is_written_by_user(target / card.name):
            card.unlink()
            logger.warning(
                "%s was not written by this package, and stays as it is: what it says of the training may be old.",
                target / card.name,
            )

    def write_stages(self, folder: Path, trainer: Trainer) -> None:
        """Write the record of all stages into a folder."""
        write_records(folder, [*self.earlier, self.of_stage(trainer)])

    def of_stage(self, trainer: Trainer) -> StageRecord:
        """What the run knows of itself by now; see [`StageRecord`]."""
        args, state = trainer.args, trainer.state
        logs = state.log_history
        training = [entry for entry in logs if "loss" in entry]
        evaluations = [entry for entry in logs if any(name.startswith("eval_") for name in entry)]
        # Several evaluation sets have an entry each.
        evaluated = {
            name: value
            for entry in evaluations
            if entry["step"] == evaluations[-1]["step"]
            for name, value in entry.items()
        }
        whole = [entry["train_runtime"] for entry in logs if "train_runtime" in entry]
        seconds = whole[-1] if whole and not trainer.was_resumed else None
        return StageRecord(
            stage=getattr(args, "stage", "contrastive"),
            settings=changed_settings(args) | ({"teacher": self.teacher} if self.teacher else {}),
            base_model=self._base_model,
            base_revision=self._base_revision,
            datasets=self.datasets,
            adapters=describe_adapters(trainer.backbone),
            trained_parameters=count_trained(trainer.model),
            steps=state.global_step,
            epochs=float(state.epoch or 0.0),
            processes=args.world_size,
            device=torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type.upper(),
            seconds=seconds,
            losses=measures(training[-1]) if training else {},
            evaluation=measures(evaluated),
            emissions={} if seconds is None else measured_emissions(trainer),
            versions={name: number for name in LIBRARIES if (number := installed_version(name)) is not None},
        )


def describe_datasets(dataset: Any) -> list[dict[str, Any]]:
    """Names of datasets, and where known their rows, Hub name, commit and licence."""
    if dataset is None:
        return []
    named = dict(dataset) if isinstance(dataset, Mapping) else {None: dataset}
    found = []
    for name, rows in named.items():
        info = getattr(rows, "info", None)
        facts: dict[str, Any] = {"name": name or getattr(info, "dataset_name", None) or "training data"}
        if hasattr(rows, "__len__"):
            facts["rows"] = len(rows)
        if isinstance(rows, Dataset):
            (known,) = CocoaModelCardData().infer_datasets(DatasetDict({"": rows}))
            facts.update({key: known[key] for key in ("id", "revision") if key in known})
        if getattr(info, "license", None):
            facts["license"] = info.license
        found.append(facts)
    return found


def count_trained(model: nn.Module) -> int:
    """How many numbers train, also where DeepSpeed has shared them out."""
    return sum(getattr(value, "ds_numel", value.numel()) for value in model.parameters() if value.requires_grad)


def describe_adapters(backbone: nn.Module) -> dict[str, Any]:
    """Kind, rank and places of the adapters in a backbone; empty where there are none."""
    for config in getattr(backbone, "peft_config", {}).values():
        values = {name: getattr(config, name, None) for name in ADAPTER_SETTINGS}
        values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
        return {"type": str(config.peft_type.value), **{name: value for name, value in values.items() if value}}
    return {}


def changed_settings(args: TrainingArguments) -> dict[str, Any]:
    """Settings that are not at their defaults, and change what is trained; no paths."""
    found = {}
    for item in fields(args):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        value, default = (
            part.value if isinstance(part, Enum) else part for part in (getattr(args, item.name), default)
        )
        if item.name.startswith((*UNRELATED, "stage")) or value == default or not (value or default):
            continue
        if isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value)):
            continue
        found[item.name] = value
    return json.loads(json.dumps(found, default=str))


def measures(entry: Mapping[str, Any]) -> dict[str, float]:
    """The measures in an entry of a trainer's log, by their names without `eval_`."""
    other = (
        "learning_rate", "grad_norm", "epoch", "step", "runtime", "samples_per_second", "steps_per_second",
        "model_preparation_time",
    )  # fmt: skip
    named = {name.removeprefix("eval_"): value for name, value in entry.items()}
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, (int, float)) and not name.endswith(other)
    }


def measured_emissions(trainer: Trainer) -> dict[str, Any]:
    """What codecarbon measured; empty where it did not run."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CodeCarbonCallback) and callback.tracker is not None:
            data = CocoaModelCardData()
            data.code_carbon_callback = callback
            return data.get_codecarbon_data()["co2_eq_emissions"]
    return {}
