# SPDX-License-Identifier: Apache-2.0
"""
Search the vectors of `cocoa embed` in LanceDB (`pip install lancedb`).

    cocoa embed my_pictures --model my_model/final --output-dir vectors
    python examples/search_with_lancedb.py vectors "boats at sea" --database my_database

The first call copies the parquet files into a table. With `cocoa embed --format lance` there is nothing to copy: the
output folder is a database with the table `vectors`, and `--database` may be left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lancedb
import pyarrow.compute
import pyarrow.dataset

from cocoa import CocoaEmbedder


def main() -> None:
    """Read the command line, make the table if there is none, and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="what `cocoa embed` wrote, in float32 or float16")
    parser.add_argument("query", help="words")
    parser.add_argument("--database", type=Path, help="folder of a LanceDB database; by default the vectors' own")
    parser.add_argument("--top", type=int, default=5, help="how many rows to show")
    options = parser.parse_args()
    manifest = json.loads((options.vectors / "manifest.json").read_text(encoding="utf-8"))
    if options.database is None and manifest["format"] != "lance":
        parser.error("these are parquet files; name a --database to copy them into")

    # 1. The table. Parquet files go into it batch by batch, whatever their number, without rows that have an error in
    #    place of a vector.
    database = lancedb.connect(options.database or options.vectors)
    if "vectors" in database.list_tables().tables:
        table = database.open_table("vectors")
    else:
        files = pyarrow.dataset.dataset(sorted(map(str, options.vectors.glob("shard-*.parquet"))))
        rows = files.scanner(filter=pyarrow.compute.field("error").is_null()).to_batches()
        table = database.create_table("vectors", rows, schema=files.schema)

    # 2. The query. A table of `--format lance` has rows with errors, too. For millions of rows, make an index first
    #    (`create_index`).
    embedder = CocoaEmbedder(manifest["model"], prompt_name="query", truncate_dim=manifest["dim"])
    (query,), _ = embedder.embed([{"text": options.query}])
    search = table.search(query, vector_column_name="embedding").distance_type("cosine").where("error IS NULL")
    for row in search.limit(options.top).to_list():
        print(f"  {1 - row['_distance']:.3f}  {row['id']}")


if __name__ == "__main__":
    main()
