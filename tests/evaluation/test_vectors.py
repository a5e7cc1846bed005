# SPDX-License-Identifier: Apache-2.0
"""Kept vectors: nothing computed twice, nothing lost, nothing taken for another."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

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
