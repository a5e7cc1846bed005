# SPDX-License-Identifier: Apache-2.0
"""Batches by token budget hold what they should, in every epoch and on every process."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data.batching import TokenBatchSampler, count_row_tokens
from trainers.data.collators import DIRECTIONS, ReconstructionCollator
from trainers.data.datasets import EpochSampler, ReconstructionDataset
from trainers.reconstruction_config import CocoaReconstructionConfig
from trainers.reconstruction_trainer import CocoaReconstructionTrainer


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=4, max_size=40),
    budget=st.integers(1, 100),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_batches_keep_the_budget_and_every_process_gets_as_many(lengths, budget, processes, epoch):
    count = len(lengths)
    rows = EpochSampler(count, 7, epoch=lambda: epoch)
    sampler = TokenBatchSampler(rows, lambda key: lengths[key % count], budget, processes)
    batches = list(sampler)
    visited = [key for batch in batches for key in batch]
    assert len(visited) == len(set(visited)) and {key // count for key in visited} == {epoch}
    assert visited == rows.order(epoch)[: len(visited)], "in the epoch's order, and only the end may be left out"
    assert len(batches) == len(sampler) and all(batches)
    assert len(batches) % processes == 0
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[key % count] for key in batch) <= budget


def test_fewer_rows_than_processes_are_refused():
    with pytest.raises(ValueError, match="2 rows do not suffice for 3 processes"):
        TokenBatchSampler(EpochSampler(2, 0, epoch=lambda: 0), lambda key: 1, 10, processes=3)


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_the_count_is_the_length_of_the_example(processor, emoji, stage):
    """For every direction, images of other sizes, rows without one side, and images in a dataset or in memory."""
    collator = ReconstructionCollator(processor, stage=stage, direction_weights=dict.fromkeys(DIRECTIONS, 1.0))
    images = [emoji[index]["image"].resize((40 + 16 * index, 64)) for index in range(24)]
    data = {"image": images, "text": list(emoji["text"][:24])}
    data["image"][0] = data["text"][1] = None
    rows = ReconstructionDataset(Dataset.from_dict(data).cast_column("image", ImageFeature()), seed=5)
    counts = count_row_tokens(rows.parts[""], processor)
    seen = set()
    for key in range(48):
        _, index, seed = rows.visit(key)
        example = collator.example(rows[key])
        seen.add(example.direction)
        length = len(example.source.input_ids) + (len(example.target.input_ids) if example.target else 0)
        assert collator.count_tokens(*counts[index].tolist(), seed) == length, (key, example.direction)
    assert seen == (set(DIRECTIONS) if stage == "bridge" else {"warmup"})


def test_a_picture_that_cannot_be_read_counts_nothing(processor):
    data = Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}], "text": ["two words"]})
    counts = count_row_tokens(data.cast_column("image", ImageFeature(decode=False)), processor)
    assert counts[0, 0] == 0 and counts[0, 1] > 0


def test_a_run_by_tokens_resumes_to_the_same_weights(tmp_path, model, processor, emoji):
    def train(folder, steps, **options):
        args = CocoaReconstructionConfig(
            str(folder),
            stage="bridge",
            max_steps=steps,
            per_device_train_batch_num_tokens=400,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            save_steps=5,
            logging_steps=1,
            check_data=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = CocoaReconstructionTrainer(
            copy.deepcopy(model), args, train_dataset=emoji, processing_class=processor
        )
        sizes = []
        step = trainer.training_step

        def keep(model, inputs, *rest, **kwargs):
            sizes.append(int(inputs["attention_mask"].sum()))
            return step(model, inputs, *rest, **kwargs)

        trainer.training_step = keep
        trainer.train(**options)
        return trainer, sizes

    whole, sizes = train(tmp_path / "whole", 12)
    assert max(sizes) <= 400 and sum(sizes) / len(sizes) > 300
    assert whole.state.epoch > 1, "the second epoch has begun"
    train(tmp_path / "cut", 10)
    resumed, rest = train(tmp_path / "cut", 12, resume_from_checkpoint=True)
    assert rest == sizes[10:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_former_name_of_the_token_budget_warns(tmp_path):
    with pytest.warns(FutureWarning, match="now called per_device_train_batch_num_tokens"):
        args = CocoaReconstructionConfig(str(tmp_path), per_device_train_batch_tokens=400, use_cpu=True)
    assert args.per_device_train_batch_num_tokens == 400
