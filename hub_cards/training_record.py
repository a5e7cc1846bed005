# SPDX-License-Identifier: Apache-2.0
"""How a model was trained: each stage adds a record to the model's folder, and the card reads them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modeling_cocoa.files import atomic_write

RECORD_FILE = "training.json"
"""In a model's folder: its stages, first to last."""


@dataclass
class StageRecord:
    """
    One stage of training, as its run recorded it; what was not measured is empty.

    Args:
        stage (`str`): `"warmup"`, `"bridge"` or `"contrastive"`.
        settings (`dict`): Fields of the stage's configuration that are not at their defaults.
        base_model (`str`, *optional*): Hub name of the model that it started from; a folder has its own record.
        base_revision (`str`, *optional*): Commit of the base model.
        datasets (`list[dict]`): The `name` of each, and where known `rows`, `id` (on the Hub), `revision`, `license`.
        adapters (`dict`): `type`, rank and target modules of adapters such as LoRA.
        trained_parameters (`int`), steps (`int`), epochs (`float`), processes (`int`): Totals of the run.
        device (`str`): Name of the GPU; `"CPU"` without one.
        seconds (`float`, *optional*): Training time of a run that was not interrupted.
        losses (`dict[str, float]`): As last logged.
        evaluation (`dict[str, float]`): As last measured on the evaluation data.
        emissions (`dict`): From codecarbon: `emissions` (grams of CO2), `energy_consumed` (kWh), ...
        versions (`dict[str, str]`): Versions of the libraries.
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
    The stages of the model in `folder`, first to last; empty without a record.

    Raises:
        ValueError: the file was not written by [`write_records`].
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return []
    try:
        return [StageRecord(**stage) for stage in json.loads(path.read_text(encoding="utf-8"))["stages"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the stages of a training ({error}): remove it, or fix it.") from error


def write_records(folder: str | os.PathLike, records: list[StageRecord]) -> None:
    """Write the stages of the model in `folder`, first to last, atomically."""
    content = {"stages": [asdict(record) for record in records]}
    with atomic_write(Path(folder) / RECORD_FILE) as path:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
