# SPDX-License-Identifier: Apache-2.0
"""How fast a folder's loaders embed: stock sentence-transformers, remote code, and CocoaTransformer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from modeling_cocoa import CocoaTransformer

from .measure import alternate
from .models import device, make_workloads, save_118m
from .operations import embedding_operations

STOCK = "SentenceTransformer(folder)"
BATCH_SIZE = 16


def load_in_every_way(folder: Path, module: CocoaTransformer) -> dict[str, Callable[[list[Any]], np.ndarray]]:
    """Ways to embed with one folder, by the line that a user writes."""
    stock = SentenceTransformer(str(folder))
    remote = SentenceTransformer(str(folder), trust_remote_code=True)
    wrapped = SentenceTransformer(modules=[module])
    return {
        STOCK: partial(stock.encode, batch_size=BATCH_SIZE),
        "SentenceTransformer(folder, trust_remote_code=True)": partial(remote.encode, batch_size=BATCH_SIZE),
        "SentenceTransformer(modules=[CocoaTransformer(folder)])": partial(wrapped.encode, batch_size=BATCH_SIZE),
        "CocoaTransformer(folder)": module.encode,
    }


def bench_encode(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """
    Measure every loader on every workload.

    Returns:
        `dict`: By workload and loader, items a second, speed against the stock loader, share of the machine's rate of
        matrix multiplication (of the operations that real tokens need), peak memory, and the largest difference of a
        vector's entry from the stock loader's.
    """
    module = CocoaTransformer(folder).to(device())
    loaders = load_in_every_way(folder, module)
    report: dict[str, Any] = {}
    for workload, items in make_workloads(count).items():
        needed = embedding_operations(module.model, module.processor.preprocess(items))
        expected = loaders[STOCK](items)
        differences = {name: float(np.abs(loader(items) - expected).max()) for name, loader in loaders.items()}
        results, rate = alternate({name: partial(loader, items) for name, loader in loaders.items()}, repeats)
        report[workload] = {
            name: {
                "items a second": count / result.median,
                "against stock": results[STOCK].median / result.median,
                "share of matmul rate": needed / result.median / rate,
                "peak MiB": result.peak,
                "largest difference": differences[name],
            }
            for name, result in results.items()
        }
    return report


def bench_encode_qwen3(count: int, repeats: int) -> dict[str, Any]:
    """[`bench_encode`] of a Qwen3-VL with the same sizes."""
    with TemporaryDirectory() as folder:
        return bench_encode(save_118m(Path(folder), "qwen3_vl"), count, repeats)
