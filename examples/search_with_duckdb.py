# SPDX-License-Identifier: Apache-2.0
"""
Search the vectors of `cocoa embed` with SQL, in DuckDB (`pip install duckdb`). Nothing is copied: DuckDB reads the
parquet files.

    cocoa embed my_pictures --model my_model/final --output-dir vectors
    python examples/search_with_duckdb.py vectors "boats at sea"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import duckdb

from cocoa import CocoaEmbedder

QUERY = """
SELECT id, array_cosine_similarity(embedding::FLOAT[{dim}], $query::FLOAT[{dim}]) AS score
FROM read_parquet($files)
WHERE error IS NULL
ORDER BY score DESC, id
LIMIT $top
"""


def main() -> None:
    """Read the command line, embed the query, and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="what `cocoa embed` wrote, in float32 or float16")
    parser.add_argument("query", help="words")
    parser.add_argument("--top", type=int, default=5, help="how many rows to show")
    options = parser.parse_args()

    # 1. The manifest says which model made the vectors, and how long they are.
    manifest = json.loads((options.vectors / "manifest.json").read_text(encoding="utf-8"))
    embedder = CocoaEmbedder(manifest["model"], prompt_name="query", truncate_dim=manifest["dim"])
    (query,), _ = embedder.embed([{"text": options.query}])

    # 2. Parquet knows lists alone; the cast makes arrays of one length of them, which DuckDB has functions for. Rows
    #    with an error have no vector.
    values = {"query": query.tolist(), "files": str(options.vectors / "shard-*.parquet"), "top": options.top}
    for row, score in duckdb.execute(QUERY.format(dim=manifest["dim"]), values).fetchall():
        print(f"  {score:.3f}  {row}")


if __name__ == "__main__":
    main()
