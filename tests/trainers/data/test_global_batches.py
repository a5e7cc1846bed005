# SPDX-License-Identifier: Apache-2.0
"""Steps of contrastive training: equal parts for all processes, of one dataset, in proportion, no row twice."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler

from trainers.data.global_batches import ANOTHER_PASS, GlobalBatchSampler, TaskBatchSampler, shares


def sampler_of(rows, batch_size, processes, drop_last=False, seed=0):
    generator = torch.Generator()
    order = RandomSampler(range(rows), generator=generator)
    inner = DefaultBatchSampler(order, batch_size * processes, drop_last, generator=generator, seed=seed)
    return GlobalBatchSampler(inner, rows, processes)


def task_sampler(sizes, batch_size, processes, drop_last=False, **options):
    samplers = [sampler_of(rows, batch_size, processes, drop_last) for rows in sizes]
    return TaskBatchSampler(ConcatDataset([range(rows) for rows in sizes]), samplers, **options)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_a_pass_gives_equal_parts_and_no_row_twice(rows, batch_size, processes, drop_last, epoch):
    step = batch_size * processes
    if rows < processes or (drop_last and rows < step):
        with pytest.raises(ValueError, match=f"{rows} rows do not suffice for a step of {step} on {processes}"):
            sampler_of(rows, batch_size, processes, drop_last)
        return
    sampler = sampler_of(rows, batch_size, processes, drop_last)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert batches == list(sampler), "an epoch is always the same"
    assert len(batches) == len(sampler) and len(batches) % processes == 0
    for first in range(0, len(batches), processes):
        assert len({len(batch) for batch in batches[first : first + processes]}) == 1
    seen = Counter(row for batch in batches for row in batch)
    assert max(seen.values()) == 1
    left_out = rows - len(seen)
    assert left_out < processes if not drop_last else left_out < step


def test_another_epoch_is_another_order():
    sampler = sampler_of(40, 4, 2)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(8, 60), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_a_step_is_of_one_dataset_and_every_row_comes_once(sizes, batch_size, processes, epoch):
    sampler = task_sampler(sizes, batch_size, processes)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) and len(batches) % processes == 0
    bounds = ConcatDataset([range(rows) for rows in sizes]).cumulative_sizes
    for first in range(0, len(batches), processes):
        step = batches[first : first + processes]
        assert len({len(batch) for batch in step}) == 1
        assert len({sum(row >= bound for bound in bounds) for batch in step for row in batch}) == 1
    seen = Counter(row for batch in batches for row in batch)
    assert max(seen.values()) == 1
    assert sum(sizes) - len(seen) < processes * len(sizes)


def test_without_homogeneity_each_process_draws_for_itself():
    sampler = task_sampler([40, 40], 4, 2, homogeneous=False)
    batches = list(sampler)
    datasets = [batch[0] // 40 for batch in batches]
    assert len(batches) == 20 and Counter(datasets) == {0: 10, 1: 10}
    assert any(datasets[step] != datasets[step + 1] for step in range(0, 20, 2))


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, [16, 4]), (0.5, [13, 7]), (0.0, [10, 10])])
def test_datasets_are_drawn_by_their_size_to_a_power(alpha, expected):
    sampler = task_sampler([64, 16], 4, 1, alpha=alpha)
    batches = list(sampler)
    assert [sum(batch[0] < 64 for batch in batches), sum(batch[0] >= 64 for batch in batches)] == expected
    small = [batch for batch in batches if batch[0] >= 64]
    assert set(row for batch in small[:4] for row in batch) == set(range(64, 80)), "a pass before it begins again"
    if alpha == 0.0:
        assert small[4:8] != small[:4], "in another order"


def test_datasets_of_one_length_are_in_different_orders():
    """As the variants of an entry are: a row shall not meet the same negatives in each."""
    batches = list(task_sampler([32, 32], 8, 1))
    of = [[{row % 32 for row in batch} for batch in batches if batch[0] // 32 == number] for number in (0, 1)]
    assert len(of[0]) == len(of[1]) == 4 and not any(rows in of[1] for rows in of[0])


def test_short_steps_do_not_make_a_dataset_be_drawn_more_often():
    """A dataset of yes and no, without duplicates in a batch, has many steps of few rows."""

    class Pairs(DefaultBatchSampler):
        def __iter__(self):
            order = list(self.sampler)
            return iter([order[first : first + 2] for first in range(0, len(order), 2)])

    def inner(kind, rows):
        generator = torch.Generator()
        return kind(RandomSampler(range(rows), generator=generator), 16, False, generator=generator, seed=0)

    parts = [GlobalBatchSampler(inner(Pairs, 64), 64, 1), GlobalBatchSampler(inner(DefaultBatchSampler, 256), 256, 1)]
    data = ConcatDataset([range(64), range(256)])
    assert [part.steps for part in parts] == [32, 16]
    assert TaskBatchSampler(data, parts, alpha=0.5).draws == [16, 32], "by 8 to 16, the roots of the rows"
    assert TaskBatchSampler(data, parts, alpha=1.0).draws == [32, 16], "every row once"


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 50))
def test_shares_are_whole_and_within_one_of_the_exact_ones(weights, total):
    found = shares(weights, total)
    assert sum(found) == total
    assert all(abs(part - weight / sum(weights) * total) < 1 for part, weight in zip(found, weights, strict=True))


def test_a_step_of_all_processes_has_no_value_twice():
    """Twenty rows of five values: two processes of two rows see four different ones."""
    rows = Dataset.from_dict({"query": [f"q{i}" for i in range(20)], "positive": [f"p{i % 5}" for i in range(20)]})
    generator = torch.Generator()
    inner = NoDuplicatesBatchSampler(rows, 4, False, generator=generator, precompute_hashes=True)
    batches = list(GlobalBatchSampler(inner, len(rows), 2))
    for first in range(0, len(batches), 2):
        values = [rows[row]["positive"] for batch in batches[first : first + 2] for row in batch]
        assert len(values) == len(set(values))


@pytest.mark.parametrize(("processes", "drop_last"), [(1, False), (1, True), (2, False), (4, False)])
def test_few_different_values_make_short_steps_of_all_rows_or_an_error(processes, drop_last, caplog):
    """Sixty-four rows of yes and no, beside another dataset: no endless search, no row that is never read."""
    rows = Dataset.from_dict({"query": [f"q{i}" for i in range(64)], "positive": [f"{i % 2}" for i in range(64)]})
    inner = NoDuplicatesBatchSampler(
        rows, 8 * processes, drop_last, generator=torch.Generator(), precompute_hashes=True
    )
    if drop_last or processes > 2:
        with pytest.raises(ValueError, match="64 rows do not suffice for a step"):
            GlobalBatchSampler(inner, 64, processes)
        return
    sampler = GlobalBatchSampler(inner, 64, processes)
    together = TaskBatchSampler(ConcatDataset([rows, range(64)]), [sampler, sampler_of(64, 8, processes)])
    for epoch in range(3):
        together.set_epoch(epoch)
        batches = list(together)
        assert len(batches) == len(together)
        assert {row for batch in batches for row in batch} == set(range(128))


@pytest.mark.parametrize(("values", "told"), [(11, 0), (2, 1)])
def test_few_rows_are_no_few_values_and_few_values_are_told_once(values, told, caplog):
    """Eleven rows for steps of 64: the size of the data is no fault of its values."""
    for _ in range(2):  # as two evaluations do
        rows = Dataset.from_dict(
            {"query": [f"q{i}" for i in range(11)], "positive": [f"{i % values}" for i in range(11)]}
        )
        inner = NoDuplicatesBatchSampler(rows, 64, False, generator=torch.Generator(), precompute_hashes=True)
        GlobalBatchSampler(inner, 11, 1)
    assert caplog.text.count("where 11 have room") == caplog.text.count("different values") == told


def test_two_processes_see_another_order_every_epoch(tmp_path):
    """Through accelerate, which tells the epoch to what lies inside of a batch sampler."""
    seen = []
    for index in range(2):
        loader = prepare_data_loader(
            DataLoader(list(range(16)), batch_sampler=sampler_of(16, 4, 2)),
            num_processes=2,
            process_index=index,
            even_batches=False,
        )
        epochs = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            epochs.append([batch.tolist() for batch in loader.base_dataloader])
        assert len({str(epoch) for epoch in epochs}) == 3
        seen.append(epochs)
    for one, other in zip(*seen, strict=True):
        assert sorted(row for batch in one + other for row in batch) == list(range(16))


def test_a_pass_that_was_given_up_does_not_set_the_next_one_back():
    sampler = sampler_of(40, 4, 2)
    begun = iter(sampler)
    next(begun)
    sampler.set_epoch(1)
    del begun
    assert sampler.epoch == 1


def test_a_pass_that_is_shorter_than_the_first_is_filled_up_from_another():
    class Shrinking(DefaultBatchSampler):
        def __iter__(self):
            batches = list(super().__iter__())
            yield from batches if self.epoch in (0, 7 + ANOTHER_PASS) else batches[:3]

    generator = torch.Generator()
    inner = Shrinking(RandomSampler(range(20), generator=generator), 4, False, generator=generator)
    sampler = GlobalBatchSampler(inner, 20, 2)
    sampler.set_epoch(7)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10 and sampler.epoch == 7
    assert len({row for batch in batches[:6] for row in batch}) == 12
