# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks.serve`: `cocoa serve` against a server that encodes each request by itself with stock
sentence-transformers, both on loopback, in one run.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from sentence_transformers import SentenceTransformer

from cocoa.serve.api import create_app
from modeling_cocoa import CocoaTransformer

from .models import device, make_texts, save_118m

CLIENTS = (1, 32)
REQUESTS = 96
ROUNDS = 3
RESULT = Path(__file__).parent / "results" / "serve.json"


def plain_app(model: SentenceTransformer) -> FastAPI:
    """A server that takes requests in turn and encodes each with `SentenceTransformer.encode`."""
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        text = (await request.json())["input"]

        def encode() -> list[float]:
            with lock:
                return model.encode([text], show_progress_bar=False)[0].tolist()

        return {"data": [{"embedding": await run_in_threadpool(encode)}]}

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of an application, run in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1/embeddings"
    finally:
        server.should_exit = True
        thread.join()


def ask(url: str, text: str) -> tuple[float, np.ndarray]:
    """Seconds of a request, and its vector."""
    start = time.perf_counter()
    request = urllib.request.Request(url, json.dumps({"input": text}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        vector = json.load(response)["data"][0]["embedding"]
    return time.perf_counter() - start, np.array(vector)


def load(url: str, clients: int, texts: list[str]) -> tuple[float, float, np.ndarray]:
    """Requests a second, median seconds of a request, and the vectors, with some clients at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds, vectors = zip(*pool.map(lambda text: ask(url, text), texts), strict=True)
    return len(texts) / (time.perf_counter() - start), statistics.median(seconds), np.stack(vectors)


def main() -> None:
    """Measure both servers in turn; print and write requests a second, medians, and the largest difference."""
    texts = make_texts(REQUESTS)
    with tempfile.TemporaryDirectory(prefix="cocoa-serve-") as scratch:
        folder = save_118m(Path(scratch) / "model")
        servers: dict[str, Callable[[], FastAPI]] = {
            "one request at a time": lambda: plain_app(SentenceTransformer(str(folder), device=device())),
            "cocoa serve": lambda: create_app(CocoaTransformer(str(folder)).to(device()), name="model"),
        }
        found: dict[str, dict[int, list[tuple[float, float]]]] = {name: {} for name in servers}
        vectors: dict[str, np.ndarray] = {}
        with served(servers["one request at a time"]()) as plain, served(servers["cocoa serve"]()) as ours:
            urls = {"one request at a time": plain, "cocoa serve": ours}
            for url in urls.values():
                load(url, 4, texts[:8])
            for _ in range(ROUNDS):
                for clients in CLIENTS:
                    for name, url in urls.items():
                        rate, median, vectors[name] = load(url, clients, texts)
                        found[name].setdefault(clients, []).append((rate, median))
    report: dict[str, Any] = {
        "device": device(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "requests": REQUESTS,
        "largest difference": float(np.abs(np.subtract(*vectors.values())).max()),
    }
    for name, runs in found.items():
        for clients, values in runs.items():
            rate, median = (statistics.median(numbers) for numbers in zip(*values, strict=True))
            report[f"{name}, {clients} clients"] = {"requests a second": rate, "median ms": 1000 * median}
            typer.echo(f"{name}, {clients} clients: {rate:.1f} requests a second, median {1000 * median:.1f} ms")
    typer.echo(f"largest difference of vectors: {report['largest difference']:.1e}")
    RESULT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
