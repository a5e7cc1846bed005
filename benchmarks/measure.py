# SPDX-License-Identifier: Apache-2.0
"""How a thing is measured: alternating runs, medians, peak memory."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .operations import matmul_rate


@dataclass
class Measured:
    """
    Repeated measurements of one thing.

    Args:
        seconds (`list[float]`): Of each run.
        peak (`float`): MiB by which memory rose in a run of its own.
    """

    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


class PeakMemory:
    """
    How far memory rises above what it was on entry; `mib` says it on leaving. On a CPU the kernel's own high-water
    mark is read, which only Linux lets one reset; elsewhere `mib` is not a number.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            # What the C library keeps for reuse would hide the next allocations.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._start = high_water_mark()
        return self

    def __exit__(self, *details: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.mib = (torch.cuda.max_memory_allocated() - self._start) / 2**20
        elif sys.platform == "linux":
            self.mib = (high_water_mark() - self._start) / 2**20
        else:
            self.mib = math.nan


def high_water_mark() -> int:
    """The most bytes that this process had in memory since the mark was reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def alternate(
    ways: dict[str, Callable[[], Any]],
    repeats: int,
    *,
    seconds: float = math.inf,
    rate: Callable[[], float] = matmul_rate,
) -> tuple[dict[str, Measured], float]:
    """
    Run several ways of doing one thing in turn, and the machine's matrix multiplication with them.

    Each runs once to warm up, once to measure its memory, then `repeats` times to measure its time.

    Args:
        ways (`dict[str, Callable]`).
        repeats (`int`).
        seconds (`float`, *optional*): After which no further round begins, but the first. Where it is given, a way
            warms up by the one run that measures its memory.
        rate (`Callable`): Measures the rate of matrix multiplication.

    Returns:
        `dict[str, Measured]`: By way; and the median rate of matrix multiplication between the runs, in operations a
        second.
    """
    results = {name: Measured() for name in ways}
    rates: list[float] = []
    start, is_brief = time.perf_counter(), seconds < math.inf
    for name, way in ways.items():
        if not is_brief:
            way()
        with PeakMemory() as memory:
            way()
        results[name].peak = memory.mib
        if not is_brief:
            way()  # finds again the memory that was given back
    for _ in range(repeats):
        if rates and time.perf_counter() - start > seconds:
            break
        rates.append(rate())
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            results[name].seconds.append(time.perf_counter() - begin)
    return results, statistics.median(rates)
