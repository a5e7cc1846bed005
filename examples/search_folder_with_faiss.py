# SPDX-License-Identifier: Apache-2.0
"""
Search a folder of pictures by words or by another picture, with FAISS (`pip install faiss-cpu`).

    python examples/search_folder_with_faiss.py my_pictures "boats at sea" --model my_model/final
    python examples/search_folder_with_faiss.py my_pictures harbour.jpg --model my_model/final

The first call embeds every picture and keeps the vectors in `search_index/`; later calls embed only pictures that are
new or were changed. Without `--model` the tiny model that comes with the package is used; it knows emoji and nothing
else.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import faiss
import torch

from evaluation.assets import asset_path
from evaluation.vectors import fingerprint
from modeling_cocoa import CocoaTransformer
from modeling_cocoa.inputs import IMAGE_EXTENSIONS


def main() -> None:
    """Read the command line, bring the index up to date, and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="your pictures; folders within are searched too")
    parser.add_argument("query", help="words, or the path of a picture")
    parser.add_argument("--model", default="tiny", help="folder or Hub name of a CoCoA model, or 'tiny'")
    parser.add_argument("--index", type=Path, default=Path("search_index"), help="where vectors and names are kept")
    parser.add_argument("--top", type=int, default=5, help="how many pictures to show")
    options = parser.parse_args()

    # 1. The pictures. Size and time of a file tell whether it has changed since it was embedded.
    files = []
    for path in sorted(options.folder.rglob("*")):
        if path.suffix.lower() in IMAGE_EXTENSIONS:
            status = path.stat()
            files.append((str(path.relative_to(options.folder)), status.st_size, status.st_mtime_ns))
    if not files:
        parser.error(f"there are no pictures ({', '.join(IMAGE_EXTENSIONS)}) in {options.folder}; check the path")

    # 2. The model, and a name for everything that decides its vectors: those of another model cannot be compared.
    folder = str(asset_path("checkpoints/cocoa-tiny")) if options.model == "tiny" else options.model
    model = CocoaTransformer(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    name = fingerprint(model)

    # 3. What is known from an earlier call. `IndexFlatIP` compares with every vector: exact, and fast enough up to
    #    some millions of them. Vectors have length 1, so that the inner product (IP) is the cosine.
    index_file, names_file = options.index / "vectors.faiss", options.index / "files.json"
    index, known = faiss.IndexFlatIP(model.get_embedding_dimension()), []
    if names_file.is_file():
        kept = json.loads(names_file.read_text(encoding="utf-8"))
        if kept["model"] != name:
            parser.error(
                f"the vectors in {options.index} were made by another model, or by other versions of the libraries; "
                "give another --index, or delete it"
            )
        index, known = faiss.read_index(str(index_file)), [tuple(file) for file in kept["files"]]

    # 4. Embed what is new. Pictures that are gone or were changed leave the index; the new ones come at its end.
    before, now = set(known), set(files)
    gone = [row for row, file in enumerate(known) if file not in now]
    new = [file for file in files if file not in before]
    index.remove_ids(faiss.IDSelectorBatch(gone))
    known = [file for file in known if file in now]
    if new:
        index.add(model.encode([str(options.folder / path) for path, _, _ in new], show_progress_bar=True))
    print(f"Embedded {len(new)} of {len(files)} pictures; {len(known)} were in the index.")

    # 5. Keep it. The names are removed first and put in place last, so that an interruption leaves no vectors with the
    #    names of others. Neither file can hold code that would run when it is read.
    if new or gone:
        known += new
        options.index.mkdir(parents=True, exist_ok=True)
        names_file.unlink(missing_ok=True)
        faiss.write_index(index, str(index_file))
        partial = names_file.with_suffix(".partial")
        partial.write_text(json.dumps({"model": name, "files": known}), encoding="utf-8")
        os.replace(partial, names_file)

    # 6. Search. A text that is the path of a picture is taken as the picture. A model that was trained with
    #    instructions wants them here: `model.encode([options.query], prompt="...")`.
    scores, rows = index.search(model.encode([options.query]), min(options.top, len(known)))
    for score, row in zip(scores[0], rows[0], strict=True):
        print(f"  {score:.2f}  {known[row][0]}")


if __name__ == "__main__":
    main()
