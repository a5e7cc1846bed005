# SPDX-License-Identifier: Apache-2.0
"""Workers as actors of a Ray cluster."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from typing import Any

from .local import available_cores
from .ray_guard import MARK, start_guard
from .worker import Job, ShardWorker


class RayEngine:
    """
    An actor for each worker, on a cluster that runs or on one that is started here, of this machine alone.

    Args:
        job ([`Job`]): Its output must be a folder that all machines see.
        workers (`int`, *optional*): By default one a GPU, or else one a core of the cluster.
        threads (`int`, *optional*): By default the cores of the cluster, divided by the workers.
        address (`str`, *optional*): Of a running cluster, such as `ray://host:10001`.

    Attributes:
        workers, threads (`int`)

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at this address.
    """

    def __init__(
        self, job: Job, workers: int | None = None, threads: int | None = None, address: str | None = None
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ImportError(f'{error}. --engine ray needs an extra: pip install "cocoa-embed[ray]"') from error
        self.ray = ray
        self.job = job
        self.is_ours = not ray.is_initialized()
        self.guard = None
        if self.is_ours and address:
            ray.init(address=address, log_to_driver=False)
        elif self.is_ours:
            # Its workers are the work itself; Ray would rank them below everything else on the machine.
            os.environ.setdefault("RAY_worker_niceness", "0")
            os.environ[MARK] = mark = uuid.uuid4().hex
            self.guard = start_guard(mark)
            # Nothing but numbers of shards and exceptions goes through the object store.
            here = {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": 100 * 2**20}
            ray.init(address="local", log_to_driver=False, logging_level=logging.WARNING, **here)
            del os.environ[MARK]
        resources = ray.cluster_resources()
        cores, self.gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        self.workers = workers or self.gpus or (max(1, cores // threads) if threads else cores)
        self.threads = threads or max(1, cores // self.workers)
        options = {"num_cpus": 0 if self.gpus else min(self.threads, cores / self.workers)}
        self.actor = ray.remote(**options, num_gpus=min(1, self.gpus / self.workers))(ShardWorker)
        self.answers: dict[Any, Any] = {}

    def start(self) -> Any:
        """Start a worker, and have it load the model."""
        worker = self.actor.remote(self.job, self.threads)
        self.send(worker, None)
        return worker

    def send(self, worker: Any, shard: int | None) -> None:
        """Give a worker its next shard."""
        self.answers[worker.run.remote(shard)] = worker

    def wait(self) -> Iterator[tuple[Any, str, Any]]:
        """What workers have answered since the last call; those that have died answer `"died"`."""
        ready, _ = self.ray.wait(list(self.answers))
        for answer in ready:
            worker = self.answers.pop(answer)
            try:
                yield worker, *self.ray.get(answer)
            except self.ray.exceptions.RayTaskError as error:
                yield worker, "error", RuntimeError(str(error.cause))
            except self.ray.exceptions.RayError as error:
                yield worker, "died", str(error).splitlines()[0]

    def close(self) -> None:
        """End all workers at once, and the cluster, if it was started here."""
        for worker in set(self.answers.values()):
            self.ray.kill(worker)
        self.answers.clear()
        if self.is_ours:
            self.ray.shutdown()
        if self.guard:
            self.guard.stdin.close()
