# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with the folder and the data of a recipe, found before the first step of its first stage."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..contrastive_config import CocoaContrastiveConfig, check_teacher
from ..data.contrastive_rows import prepare_contrastive_data
from ..data.datasets import check_weights
from ..data.rows import PAIR_COLUMNS, choose_columns
from ..reconstruction_config import CocoaReconstructionConfig


def check_writable(folder: str | os.PathLike) -> None:
    """Make an output folder; raise `ValueError` where nothing can be written into it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir: cannot write to {folder} ({error.strerror or error}).") from error


def check_stage_data(
    stage: str,
    args: CocoaReconstructionConfig | CocoaContrastiveConfig,
    train: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> None:
    """
    Check that a stage can be trained on its datasets, without reading images.

    Args:
        stage (`str`): For errors.
        args ([`CocoaReconstructionConfig`] or [`CocoaContrastiveConfig`]): Of the stage.
        train, evaluation (`Mapping`): Datasets by name.

    Raises:
        FileNotFoundError: there is no such teacher; names the stage.
        ValueError: columns are missing, a text is empty, a weight or prompt is for a dataset that does not exist, or
            another option does not fit the data; names the stage.
    """
    parts = [*train.items(), *(evaluation or {}).items()]
    try:
        if isinstance(args, CocoaContrastiveConfig):
            prepare_contrastive_data(train, evaluation, args)
            check_teacher(args)
        else:
            check_weights(train, args.dataset_weights)
            for name, part in parts:
                if part.column_names is not None:
                    choose_columns(part.column_names, f"The dataset {name!r}")
                if isinstance(part, IterableDataset) and args.max_steps < 1:
                    raise ValueError(f"The dataset {name!r} is streamed and has no end; give max_steps.")
        if args.on_bad_row == "error" and args.check_data:
            for name, part in parts:
                check_texts(name, part)
    except ValueError as error:
        raise ValueError(f"stage {stage!r}: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"stage {stage!r}: {error}") from error


def check_texts(name: str, dataset: Dataset | IterableDataset) -> None:
    """Raise `ValueError` where a side of a pair is missing or an empty text; names the first row."""
    for column in PAIR_COLUMNS:
        if not isinstance(dataset, Dataset) or column not in dataset.column_names:
            continue
        row = 0
        for table in dataset.select_columns([column]).with_format("arrow").iter(10_000):
            cells = table.column(column)
            is_text = str(cells.type) in ("string", "large_string")
            for cell in cells:
                if not cell.is_valid or (is_text and not cell.as_py().strip()):
                    raise ValueError(
                        f"Row {row} of {name!r} (the first is row 0): column {column!r} is empty. Fill it, or set "
                        "on_bad_row='skip'."
                    )
                row += 1
