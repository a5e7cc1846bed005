# SPDX-License-Identifier: Apache-2.0
"""How fast models of the published shapes embed, against stock sentence-transformers, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling_cocoa import CocoaTransformer
from modeling_cocoa.encoding import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS

from .measure import alternate
from .models import device
from .operations import bfloat16_rate, embedding_operations
from .parts import Work
from .shapes import Models, Scale, build_models, shape_workloads

BATCH_SIZES = (32, 128)
"""Batch sizes of stock sentence-transformers: its default, and a large one."""
STOCK = "stock, batches of {}"
OURS = "CocoaTransformer"
MODEL = "its model alone"
READING = "its reading alone"
"""By `encode`, with next to no model behind it."""
PROCESSOR = "its processor alone"
"""In one thread, once."""


def encode_works(scale: Scale, name: str, repeats: int, seconds: float) -> Iterator[tuple[str, Work]]:
    """
    Measure each workload, in bfloat16.

    Args:
        scale ([`Scale`]).
        name (`str`): Of the shape.
        repeats (`int`): Runs of each way, fewer where time is short.
        seconds (`float`): Of all workloads together, nearly.
    """
    models = build_models(scale.shapes[name], torch.bfloat16)
    workloads = shape_workloads(scale)
    for workload, items in workloads.items():
        yield workload, partial(measure_workload, models, workload, items, repeats, seconds / (len(workloads) + 1))


def measure_workload(models: Models, workload: str, items: list[Any], repeats: int, seconds: float) -> dict[str, Any]:
    """
    Measure every loader on a workload, and ours by what it consists of.

    Returns:
        `dict`: By way, items and real tokens a second, share of the rate of bfloat16 matrix multiplication, peak
        memory above the weights; of loaders also the speed against the faster of the stock ones, and the smallest
        cosine of a vector with the first stock one's: as it is, and with the mean of all vectors taken off, since
        those of random weights are all alike (how much, says the mean cosine of two inputs).

    Raises:
        ValueError: a vector is not finite.
    """
    ours, vectors = models.ours, {}
    begin = time.perf_counter()
    rows = ours.processor.preprocess(items)
    seconds_read = time.perf_counter() - begin
    batches = list(prepared_batches(ours, rows))
    needed, tokens = embedding_operations(ours.model, rows), sum(len(row["input_ids"]) for row in rows)

    def kept(name: str, loader: Callable[[list[Any]], np.ndarray]) -> None:
        vectors[name] = loader(items)

    loaders = {STOCK.format(size): partial(models.stock.encode, batch_size=size) for size in BATCH_SIZES}
    stock = list(loaders)
    loaders[OURS] = ours.encode
    ways: dict[str, Callable[[], Any]] = {name: partial(kept, name, loader) for name, loader in loaders.items()}
    ways[MODEL] = partial(run_batches, ours, batches)
    ways[READING] = partial(models.reader.encode, items)
    results, rate = alternate(ways, repeats, seconds=seconds, rate=bfloat16_rate)
    best = min(results[name].median for name in stock)
    found: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        found[name] = {
            "items a second": len(items) / result.median,
            "tokens a second": tokens / result.median,
            "runs": len(result.seconds),
        }
        if name in (*loaders, MODEL):
            found[name]["share of matmul rate"] = needed / result.median / rate
            found[name]["peak MiB"] = result.peak
        if name in loaders:
            found[name] |= {"against stock": best / result.median, **compare(vectors[name], vectors[stock[0]])}
    found[PROCESSOR] = {
        "items a second": len(items) / seconds_read,
        "tokens a second": tokens / seconds_read,
        "runs": 1,
    }
    found[OURS]["matmul TFLOP/s"] = rate / 1e12
    return {workload: found}


def prepared_batches(module: CocoaTransformer, rows: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Rows on the device in batches of the tokens that `encode` takes, those of similar length together."""
    limit = CPU_BATCH_TOKENS if device() == "cpu" else GPU_BATCH_TOKENS
    batch: list[dict[str, Tensor]] = []
    for row in [*sorted(rows, key=lambda row: len(row["input_ids"])), None]:
        if batch and (row is None or sum(len(r["input_ids"]) for r in [*batch, row]) > limit):
            features = module.processor.collate(batch)
            yield {name: value.to(device()) for name, value in features.items() if not name.startswith("num_")}
            batch = []
        batch.append(row)


def run_batches(module: CocoaTransformer, batches: list[dict[str, Tensor]]) -> None:
    """Embed what lies on the device."""
    with torch.inference_mode():
        for batch in batches:
            module.model(**batch, eos_only=True).pooler_output.float().cpu()


def compare(vectors: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How like some vectors are to those that are expected, and these among themselves."""
    if not (np.isfinite(vectors).all() and np.isfinite(expected).all()):
        raise ValueError("Some vectors are not finite.")
    mean = expected.mean(0)
    unit = normalized(expected)
    count = len(unit)
    among = float((unit.sum(0) ** 2).sum() - count) / max(1, count * (count - 1))
    found = {"least cosine": float((normalized(vectors) * unit).sum(1).min()), "mean cosine of two inputs": among}
    if count > 1:
        found["least cosine, mean off"] = float(
            (normalized(vectors - mean) * normalized(expected - mean)).sum(1).min()
        )
    return found


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, float64."""
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
