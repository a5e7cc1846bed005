# SPDX-License-Identifier: Apache-2.0
"""Rows for reconstruction: columns checked, a seed for each visit, an order that interruptions do not change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_cocoa.inputs import CocoaInputError, input_parts

from .rows import PAIR_COLUMNS, ROW_COLUMNS, TEACHER_COLUMN, choose_columns, has_image, undecoded

logger = logging.get_logger(__name__)

CONTRASTIVE = rf"negative_\d+|{TEACHER_COLUMN}"
"""Columns of pairs that contrastive training alone reads."""
ROWS_AT_ONCE = 1024
"""Rows of a table that are read at a time."""


def check_weights(parts: Mapping[str, Any], weights: Mapping[str, float] | None) -> None:
    """Raise `ValueError` where there are no datasets, or the weights are not one above 0 for each."""
    if not parts:
        raise ValueError("There are no datasets to train on.")
    if weights is not None and (set(weights) != set(parts) or any(weight <= 0 for weight in weights.values())):
        raise ValueError(
            f"dataset_weights must give a weight above 0 for each of {list(parts)}, and nothing else; "
            f"got {dict(weights)}."
        )


def warn_unused_columns(columns: SequenceOf[str], chosen: SequenceOf[str], what: str) -> None:
    """Name columns that rows are not read from; those of pairs that contrastive training reads apart."""
    is_pair = list(chosen) == list(PAIR_COLUMNS)
    unused = [name for name in columns if name not in chosen and not (is_pair and re.fullmatch(CONTRASTIVE, name))]
    if unused:
        logger.warning(f"{what}: columns {unused} are not used; known are {[*PAIR_COLUMNS, *ROW_COLUMNS]}.")


class ReconstructionDataset(torch.utils.data.Dataset):
    """
    Rows in any of the forms of [`~rows.parts_of`], of one or several datasets, each with a seed of its own for every
    epoch.

    Indexed by `epoch * len(dataset) + row` (see [`EpochSampler`]), so a visit's seed follows from the index alone.
    Rows keep their own form: datasets whose columns are of different kinds mix.

    Args:
        dataset ([`~datasets.Dataset`] or a dict of them by name): With the columns of [`~rows.choose_columns`]; a row
            of one side may lack an image or a text (None).
        seed (`int`): Of the run.
        weights (`Mapping[str, float]`, *optional*): How often each dataset is drawn from, relative to the others: an
            epoch ends when every dataset has been read, and repeats the others meanwhile. Without weights every
            row occurs once.

    Attributes:
        parts (`dict[str, Dataset]`): By name, `""` where there is one only.
        places (`np.ndarray` of shape `(rows, 2)`): Of each row of an epoch, the number of its dataset and its own.

    Raises:
        ValueError: there are no datasets, or weights that do not fit; one lacks the columns, or has no rows.
    """

    def __init__(
        self, dataset: Dataset | Mapping[str, Dataset], seed: int, weights: Mapping[str, float] | None = None
    ) -> None:
        datasets = {"": dataset} if isinstance(dataset, Dataset) else dataset
        check_weights(datasets, weights)
        self.seed = seed
        self.weights = weights
        self.parts: dict[str, Dataset] = {}
        for name, part in datasets.items():
            what = f"The dataset {name!r}" if name else "The dataset"
            columns = choose_columns(part.column_names, what)
            warn_unused_columns(part.column_names, columns, what)
            part = part.select_columns(columns)
            if not len(part):
                raise ValueError(f"{what} has no rows.")
            self.parts[name] = undecoded(part)
        self.keep({name: range(len(part)) for name, part in self.parts.items()})

    def keep(self, rows: Mapping[str, SequenceOf[int]]) -> None:
        """Use some rows of each dataset only."""
        sizes = {name: len(rows[name]) for name in self.parts}
        counts = dict(sizes)
        if self.weights is not None:
            scale = max(size / self.weights[name] for name, size in sizes.items())
            # One without a usable row has nothing to repeat.
            counts = {
                name: max(size, round(self.weights[name] * scale)) if size else 0 for name, size in sizes.items()
            }
        self.kept = {name: np.asarray(rows[name], dtype=np.int64) for name in self.parts}
        self.places = np.concatenate(
            [
                np.stack([np.full(counts[name], number), np.resize(self.kept[name], counts[name])], axis=1)
                for number, name in enumerate(self.parts)
            ]
        )

    def check(self, read: Callable[[Mapping[str, Any]], Any], what: str, on_bad_row: str) -> None:
        """Read every row of every dataset once, and leave bad ones out; see [`check_rows`]."""
        good: dict[str, SequenceOf[int]] = {}
        for name, part in self.parts.items():
            rows = self.kept[name].tolist()  # none, where no pair has a text to rebuild
            label = f"{what} ({name})" if name else what

            def read_row(row: int, part: Dataset = part) -> None:
                read({**part[row], "index": row, "seed": (self.seed, 0, row)})

            good[name] = check_rows(rows, read_row, label, on_bad_row) if rows else rows
        self.keep(good)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int) -> dict[str, Any]:
        name, row, seed = self.visit(key)
        return {**self.parts[name][row], "index": f"{row} of {name!r}" if name else row, "seed": seed}

    def visit(self, key: int) -> tuple[str, int, tuple[int, int, int]]:
        """The dataset and the row that an index means, and the seed of that visit."""
        epoch, place = divmod(int(key), len(self.places))
        part, row = self.places[place].tolist()
        return list(self.parts)[part], row, (self.seed, epoch, place)


class EpochSampler(Sampler[int]):
    """A new permutation of the rows every epoch, drawn from the run's seed and the number that `epoch` gives."""

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length = length
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        yield from self.order(self.epoch())

    def order(self, epoch: int) -> list[int]:
        """What an epoch yields: `epoch * length + row`."""
        rows = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        return (epoch * self.length + rows).tolist()


def drop_pairs_without_text(rows: ReconstructionDataset, what: str) -> None:
    """
    Leave out pairs in which both sides hold an image, where the EOS-bridged stage has no text to rebuild, and log how
    many these are of each dataset; `ValueError` where no row is left.
    """
    kept: dict[str, SequenceOf[int]] = {name: range(len(part)) for name, part in rows.parts.items()}
    for name, part in rows.parts.items():
        if set(PAIR_COLUMNS) <= set(part.column_names):
            kept[name] = pairs_with_text(part, f"Looking at {what} pairs")
    skipped = {name: len(rows.parts[name]) - len(chosen) for name, chosen in kept.items()}
    if not any(skipped.values()):
        return
    if not any(map(len, kept.values())):
        raise ValueError(
            f"No {what} row has a text to rebuild: in every pair both sides hold an image. Train the bridge on pairs "
            "of which one side is a text."
        )
    counts = ", ".join(f"{count:,}{f' of {name!r}' if name else ''}" for name, count in skipped.items() if count)
    logger.warning(f"Skipped {what} pairs in which both sides hold an image, so without a text to rebuild: {counts}.")
    rows.keep(kept)


def pairs_with_text(part: Dataset, description: str) -> list[int]:
    """Rows of which one side holds no image; those that cannot be read are among them, and found when they are."""
    # What a column of images holds need not be looked at.
    columns = [name for name in PAIR_COLUMNS if not isinstance(part.features[name], Image)]
    if not columns:
        return []
    found = part.select_columns(columns).map(
        lambda row: {"has_text": any(map(may_be_text, row.values()))},
        remove_columns=columns,
        load_from_cache_file=False,  # a path may have become a file
        desc=description,
    )
    return [row for row, has_text in enumerate(found["has_text"]) if has_text]


def may_be_text(cell: Any) -> bool:
    """Whether one side of a pair holds no image or cannot be read."""
    try:
        return not has_image(input_parts(cell))
    except CocoaInputError:
        return True


def check_rows(rows: SequenceOf[int], read: Callable[[int], Any], name: str, on_bad_row: str) -> list[int]:
    """
    Read rows once, so that a bad one is found before the first step and not hours into a run.

    Args:
        rows (`Sequence[int]`): Their numbers in the dataset.
        read (`Callable`): Reads the row of a number as training will; raises `ValueError` where it cannot.
        name (`str`): Of the dataset, for the progress bar and the error.
        on_bad_row (`"error"` or `"skip"`): With `"skip"`, an error only where no row can be read.

    Returns:
        `list[int]`: The numbers of the rows that can be read.
    """
    good, first = [], None
    for row in tqdm(rows, desc=f"Checking {name} rows", unit="row", leave=False):
        try:
            read(row)
        except ValueError as error:
            problem = f"Row {row} of the {name} data (the first is row 0): {getattr(error, 'reason', error)}"
            if on_bad_row == "error":
                raise ValueError(f"{problem} Repair the row, or set on_bad_row='skip'.") from error
            first = first or problem
        else:
            good.append(row)
    if not good:
        raise ValueError(f"None of the {len(rows)} rows of the {name} data can be read. {first}")
    if first:
        logger.warning(f"{len(rows) - len(good)} of {len(rows)} rows of the {name} data are left out. {first}")
    return good
