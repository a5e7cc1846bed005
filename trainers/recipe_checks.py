# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a recipe, found before the first step of its first stage."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from datasets import Dataset, IterableDataset

from .contrastive_config import CocoaContrastiveConfig
from .contrastive_rows import check_columns, check_contrastive_data, column_prompts, with_negatives
from .datasets import check_weights
from .recipe_data import nearest
from .reconstruction_config import CocoaReconstructionConfig
from .rows import choose_columns

NEED_A_GPU = ("bf16", "fp16", "tf32")
"""Settings of precision that a CPU does not have; with `use_cpu` it computes in bfloat16 where asked for."""

Config = TypeVar("Config")


def require_known(what: str, kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """
    Raise `ValueError` where a name is not known, with the closest one that is.

    Args:
        what (`str`): Where the names are.
        kind (`str`): What they name, such as `option`.
        names, known (`Iterable[str]`).
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: unknown {kind} {name!r}{nearest(name, known)}.")


def require_mapping(what: str, value: Any) -> None:
    """Raise `ValueError` where a part of a recipe is no mapping of names to values."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must have names with values (`name: value`); got {value!r}.")


def parse_options(config_class: type[Config], options: Mapping[str, Any], what: str) -> Config:
    """
    A dataclass of some options, which may be numbers written as strings: YAML 1.1 reads `5e-4` as one.

    Args:
        config_class (`type`): A dataclass.
        options (`Mapping`): By the names of its fields.
        what (`str`): Where they are, for errors: `stage 'warmup'`.

    Raises:
        ValueError: an option is unknown, of another type or out of range, or not for this device; names it.
    """
    require_mapping(what, options)
    hints = get_type_hints(config_class)
    require_known(what, "option", options, (item.name for item in fields(config_class) if item.init))
    values = {name: converted(value, hints[name], f"{what}: {name}") for name, value in options.items()}
    check_device(values, what)
    try:
        return config_class(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{what}: {error}") from error


def converted(value: Any, hint: Any, what: str) -> Any:
    """
    A value of a recipe as a field's type has it.

    Args:
        value: As YAML has it.
        hint: Type of the field.
        what (`str`): The field, for errors.

    Raises:
        ValueError: it is of another type.
    """
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    by_type = {get_origin(part) or part: part for part in hints}
    is_enum = any(isinstance(kind, type) and issubclass(kind, Enum) for kind in by_type)
    takes_text = str in by_type or is_enum
    if value is None:
        if type(None) in by_type or Any in by_type:
            return None
    elif isinstance(value, bool):
        if bool in by_type:
            return value
        if value is False and takes_text:
            return "no"  # of `eval_strategy: no`, which YAML 1.1 reads as False
    elif isinstance(value, (int, float, str)):
        if isinstance(value, str) and takes_text:
            return value
        if (number := as_number(value)) is not None and float in by_type:
            return number
        if number is not None and int in by_type and number == int(number):
            return int(number)
        if isinstance(value, str) and bool in by_type and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, str) and takes_text and not {float, int} & set(by_type):
            return str(value)
        if isinstance(value, str) and list in by_type and get_args(by_type[list]) == (str,):
            return [value]
    elif isinstance(value, (list, tuple)):
        if list in by_type:
            (kind,) = get_args(by_type[list]) or (Any,)
            return [part if kind is Any else converted(part, kind, f"{what}[{n}]") for n, part in enumerate(value)]
    elif isinstance(value, Mapping) and dict in by_type:
        kind = (get_args(by_type[dict]) or (Any, Any))[1]
        return {name: part if kind is Any else converted(part, kind, f"{what}.{name}") for name, part in value.items()}
    if Any in by_type:
        return value
    raise ValueError(f"{what} must be {expected(by_type)}; got {value!r}.")


def as_number(value: Any) -> int | float | None:
    """A number, or what a text says as one; `None` where it says none."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        return None


def expected(kinds: Iterable[Any]) -> str:
    """What a field takes, in words."""
    words = {
        int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list",
        dict: "a mapping of names to values", type(None): "null",
    }  # fmt: skip
    found = list(dict.fromkeys(words.get(kind, "a text") for kind in kinds))
    return " or ".join(found)


def check_device(options: Mapping[str, Any], what: str) -> None:
    """Raise `ValueError` where options ask for what the device that is there does not have."""
    on_cpu = bool(options.get("use_cpu")) or not torch.accelerator.is_available()
    if not on_cpu:
        return
    for name in NEED_A_GPU:
        if options.get(name) and not (name == "bf16" and options.get("use_cpu")):
            raise ValueError(f"{what}: {name}: true needs a GPU; remove it to train on this CPU.")
    if "flash" in str(options.get("attn_implementation")):
        raise ValueError(
            f"{what}: attn_implementation: {options['attn_implementation']} needs a GPU; remove it to train on this "
            "CPU."
        )


def check_writable(folder: str | os.PathLike) -> None:
    """Raise `ValueError` where nothing can be written into an output folder, which is made where there is none."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir: cannot write to {folder} ({error.strerror or error}).") from error


def check_stage_data(stage: str, args: Any, train: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> None:
    """
    See that a stage can be trained on its datasets, as far as that is seen without reading images.

    Args:
        stage (`str`): For errors.
        args ([`CocoaReconstructionConfig`] or [`CocoaContrastiveConfig`]): Of the stage.
        train, evaluation (`Mapping`): Datasets by name.

    Raises:
        ValueError: columns are missing, a text is empty, a weight or prompt is for a dataset that there is not, or
            another option does not fit the data; names the stage.
    """
    try:
        if isinstance(args, CocoaReconstructionConfig):
            check_weights(train, args.dataset_weights)
            for name, part in (*train.items(), *(evaluation or {}).items()):
                if part.column_names is not None:
                    choose_columns(part.column_names, f"The dataset {name!r}")
                if isinstance(part, IterableDataset) and args.max_steps < 1:
                    raise ValueError(f"The dataset {name!r} is streamed and has no end; give max_steps.")
        else:
            check_contrastive(args, train, evaluation)
        if args.on_bad_sample == "raise" and args.check_data:
            for name, part in (*train.items(), *(evaluation or {}).items()):
                check_texts(name, part)
    except ValueError as error:
        raise ValueError(f"stage {stage!r}: {error}") from error


def check_contrastive(
    args: CocoaContrastiveConfig, train: Mapping[str, Dataset], evaluation: Mapping[str, Dataset] | None
) -> None:
    """Raise `ValueError` where contrastive training would refuse datasets for what they are, or options for them."""
    for name, part in (("train_dataset", train), ("eval_dataset", evaluation)):
        check_columns(name, part)
        with_negatives(part, args.num_hard_negatives, name, at_most=part is evaluation)
    check_contrastive_data(train, evaluation, args)
    column_prompts(args, train)


def check_texts(name: str, dataset: Any) -> None:
    """Raise `ValueError` where a side of a pair is missing or an empty text; names the first row."""
    if not isinstance(dataset, Dataset):
        return
    for column in ("query", "positive"):
        if column not in dataset.column_names:
            continue
        cells = dataset.select_columns([column]).with_format("arrow")
        row = 0
        for table in cells.iter(10_000):
            for cell in table.column(column):
                if not cell.is_valid or (isinstance(text := cell_text(cell), str) and not text.strip()):
                    raise ValueError(f"Row {row} of {name!r}: column {column!r} is empty.")
                row += 1


def cell_text(cell: Any) -> Any:
    """The text of a column's cell; `None` of one that is no text."""
    return cell.as_py() if str(cell.type) in ("string", "large_string") else None
