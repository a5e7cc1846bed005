# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: measure everything, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from modeling_cocoa.files import written_whole

from .compact import bench_compact
from .encode import bench_encode
from .evaluation import bench_evaluation
from .gradcache import bench_gradcache
from .growth import bench_growth
from .models import device, save_118m
from .photos import bench_photos
from .precision import bench_precision
from .train import bench_contrastive, bench_pretraining

TINY = Path(__file__).parents[1] / "checkpoints" / "cocoa-tiny"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "sentence-transformers")


def parts_of(folder: Path, items: int, rows: int, repeats: int) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    """What can be measured, by name: a title, and how."""
    return {
        "encode": ("118M parameters, encode", lambda: bench_encode(folder, items, repeats)),
        "encode-tiny": ("cocoa-tiny, encode", lambda: bench_encode(TINY, items, repeats)),
        "pretraining": ("118M parameters, bridge step", lambda: bench_pretraining(folder, rows, repeats)),
        "contrastive": ("118M parameters, contrastive step", lambda: bench_contrastive(folder, rows, repeats)),
        "gradcache": ("cocoa-tiny, memory of a contrastive step", lambda: alone(bench_gradcache, TINY)),
        "growth": ("118M parameters, growth", lambda: alone(bench_growth, folder, 2 * items, min(repeats, 3))),
        "photos": ("cocoa-tiny, memory by number of photos", lambda: bench_photos(TINY)),
        "evaluation": (
            "118M parameters, evaluation",
            lambda: bench_evaluation(folder, items // 2, min(repeats, 3)),
        ),
        "compact": ("cocoa-tiny, short and quantized vectors", lambda: bench_compact(TINY)),
        "precision": (
            "118M parameters (speed), cocoa-tiny (accuracy)",
            lambda: bench_precision(folder, TINY, items, repeats),
        ),
    }


def alone(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Do a work in a process of its own, whose memory no other work has parted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        return worker.submit(work, *arguments).result()


def measure(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A part to measure; may be given several times. One of {', '.join(parts_of(TINY, 0, 0, 0))}."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way, in turn; medians are reported.")] = 5,
    items: Annotated[int, typer.Option(min=12, help="Inputs of each workload.")] = 96,
    rows: Annotated[int, typer.Option(min=2, help="Rows (or pairs) of a training step.")] = 16,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers; by default by the device.")] = None,
) -> None:
    """
    Measure speed and memory against stock sentence-transformers and against the straightforward training step.

    Numbers of parts that are not measured stay in the file.
    """
    output = output or RESULTS / f"{device()}.json"
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        parts = parts_of(folder, items, rows, repeats)
        chosen = only or list(parts)
        if unknown := [part for part in chosen if part not in parts]:
            raise typer.BadParameter(f"there is no part {unknown[0]!r}; the parts are {', '.join(parts)}.")
        logging.disable_progress_bar()
        console = Console(width=180)
        save_118m(folder)
        report = json.loads(output.read_text()) if output.exists() else {}
        for part in chosen:
            title, run = parts[part]
            start = time.monotonic()
            with console.status(f"{title} ..."):
                numbers = run()
            report[part] = {
                "title": title,
                "settings": {"items": items, "rows": rows, "repeats": repeats},
                "machine": describe_machine(),
                "numbers": numbers,
            }
            show(console, title, numbers)
            console.print(f"[dim]{time.monotonic() - start:.0f} s[/dim]")
            output.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(output) as path:
                path.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"Numbers: {os.path.relpath(output)}")


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
