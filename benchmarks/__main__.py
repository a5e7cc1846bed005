# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: measure everything, as a table and as JSON."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from modeling_cocoa.files import atomic_write

from .compact import bench_compact
from .embed import SHARD, bench_engines, bench_overhead, bench_peaks, bench_search
from .encode import bench_encode, bench_encode_qwen3
from .evaluation import bench_evaluation
from .gradcache import bench_gradcache
from .growth import bench_growth
from .models import device, save_118m
from .parts import Part, Work, run_part
from .photos import bench_photos
from .precision import bench_precision
from .shape_encode import encode_works
from .shape_train import step_works
from .shapes import PUBLISHED, SMALL, Scale, shared_processor
from .shortcuts import bench_shortcuts
from .train import bench_contrastive, bench_pretraining

TINY = Path(__file__).parents[1] / "checkpoints" / "cocoa-tiny"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "sentence-transformers")
EMBEDDED = 10_000
"""Inputs of a run of `cocoa embed`."""
BUILDING = 8
"""Seconds of a part that are left for building its models and stopping."""


def parts_of(folder: Path, items: int, rows: int, repeats: int) -> dict[str, Part]:
    """What can be measured of the small models, by name."""
    works: dict[str, tuple[str, Work]] = {
        "encode": ("118M parameters, encode", lambda: bench_encode(folder, items, repeats)),
        "encode-tiny": ("cocoa-tiny, encode", lambda: bench_encode(TINY, items, repeats)),
        "encode-qwen3": ("Qwen3-VL of 126M parameters, encode", lambda: bench_encode_qwen3(items, repeats)),
        "encode-shortcuts": ("encode without shortcuts", lambda: bench_shortcuts(folder, items, repeats)),
        "pretraining": ("118M parameters, bridge step", lambda: bench_pretraining(folder, rows, repeats)),
        "contrastive": ("118M parameters, contrastive step", lambda: bench_contrastive(folder, rows, repeats)),
        "gradcache": ("cocoa-tiny, memory of a contrastive step", lambda: alone(bench_gradcache, TINY)),
        "growth": ("118M parameters, growth", lambda: alone(bench_growth, folder, 2 * items, min(repeats, 3))),
        "photos": ("cocoa-tiny, memory by number of photos", lambda: bench_photos(TINY)),
        "evaluation": (
            "118M parameters, evaluation",
            lambda: bench_evaluation(folder, items // 2, min(repeats, 3)),
        ),
        "embed-texts": ("cocoa-tiny, cocoa embed, texts", lambda: bench_overhead(TINY, EMBEDDED, repeats, "texts")),
        "embed-images": ("cocoa-tiny, cocoa embed, images", lambda: bench_overhead(TINY, EMBEDDED, repeats, "images")),
        "embed-workers": ("cocoa-tiny, cocoa embed by workers", lambda: bench_engines(TINY, 8 * SHARD, repeats)),
        "embed-memory": ("cocoa-tiny, cocoa embed, memory", lambda: bench_peaks(TINY, (EMBEDDED, 4 * EMBEDDED))),
        "search": ("cocoa search", lambda: bench_search(100 * EMBEDDED, 512, min(repeats, 3))),
        "compact": ("cocoa-tiny, short and quantized vectors", lambda: bench_compact(TINY)),
        "precision": (
            "118M parameters (speed), cocoa-tiny (accuracy)",
            lambda: bench_precision(folder, TINY, items, repeats),
        ),
    }
    settings = {"items": items, "rows": rows, "repeats": repeats}
    return {
        name: Part(title, lambda title=title, work=work: [(title, work)], settings)
        for name, (title, work) in works.items()
    }


def shape_parts_of(scale: Scale, repeats: int) -> dict[str, Part]:
    """What can be measured of the published shapes, by name, the most worthwhile first."""
    settings = {**{name: value for name, value in vars(scale).items() if name != "shapes"}, "repeats": repeats}

    def part(
        works: Callable[..., Iterator[tuple[str, Work]]], name: str, title: str, seconds: float, *more: Any
    ) -> Part:
        limit = seconds if device() == "cuda" else math.inf
        return Part(
            f"{name}, {title}", partial(works, scale, name, *more, repeats, seconds - BUILDING), settings, limit
        )

    return {
        "encode-2b": part(encode_works, "Qwen2-VL-2B", "encode, bfloat16", 45),
        "steps-2b": part(step_works, "Qwen2-VL-2B", "steps of all weights, float32 with autocast", 45, False),
        "encode-7b": part(encode_works, "Qwen2-VL-7B", "encode, bfloat16", 60),
        "steps-7b": part(step_works, "Qwen2-VL-7B", "steps of LoRA over bfloat16, with autocast", 60, True),
        "encode-3b": part(encode_works, "Qwen2.5-VL-3B", "encode, bfloat16", 40),
        "encode-qwen3-2b": part(encode_works, "Qwen3-VL-2B", "encode, bfloat16", 40),
    }


def alone(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Do a work in a process of its own, whose memory no other work has parted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        return worker.submit(work, *arguments).result()


def measure(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A part to measure; may be given several times. By default on a CPU all of "
            f"{', '.join(parts_of(TINY, 0, 0, 0))}, and on a GPU {', '.join(shape_parts_of(PUBLISHED, 0))}."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way, in turn; medians are reported.")] = 5,
    items: Annotated[int, typer.Option(min=12, help="Inputs of each workload of the small models.")] = 96,
    rows: Annotated[int, typer.Option(min=2, help="Rows (or pairs) of a training step of the small models.")] = 16,
    small: Annotated[
        bool, typer.Option("--small", help="The parts of a GPU, with small shapes: a try that takes two minutes.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers; by default by the device.")] = None,
) -> None:
    """
    Measure speed and memory against stock sentence-transformers and against the straightforward training step.

    Numbers of parts that are not measured stay in the file. A part that runs out of time or memory keeps what it has;
    so does one that fails, but then the command does too, at the end.
    """
    on_gpu = device() == "cuda"
    output = output or (Path(gettempdir()) / "small.json" if small else RESULTS / f"{device()}.json")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        ours, shapes = (
            parts_of(folder, items, rows, repeats),
            shape_parts_of(SMALL if small else PUBLISHED, min(repeats, 3)),
        )
        parts = {**ours, **shapes}
        chosen = only or list(shapes if small or on_gpu else ours)
        if unknown := [part for part in chosen if part not in parts]:
            raise typer.BadParameter(f"there is no part {unknown[0]!r}; the parts are {', '.join(parts)}.")
        logging.disable_progress_bar()
        console = Console(width=180)
        if any(part in ours for part in chosen):
            save_118m(folder)
        if any(part in shapes for part in chosen):
            shared_processor("qwen2_vl")
        gc.collect()
        gc.freeze()  # the tokenizer's half a million objects need not be looked through before each measurement
        report = json.loads(output.read_text()) if output.exists() else {}
        is_well = all([measure_part(name, parts[name], report, output, console) for name in chosen])
    console.print(f"Numbers: {os.path.relpath(output)}")
    if not is_well:
        raise typer.Exit(1)


def measure_part(name: str, part: Part, report: dict[str, Any], output: Path, console: Console) -> bool:
    """Measure a part, put its numbers into the report and its file as they come, and say whether nothing failed."""
    start = time.monotonic()
    entry = {"title": part.title, "settings": part.settings, "machine": describe_machine(), "numbers": {}}

    def done(numbers: dict[str, Any], problems: dict[str, str]) -> None:
        entry["numbers"] |= numbers
        entry["seconds"] = time.monotonic() - start
        if problems:
            entry["stopped"] = {**entry.get("stopped", {}), **problems}
            for work, problem in problems.items():
                console.print(f"{part.title}, {work}: {problem}", markup=False)
        show(console, part.title, numbers)
        report[name] = entry
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")

    is_well = run_part(part, done)
    console.print(f"[dim]{part.title}: {time.monotonic() - start:.0f} s[/dim]")
    return is_well


def describe_machine() -> dict[str, Any]:
    """What was measured on."""
    name = torch.cuda.get_device_name() if device() == "cuda" else processor_name()
    packages = {package: version(package) for package in PACKAGES}
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **packages}


def processor_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(console: Console, title: str, numbers: dict[str, dict[str, dict[str, float]]]) -> None:
    """A table of each group of measurements."""
    for group, rows in numbers.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table = Table("", title=f"{title}: {group}", title_justify="left")
        for column in columns:
            table.add_column(column, justify="right")
        for row, values in rows.items():
            table.add_row(row, *(f"{values[column]:.3g}" if column in values else "" for column in columns))
        console.print(table)


if __name__ == "__main__":
    typer.run(measure)
