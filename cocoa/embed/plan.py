# SPDX-License-Identifier: Apache-2.0
"""Which rows make up each shard, written down before anything runs."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .formats import Piece
from .source import Source

logger = logging.getLogger(__name__)

PLAN = "shards.plan"
"""A parquet file with a row group for each shard; its name keeps it out of `*.parquet`."""
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("version", pa.string()),
        ("first", pa.int64()),
        ("rows", pa.int64()),
        ("offset", pa.int64()),
    ]
)


class Plan:
    """
    The shards of an output folder. A shard's pieces are read when they are asked for, so that memory does not grow
    with the number of rows.

    Args:
        folder (`Path`): The output.

    Attributes:
        digests (`list[str]`): Of the pieces of each shard.
        rows (`list[int]`): Of each shard.
    """

    def __init__(self, folder: Path) -> None:
        self.file = pq.ParquetFile(folder / PLAN, memory_map=True)
        found = json.loads(self.file.metadata.metadata[b"shards"])
        self.digests: list[str] = found["digests"]
        self.rows: list[int] = found["rows"]

    def __len__(self) -> int:
        return len(self.digests)

    def pieces(self, shard: int) -> list[Piece]:
        """What a shard is made of."""
        return [Piece(*row.values()) for row in self.file.read_row_group(shard).to_pylist()]

    @property
    def digest(self) -> str:
        """Digest of the source, as it was when it was cut into shards."""
        return digest_of(self.digests)


def digest_of(value: object) -> str:
    """A digest of a value, as JSON writes it."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def make_plan(source: Source, folder: Path, rows_per_shard: int) -> Plan:
    """
    Cut a source into shards, or bring the cut up to date with it. Shards of files that have not changed stay as they
    are; files that are new or were changed make up new shards in the order of their paths, and leave the old ones.

    Args:
        source ([`Source`]).
        folder (`Path`): The output.
        rows_per_shard (`int`): At most.

    Raises:
        ValueError: a file cannot be read.
    """
    from modeling_cocoa.files import atomic_write

    old = Plan(folder) if (folder / PLAN).exists() else None
    # A temporary database on disk, since a list of all files may be large.
    with closing(sqlite3.connect("")) as files:
        files.execute("CREATE TABLE files (path TEXT PRIMARY KEY, version TEXT, known INT DEFAULT 0) WITHOUT ROWID")
        files.executemany("INSERT OR IGNORE INTO files (path, version) VALUES (?, ?)", map(encodable, source.list()))

        def is_known(piece: Piece) -> bool:
            change = "UPDATE files SET known = 1 WHERE path = ? AND version = ?"
            return files.execute(change, (piece.path, piece.version)).rowcount == 1

        def shards() -> Iterator[list[Piece]]:
            for shard in range(len(old) if old else 0):
                pieces = old.pieces(shard)
                yield (kept := [piece for piece in pieces if is_known(piece)])
                if len(kept) < len(pieces):
                    logger.warning("Shard %d is embedded again: files of it have changed or are gone.", shard)
            new = files.execute("SELECT path, version FROM files WHERE known = 0 ORDER BY path")
            pieces = (piece for file in new for piece in source.cut(*file, rows_per_shard))
            yield from full_shards(pieces, rows_per_shard)

        digests, rows = [], []
        options = {"compression": "zstd", "write_statistics": False}
        with atomic_write(folder / PLAN) as path, pq.ParquetWriter(path, SCHEMA, **options) as writer:
            for pieces in shards():
                columns = [
                    pa.array([piece[place] for piece in pieces], kind) for place, kind in enumerate(SCHEMA.types)
                ]
                writer.write_table(pa.table(columns, schema=SCHEMA))
                digests.append(digest_of(pieces))
                rows.append(sum(piece.rows for piece in pieces))
            writer.add_key_value_metadata({"shards": json.dumps({"digests": digests, "rows": rows})})
    return Plan(folder)


def full_shards(pieces: Iterable[Piece], rows_per_shard: int) -> Iterator[list[Piece]]:
    """Pieces together, in order, as many as a shard may have rows."""
    shard: list[Piece] = []
    rows = 0
    for piece in pieces:
        if shard and rows + piece.rows > rows_per_shard:
            yield shard
            shard, rows = [], 0
        shard.append(piece)
        rows += piece.rows
    if shard:
        yield shard


def encodable(file: tuple[str, str]) -> tuple[str, str]:
    """A file whose name is a text; `ValueError` where it is not."""
    try:
        file[0].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The name of the file {file[0]!r} is not valid UTF-8; rename it.") from error
    return file
