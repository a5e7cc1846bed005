# SPDX-License-Identifier: Apache-2.0
"""Rows for reconstruction: columns checked, a seed for each visit, an order that interruptions do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from .rows import ROW_COLUMNS


class ReconstructionDataset(torch.utils.data.Dataset):
    """
    Rows in any of the forms of [`~rows.parts_of`], each with a seed of its own for every epoch.

    Indexed by `epoch * len(dataset) + row` (see [`EpochSampler`]), so a visit's seed follows from the index alone.

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
        self.dataset = dataset.select_columns(present)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> dict[str, Any]:
        index, seed = self.visit(key)
        return {**self.dataset[index], "index": index, "seed": seed}

    def visit(self, key: int) -> tuple[int, tuple[int, int, int]]:
        """The row that an index means, and the seed of that visit."""
        epoch, index = divmod(int(key), len(self.dataset))
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


def check_rows(dataset: torch.utils.data.Dataset, collate: Callable[[list[Any]], Any], name: str) -> None:
    """
    Read every row once, so that a bad one is found before the first step and not hours into a run.

    Args:
        dataset: Rows.
        collate: What the trainer will do with a row; raises where it cannot.
        name (`str`): Of the dataset, for the progress bar and the error.

    Raises:
        ValueError: a row cannot be read; names it.
    """
    for index in tqdm(range(len(dataset)), desc=f"Checking {name} rows", unit="row", leave=False):
        try:
            collate([dataset[index]])
        except ValueError as error:
            raise ValueError(f"Row {index} of the {name} data: {error}") from error
