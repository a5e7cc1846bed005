# SPDX-License-Identifier: Apache-2.0
"""
Search the vectors of `cocoa embed` in Qdrant, in its local mode, which needs no server (`pip install qdrant-client`).

    cocoa embed my_pictures --model my_model/final --output-dir vectors
    python examples/search_with_qdrant.py vectors "boats at sea" --database my_database

The first call copies the vectors. For a server, give its address to `QdrantClient(url=...)` instead of `path=...`.
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path

import pyarrow.dataset
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

from cocoa import CocoaEmbedder


def main() -> None:
    """Read the command line, fill the collection if there is none, and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="what `cocoa embed` wrote, as parquet in float32 or float16")
    parser.add_argument("query", help="words")
    parser.add_argument("--database", type=Path, required=True, help="folder for Qdrant's files")
    parser.add_argument("--top", type=int, default=5, help="how many rows to show")
    options = parser.parse_args()
    manifest = json.loads((options.vectors / "manifest.json").read_text(encoding="utf-8"))

    # 1. The collection. Qdrant names points by numbers or UUIDs: a UUID made from the id is always the same, so that
    #    a second call would put no row twice. Rows with an error have no vector.
    client = QdrantClient(path=str(options.database))
    if not client.collection_exists("vectors"):
        client.create_collection("vectors", VectorParams(size=manifest["dim"], distance=Distance.COSINE))
        files = pyarrow.dataset.dataset(sorted(map(str, options.vectors.glob("shard-*.parquet"))))
        for batch in files.to_batches(columns=["id", "embedding"], batch_size=256):
            points = [
                PointStruct(
                    id=str(uuid.uuid5(uuid.NAMESPACE_URL, str(row["id"]))),
                    vector=row["embedding"],
                    payload={"id": row["id"]},
                )
                for row in batch.to_pylist()
                if row["embedding"] is not None
            ]
            if points:
                client.upsert("vectors", points)

    # 2. The query.
    embedder = CocoaEmbedder(manifest["model"], prompt_name="query", truncate_dim=manifest["dim"])
    (query,), _ = embedder.embed([{"text": options.query}])
    for point in client.query_points("vectors", query=query.tolist(), limit=options.top).points:
        print(f"  {point.score:.3f}  {point.payload['id']}")
    client.close()


if __name__ == "__main__":
    main()
