# SPDX-License-Identifier: Apache-2.0
"""Several datasets as one."""

from __future__ import annotations

import collections
import copy
import logging

import pytest
from datasets import Dataset

from trainers.data.datasets import ReconstructionDataset
from trainers.data.rows import parts_of
from trainers.data.streaming import mix_streams
from trainers.reconstruction_config import CocoaReconstructionConfig
from trainers.reconstruction_trainer import CocoaReconstructionTrainer


def named(name, count):
    return Dataset.from_dict({"text": [f"{name} {index}" for index in range(count)], "other": [0] * count})


def texts_of(rows):
    return [rows[key]["text"] for key in range(len(rows))]


def test_without_weights_every_row_occurs_once():
    mixed = ReconstructionDataset({"a": named("a", 5), "b": named("b", 9)}, seed=0)
    assert sorted(texts_of(mixed)) == sorted([f"a {i}" for i in range(5)] + [f"b {i}" for i in range(9)])
    assert set(mixed[0]) == {"text", "index", "seed"} and mixed[5]["index"] == "0 of 'b'"


def test_rows_are_repeated_by_weight_until_all_were_seen():
    parts = {"a": named("a", 300), "b": named("b", 60)}
    mixed = ReconstructionDataset(parts, 0, {"a": 3.0, "b": 1.0})
    texts = texts_of(mixed)
    counts = collections.Counter(text[0] for text in texts)
    assert counts == {"a": 300, "b": 100} and len(set(texts)) == 360
    seeds = [mixed[key]["seed"] for key in range(len(mixed))]
    assert len(set(seeds)) == 400, "a row that occurs twice is masked otherwise"
    mixed.keep({"a": [7], "b": range(60)})
    assert collections.Counter(text[0] for text in texts_of(mixed)) == {"a": 180, "b": 60}
    mixed.keep({"a": [], "b": range(60)})
    assert collections.Counter(text[0] for text in texts_of(mixed)) == {"b": 60}, "no row of one that has none left"


def test_rows_of_a_stream_are_drawn_by_weight_until_all_were_seen():
    parts = {"a": named("a", 300), "b": named("b", 60).to_iterable_dataset()}
    mixed = mix_streams(parts, {"a": 3.0, "b": 1.0}, seed=0)
    texts = [row["text"] for row in mixed]
    counts = collections.Counter(text[0] for text in texts)
    assert 2.3 < counts["a"] / counts["b"] < 4
    assert len(set(texts)) == 360, "all of both"
    assert texts == [row["text"] for row in mix_streams(parts, {"a": 3.0, "b": 1.0}, seed=0)]


def test_datasets_of_different_forms_mix(emoji):
    conversations = Dataset.from_dict({"messages": [[{"role": "user", "content": "hello"}]] * 3})
    pairs = Dataset.from_dict({"query": ["a"] * 2, "positive": ["b"] * 2})
    rows = ReconstructionDataset({"captions": emoji.select(range(4)), "chats": conversations, "pairs": pairs}, seed=0)
    kinds = [[part["type"] for part in parts_of(rows[key])] for key in range(len(rows))]
    assert kinds == [["image", "text"]] * 4 + [["text"]] * 5


@pytest.mark.parametrize(
    "mix",
    [
        lambda parts, weights: ReconstructionDataset(parts, 0, weights),
        lambda parts, weights: mix_streams(parts, weights, 0),
    ],
)
@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_weights_must_fit_the_datasets(weights, mix):
    with pytest.raises(ValueError, match=r"a weight above 0 for each of \['a', 'b'\]"):
        mix({"a": named("a", 2), "b": named("b", 2)}, weights)
    with pytest.raises(ValueError, match="no datasets"):
        mix({}, None)
    with pytest.raises(ValueError, match=r"The dataset 'c' needs the columns .*; it has \['caption'\]"):
        mix({"c": Dataset.from_dict({"caption": ["x"]})}, None)


def test_a_trainer_takes_several(tmp_path, model, processor, emoji):
    args = CocoaReconstructionConfig(
        str(tmp_path),
        max_steps=2,
        dataset_weights={"texts": 1, "pairs": 2},
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    data = {"texts": named("text", 20), "pairs": emoji}
    trainer = CocoaReconstructionTrainer(model, args, train_dataset=data, processing_class=processor)
    assert trainer.train().global_step == 2


def test_streams_whose_columns_are_not_known_mix():
    """As those of CSV files, or after a `map`."""
    parts = {
        name: Dataset.from_dict({"text": [name] * 4, "other": [1] * 4}).to_iterable_dataset().map(lambda row: row)
        for name in ("a", "b")
    }
    assert parts["a"].column_names is None, "else this test says nothing"
    assert sorted(row["text"] for row in mix_streams(parts, None, 0)) == ["a"] * 4 + ["b"] * 4
    parts = {"a": parts["a"].map(lambda row: {"words": "x"}, remove_columns=["text"])}
    with pytest.raises(ValueError, match=r"The dataset 'a' needs the columns .*; it has \['other', 'words'\]"):
        mix_streams(parts, None, 0)


def test_weights_may_be_json_as_on_a_command_line():
    config = CocoaReconstructionConfig("x", use_cpu=True, direction_weights='{"text_to_text": 1}')
    assert config.direction_weights == {"text_to_text": 1}
    with pytest.raises(ValueError, match="dataset_weights must be a JSON object"):
        CocoaReconstructionConfig("x", use_cpu=True, dataset_weights="a=1")


def test_evaluation_takes_datasets_and_nothing_else(tmp_path, model, processor, emoji):
    args = CocoaReconstructionConfig(
        str(tmp_path), use_cpu=True, report_to="none", check_data=False, disable_tqdm=True
    )
    rows = emoji.select_columns(["image", "text"]).select(range(4))
    trainer = CocoaReconstructionTrainer(model, args, train_dataset=rows, processing_class=processor)
    assert trainer.evaluate(rows)["eval_loss"] > 0
    with pytest.raises(ValueError, match="The evaluation data is of type list; give a Dataset"):
        CocoaReconstructionTrainer(model, args, eval_dataset=[{"text": "a"}], processing_class=processor)


@pytest.mark.parametrize("streamed", [False, True])
def test_columns_that_are_not_used_are_named_at_the_start(tmp_path, model, processor, emoji, caplog, streamed):
    """The commonest names on the Hub are `image` and `caption`; negatives of pairs are for another stage."""
    logging.getLogger("transformers").propagate = True
    rows = emoji.rename_column("text", "caption")
    names = [str(number) for number in range(64)]
    pairs = Dataset.from_dict({"query": names, "positive": names, "negative_1": names, "id": names})
    for data, unused in ((rows, ["twemoji", "caption"]), (pairs, ["id"]), ({"a": pairs, "b": pairs}, ["id"])):
        caplog.clear()
        if streamed:
            data = (
                {name: part.to_iterable_dataset() for name, part in data.items()}
                if isinstance(data, dict)
                else data.to_iterable_dataset()
            )
        args = CocoaReconstructionConfig(
            str(tmp_path), use_cpu=True, report_to="none", check_data=False, max_steps=1, stage="warmup"
        )
        CocoaReconstructionTrainer(copy.deepcopy(model), args, train_dataset=data, processing_class=processor)
        assert f"columns {unused} are not used; known are ['query', 'positive', 'image'," in caplog.text
        caplog.clear()
        known = data if isinstance(data, dict) else {"": data}
        used = {
            name: part.remove_columns([*unused, *(["negative_1"] if "id" in unused else [])])
            for name, part in known.items()
        }
        CocoaReconstructionTrainer(
            copy.deepcopy(model),
            args,
            train_dataset=used if isinstance(data, dict) else used[""],
            processing_class=processor,
        )
        assert "not used" not in caplog.text
