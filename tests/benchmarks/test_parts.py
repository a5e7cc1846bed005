# SPDX-License-Identifier: Apache-2.0
"""Parts of a measurement end in time and do not end each other; those of the published shapes compare what agrees."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.parts import Part, run_part
from benchmarks.shape_encode import encode_works
from benchmarks.shape_train import compare_gradients, make_step
from benchmarks.shapes import SMALL, build_models, creating
from benchmarks.tables import encode_tables, markdown
from modeling_cocoa import CocoaForReconstruction


def fails(error):
    raise error


def run(works, seconds=60.0):
    numbers, problems = {}, {}
    is_well = run_part(
        Part("a part", lambda: works, {}, seconds),
        lambda found, wrong: (numbers.update(found), problems.update(wrong)),
    )
    return numbers, problems, is_well


def test_what_lacks_memory_is_noted_and_the_rest_is_measured():
    works = [("a", lambda: fails(torch.OutOfMemoryError("of 80 GiB"))), ("b", lambda: {"group": {}})]
    numbers, problems, is_well = run(works)
    assert numbers == {"group": {}} and problems == {"a": "OutOfMemoryError: of 80 GiB"} and is_well


def test_a_failure_is_told_apart_from_want_of_memory():
    numbers, problems, is_well = run([("a", lambda: fails(ValueError("wrong"))), ("b", lambda: {"group": {}})])
    assert numbers and "ValueError: wrong" in problems["a"] and not is_well


def test_a_part_ends_in_time_with_what_it_has():
    works = [("a", lambda: {"group": {}}), ("b", lambda: time.sleep(60)), ("c", lambda: {"other": {}})]
    start = time.monotonic()
    numbers, problems, is_well = run(works, 6.0)
    assert time.monotonic() - start < 40 and is_well
    assert numbers == {"group": {}} and list(problems) == ["b"] and "after 6 seconds" in problems["b"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2-VL-2B", "Qwen2.5-VL-3B"])
def test_vectors_of_small_shapes_are_those_of_stock(name):
    numbers = {}
    for _, work in encode_works(SMALL, name, 1, 1.0):
        numbers |= work()
    assert len(numbers) == 5
    for ways in numbers.values():
        assert ways["CocoaTransformer"]["least cosine"] > 0.999
        assert ways["CocoaTransformer"]["least cosine, mean off"] > 0.99
    assert "image + text" in encode_tables(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["contrastive", "bridge", "warmup"])
def test_gradients_of_small_shapes_are_those_of_the_other_way(stage):
    models = build_models(SMALL.shapes["Qwen2-VL-2B"], torch.float32)
    with creating(torch.float32):
        model = CocoaForReconstruction(models.ours.model).train()
    make = lambda stage, rows: make_step(models, model, SMALL.sides[0], stage, rows)  # noqa: E731
    (found,) = compare_gradients(make, stage, 2, (torch.float32,)).values()
    assert found["float32"]["loss"] < 1e-4 and found["float32"]["worst matrix"] < 1e-3


def test_tables_say_what_stopped_a_part():
    group = {"CocoaTransformer": {"items a second": 2.0}}
    part = {
        "title": "A model, steps",
        "machine": {"device": "a GPU", "torch": "2"},
        "numbers": {
            "gradients, relative difference": {"float32": {"loss": 0.0, "gradients": 1e-6, "worst matrix": 1e-5}}
        },
        "stopped": {"bridge step": "OutOfMemoryError: of 80 GiB"},
    }
    text = markdown({"steps-2b": part, "growth": {"numbers": {"texts": group}}})
    assert "A model, steps, a GPU" in text and "bridge step: OutOfMemoryError" in text and "| 1e-05 |" in text
