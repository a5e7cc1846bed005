# SPDX-License-Identifier: Apache-2.0
"""What the output folder of a run tells: who trains in it, and with which settings, data and model the run began."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from modeling_cocoa.files import atomic_write

from .data.rows import undecoded

try:
    import fcntl
except ImportError:  # Windows, where only runs of one process are kept apart
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

RUN_FILE = ".run.json"
"""In a run's output folder: what it was started with."""
LOCK_FILE = ".lock"
"""In a run's output folder: locked while it trains."""
LENGTHS = ("max_steps", "num_train_epochs")
"""Settings by which a run may be made longer when it goes on."""
UNRELATED = (
    "accelerator_config",
    "check_data",
    "dataloader_",
    "deepspeed",
    "disable_tqdm",
    "do_",
    "eval_",
    "evaluate_",
    "fsdp",
    "greater_is_better",
    "hub_",
    "include_",
    "log_",
    "logging_",
    "output_dir",
    "per_device_eval_",
    "prediction_loss_only",
    "project",
    "push_to_hub",
    "remove_unused_columns",
    "report_to",
    "restore_callback_states",
    "run_name",
    "save_",
    "trackio",
    "use_cpu",
)
"""Beginnings of the names of settings that say nothing of the training itself: in no record of it."""
MAY_CHANGE = (
    *UNRELATED,
    "activation_checkpointing",
    "batch_eval_metrics",
    "bf16_full_eval",
    "ddp_",
    "debug",
    "early_stopping_patience",
    "enable_jit_checkpoint",
    "fp16_full_eval",
    "gradient_checkpointing",
    "ignore_data_skip",
    "load_best_model_at_end",
    "local_rank",
    "metric_for_best_model",
    "mini_batch_",
    "on_bad_",
    "parallelism_config",
    "resume_from_checkpoint",
    "skip_memory_metrics",
    "torch_compile",
    "torch_empty_cache_steps",
)
"""Beginnings of the names of settings that change time, memory, logs, evaluations or saves: not what is trained."""
SETTINGS, PROCESSOR, DATA, BASE_MODEL, ADAPTERS, MODEL = (
    "settings",
    "processor",
    "data",
    "base model",
    "adapters",
    "model",
)
"""Sections of what a run was started with; the last one of a recipe's run."""
READ_ROWS = 4096
"""Rows of a dataset, evenly spaced, whose content its fingerprint is made of."""
READ_STREAMED_ROWS = 8
"""First rows of a streamed dataset, of which its fingerprint is made."""
READ_VALUES = 64
"""Values of each weight, evenly spaced, of which a model's fingerprint is made."""

IN_USE = "Another run is training in {folder} ({who}). Wait until it ends, or choose another output_dir."

_locked: set[str] = set()
"""Folders in which this process trains: a lock keeps other processes away only."""


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """
    Within it, no other run trains in a folder. The lock ends with the process, however that ends.

    Raises:
        BlockingIOError: another run does; names it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, LOCK_FILE).resolve()
    if str(path) in _locked:  # opening and closing the file would give up this process's lock
        raise BlockingIOError(IN_USE.format(folder=folder, who="this process"))
    with open(path, "a+", encoding="utf-8") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            who = file.read().strip() or "unknown process"
            raise BlockingIOError(IN_USE.format(folder=folder, who=who)) from error
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error}): see to it that no other run trains in it.")
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        _locked.add(str(path))
        try:
            yield
        finally:
            _locked.discard(str(path))


def read_run(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What the run of an output folder was started with; `None` where the folder does not say."""
    path = Path(folder, RUN_FILE)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_run(folder: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    """Write what the run of an output folder is started with."""
    with atomic_write(Path(folder, RUN_FILE)) as path:
        path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> list[str]:
    """
    What differs between two runs, such as `learning_rate was 0.001, is 0.002`: of the facts that [`write_run`] has by
    section and name. A section that only one of them has is not compared.
    """
    found = []
    for section in (name for name in now if name in before):
        old, new = before[section], now[section]
        if section == BASE_MODEL:
            found += ["the base model has other weights"] if old != new else []
            continue
        # A setting that only one version of a library knows is not compared.
        names = set(old) | set(new) if section in (DATA, MODEL) or not (old and new) else set(old) & set(new)
        for name in sorted(names):
            if name not in ignore and old.get(name) != new.get(name):
                label = name if section == SETTINGS else f"{section} {name}"
                found.append(f"{label} was {old.get(name)!r}, is {new.get(name)!r}")
    return found


def run_settings(args: TrainingArguments, *, streamed: bool = False) -> dict[str, Any]:
    """The settings that change what is trained; of streamed data the number of workers, which decides the batches."""
    found = {item.name: getattr(args, item.name) for item in fields(args) if not item.name.startswith(MAY_CHANGE)}
    found["dataloader_drop_last"] = args.dataloader_drop_last
    if streamed:
        found["dataloader_num_workers"] = args.dataloader_num_workers
    return as_json(found)


def as_json(value: Any) -> Any:
    """A value as JSON gives it back; what JSON has no form for, by its name."""
    return json.loads(json.dumps(value, default=plain, sort_keys=True))


def plain(value: Any) -> Any:
    """A form of a value that JSON has, and that is the same in the next run."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def fingerprint_data(dataset: Any) -> dict[str, str]:
    """
    What shows that a run has other rows, by the names of its datasets: how many, and a digest of their content.

    Of a large dataset [`READ_ROWS`] rows are read, of a streamed one the first [`READ_STREAMED_ROWS`].
    """
    if dataset is None:
        return {}
    parts = dict(dataset) if isinstance(dataset, Mapping) else {"rows": dataset}
    return {name: fingerprint_rows(part) for name, part in parts.items()}


def fingerprint_rows(dataset: Any) -> str:
    """The number of rows of a dataset and a digest of their content."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(dataset, IterableDataset):
        for row in undecoded(dataset).take(READ_STREAMED_ROWS):
            feed(digest, row)
        return f"streamed rows ({digest.hexdigest()})"
    if not isinstance(dataset, Dataset):
        return type(dataset).__qualname__
    count = len(dataset)
    chosen = range(count) if count <= READ_ROWS else np.linspace(0, count - 1, READ_ROWS, dtype=np.int64).tolist()
    raw = dataset.with_format("arrow")
    for start in range(0, len(chosen), 256):
        for row in raw[list(chosen[start : start + 256])].to_pylist():
            feed(digest, row)
    return f"{count:,} rows ({digest.hexdigest()})"


def feed(digest: Any, value: Any) -> None:
    """Add a cell's content to a digest; an image's bytes count, or without them its path."""
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and value["bytes"] is not None:
            value = {"bytes": value["bytes"]}
        for name in sorted(value):
            digest.update(f"{name}:".encode())
            feed(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)}:".encode())
        for part in value:
            feed(digest, part)
    else:
        content = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(f"{type(value).__name__} {len(content)}:".encode() + content)


@torch.no_grad()
def fingerprint_weights(model: nn.Module) -> str:
    """A digest of a model's weights, of [`READ_VALUES`] values of each."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.named_parameters():
        values = weight.flatten()
        values = values[:: max(1, len(values) // READ_VALUES)][: READ_VALUES + 1]
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()
