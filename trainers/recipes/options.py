# SPDX-License-Identifier: Apache-2.0
"""Values of a YAML file as the typed fields of a dataclass; errors name the key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from evaluation.naming import nearest

NEED_A_GPU = ("bf16", "fp16", "tf32")
"""Settings of precision that a CPU does not have; with `use_cpu` it computes in bfloat16 where asked for."""
TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping of names to values",
    type(None): "null",
}
"""What a field takes, in words; anything else is a text."""

Config = TypeVar("Config")


def check_names(
    what: str, kind: str, names: Iterable[str], known: Collection[str], required: Iterable[str] = ()
) -> None:
    """Raise `ValueError` where a name is unknown (with the closest known one) or a required one is missing."""
    listed = f"; there are {list(known)}" if len(known) <= 20 else ""
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: unknown {kind} {name!r}{nearest(name, known)}{listed}.")
    for name in required:
        if name not in names:
            raise ValueError(f"{what}: missing {kind} {name!r}{listed}.")


def check_mapping(what: str, value: Any) -> None:
    """Raise `ValueError` where a part of a recipe is no mapping of names to values."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must have names with values (`name: value`); got {value!r}.")


def parse_options(config_class: type[Config], options: Mapping[str, Any], what: str) -> Config:
    """
    Make a dataclass of options from a YAML file, in which a number may be a text: YAML 1.1 reads `5e-4` as one.

    transformers' `HfArgumentParser.parse_dict` checks no types, and TRL's `TrlParser` ends the process on an error.

    Args:
        config_class (`type`): A dataclass.
        options (`Mapping`): By the names of its fields.
        what (`str`): Where they are, for errors: `stage 'warmup'`.

    Raises:
        ValueError: an option is unknown, of another type or out of range, or not for this device; names it.
    """
    check_mapping(what, options)
    hints = get_type_hints(config_class)
    check_names(what, "option", options, [item.name for item in fields(config_class) if item.init])
    values = {name: convert(value, hints[name], f"{what}: {name}") for name, value in options.items()}
    check_device(values, what)
    try:
        return config_class(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{what}: {error}") from error


def convert(value: Any, hint: Any, what: str) -> Any:
    """A value from YAML as the type of a field; raises `ValueError` where it is of another type."""
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    by_type = {get_origin(part) or part: part for part in hints}
    takes_text = any(kind is str or (isinstance(kind, type) and issubclass(kind, Enum)) for kind in by_type)
    if (value is None and type(None) in by_type) or (isinstance(value, bool) and bool in by_type):
        return value
    if value is False and takes_text:
        return "no"  # `eval_strategy: no`, which YAML 1.1 reads as False
    if isinstance(value, str) and takes_text:
        return value
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = as_number(value)
        if number is not None and float in by_type:
            return number
        if number is not None and int in by_type and number == int(number):
            return int(number)
        if isinstance(value, str) and bool in by_type and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, str) and takes_text and not {float, int} & set(by_type):
            return str(value)
        if isinstance(value, str) and by_type.get(list) == list[str]:
            return [value]
    if isinstance(value, (list, tuple)) and list in by_type:
        (kind,) = get_args(by_type[list]) or (Any,)
        return [convert(part, kind, f"{what}[{place}]") for place, part in enumerate(value)]
    if isinstance(value, Mapping) and dict in by_type:
        _, kind = get_args(by_type[dict]) or (Any, Any)
        return {name: convert(part, kind, f"{what}.{name}") for name, part in value.items()}
    if Any in by_type:
        return value
    expected = " or ".join(dict.fromkeys(TYPE_NAMES.get(kind, "a text") for kind in by_type))
    raise ValueError(f"{what} must be {expected}; got {value!r}.")


def as_number(value: Any) -> int | float | None:
    """A number, or the one that a text spells; `None` where it spells none."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return None


def check_device(options: Mapping[str, Any], what: str) -> None:
    """Raise `ValueError` where options ask for what this device does not have."""
    if torch.accelerator.is_available() and not options.get("use_cpu"):
        return
    wanted = [f"{name}: true" for name in NEED_A_GPU if options.get(name)]
    if options.get("use_cpu") and options.get("bf16"):
        wanted.remove("bf16: true")
    if "flash" in str(attention := options.get("attn_implementation")):
        wanted.append(f"attn_implementation: {attention}")
    if wanted:
        raise ValueError(f"{what}: {wanted[0]} needs a GPU; remove it to train on this CPU.")
