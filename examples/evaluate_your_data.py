# SPDX-License-Identifier: Apache-2.0
"""
Measure how well models search your own pictures, and see what they miss.

The folder holds the pictures and a file `metadata.csv` of the columns file_name and text. Every text searches the
pictures, and every picture the texts. Give several models to compare them, such as one before and after training:

    python examples/evaluate_your_data.py my_pictures --model my_model/before --model my_model/final

Any model that sentence-transformers loads will do; 'tiny', the default, comes with the package and knows only emoji.
For MMEB-V1 there is `cocoa eval mmeb`, for mteb examples/evaluate_with_mteb.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import evaluate
import numpy as np
from datasets import Image, load_dataset
from sentence_transformers import SentenceTransformer

import cocoa
from cocoa import asset_path, bootstrap_interval, load_image

METRICS = Path(cocoa.__file__).parent / "evaluation" / "metrics"
K = 10
"""How many of what a query finds are looked at."""


def main() -> None:
    """Read the command line, rank, and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="your pictures and metadata.csv")
    parser.add_argument("--model", action="append", help="folder or Hub name of a model, or 'tiny'; may be repeated")
    parser.add_argument("--misses", type=int, default=3, help="how many misses to show")
    options = parser.parse_args()

    # 1. The data. A text that several pictures share is one query, and each of these pictures is a right answer.
    rows = load_dataset("imagefolder", data_dir=str(options.folder), split="train")
    cells = rows.cast_column("image", Image(decode=False))["image"]
    files = [os.path.relpath(cell["path"], options.folder) for cell in cells]
    pictures = [load_image(cell) for cell in cells]  # transparency on white, 16 bits scaled down
    texts = list(dict.fromkeys(rows["text"]))
    text_of = dict(zip(files, rows["text"], strict=True))
    files_of = {text: [file for file in files if text_of[file] == text] for text in texts}
    by_text = {text: {"text": text} for text in texts}  # a bare text that is the path of a picture would be opened
    by_file = dict(zip(files, pictures, strict=True))
    directions = {
        "text → picture": (by_text, by_file, files_of),
        "picture → text": (by_file, by_text, {file: [text] for file, text in text_of.items()}),
    }

    # 2. The metrics, as modules of the `evaluate` library: they score ranked lists, from wherever these come.
    recall, mrr, ndcg = (evaluate.load(str(METRICS / f"{name}_at_k.py")) for name in ("recall", "mrr", "ndcg"))

    for model_name in options.model or ["tiny"]:
        is_tiny = model_name == "tiny"
        model = SentenceTransformer(str(asset_path("checkpoints/cocoa-tiny")) if is_tiny else model_name)
        print(f"\n{model_name}")
        for title, (queries, documents, right) in directions.items():
            # 3. Embed. The model's own instructions for queries and documents, if it has any, are put in front.
            query_vectors = model.encode_query(list(queries.values()), normalize_embeddings=True)
            document_vectors = model.encode_document(list(documents.values()), normalize_embeddings=True)

            # 4. Rank: for each query the names of the nearest documents, the nearest first.
            names = list(documents)
            places = np.argsort(-query_vectors @ document_vectors.T, axis=1, kind="stable")[:, :K]
            found = [[names[place] for place in row] for row in places]
            lists = {"predictions": found, "references": [right[query] for query in queries]}

            # 5. Score. The interval says how far the mean may be off because there are no more queries than these: a
            #    difference between two models that is smaller means nothing.
            pairs = list(zip(queries, found, strict=True))
            shares = [len({*right[query]} & {*first}) / len(right[query]) for query, first in pairs]
            low, high = bootstrap_interval(shares)
            print(
                f"  {title} of {len(names)}: "
                f"Recall@1 {recall.compute(**lists, k=1)['recall_at_k']:.1%}, "
                f"Recall@{K} {recall.compute(**lists, k=K)['recall_at_k']:.1%} ({low:.1%} to {high:.1%}), "
                f"MRR@{K} {mrr.compute(**lists, k=K)['mrr_at_k']:.3f}, "
                f"nDCG@{K} {ndcg.compute(**lists, k=K)['ndcg_at_k']:.3f}"
            )

            # 6. Look at the misses: often the data is wrong, not the model.
            misses = [(query, first) for query, first in pairs if not {*right[query]} & {*first}]
            for query, first in misses[: options.misses]:
                print(f"    {query!r} finds {first[0]!r}, and {right[query][0]!r} not among the first {K}")


if __name__ == "__main__":
    main()
