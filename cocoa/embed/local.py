# SPDX-License-Identifier: Apache-2.0
"""Workers as processes of this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any

from ..quiet import hide_lines
from .worker import Job, ShardWorker

SECONDS_TO_END = 5
"""What a worker has for it when it is told to."""


class LocalEngine:
    """
    A process for each worker, which ends when its parent does.

    Args:
        job ([`Job`]).
        workers (`int`, *optional*): By default one a GPU, or else one a core, as many as memory has room for.
        threads (`int`, *optional*): By default the cores of the machine, divided by the workers.

    Attributes:
        workers, threads (`int`)
    """

    def __init__(self, job: Job, workers: int | None = None, threads: int | None = None) -> None:
        import torch

        self.job = job
        self.gpus = torch.cuda.device_count()
        cores = available_cores()
        if workers is None:
            workers = self.gpus or (max(1, cores // threads) if threads else min(cores, models_that_fit(job.model)))
        self.workers = workers
        self.threads = threads or max(1, cores // workers)
        self.processes: dict[Connection, Any] = {}
        self.started = 0

    def start(self) -> Connection:
        """Start a worker, and have it load the model."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        device = f"cuda:{self.started % self.gpus}" if self.gpus else "cpu"
        self.started += 1
        process = context.Process(target=serve, args=(theirs, self.job, self.threads, device), daemon=True)
        process.start()
        theirs.close()
        self.processes[ours] = process
        self.send(ours, None)
        return ours

    def send(self, worker: Connection, shard: int | None) -> None:
        """Give a worker its next shard."""
        try:
            worker.send(shard)
        except OSError:  # it has died, which `wait` finds
            pass

    def wait(self) -> Iterator[tuple[Connection, str, Any]]:
        """What workers have answered since the last call; those that have died answer `"died"`."""
        for worker in wait(list(self.processes)):
            try:
                yield worker, *worker.recv()
            except (EOFError, OSError):
                process = self.processes.pop(worker)
                process.join()
                yield worker, "died", f"exit code {process.exitcode}"

    def close(self) -> None:
        """End all workers at once, whatever they do."""
        for process in self.processes.values():
            process.terminate()
        for worker, process in self.processes.items():
            process.join(SECONDS_TO_END)
            process.kill()
            process.join()
            worker.close()
        self.processes.clear()


def serve(connection: Connection, job: Job, threads: int, device: str) -> None:
    """Answer the parent until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that half a file is removed
    Thread(target=end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
    hide_lines()  # a process of ours alone
    worker = ShardWorker(job, threads, device)
    while True:
        try:
            shard = connection.recv()
        except EOFError:
            return
        connection.send(worker.run(shard))


def end_with_parent() -> None:
    """End this process, whatever it does, when its parent is killed."""
    wait([parent_process().sentinel])
    os._exit(1)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def models_that_fit(model: str) -> int:
    """How many copies of a model half of the free memory has room for, each with a GiB to work in."""
    from pathlib import Path

    import psutil

    from modeling_cocoa.checkpoint_files import find_checkpoint_file

    config = find_checkpoint_file(model, "config.json")
    weights = sum(path.stat().st_size for path in Path(config).parent.glob("*.safetensors")) if config else 0
    return max(1, int(psutil.virtual_memory().available / 2 / (weights + 2**30)))
