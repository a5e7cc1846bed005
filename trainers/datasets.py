# SPDX-License-Identifier: Apache-2.0
"""Rows for reconstruction: columns checked, a seed for each visit, an order that interruptions do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset, Sequence, Value, concatenate_datasets, interleave_datasets
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers.utils import logging

from .rows import ROW_COLUMNS, undecoded

logger = logging.get_logger(__name__)


def mix_datasets(
    parts: Mapping[str, Dataset | IterableDataset], weights: Mapping[str, float] | None, seed: int
) -> Dataset | IterableDataset:
    """
    Several datasets as one, of which each next row comes from one that is drawn by weight.

    Args:
        parts (`Mapping[str, Dataset or IterableDataset]`): By name. Columns that rows are not read from are left out.
            Where one of them is streamed, all are.
        weights (`Mapping[str, float]`, *optional*): Of each. The mixture ends when every dataset has been seen whole,
            the others more than once meanwhile. Without weights every row occurs once (and streams take turns).
        seed (`int`): Of the draws.

    Raises:
        ValueError: there are no datasets, names differ from the weights', or a weight is not above 0.
    """
    if not parts:
        raise ValueError("There are no datasets to train on.")
    if weights is not None and (set(weights) != set(parts) or any(weight <= 0 for weight in weights.values())):
        raise ValueError(
            f"dataset_weights must give a weight above 0 for each of {list(parts)}, and nothing else; "
            f"got {dict(weights)}."
        )
    is_streamed = any(isinstance(part, IterableDataset) for part in parts.values())
    chosen: list[Any] = []
    for name, part in parts.items():
        known = part.column_names
        if known is None:  # of a stream, whose rows alone tell
            known = list(next(iter(part.take(1)), {}))
        columns = [column for column in ROW_COLUMNS if column in known]
        if not columns:
            raise ValueError(f"Dataset {name!r} needs a column of {list(ROW_COLUMNS)}; it has {known}.")
        part = with_image_columns(part.select_columns(columns))
        chosen.append(part.to_iterable_dataset() if is_streamed and isinstance(part, Dataset) else part)
    if len(chosen) == 1:
        return chosen[0]
    if weights is None and not is_streamed:
        return concatenate_datasets(chosen)
    shares = None
    if weights is not None:
        total = sum(weights.values())
        shares = [weights[name] / total for name in parts]
    return interleave_datasets(chosen, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def with_image_columns(part: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows, paths of images being images: only then do they mix with those of other datasets."""
    path = Value("string")
    for name, paths, images in (("image", path, Image()), ("images", Sequence(path), Sequence(Image()))):
        if (part.features or {}).get(name) == paths:
            part = part.cast_column(name, images)
    return part


class ReconstructionDataset(torch.utils.data.Dataset):
    """
    Rows in any of the forms of [`~rows.parts_of`], each with a seed of its own for every epoch.

    Indexed by `epoch * len(dataset) + row` (see [`EpochSampler`]), so a visit's seed follows from the index alone.
    `rows` are those of the dataset that it has; fewer than all where [`check_rows`] found bad ones.

    Args:
        dataset ([`~datasets.Dataset`]): With at least one of the columns; a row may lack either (None).
        seed (`int`): Of the run.

    Raises:
        ValueError: the dataset has neither column, or no rows.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        present = [name for name in ROW_COLUMNS if name in dataset.column_names]
        if not present:
            raise ValueError(
                f"The dataset needs a column of {list(ROW_COLUMNS)}; it has {dataset.column_names}. "
                "Rename yours with dataset.rename_column(...)."
            )
        if not len(dataset):
            raise ValueError("The dataset has no rows.")
        dataset = dataset.select_columns(present)
        self.dataset = dataset.cast(undecoded(dataset.features))
        self.seed = seed
        self.rows: SequenceOf[int] = range(len(dataset))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int) -> dict[str, Any]:
        index, seed = self.visit(key)
        return {**self.dataset[index], "index": index, "seed": seed}

    def visit(self, key: int) -> tuple[int, tuple[int, int, int]]:
        """The row that an index means, and the seed of that visit."""
        epoch, place = divmod(int(key), len(self.rows))
        index = self.rows[place]
        return index, (self.seed, epoch, index)


class EpochSampler(Sampler[int]):
    """
    A new permutation of the rows every epoch, drawn from the run's seed and the epoch's number.

    Args:
        length (`int`): Rows.
        seed (`int`): Of the run.
        epoch (`Callable[[], int]`): Tells the epoch that is about to begin.
    """

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


def check_rows(rows: SequenceOf[Any], read: Callable[[Any], Any], name: str, on_bad_sample: str) -> list[int]:
    """
    Read every row once, so that a bad one is found before the first step and not hours into a run.

    Args:
        rows: By their place.
        read (`Callable`): Does with a row what the trainer will do; raises `ValueError` where it cannot.
        name (`str`): Of the dataset, for the progress bar and the error.
        on_bad_sample (`"raise"` or `"skip"`).

    Returns:
        `list[int]`: The places of the rows that can be read.

    Raises:
        ValueError: a row cannot be read, and names it; or with `"skip"`, none can.
    """
    good, first = [], None
    for index in tqdm(range(len(rows)), desc=f"Checking {name} rows", unit="row", leave=False):
        try:
            read(rows[index])
        except ValueError as error:
            problem = f"Row {index} of the {name} data: {getattr(error, 'reason', error)}"
            if on_bad_sample == "raise":
                raise ValueError(f"{problem} Mend the row, or set on_bad_sample='skip'.") from error
            first = first or problem
        else:
            good.append(index)
    if not good:
        raise ValueError(f"None of the {len(rows)} rows of the {name} data can be read. {first}")
    if first:
        logger.warning(f"{len(rows) - len(good)} of {len(rows)} rows of the {name} data are left out. {first}")
    return good
