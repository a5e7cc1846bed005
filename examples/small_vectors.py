# SPDX-License-Identifier: Apache-2.0
"""
Make vectors small: fewer numbers, 8 bits a number, one bit a number; and see what each finds of your own pictures.

The folder holds the pictures and a file `metadata.csv` of the columns file_name and text. Each text is to find its
picture (needs `pip install faiss-cpu`).

    python examples/small_vectors.py my_pictures --model my_model/final

Without `--model` the tiny model that comes with the package is used; it knows emoji and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import faiss
import numpy as np
from datasets import Image, load_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings, truncate_embeddings

from cocoa import asset_path, load_image


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The columns of the k highest scores of each row, the highest first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def main() -> None:
    """Read the command line, embed, and compare the forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="your pictures and metadata.csv")
    parser.add_argument("--model", default="tiny", help="folder or Hub name of a CoCoA model, or 'tiny'")
    parser.add_argument("--k", type=int, default=10, help="a text has found its picture if it is among the first k")
    options = parser.parse_args()
    k = options.k

    # 1. Whole vectors, in float32: 4 bytes a number.
    rows = load_dataset("imagefolder", data_dir=str(options.folder), split="train")
    model = SentenceTransformer(
        str(asset_path("checkpoints/cocoa-tiny")) if options.model == "tiny" else options.model
    )
    #    As a dict, a text that is the path of a picture stays a text.
    texts = list(rows["text"])
    pictures = [load_image(cell) for cell in rows.cast_column("image", Image(decode=False))["image"]]
    queries, documents = model.encode_query([{"text": text} for text in texts]), model.encode_document(pictures)
    dim = documents.shape[1]
    found = {f"{dim} float32": (4 * dim, best(queries @ documents.T, k))}

    # 2. Fewer numbers: the first ones of each vector, brought to length 1 again. A model that was trained with
    #    `matryoshka_dims` loses little by it, others more. Where it is wanted always, load the model with
    #    `SentenceTransformer(..., truncate_dim=...)`, and give `encode` `normalize_embeddings=True`.
    short = [truncate_embeddings(part, dim // 2) for part in (queries, documents)]
    short = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in short]
    found[f"{dim // 2} float32"] = (2 * dim, best(short[0] @ short[1].T, k))

    # 3. 8 bits a number: a quarter of the memory. `ranges` says which numbers the 256 steps lie between: one range for
    #    all, around zero, so that the products stay in proportion to cosines. Take it from the documents once and keep
    #    it with them: queries that come later must be cut into the same steps.
    largest = np.full(dim, np.abs(documents).max(), dtype=np.float32)
    ranges = np.stack([-largest, largest])
    queries8, documents8 = (quantize_embeddings(part, "int8", ranges=ranges) for part in (queries, documents))
    found[f"{dim} int8"] = (dim, best(queries8.astype(np.float32) @ documents8.astype(np.float32).T, k))

    # 4. One bit a number: its sign. What counts is how many signs agree, which FAISS finds very fast.
    queries1, documents1 = (quantize_embeddings(part, "ubinary") for part in (queries, documents))
    index = faiss.IndexBinaryFlat(8 * documents1.shape[1])
    index.add(documents1)
    candidates = index.search(queries1, min(4 * k, len(documents)))[1]
    found[f"{dim} binary"] = (documents1.shape[1], candidates[:, :k])

    # 5. Rescoring: the bits find four times as many pictures as are wanted, and whole queries put these in order by
    #    the int8 vectors, which may lie on a disk: only the candidates' are read.
    scores = np.einsum("qd,qcd->qc", queries, documents8[candidates].astype(np.float32))
    rescored = np.take_along_axis(candidates, best(scores, k), axis=1)
    found[f"{dim} binary, rescored"] = (documents1.shape[1], rescored)

    # 6. What each costs and finds. Texts that occur twice have several right pictures; any of them counts.
    print(f"{'vector':<24}{'bytes':>7}{'a million of them':>20}{f'Recall@{k}':>11}")
    for form, (size, columns) in found.items():
        hits = [texts[row] in {texts[column] for column in places} for row, places in enumerate(columns)]
        print(f"{form:<24}{size:>7}{size * 1e6 / 2**20:>16.0f} MiB{np.mean(hits):>11.1%}")


if __name__ == "__main__":
    main()
