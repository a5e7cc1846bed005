# SPDX-License-Identifier: Apache-2.0
"""`cocoa embed` against what it is made of: `encode` alone, bare processes, and its own engines against each other."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cocoa.embed.embedder import DTYPES, convert
from cocoa.embed.local import LocalEngine
from cocoa.embed.output import TYPES, Output
from cocoa.embed.plan import Plan, make_plan
from cocoa.embed.ray_engine import RayEngine
from cocoa.embed.run import embed_dataset
from cocoa.embed.search import nearest
from cocoa.embed.source import find_source
from cocoa.embed.worker import Job, ShardWorker
from modeling_cocoa import CocoaTransformer

from .measure import alternate, high_water_mark
from .models import make_texts

SIDE = 56
SHARD = 1024


def write_texts(folder: Path, count: int) -> str:
    """Distinct texts as a parquet file."""
    texts = [f"{text} {number}" for number, text in enumerate(make_texts(count))]
    pq.write_table(pa.table({"id": range(count), "text": texts}), folder / "texts.parquet", row_group_size=SHARD)
    return str(folder / "texts.parquet")


def write_images(folder: Path, count: int) -> str:
    """Distinct images as a folder of PNG files."""
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        few = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(few).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(
            folder / "images" / f"{number:06d}.png"
        )
    return str(folder / "images")


def job_of(model: str, source: str, folder: Path) -> Job:
    """A job whose output is planned."""
    folder.mkdir(exist_ok=True)
    job = Job(find_source(source), Output(folder, "parquet"), model, "document", "float32", None, "error")
    make_plan(job.source, folder, SHARD)
    return job


def inputs_of(source: str) -> list[Any]:
    """The inputs of a source, as a user would give them to `encode`."""
    if source.endswith(".parquet"):
        return [{"text": text} for text in pq.read_table(source)["text"].to_pylist()]
    return [{"image": str(path)} for path in sorted(Path(source).iterdir())]


def bench_overhead(model: Path, count: int, repeats: int, kind: str) -> dict[str, Any]:
    """
    CPU seconds of a worker's shards, and of `encode` on the same inputs with the same model, in turn; of `"texts"` or
    `"images"`.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = {"texts": write_texts, "images": write_images}[kind](folder, count)
        worker = ShardWorker(job_of(str(model), source, folder / "out"), torch.get_num_threads())
        worker.load()
        inputs, module = inputs_of(source), worker.embedder.module
        shards = range(len(Plan(worker.job.output.folder)))

        def embed() -> None:
            for shard in shards:
                worker.job.output.path(shard).unlink(missing_ok=True)
                worker.embed(shard)

        module.encode(inputs[:SHARD])
        seconds = [(cpu_seconds(lambda: module.encode(inputs)), cpu_seconds(embed)) for _ in range(repeats)]
    bare, ours = (statistics.median(values) for values in zip(*seconds, strict=True))
    numbers = {
        "encode: CPU seconds": bare,
        "embed: CPU seconds": ours,
        "median ratio": statistics.median(of_embed / of_encode for of_encode, of_embed in seconds),
    }
    return {"overhead over encode": {f"{count} {kind}": numbers}}


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this process, of all its threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def bench_engines(model: Path, count: int, repeats: int, workers: int = 2) -> dict[str, Any]:
    """Inputs a second of bare processes that encode a part each, of local processes and of actors of Ray, in turn."""
    seconds: dict[str, list[float]] = {"bare processes": [], "local": [], "ray": []}
    with TemporaryDirectory() as scratch:
        source = write_images(Path(scratch), count)
        job = job_of(str(model), source, Path(scratch) / "out")
        local, ray = LocalEngine(job, workers), RayEngine(job, workers)
        bare = Bare(str(model), inputs_of(source), workers, local.threads)
        try:
            engines = {"local": (local, started(local)), "ray": (ray, started(ray))}
            for turn in range(repeats + 1):
                found = {"bare processes": bare.run()}
                for name, (engine, held) in engines.items():
                    found[name] = run_engine(job, engine, held)
                if turn:  # the first warms up
                    for name, value in found.items():
                        seconds[name].append(value)
        finally:
            local.close()
            ray.close()
            bare.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = {name: {"inputs a second": count / value} for name, value in medians.items()}
    pairs = {"local": "bare processes", "ray": "local"}
    for name, base in pairs.items():
        ratios = [reference / value for reference, value in zip(seconds[base], seconds[name], strict=True)]
        rows[name][f"of {base}, median of pairs"] = statistics.median(ratios)
    return {f"{workers} workers with {local.threads} threads each, {count} images": rows}


def started(engine: Any) -> list[Any]:
    """Workers of an engine, their models loaded."""
    held = [engine.start() for _ in range(engine.workers)]
    ready = 0
    while ready < len(held):
        for _, kind, value in engine.wait():
            if kind != "ready":
                raise RuntimeError(f"{kind}: {value}")
            ready += 1
    return held


def run_engine(job: Job, engine: Any, held: list[Any]) -> float:
    """Seconds in which the workers of an engine embed all shards."""
    plan = Plan(job.output.folder)
    pending = list(range(len(plan)))
    for shard in pending:
        job.output.path(shard).unlink(missing_ok=True)
    start = time.perf_counter()
    for worker in held:
        engine.send(worker, pending.pop(0))
    running = len(held)
    while running:
        for worker, kind, value in engine.wait():
            if kind != "done":
                raise RuntimeError(f"{kind}: {value}")
            if pending:
                engine.send(worker, pending.pop(0))
            else:
                running -= 1
    return time.perf_counter() - start


class Bare:
    """Processes that do nothing but encode a part of the inputs each."""

    def __init__(self, model: str, inputs: list[Any], workers: int, threads: int) -> None:
        context = get_context("spawn")
        self.pipes, self.processes = [], []
        for number in range(workers):
            ours, theirs = context.Pipe()
            arguments = (theirs, model, inputs[number::workers], threads)
            self.processes.append(process := context.Process(target=encode_when_told, args=arguments, daemon=True))
            process.start()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()

    def run(self) -> float:
        """Seconds until all have encoded their part."""
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()
        return time.perf_counter() - start

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def encode_when_told(pipe: Connection, model: str, inputs: list[Any], threads: int) -> None:
    """What a bare process does."""
    torch.set_num_threads(threads)
    module = CocoaTransformer(model).eval()
    pipe.send(True)
    while True:
        pipe.recv()
        module.encode(inputs)
        pipe.send(True)


def bench_peaks(model: Path, counts: tuple[int, ...]) -> dict[str, Any]:
    """Peak memory of the driver and of its worker, by number of rows; each in a fresh process."""
    rows = {}
    with TemporaryDirectory() as scratch:
        for count in counts:
            folder = Path(scratch) / str(count)
            folder.mkdir()
            source = write_images(folder, count)
            ours, theirs = get_context("spawn").Pipe()
            process = get_context("spawn").Process(
                target=peaks, args=(theirs, str(model), source, str(folder / "out"))
            )
            process.start()
            driver, worker = ours.recv()
            process.join()
            rows[f"{count} images"] = {"driver: MiB": driver / 2**20, "worker: MiB": worker / 2**20}
    return {"peak memory": rows}


def peaks(pipe: Connection, model: str, source: str, output: str) -> None:
    """What a process does whose memory is measured: bytes of itself and of its worker."""
    embed_dataset(source, model, output, workers=1, show_progress_bar=False)
    pipe.send((high_water_mark(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))


def bench_search(count: int, dim: int, repeats: int) -> dict[str, Any]:
    """Seconds of a search among random vectors of each type, and what it adds to memory."""
    rows, generator = {}, np.random.default_rng(0)
    for dtype in DTYPES:
        with TemporaryDirectory() as scratch:
            output, shards = Output(Path(scratch), "parquet"), -(-count // SHARD)
            for shard in range(shards):
                vectors = generator.standard_normal((min(SHARD, count - shard * SHARD), dim), dtype=np.float32)
                vectors = convert(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype)
                kind = pa.list_(TYPES[dtype], vectors.shape[1])
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=kind)
                output.write(shard, pa.table({"embedding": column}), {})
            query = generator.standard_normal(dim, dtype=np.float32)
            query /= np.linalg.norm(query)
            search = partial(nearest, output, shards, query, 10, dtype == "binary")
            results, _ = alternate({"search": search}, repeats)
            size = sum(path.stat().st_size for path in Path(scratch).iterdir())
            measured = {"seconds": results["search"].median, "peak MiB": results["search"].peak}
            rows[dtype] = {**measured, "files: MiB": size / 2**20}
    return {f"search among {count} vectors of {dim} numbers": rows}
