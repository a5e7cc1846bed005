# SPDX-License-Identifier: Apache-2.0
"""What is known of how a model was trained, written into its folder by each stage and read by its card."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modeling_cocoa.files import atomic_write

RECORD_FILE = "training.json"
"""Beside a model's weights: its stages, first to last."""


@dataclass
class StageRecord:
    """
    One stage of training, as its run knows it; what was not measured is empty.

    Args:
        stage (`str`): `"warmup"`, `"bridge"` or `"contrastive"`.
        settings (`dict`): Fields of the stage's configuration that are not at their defaults.
        base_model (`str`, *optional*): Hub name of the model that it began with; of a folder's, its own record tells.
        base_revision (`str`, *optional*): Commit of it.
        datasets (`list[dict]`): Of each, `name`, and where known `rows`, `id` (on the Hub), `revision`, `license`.
        adapters (`dict`): Of LoRA and its kin: `type`, rank and what they are put into.
        trained_parameters (`int`): How many numbers were trained.
        steps (`int`), epochs (`float`): Made in all.
        processes (`int`): That trained together.
        device (`str`): Name of the GPU; `"CPU"` without one.
        seconds (`float`, *optional*): Of a run that was not interrupted.
        losses (`dict[str, float]`): As last logged.
        evaluation (`dict[str, float]`): As last measured on the evaluation data.
        emissions (`dict`): As codecarbon measured them: `emissions` (grams of CO2), `energy_consumed` (kWh), ...
        versions (`dict[str, str]`): Of the libraries.
    """

    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    base_revision: str | None = None
    datasets: list[dict[str, Any]] = field(default_factory=list)
    adapters: dict[str, Any] = field(default_factory=dict)
    trained_parameters: int = 0
    steps: int = 0
    epochs: float = 0.0
    processes: int = 1
    device: str = "CPU"
    seconds: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    emissions: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def read_records(folder: str | os.PathLike) -> list[StageRecord]:
    """
    The stages of a model, first to last; none where its folder does not tell.

    Args:
        folder (`str` or `os.PathLike`): Of the model.

    Raises:
        ValueError: the file is none that [`write_records`] wrote.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return []
    try:
        return [StageRecord(**stage) for stage in json.loads(path.read_text(encoding="utf-8"))["stages"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the stages of a training ({error}): remove it, or fix it.") from error


def write_records(folder: str | os.PathLike, records: list[StageRecord]) -> None:
    """
    Write the stages of a model into its folder, whole or not at all.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
        records (`list[StageRecord]`): First to last.
    """
    content = {"stages": [asdict(record) for record in records]}
    with atomic_write(Path(folder) / RECORD_FILE) as path:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
