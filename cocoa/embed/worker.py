# SPDX-License-Identifier: Apache-2.0
"""What every worker of every engine does: embed one shard of a source into one file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .output import Output, schema_of, table_of
from .plan import Plan, digest_of
from .source import Source


@dataclass(frozen=True)
class Job:
    """
    All that a worker has to know.

    Args:
        source ([`Source`]), output ([`Output`]).
        model (`str`), prompt_name, dtype, truncate_dim: As in [`CocoaEmbedder`].
        on_bad_row (`str`): `"skip"` or `"error"`.
    """

    source: Source
    output: Output
    model: str
    prompt_name: str
    dtype: str
    truncate_dim: int | None
    on_bad_row: str


class ShardWorker:
    """
    Holds a model and embeds shards, one at a time. An engine runs several, each in a process of its own.

    Args:
        job ([`Job`]).
        threads (`int`): Of the CPU.
        device (`str`, *optional*): By default a GPU, where there is one.
    """

    def __init__(self, job: Job, threads: int, device: str | None = None) -> None:
        self.job = job
        self.threads = threads
        self.device = device

    def run(self, shard: int | None) -> tuple[str, Any]:
        """
        Load the model, or embed a shard.

        Args:
            shard (`int`, *optional*): Its number; none to load the model.

        Returns:
            `"ready"` and what [`CocoaEmbedder.describe`] gives; `"done"` and the number of rows; or `"error"` and the
            exception. A worker that returns nothing has died.
        """
        try:
            return ("ready", self.load()) if shard is None else ("done", self.embed(shard))
        except (OSError, ValueError, ImportError) as error:
            return "error", error
        except Exception as error:  # of a type that may not pass from process to process
            return "error", RuntimeError(f"{type(error).__name__}: {error}")

    def load(self) -> dict[str, Any]:
        """Load the model."""
        from transformers.utils.logging import disable_progress_bar

        from .embedder import CocoaEmbedder

        disable_progress_bar()
        job = self.job
        self.embedder = CocoaEmbedder(
            job.model,
            prompt_name=job.prompt_name,
            dtype=job.dtype,
            truncate_dim=job.truncate_dim,
            threads=self.threads,
            device=self.device,
        )
        self.schema = schema_of(job.source, job.dtype, self.embedder.dim)
        self.description = self.embedder.describe()
        return self.description

    def embed(self, shard: int) -> int:
        """
        Embed a shard into its file; of one that is there and has rows with errors, these rows alone.

        Raises:
            CocoaInputError: a row cannot be embedded, and `on_bad_row` is `"error"`.
            FileNotFoundError: the source has vanished.
        """
        job, plan = self.job, Plan(self.job.output.folder)
        digest = shard_digest(plan, shard, self.description)
        before = job.output.read(shard) if job.output.about(shard).get("digest") == digest else None
        wanted = None if before is None else [row for row, error in enumerate(before["error"].to_pylist()) if error]
        ids: list[Any] = []
        kept: list[dict[str, Any]] = []

        def inputs() -> Iterator[Any]:
            for item in items(job.source, plan, shard, wanted):
                ids.append(item.id)
                kept.append(item.kept)
                yield ValueError("its id is missing.") if item.id is None else item.input

        vectors, failed = self.embedder.embed(inputs())
        if failed:
            job.source.check_exists()
            if job.on_bad_row == "error":
                from modeling_cocoa.inputs import CocoaInputError

                row, reason = next(iter(failed.items()))
                raise CocoaInputError(f"{ids[row]}: {reason} With --on-bad-row skip, it gets no vector.")
        table = table_of(self.schema, ids, vectors, failed, kept)
        if before is not None:
            places = list(range(len(before)))
            for new, row in enumerate(wanted or ()):
                places[row] = len(before) + new
            table = pa.concat_tables([before, table]).take(places)
        about = {"digest": digest, "rows": len(table), "errors": len(failed), "threads": self.embedder.threads}
        job.output.write(shard, table, about)
        return len(table)


def items(source: Source, plan: Plan, shard: int, wanted: list[int] | None = None) -> Iterator[Any]:
    """The rows of a shard, or some of them; pieces without these are not opened."""
    chosen, row = None if wanted is None else set(wanted), 0
    for piece in plan.pieces(shard):
        rows = range(row, row + piece.rows)
        row = rows.stop
        if chosen is None or not chosen.isdisjoint(rows):
            for number, item in zip(rows, source.read(piece), strict=True):
                if chosen is None or number in chosen:
                    yield item


def shard_digest(plan: Plan, shard: int, description: dict[str, Any]) -> str:
    """What a finished file of a shard was made of."""
    return digest_of([plan.digests[shard], description["fingerprint"]])
