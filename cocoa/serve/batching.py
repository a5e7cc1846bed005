# SPDX-License-Identifier: Apache-2.0
"""Inputs of requests that arrive at the same time, embedded together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modeling_cocoa import CocoaTransformer
from modeling_cocoa.encoding import Embedder, Window

READERS = 2
"""Threads that read requests while the model works."""
WAIT = 0.003
"""Seconds that a batch waits for requests that are being read; with none of these, it does not wait."""

Entry = tuple[dict[str, Tensor], "asyncio.Future[Tensor]"]
"""An input as the processor gives it, and what waits for its vector."""


class QueueFull(Exception):
    """More inputs wait than the server takes."""


class Batcher:
    """
    Embeds inputs of concurrent requests in batches of up to `batch_num_tokens` tokens, first come, first served.

    Requests are read in threads of their own, so that an input that cannot be read fails its request alone. While the
    model computes a batch, the next one collects.

    Args:
        module ([`CocoaTransformer`]): The model, on its device.
        batch_num_tokens (`int`): Tokens of a batch; an input that is longer makes one alone.
        max_queue (`int`): Inputs that may be read, wait or be computed at a time.
    """

    def __init__(self, module: CocoaTransformer, *, batch_num_tokens: int, max_queue: int) -> None:
        self.module = module.eval()
        self.embedder = Embedder(module.model, module.processor, batch_num_tokens)
        self.max_queue = max_queue
        self.taken = 0
        self.reading = 0
        self.rows: deque[Entry] = deque()
        self.arrived = asyncio.Event()
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher:
        self.task = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()
        self.readers.shutdown()
        self.worker.shutdown()

    async def embed(self, inputs: Sequence[Any], prompt: str | None = None) -> tuple[Tensor, int]:
        """
        Embed the inputs of a request.

        Args:
            inputs (`Sequence`): As [`CocoaProcessor`] takes them.
            prompt (`str`, *optional*): Their instruction.

        Returns:
            `tuple[Tensor, int]`: Unit vectors `(inputs, hidden)` in float32, and the number of tokens.

        Raises:
            QueueFull: too many inputs wait.
            CocoaInputError: an input cannot be embedded.
        """
        if self.taken + len(inputs) > self.max_queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        self.taken += len(inputs)
        try:
            self.reading += 1
            try:
                read = partial(self.module.processor.preprocess, inputs, prompt=prompt)
                rows = await loop.run_in_executor(self.readers, read)
            finally:
                self.reading -= 1
                self.arrived.set()
            futures = [loop.create_future() for _ in rows]
            self.rows.extend(zip(rows, futures, strict=True))
            try:
                vectors = torch.stack(await asyncio.gather(*futures))
            finally:
                for future in futures:  # after an error, or for a client that has gone, the others need no vector
                    future.cancel()
        finally:
            self.taken -= len(inputs)
        return vectors, sum(len(row["input_ids"]) for row in rows)

    async def work(self) -> None:
        """Compute batches as long as the server runs."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            while self.rows:
                if self.reading and self.tokens() < self.embedder.batch_num_tokens:
                    await asyncio.sleep(WAIT)
                if batch := self.take():
                    await self.answer(batch)

    async def answer(self, batch: list[Entry]) -> None:
        """Compute a batch; where that fails, each of its rows alone, so that an error is the answer of one."""
        try:
            rows = [row for row, _ in batch]
            vectors = await asyncio.get_running_loop().run_in_executor(self.worker, self.compute, rows)
        except Exception as error:  # whatever it is, the next requests are served
            if len(batch) > 1:
                for entry in batch:
                    await self.answer([entry])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for vector, (_, future) in zip(vectors, batch, strict=True):
            if not future.done():
                future.set_result(vector)

    def tokens(self) -> int:
        """Tokens that wait."""
        return sum(len(row["input_ids"]) for row, _ in self.rows)

    def take(self) -> list[Entry]:
        """The next batch, without what nobody waits for any more."""
        batch, tokens = [], 0
        while self.rows:
            size = len(self.rows[0][0]["input_ids"])
            if batch and tokens + size > self.embedder.batch_num_tokens:
                break
            entry = self.rows.popleft()
            if not entry[1].done():
                batch.append(entry)
                tokens += size
        return batch

    @torch.inference_mode()
    def compute(self, rows: list[dict[str, Tensor]]) -> Tensor:
        """Unit vectors of some rows, float32 on the CPU."""
        images = {
            place: [f"{place} {number}".encode() for number in range(len(row.get("image_grid_thw", ())))]
            for place, row in enumerate(rows)
        }
        window = Window(rows={place: dict(row) for place, row in enumerate(rows)}, images=images)
        self.embedder.features.clear()
        self.embedder.encode_images(window)
        self.embedder.embed_window(window, None, lambda count: None)
        vectors = torch.empty(len(rows), self.module.get_embedding_dimension())
        window.write_to(vectors)
        return vectors
