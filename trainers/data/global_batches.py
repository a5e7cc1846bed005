# SPDX-License-Identifier: Apache-2.0
"""Which rows make a step of contrastive training, on all processes together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import ConcatDataset, Sampler
from transformers.utils import logging

logger = logging.get_logger(__name__)

ANOTHER_PASS, ANOTHER_ROUND, ANOTHER_DATASET = 1_000_003, 998_244_353, 715_225_741
"""Distances between the epochs by which further passes are drawn: to fill up a short one, to begin again, and of the
next dataset, so that the same rows do not meet in several variants of an entry."""


class GlobalBatchSampler(Sampler[list[int]]):
    """
    Batches of a step of all processes from another sampler, each cut into one part of equal size for each process.

    What that sampler guarantees of a batch (no duplicates) then holds for the step, all processes make the same number
    of steps, and their vectors can be gathered. accelerate shards batches in turn, and has each process filter for
    duplicates alone. Rows beyond equal parts are left out; another epoch has others.

    Args:
        sampler ([`~sentence_transformers.base.sampler.DefaultBatchSampler`]): Of one dataset, with its own generator.
        rows (`int`): Rows of that dataset.
        processes (`int`): They share a step in turn.
        smallest (`int`, defaults to 1): Fewest rows of a part; a shorter batch is left out.

    Raises:
        ValueError: the rows do not suffice for a step.
    """

    def __init__(self, sampler: DefaultBatchSampler, rows: int, processes: int, smallest: int = 1) -> None:
        self.sampler = sampler
        self.rows = rows
        self.processes = processes
        self.smallest = smallest * processes
        self.drop_last = sampler.drop_last
        if type(sampler) is DefaultBatchSampler:
            last = rows % sampler.batch_size >= self.smallest and not sampler.drop_last
            self.steps = rows // sampler.batch_size + last
        else:  # how many there are is seen in a pass only
            sizes = [len(batch) for batch in self.batches()]
            self.steps = len(sizes)
            room = min(sampler.batch_size, rows)
            if sizes and sum(sizes) < len(sizes) * room / 2:
                logger.warning_once(  # evaluation makes a sampler each time
                    f"{type(sampler).__name__} makes steps of {sum(sizes) / len(sizes):.1f} of the {rows} rows, where "
                    f"{room} have room: no value comes twice in a step, and the data has few different values."
                )
        if not self.steps:
            raise ValueError(
                f"{rows} rows do not suffice for a step of {sampler.batch_size} on {processes} processes"
                + (" with dataloader_drop_last=True" if sampler.drop_last else "")
                + "; lower per_device_train_batch_size."
            )

    def __len__(self) -> int:
        return self.steps * self.processes

    @property
    def epoch(self) -> int:
        """The epoch of the next pass; accelerate sets it in the inner sampler alone."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        left = self.steps
        for attempt in count():
            for batch in islice(self.another_pass(attempt) if attempt else self.batches(), left):
                size = len(batch) // self.processes
                for part in range(self.processes):
                    yield batch[part * size : (part + 1) * size]
                left -= 1
            if not left:  # some passes of a sampler that looks at values are shorter than the first one
                return

    def another_pass(self, attempt: int) -> list[list[int]]:
        """The batches of one more pass of the same epoch; all at once, so that the epoch is what it was."""
        epoch = self.epoch
        self.sampler.set_epoch(epoch + attempt * ANOTHER_PASS)
        try:
            return list(self.batches())
        finally:
            self.sampler.set_epoch(epoch)

    def batches(self) -> Iterator[list[int]]:
        """The batches of a pass that have rows enough for each process."""
        if self.sampler.generator is not None:
            self.sampler.generator.manual_seed(self.sampler.seed + self.sampler.epoch)
        return (batch for batch in self.sampler if len(batch) >= self.smallest)


class TaskBatchSampler(Sampler[list[int]]):
    """
    Steps of several datasets, drawn in proportion to their size to a power; an epoch has as many as all together.

    With a power of 1 an epoch takes every row once. With another, a dataset drawn more often than it has batches
    begins again in another order.

    Args:
        dataset ([`~torch.utils.data.ConcatDataset`]).
        batch_samplers (`Sequence[GlobalBatchSampler]`): One a dataset.
        alpha (`float`, defaults to 1.0): The power.
        homogeneous (`bool`, defaults to `True`): All processes' batches of a step are of one dataset. Otherwise each
            process's is drawn for itself.
        seed (`int`, defaults to 0).
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: Sequence[GlobalBatchSampler],
        alpha: float = 1.0,
        homogeneous: bool = True,
        seed: int = 0,
    ) -> None:
        self.batch_samplers = batch_samplers
        self.offsets = [0, *dataset.cumulative_sizes]
        self.seed = seed
        self.epoch = 0
        self.sampler = self  # accelerate passes the epoch on to a batch sampler's sampler
        self.at_once = batch_samplers[0].processes if homogeneous else 1
        if alpha == 1:
            self.draws = [len(sampler) // self.at_once for sampler in batch_samplers]
        else:
            self.draws = shares([sampler.rows**alpha for sampler in batch_samplers], len(self) // self.at_once)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.batch_samplers)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.tensor([number for number, times in enumerate(self.draws) for _ in range(times)])
        batches = [self.endless(number) for number in range(len(self.batch_samplers))]
        for number in drawn[torch.randperm(len(drawn), generator=generator)].tolist():
            for batch in islice(batches[number], self.at_once):
                yield [index + self.offsets[number] for index in batch]

    def endless(self, number: int) -> Iterator[list[int]]:
        """The batches of a dataset, pass after pass."""
        sampler = self.batch_samplers[number]
        for attempt in count():
            sampler.set_epoch(self.epoch + attempt * ANOTHER_ROUND + number * ANOTHER_DATASET)
            yield from sampler


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to weights, each within one of its exact share (the method of largest remainders)."""
    exact = np.asarray(weights, dtype=float) / sum(weights) * total
    found = np.floor(exact).astype(int)
    for place in np.argsort(found - exact, kind="stable")[: total - found.sum()]:
        found[place] += 1
    return found.tolist()
