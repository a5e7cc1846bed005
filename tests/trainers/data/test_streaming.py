# SPDX-License-Identifier: Apache-2.0
"""A streamed dataset: no row twice, the same batches again, and a run that resumes to the same weights."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from datasets import Dataset, Features, Image
from torch.utils.data import DataLoader

from trainers.data.collators import ReconstructionCollator
from trainers.data.masking import IGNORE_INDEX
from trainers.data.streaming import ReconstructionStream
from trainers.reconstruction_config import CocoaReconstructionConfig
from trainers.reconstruction_trainer import CocoaReconstructionTrainer


def numbered(count, shards):
    return Dataset.from_dict({"text": [f"number {index}" for index in range(count)]}).to_iterable_dataset(shards)


def texts_of(processor, batch):
    ids = torch.where(batch["labels"] != IGNORE_INDEX, batch["labels"], batch["input_ids"])
    special = set(processor.tokenizer.get_added_vocab().values())
    return [processor.tokenizer.decode([token for token in row if token not in special]) for row in ids.tolist()]


def stream(processor, dataset, **options):
    collator = ReconstructionCollator(processor, on_bad_row=options.pop("on_bad_row", "error"))
    return ReconstructionStream(dataset, collator, 5, **{"batch_size": 1, "buffer_size": 8, **options})


@pytest.mark.parametrize(("shards", "workers"), [(4, 0), (4, 2), (1, 0), (3, 2), (1, 3)])
def test_two_processes_see_every_row_once_a_pass(processor, shards, workers):
    seen = []
    for process in range(2):
        rows = stream(processor, numbered(24, shards), process_index=process, num_processes=2)
        loader = DataLoader(rows, batch_size=None, num_workers=workers)
        for batch, _ in zip(loader, range(12), strict=False):
            seen += [(batch["rows"][0], *texts_of(processor, batch))]
    texts = collections.Counter(text for name, text in seen if "pass 0" in name)
    assert set(texts.values()) == {1}, "no row twice"
    if workers == 0:
        assert len(texts) == 24 and sorted(texts) != [text for _, text in seen], "all of them, mixed"


def test_passes_differ_and_the_same_stream_is_the_same(processor):
    def first(count, **options):
        rows = stream(processor, numbered(10, 2), **options)
        return [text for batch, _ in zip(rows, range(count), strict=False) for text in texts_of(processor, batch)]

    assert first(20) == first(20)
    assert sorted(first(20)[:10]) == sorted(first(20)[10:]) and first(20)[:10] != first(20)[10:]


def test_batches_keep_the_token_budget(processor, emoji):
    rows = stream(processor, emoji.select_columns(["image", "text"]).to_iterable_dataset(2), batch_num_tokens=120)
    for batch, _ in zip(rows, range(12), strict=False):
        tokens = int(batch["attention_mask"].sum())
        assert tokens <= 120 or len(batch["rows"]) == 1


def test_bad_rows_are_named_or_skipped_and_counted(processor):
    data = Dataset.from_dict({"text": ["one", None, "two", " "]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"row \d of pass 0 in process 0, worker 0 .*: it has neither.*on_bad_row"):
        [batch for batch, _ in zip(stream(processor, data), range(4), strict=False)]
    skipping = stream(processor, data, on_bad_row="skip")
    batches = [batch for batch, _ in zip(skipping, range(9), strict=False)]
    assert sum(batch["num_skipped"] for batch in batches) >= 6
    corrupt = Dataset.from_dict(
        {"image": [{"bytes": b"nothing", "path": None}]}, features=Features({"image": Image()})
    )
    with pytest.raises(ValueError, match="row 0 of pass 0 .*image cannot be read"):
        next(iter(stream(processor, corrupt.to_iterable_dataset())))
    nothing = Dataset.from_dict({"text": [None, " "]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="No row of the streamed dataset"):
        next(iter(stream(processor, nothing, on_bad_row="skip")))


def test_a_streamed_run_resumes_to_the_same_weights(tmp_path, model, processor, emoji):
    data = emoji.select_columns(["image", "text"]).to_iterable_dataset(num_shards=2)

    def train(folder, steps, **options):
        args = CocoaReconstructionConfig(
            str(folder),
            stage="bridge",
            max_steps=steps,
            per_device_train_batch_num_tokens=300,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            save_steps=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = CocoaReconstructionTrainer(
            copy.deepcopy(model), args, train_dataset=data, processing_class=processor
        )
        trainer.train(**options)
        return trainer.model.state_dict()

    whole = train(tmp_path / "whole", 5)
    train(tmp_path / "cut", 3)
    resumed = train(tmp_path / "cut", 5, resume_from_checkpoint=True)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_stream_needs_an_end_and_is_not_for_evaluation(tmp_path, model, processor):
    data = numbered(4, 1)
    args = CocoaReconstructionConfig(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="give max_steps"):
        CocoaReconstructionTrainer(model, args, train_dataset=data, processing_class=processor)
    with pytest.raises(ValueError, match="eval_dataset cannot be streamed"):
        CocoaReconstructionTrainer(model, args, eval_dataset=data, processing_class=processor)
