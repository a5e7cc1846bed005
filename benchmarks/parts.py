# SPDX-License-Identifier: Apache-2.0
"""Parts of a measurement, each within its time, whose end by an error does not end the others."""

from __future__ import annotations

import gc
import math
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], dict[str, Any]]
"""Measures something: numbers by group, row and column."""


class TimeLimitError(BaseException):
    """A part's time is over. No `Exception`, so that nobody takes it for a failure of his own and goes on."""


@dataclass
class Part:
    """
    Something to measure.

    Args:
        title (`str`).
        works (`Callable`): Gives works by name, each done before the next is asked for.
        settings (`dict`): What is written beside the numbers.
        seconds (`float`): After which the part is stopped.
    """

    title: str
    works: Callable[[], Iterable[tuple[str, Work]]]
    settings: dict[str, Any]
    seconds: float = math.inf


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise [`TimeLimitError`] in the main thread after so many seconds, where the system has alarms."""
    if seconds == math.inf or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*details: Any) -> None:
        raise TimeLimitError(f"stopped after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(part: Part, done: Callable[[dict[str, Any], dict[str, str]], None]) -> bool:
    """
    Do the works of a part.

    Args:
        part ([`Part`]).
        done (`Callable`): Called after each work with its numbers, and with what stopped it, by its name.

    Returns:
        `bool`: Whether nothing failed but for want of time or memory.
    """
    is_well, name = True, "preparation"

    def note(error: BaseException) -> None:
        nonlocal is_well
        if isinstance(error, (TimeLimitError, torch.OutOfMemoryError)):
            done({}, {name: f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            return
        is_well = False
        done({}, {name: traceback.format_exc(limit=-6)})

    try:
        with time_limit(part.seconds):
            works = iter(part.works())
            while (found := next(works, None)) is not None:
                name, work = found
                try:
                    done(work(), {})
                except Exception as error:
                    note(error)
                name = "preparation"
                del work, found
                free_memory()
    except (Exception, TimeLimitError) as error:
        note(error)
    works = found = work = None  # what they hold must not stay in memory while the next part runs
    free_memory()
    return is_well


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
