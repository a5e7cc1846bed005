# SPDX-License-Identifier: Apache-2.0
"""Kept vectors: nothing computed twice, nothing lost, nothing taken for another."""

import hashlib
import os

import numpy as np
import pytest

from evaluation import vectors
from evaluation.vectors import VectorStore, embed_missing
from modeling_cocoa.inputs import CocoaInputError


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
    counting = Counting(bad={"5", "6", "9"})
    store = embed(counting, inputs, tmp_path / "skip", skip=skipped.__setitem__)
    assert skipped == dict.fromkeys(("5", "6", "9"), "it is bad.") and len(store) == 7
    assert counting.calls == [["0", "1", "2", "3"], ["4"], ["7"], ["8"]]
    again = Counting(bad={"5", "6", "9"})
    embed(again, inputs, tmp_path / "skip", skip=skipped.__setitem__)
    assert not again.calls, "what stands beside a bad input is kept too"


def test_a_vector_that_is_no_number_is_not_kept(tmp_path, inputs):
    with pytest.raises(ValueError, match="not numbers"):
        embed(lambda texts: np.full((len(texts), 2), np.nan), inputs, tmp_path)
    assert not len(VectorStore(tmp_path))
