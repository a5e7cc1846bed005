# SPDX-License-Identifier: Apache-2.0
"""Kept vectors: nothing computed twice, nothing lost, nothing taken for another."""

import copy
import hashlib
import os

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling

from evaluation import vectors
from evaluation.assets import asset_path
from evaluation.vectors import VectorStore, embed_missing, fingerprint
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.sentence_transformer import CocoaTransformer


def key(text):
    return hashlib.sha256(text.encode()).hexdigest()


class Counting:
    """Vectors that depend on the batch in their last bits, as a model's do."""

    def __init__(self, stop_after=None, bad=()):
        self.calls, self.stop_after, self.bad = [], stop_after, bad

    def __call__(self, inputs):
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        for position, text in enumerate(inputs):
            if text in self.bad:
                raise CocoaInputError("it is bad.", position)
        self.calls.append(list(inputs))
        return np.array([[len(text), int(key(text)[:4], 16), len(inputs)] for text in inputs], dtype=np.float32)


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK", 4)
    return {key(text): text for text in map(str, range(10))}


def embed(encode, inputs, folder, **options):
    store = VectorStore(folder)
    embed_missing(encode, inputs, store, title="test", show_progress_bar=False, **options)
    return store


def test_an_interruption_changes_no_bit(tmp_path, inputs):
    whole = embed(Counting(), inputs, tmp_path / "whole")[list(inputs)]
    with pytest.raises(KeyboardInterrupt):
        embed(Counting(stop_after=2), inputs, tmp_path / "parts")
    assert len(VectorStore(tmp_path / "parts")) == 8 and not list((tmp_path / "parts").glob(".partial*"))
    again = Counting()
    parts = embed(again, inputs, tmp_path / "parts")[list(inputs)]
    assert again.calls == [["8", "9"]]
    np.testing.assert_array_equal(parts, whole)


def test_processes_share_the_inputs_and_change_no_bit(tmp_path, inputs):
    whole = embed(Counting(), inputs, tmp_path / "whole")[list(inputs)]
    calls = []
    for index in range(2):
        counting = Counting()
        embed(counting, inputs, tmp_path / "shared", process_index=index, num_processes=2)
        calls.append(sum(map(len, counting.calls)))
    assert calls == [6, 4]
    np.testing.assert_array_equal(VectorStore(tmp_path / "shared")[list(inputs)], whole)


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: b"\0" + content[1:]])
def test_a_damaged_file_is_computed_again(tmp_path, inputs, damage, caplog):
    whole = embed(Counting(), inputs, tmp_path)[list(inputs)]
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    victim.write_bytes(damage(victim.read_bytes()))
    again = Counting()
    np.testing.assert_array_equal(embed(again, inputs, tmp_path)[list(inputs)], whole)
    assert len(again.calls) == 1 and "damaged" in caplog.text
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_every_process_gets_some_of_few_inputs(tmp_path):
    """Unless they are fewer than make a batch; and what is embedded together is the same for any number of them."""
    inputs = {key(text): text for text in map(str, range(1000))}
    calls = {}
    for count in (1, 4):
        calls[count] = []
        for index in range(count):
            counting = Counting()
            embed(counting, inputs, tmp_path / str(count), process_index=index, num_processes=count)
            calls[count].append(counting.calls)
    assert [sum(map(len, parts)) for parts in calls[4]] == [256, 256, 256, 232]
    assert sorted(sum(calls[4], [])) == sorted(calls[1][0])
    assert [vectors.chunk_size(inputs) for inputs in (1, 500, 1024, 8000, 10**6)] == [256, 256, 256, 500, 1024]


def test_a_file_that_another_process_is_writing_is_left_alone(tmp_path, inputs, monkeypatch, caplog):
    """And so is what a killed one left behind."""
    left = tmp_path / f".partial-1-{'0' * 40}.safetensors"
    left.write_bytes(b"half of it")
    replace, seen = os.replace, []

    def replace_later(partial, path):
        seen.append(len(VectorStore(tmp_path)))  # another process opens the folder now
        assert str(os.getpid()) in partial.name
        replace(partial, path)

    monkeypatch.setattr(os, "replace", replace_later)
    store = embed(Counting(), inputs, tmp_path)
    assert seen == [0, 4, 8] and len(store) == len(VectorStore(tmp_path)) == 10
    assert left.is_file() and not caplog.text


def test_bad_inputs_are_named_or_skipped(tmp_path, inputs):
    with pytest.raises(CocoaInputError, match="Item 6: it is bad"):
        embed(Counting(bad={"6", "7"}), inputs, tmp_path / "raise")
    skipped = {}

    def readable(text):
        if text in ("5", "6"):
            raise CocoaInputError("it is bad.")

    counting = Counting(bad={"5", "6", "9"})
    store = embed(counting, inputs, tmp_path / "skip", skip=skipped.__setitem__, readable=readable)
    assert skipped == dict.fromkeys(("5", "6", "9"), "it is bad.") and len(store) == 7
    assert counting.calls == [["0", "1", "2", "3"], ["4", "7"], ["8"]]


def test_a_vector_that_is_no_number_is_not_kept(tmp_path, inputs):
    with pytest.raises(ValueError, match="not numbers"):
        embed(lambda texts: np.full((len(texts), 2), np.nan), inputs, tmp_path)
    assert not len(VectorStore(tmp_path))


@pytest.fixture(scope="module")
def module():
    return CocoaTransformer(str(asset_path("checkpoints/cocoa-tiny")))


def test_a_fingerprint_is_of_all_that_decides_the_vectors(module):
    known = fingerprint(module)
    assert known == fingerprint(copy.deepcopy(module)), "and of nothing else"

    def changed(change):
        other = copy.deepcopy(module)
        change(other)
        return fingerprint(other)

    def weight(other):
        with torch.no_grad():
            other.model.language_model.norm.weight[0] += 1e-3

    changes = {
        "weight": weight,
        "dtype": lambda other: other.model.to(torch.bfloat16),
        "length": lambda other: setattr(other.tokenizer, "model_max_length", 9),
        "pixels": lambda other: (
            other.processor.image_processor.size.update(longest_edge=1024)
            if isinstance(other.processor.image_processor.size, dict)
            else setattr(other.processor.image_processor.size, "longest_edge", 1024)
        ),
        "causal": lambda other: setattr(other.model.config.get_text_config(), "is_causal", True),
        "prompt": lambda other: setattr(other.processor, "prompt", "Find it."),
    }
    found = {name: changed(change) for name, change in changes.items()}
    assert len({known, *found.values()}) == len(found) + 1, {name: value == known for name, value in found.items()}


def test_a_fingerprint_of_a_stock_model_sees_pooling_and_sizes():
    path = str(asset_path("checkpoints/cocoa-tiny"))
    known, same, mean, short = (SentenceTransformer(path, device="cpu") for _ in range(4))
    mean[1].pooling_mode = "mean"
    short.max_seq_length = 9
    assert fingerprint(known) == fingerprint(same)
    assert len({fingerprint(known), fingerprint(mean), fingerprint(short)}) == 3


def test_a_fingerprint_of_a_stock_model_sees_all_that_its_modules_save():
    """How they process inputs, how long a vector is, and what is within a router."""
    path = str(asset_path("checkpoints/cocoa-tiny"))
    model = SentenceTransformer(path, device="cpu")
    known = fingerprint(model)
    changes = (
        ("processing_kwargs", {"image": {"do_normalize": False}}),
        ("processing_kwargs", {"text": {"max_length": 4}}),
        ("modality_config", {"text": model[0].modality_config["text"]}),
    )
    found = set()
    for name, value in changes:
        before = getattr(model[0], name)
        setattr(model[0], name, value)
        found.add(fingerprint(model))
        setattr(model[0], name, before)
    model.truncate_dim = 8
    found.add(fingerprint(model))
    model.truncate_dim = None
    assert fingerprint(model) == known and len({known, *found}) == 5

    def routed(*modes):
        routes = {name: [model[0], Pooling(192, pooling_mode=mode)] for name, mode in zip("ab", modes, strict=True)}
        return fingerprint(SentenceTransformer(modules=[Router(routes, default_route="a")], device="cpu"))

    assert len({routed("mean", "cls"), routed("cls", "mean"), routed("cls", "cls")}) == 3
    assert routed("cls", "mean") == routed("cls", "mean")
