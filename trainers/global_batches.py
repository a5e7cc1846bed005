# SPDX-License-Identifier: Apache-2.0
"""Which rows make a step of contrastive training, on all processes together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import ConcatDataset, Sampler


class GlobalBatchSampler(Sampler[list[int]]):
    """
    The batches of another sampler, each of a whole step, cut into one part of equal size for each process.

    What that sampler says of a batch (no duplicates) then holds for the step, all processes make the same number of
    steps, and their vectors can be gathered. Of the last batch of an epoch, rows that do not make equal parts are left
    out; another epoch has others.

    Args:
        sampler ([`~sentence_transformers.base.sampler.DefaultBatchSampler`]): Of one dataset, with a generator of its
            own.
        rows (`int`): Of that dataset.
        processes (`int`): That share a step, in turn.

    Raises:
        ValueError: there are too few rows for a step.
    """

    def __init__(self, sampler: DefaultBatchSampler, rows: int, processes: int) -> None:
        self.sampler = sampler
        self.processes = processes
        self.epoch = 0
        last = rows % sampler.batch_size >= processes and not sampler.drop_last
        self.steps = rows // sampler.batch_size + last
        if not self.steps:
            raise ValueError(
                f"{rows} rows do not suffice for a step of {sampler.batch_size} on {processes} processes"
                + (" with dataloader_drop_last=True" if sampler.drop_last else "")
                + "; lower per_device_train_batch_size."
            )

    def __len__(self) -> int:
        return self.steps * self.processes

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass be that of another epoch."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        if self.sampler.generator is not None:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch)
        yield from islice(self.parts(), len(self))

    def parts(self) -> Iterator[list[int]]:
        """Each batch of the pass, in parts."""
        for batch in self.sampler:
            size = len(batch) // self.processes
            for part in range(self.processes if size else 0):
                yield batch[part * size : (part + 1) * size]


class TaskBatchSampler(Sampler[list[int]]):
    """
    Steps of several datasets, drawn in proportion to their size to a power; an epoch has as many as all together.

    Where a dataset is drawn more often than it has batches, it begins again in another order.

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
        steps = [sampler.steps for sampler in batch_samplers]
        self.draws = shares([count**alpha for count in steps], len(self) // self.at_once)

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass be that of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.batch_samplers)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.tensor([number for number, times in enumerate(self.draws) for _ in range(times)])
        batches = [self.endless(sampler) for sampler in self.batch_samplers]
        for number in drawn[torch.randperm(len(drawn), generator=generator)].tolist():
            for batch in islice(batches[number], self.at_once):
                yield [index + self.offsets[number] for index in batch]

    def endless(self, sampler: GlobalBatchSampler) -> Iterator[list[int]]:
        """The batches of a dataset, pass after pass."""
        generator = np.random.default_rng((self.seed, self.epoch))
        sampler.set_epoch(self.epoch)
        while True:
            yield from sampler
            sampler.set_epoch(int(generator.integers(2**31)))


def shares(weights: Sequence[float], total: int) -> list[int]:
    """A whole number in proportion to weights, each part within one of its exact share (the largest remainders)."""
    exact = np.asarray(weights, dtype=float) / sum(weights) * total
    found = np.floor(exact).astype(int)
    for place in np.argsort(found - exact, kind="stable")[: total - found.sum()]:
        found[place] += 1
    return found.tolist()
