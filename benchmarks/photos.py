# SPDX-License-Identifier: Apache-2.0
"""How the peak memory of a process grows with the number of photos that it embeds, or collates to train on."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from modeling_cocoa import CocoaTransformer
from trainers.data.collators import ReconstructionCollator
from trainers.data.contrastive_rows import ContrastiveCollator

from .measure import high_water_mark

PHOTOS = (60, 240)
SIDES = (3000, 2000)
"""Pixels of a photo: 6 megapixels."""
WAYS = ("CocoaTransformer.encode", "contrastive collator", "pre-training collator")


def bench_photos(
    model: Path,
    photos: Iterable[int] = PHOTOS,
    sides: tuple[int, int] = SIDES,
    ways: Iterable[str] = WAYS,
) -> dict[str, dict[str, dict[str, float]]]:
    """
    Measure each way in a process of its own, once for each number of photos.

    Args:
        model (`Path`): Checkpoint.
        photos (`Iterable[int]`): How many; each is another one.
        sides (`tuple[int, int]`): Their width and height.
        ways (`Iterable[str]`): Which of [`WAYS`].

    Returns:
        `dict`: For each way and number of photos, the peak of the process in MiB and the peak against the first
        number's.
    """
    photos = tuple(photos)
    report: dict[str, dict[str, dict[str, float]]] = {}
    with TemporaryDirectory() as folder:
        write_photos(Path(folder), max(photos), sides)
        for way in ways:
            report[way] = {}
            for count in photos:
                # A fresh process each: the high-water mark of one never falls.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
                    peak = worker.submit(peak_memory, model, Path(folder), count, way).result()
                first = next(iter(report[way].values()), {"peak MiB": peak})["peak MiB"]
                report[way][f"{count} photos"] = {"peak MiB": peak, f"against {photos[0]} photos": peak / first}
    return report


def write_photos(folder: Path, count: int, sides: tuple[int, int]) -> None:
    """Photos of blurred noise, each another one."""
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(sides).save(folder / f"{number}.jpg")


def peak_memory(model: Path, folder: Path, count: int, way: str) -> float:
    """The most memory in MiB that this process had, after it has gone through so many photos in one of [`WAYS`]."""
    module = CocoaTransformer(model)
    cells = [{"bytes": None, "path": str(folder / f"{number}.jpg")} for number in range(count)]
    if way == "CocoaTransformer.encode":
        module.encode(cells)
    elif way == "contrastive collator":
        ContrastiveCollator(module.preprocess)([{"query": "a photo", "positive": cell} for cell in cells])
    else:
        collator = ReconstructionCollator(module.processor, stage="warmup")
        collator([{"image": cell, "index": number, "seed": number} for number, cell in enumerate(cells)])
    return high_water_mark() / 2**20  # `ru_maxrss` would be no less than that of the process that started this one
