# SPDX-License-Identifier: Apache-2.0
"""The files of an output folder: one for each shard, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .formats import import_lance
from .source import Source

MANIFEST = "manifest.json"
LANCE = "vectors.lance"
"""A Lance dataset, and so the table `vectors` of a LanceDB database, whose data files are the shards."""
ABOUT = "cocoa"
"""Key of what a file says of itself."""
TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}


@dataclass(frozen=True)
class Output:
    """
    Where vectors go to.

    Args:
        folder (`Path`): Of this machine; for several machines, one that all of them see.
        format (`str`): `"parquet"` or `"lance"`.
    """

    folder: Path
    format: str

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        name = f"shard-{shard:05d}.{self.format}"
        return self.folder / LANCE / "data" / name if self.format == "lance" else self.folder / name

    def about(self, shard: int) -> dict[str, Any]:
        """What the file of a shard says of itself; empty where there is none, or one that was not written here."""
        path = self.path(shard)
        if not path.exists():
            return {}
        try:
            if self.format == "parquet":
                found = pq.read_metadata(path).metadata[ABOUT.encode()]
            else:
                found = lance_reader(path).metadata().schema.metadata[ABOUT.encode()]
            return json.loads(found)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            return {}

    def read(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of a shard."""
        path = self.path(shard)
        if self.format == "parquet":
            return pq.ParquetFile(path, memory_map=True).read(columns)
        table = lance_reader(path).read_all().to_table().replace_schema_metadata()
        return table if columns is None else table.select(columns)

    def write(self, shard: int, table: pa.Table, about: Mapping[str, Any]) -> None:
        """
        Write a shard.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        from modeling_cocoa.files import atomic_write

        note = {ABOUT: json.dumps(about)}
        with atomic_write(self.path(shard)) as path:
            if self.format == "parquet":
                # A byte takes four in parquet, unless its 256 values are numbered.
                is_small = table.schema.field("embedding").type.value_type.bit_width == 8
                numbered = [name for name in table.column_names if is_small or name != "embedding"]
                with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=numbered) as writer:
                    writer.write_table(table, row_group_size=max(1, len(table)))
                    writer.add_key_value_metadata(note)
                return
            import_lance()
            from lance.file import LanceFileWriter

            with LanceFileWriter(str(path), schema=table.schema) as writer:
                for batch in table.to_batches():
                    writer.write_batch(batch)
                writer.add_schema_metadata(ABOUT, note[ABOUT])

    def prepare(self) -> None:
        """Make the folder, and remove what a killed process left half written."""
        for folder in {self.folder, self.path(0).parent}:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(".partial-*"):
                path.unlink(missing_ok=True)

    def finish(self, shards: list[int], schema: pa.Schema) -> None:
        """Make a Lance dataset of finished shards, without copying them."""
        if self.format == "parquet":
            return
        lance = import_lance()
        commit = lance.LanceDataset.commit
        place = str(self.folder / LANCE)
        dataset = commit(place, lance.LanceOperation.Overwrite(schema, []))
        create = lance.LanceFragment.create_from_file
        files = [(self.path(shard).name, number) for number, shard in enumerate(shards)]
        commit(
            place, lance.LanceOperation.Overwrite(schema, [create(name, dataset, number) for name, number in files])
        )


def lance_reader(path: Path) -> Any:
    """What reads one Lance file."""
    import_lance()
    from lance.file import LanceFileReader

    return LanceFileReader(str(path))


def schema_of(source: Source, dtype: str, dim: int) -> pa.Schema:
    """The columns of an output."""
    id = source.schema.field(source.id).type if source.id else pa.string()
    vector = pa.list_(TYPES[dtype], dim // 8 if dtype == "binary" else dim)
    kept = [source.schema.field(name).remove_metadata() for name in source.keep if name != source.id]
    return pa.schema([("id", id), ("embedding", vector), ("error", pa.string()), *kept])


def table_of(
    schema: pa.Schema, ids: list[Any], vectors: np.ndarray, failed: Mapping[int, str], kept: list[dict]
) -> pa.Table:
    """
    Rows of an output; those that failed have an error and no vector.

    Raises:
        ValueError: a value of a kept column is of another type than those of the first file.
    """
    errors = [failed.get(row) for row in range(len(ids))]
    mask = pa.array([error is not None for error in errors], pa.bool_())
    kind = schema.field("embedding").type
    values = pa.array(np.ascontiguousarray(vectors).reshape(-1), kind.value_type)
    columns = {
        "id": ids,
        "embedding": pa.FixedSizeListArray.from_arrays(values, type=kind, mask=mask),
        "error": errors,
        **{name: [row.get(name) for row in kept] for name in schema.names[3:]},
    }
    for name, column in columns.items():
        if name != "embedding":
            try:
                columns[name] = pa.array(column, schema.field(name).type)
            except (pa.ArrowException, ValueError, TypeError) as error:
                raise ValueError(f"The column {name!r} does not fit the type of its first file: {error}.") from error
    return pa.table(columns, schema=schema)
