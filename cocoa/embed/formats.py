# SPDX-License-Identifier: Apache-2.0
"""Files of rows: how each kind is cut into pieces that can be read alone, and read."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

BATCH_ROWS = 256
"""Rows of a table that are decoded at a time."""
SNIFFED_ROWS = 1000
"""Rows of a text file from which the types of its columns are told."""
TAR_TEXTS = ("__key__", "text", "txt", "json", "cls")
"""Columns of tar files that are texts; others are bytes."""

Row = dict[str, Any] | ValueError
"""A row by column, or why it cannot be read."""


class Piece(NamedTuple):
    """
    Rows of one file.

    Args:
        path (`str`): The file, as fsspec opens it.
        version (`str`): Changes when the file does.
        first, rows (`int`): Number of its first row, and how many it has.
        offset (`int`): Byte at which these begin, where the file has no index.
    """

    path: str
    version: str
    first: int
    rows: int
    offset: int


def import_lance() -> Any:
    """Lance, which is an extra."""
    try:
        import lance
    except ImportError as error:
        raise ImportError(f'{error}. Lance needs an extra: pip install "cocoa-embed[lance]"') from error
    return lance


class Files:
    """Files that are a row each: nothing is opened here."""

    def schema(self, fs: AbstractFileSystem, path: str) -> pa.Schema:
        """Columns and their types."""
        return pa.schema([("file_name", pa.string())])

    def cut(self, fs: AbstractFileSystem, path: str, most: int) -> Iterator[tuple[int, int, int]]:
        """`first`, `rows` and `offset` of pieces of at most `most` rows."""
        yield 0, 1, 0

    def read(self, fs: AbstractFileSystem, piece: Piece, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a piece; other columns than these may be left out."""
        yield {"file_name": piece.path.rpartition("/")[2]}


class Parquet(Files):
    """Parquet files; row groups that a piece does not touch are not read."""

    def schema(self, fs: AbstractFileSystem, path: str) -> pa.Schema:
        with fs.open(path) as file:
            return pq.read_schema(file)

    def cut(self, fs: AbstractFileSystem, path: str, most: int) -> Iterator[tuple[int, int, int]]:
        with fs.open(path) as file:
            yield from even_pieces(pq.read_metadata(file).num_rows, most)

    def read(self, fs: AbstractFileSystem, piece: Piece, columns: Sequence[str]) -> Iterator[Row]:
        with fs.open(piece.path) as file, pq.ParquetFile(file) as table:
            groups, begin, end = [], 0, 0
            for number in range(table.num_row_groups):
                rows = table.metadata.row_group(number).num_rows
                if end + rows <= piece.first:
                    begin += rows
                elif end < piece.first + piece.rows:
                    groups.append(number)
                end += rows
            batches = table.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns))
            yield from rows_of(batches, piece.first - begin, piece.rows)


class Arrow(Files):
    """Arrow IPC files and streams, such as those that `datasets` saves."""

    def batches(self, fs: AbstractFileSystem, path: str) -> Iterator[pa.RecordBatch]:
        """All batches, which are mapped into memory where the file is a local one."""
        source = pa.memory_map(path) if "file" in fs.protocol else fs.open(path)
        with source as file:
            try:
                yield from pa.ipc.open_stream(file)
            except pa.ArrowInvalid:  # with an index at its end
                file.seek(0)
                reader = pa.ipc.open_file(file)
                yield from map(reader.get_batch, range(reader.num_record_batches))

    def schema(self, fs: AbstractFileSystem, path: str) -> pa.Schema:
        with fs.open(path) as file:
            try:
                return pa.ipc.open_stream(file).schema
            except pa.ArrowInvalid:
                file.seek(0)
                return pa.ipc.open_file(file).schema

    def cut(self, fs: AbstractFileSystem, path: str, most: int) -> Iterator[tuple[int, int, int]]:
        yield from even_pieces(sum(batch.num_rows for batch in self.batches(fs, path)), most)

    def read(self, fs: AbstractFileSystem, piece: Piece, columns: Sequence[str]) -> Iterator[Row]:
        batches = (batch.select(list(columns)) for batch in self.batches(fs, piece.path))
        yield from rows_of(batches, piece.first, piece.rows)


class Lance(Files):
    """Fragments of Lance datasets; a path is that of the dataset, `#`, and the fragment's number."""

    def fragment(self, path: str) -> Any:
        """The fragment of a path."""
        folder, _, number = path.rpartition("#")
        return import_lance().dataset(folder).get_fragment(int(number))

    def schema(self, fs: AbstractFileSystem, path: str) -> pa.Schema:
        return self.fragment(path).schema

    def cut(self, fs: AbstractFileSystem, path: str, most: int) -> Iterator[tuple[int, int, int]]:
        yield from even_pieces(self.fragment(path).count_rows(), most)

    def read(self, fs: AbstractFileSystem, piece: Piece, columns: Sequence[str]) -> Iterator[Row]:
        scanner = self.fragment(piece.path).scanner(columns=list(columns), limit=piece.rows, offset=piece.first)
        yield from rows_of(scanner.to_batches(), 0, piece.rows)


class JsonLines(Files):
    """Files of one JSON object a line."""

    def records(self, file: Any, offset: int) -> Iterator[tuple[int, Row]]:
        """The rows from a byte on, each with its first byte."""
        file.seek(offset)
        for line in file:
            begin, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield begin, row if isinstance(row, dict) else ValueError("the line is not a JSON object.")
            except ValueError as error:
                yield begin, ValueError(f"the line is not JSON ({error}).")

    def schema(self, fs: AbstractFileSystem, path: str) -> pa.Schema:
        with fs.open(path) as file:
            rows = [row for _, row in islice(self.records(file, 0), SNIFFED_ROWS) if isinstance(row, dict)]
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: [row.get(name) for row in rows] for name in names}).schema

    def cut(self, fs: AbstractFileSystem, path: str, most: int) -> Iterator[tuple[int, int, int]]:
        with fs.open(path) as file:
            yield from counted_pieces((begin for begin, _ in self.records(file, 0)), most)

    def read(self, fs: AbstractFileSystem, piece: Piece, columns: Sequence[str]) -> Iterator[Row]:
        with fs.open(piece.path) as file:
            yield from (row for _, row in islice(self.records(file, piece.offset), piece.rows))


class Csv(JsonLines):
    """CSV files with a line of names. All values are texts, and an empty one is missing."""

    def records(self, file: Any, offset: int) -> Iterator[tuple[int, Row]]:
        place = 0

        def lines() -> Iterator[str]:
            nonlocal place
            for line in file:
                place += len(line)
                yield line.decode("utf-8-sig" if place == len(line) else "utf-8", errors="surrogateescape")

        names = next(csv.reader(lines()), [])
        if offset:
            file.seek(offset)
            place = offset
        begin = place
        for values in csv.reader(lines()):
            if values and len(values) != len(names):
                yield begin, ValueError(f"the line has {len(values)} values for {len(names)} columns.")
            elif values:
                yield begin, {name: value or None for name, value in zip(names, values, strict=True)}
            begin = place


class Tar(Files):
    """
    Tar files of webdataset. Files whose names are the same up to their first dot are a row; its columns are the rest
    of their names, `__key__`, and by kind `image`, `video` and `text`.
    """

    def samples(
        self, file: Any, offset: int
    ) -> Iterator[tuple[int, str, dict[str, tarfile.TarInfo], tarfile.TarFile]]:
        """Each row's first byte, its key, its members by column, and the archive that reads them."""
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            key, begin, members = "", offset, {}
            for member in tar:
                tar.members = []  # or it would keep them all
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                own = f"{folder}/{stem}" if folder else stem
                if members and own != key:
                    yield begin, key, members, tar
                    members = {}
                if not members:
                    key, begin = own, member.offset
                members[ending.lower()] = member
            if members:
                yield begin, key, members, tar

    def columns(self, members: dict[str, Any]) -> dict[str, Any]:
        """Members by their endings, and once more by kind."""
        from modeling_cocoa.media import media_kind

        kinds: dict[str, Any] = {}
        for ending, member in members.items():
            if kind := "text" if ending == "txt" else media_kind(f"name.{ending}"):
                kinds.setdefault(kind, member)
        return {**members, **kinds}

    def schema(self, fs: AbstractFileSystem, path: str) -> pa.Schema:
        with fs.open(path) as file:
            members = next((members for _, _, members, _ in self.samples(file, 0)), {})
        types = {name: pa.string() if name in TAR_TEXTS else pa.binary() for name in self.columns(members)}
        return pa.schema({"__key__": pa.string(), **types})

    def cut(self, fs: AbstractFileSystem, path: str, most: int) -> Iterator[tuple[int, int, int]]:
        with fs.open(path) as file:
            yield from counted_pieces((begin for begin, *_ in self.samples(file, 0)), most)

    def read(self, fs: AbstractFileSystem, piece: Piece, columns: Sequence[str]) -> Iterator[Row]:
        with fs.open(piece.path) as file:
            for _, key, members, tar in islice(self.samples(file, piece.offset), piece.rows):
                row: dict[str, Any] = {"__key__": key}
                for name, member in self.columns(members).items():
                    if name in columns:
                        content = tar.extractfile(member).read()
                        row[name] = content.decode(errors="surrogateescape") if name in TAR_TEXTS else content
                yield row


def even_pieces(total: int, most: int) -> Iterator[tuple[int, int, int]]:
    """`first`, `rows` and `offset` of the pieces of a file with an index."""
    for first in range(0, total, most):
        yield first, min(most, total - first), 0


def counted_pieces(begins: Iterable[int], most: int) -> Iterator[tuple[int, int, int]]:
    """The same of a file without, of whose rows the first bytes are given."""
    first = rows = offset = 0
    for begin in begins:
        if rows == most:
            yield first, rows, offset
            first, rows = first + rows, 0
        if not rows:
            offset = begin
        rows += 1
    if rows:
        yield first, rows, offset


def rows_of(batches: Iterable[pa.RecordBatch], skip: int, rows: int) -> Iterator[Row]:
    """Some rows of batches."""
    for batch in batches:
        skipped = min(skip, batch.num_rows)
        part, skip = batch.slice(skipped, rows), skip - skipped
        rows -= part.num_rows
        for begin in range(0, part.num_rows, BATCH_ROWS):
            yield from part.slice(begin, BATCH_ROWS).to_pylist()
        if not rows:
            return


FORMATS: dict[str, Files] = {
    "images": Files(),
    "parquet": Parquet(),
    "arrow": Arrow(),
    "lance": Lance(),
    "json": JsonLines(),
    "csv": Csv(),
    "tar": Tar(),
}
ENDINGS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tar": "tar",
}
