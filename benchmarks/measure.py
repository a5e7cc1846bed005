# SPDX-License-Identifier: Apache-2.0
"""How a thing is measured: alternating runs, medians, peak memory."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .operations import matmul_rate

PAGE = os.sysconf("SC_PAGE_SIZE")


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
    """Watches, every few milliseconds, how far memory rises above what it was on entry; `mib` says it on leaving."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            # What the C library keeps for reuse would hide the next allocations.
            ctypes.CDLL(None).malloc_trim(0)
            self._start = self._most = resident()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, resident())

    def __exit__(self, *details: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()
            peak = self._most
        self.mib = max(0, peak - self._start) / 2**20


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def alternate(ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Measured], float]:
    """
    Run several ways of doing one thing in turn, and the machine's matrix multiplication with them.

    Each runs once to warm up, once to measure its memory, then `repeats` times to measure its time.

    Returns:
        `dict[str, Measured]`: By way; and the median rate of matrix multiplication between the runs, in operations a
        second.
    """
    results = {name: Measured() for name in ways}
    rates: list[float] = []
    for name, way in ways.items():
        way()
        with PeakMemory() as memory:
            way()
        results[name].peak = memory.mib
        way()  # finds again the memory that was given back
    for _ in range(repeats):
        rates.append(matmul_rate())
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            results[name].seconds.append(time.perf_counter() - start)
    return results, statistics.median(rates)
