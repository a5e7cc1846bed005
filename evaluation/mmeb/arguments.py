# SPDX-License-Identifier: Apache-2.0
"""What can be checked of an evaluation's arguments before a library is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .tasks import Task

ENDINGS = (".parquet", ".jsonl")
"""Files of a task's rows; those of the first ending that there are."""


def check_arguments(
    models: Sequence[str],
    baselines: Sequence[str],
    tasks: Sequence[Task],
    source: str,
    image_dir: str | os.PathLike,
    revision: str | None = None,
) -> None:
    """
    Check what [`~evaluate.run_mmeb`] is given.

    Raises:
        FileNotFoundError: a folder, or a task's files in it, are not there.
        ValueError: there is no model, or a revision of one that is a folder.
    """
    if not models and not baselines:
        raise ValueError("Name a model with --model, or --baseline.")
    if revision is not None and (folders := [name for name in [*models, *baselines] if os.path.isdir(name)]):
        raise ValueError(f"{folders[0]} is a folder, and a revision is one of a model on the Hub: leave it out.")
    if not Path(image_dir).is_dir():
        raise FileNotFoundError(f"There is no folder {image_dir} of images; name it with --images.")
    if Path(source).is_dir():
        for task in tasks:
            task_files(task.name, Path(source))
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is None:
        raise FileNotFoundError(
            f"{source} is neither a folder nor the name of a dataset on the Hub (such as TIGER-Lab/MMEB-eval); name "
            "one of them with --data."
        )


def task_files(name: str, folder: Path) -> list[Path]:
    """The files of a task's rows in a folder; raises `FileNotFoundError` where there is none."""
    for ending in ENDINGS:
        if files := sorted((folder / name).glob(f"*{ending}")):
            return files
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise FileNotFoundError(
        f"There are no rows of {name} in {folder}: no file {name}/*.parquet or {name}/*.jsonl. Its folders are "
        f"{there}."
    )
