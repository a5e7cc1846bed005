# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow with the number of inputs and with their length."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from modeling_cocoa import CocoaTransformer

from .measure import alternate
from .models import WORDS, device, make_workloads
from .operations import embedding_operations

TIMES = (1, 2, 4)
TOKENS = (256, 512, 1024, 2048, 4096)


def bench_growth(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """
    Measure `CocoaTransformer.encode` on 1, 2 and 4 times as many inputs (each a new one), and on one text of up to
    4,096 tokens.

    Returns:
        `dict`: Seconds, share of the rate of matrix multiplication and peak memory, by number of inputs and by tokens.
    """
    module = CocoaTransformer(folder).to(device())
    overhead = len(module.processor.preprocess(["a"])[0]["input_ids"]) - 1
    works = {
        "inputs": {f"{times * count} inputs": make_workloads(times * count)["mixed list"] for times in TIMES},
        "length": {
            f"{tokens} tokens": [" ".join((WORDS * (tokens // len(WORDS) + 1))[: tokens - overhead])]
            for tokens in TOKENS
        },
    }
    report: dict[str, Any] = {}
    for kind, items in works.items():
        results, rate = alternate({name: partial(module.encode, part) for name, part in items.items()}, repeats)
        report[kind] = {
            name: {
                "seconds": result.median,
                "share of matmul rate": embedding_operations(module.model, module.processor.preprocess(items[name]))
                / result.median
                / rate,
                "peak MiB": result.peak,
            }
            for name, result in results.items()
        }
    return report
