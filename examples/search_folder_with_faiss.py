# SPDX-License-Identifier: Apache-2.0
"""
Search a folder of pictures by words or by another picture, with FAISS (`pip install faiss-cpu`).

    python examples/search_folder_with_faiss.py my_pictures "boats at sea" --model my_model/final
    python examples/search_folder_with_faiss.py my_pictures harbour.jpg --model my_model/final

The first call embeds every picture and keeps the vectors in `search_index/` as they come; later calls embed only
pictures that are new or were changed. Files that are no pictures, and pictures that cannot be read, are left out and
counted. Without `--model` the tiny model that comes with the package is used; it knows emoji and nothing
else.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path

import faiss
import torch

from cocoa import (
    CocoaInputError,
    CocoaTransformer,
    asset_path,
    describe_unreadable,
    encode_readable,
    fingerprint,
    input_messages,
    list_images,
)


def main() -> None:
    """Read the command line, bring the index up to date, and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="your pictures; folders within are searched too")
    parser.add_argument("query", help="words, or the path of a picture")
    parser.add_argument("--model", default="tiny", help="folder or Hub name of a CoCoA model, or 'tiny'")
    parser.add_argument("--index", type=Path, default=Path("search_index"), help="where vectors and names are kept")
    parser.add_argument("--top", type=int, default=5, help="how many pictures to show")
    options = parser.parse_args()

    # 1. The query: a mistyped path of a picture is an error, instead of words to search for.
    try:
        input_messages(options.query)
    except CocoaInputError as error:
        parser.error(error.reason)

    # 2. The pictures. Size and time of a file tell whether it has changed since it was embedded.
    images, left_out = list_images(options.folder)
    if not images:
        parser.error(f"there are no pictures in {options.folder}; check the path. {left_out}")
    files = []
    for path in images:
        status = path.stat()
        files.append((str(path.relative_to(options.folder)), status.st_size, status.st_mtime_ns))

    # 3. The model, and a name for everything that decides its vectors: those of another model cannot be compared.
    folder = str(asset_path("checkpoints/cocoa-tiny")) if options.model == "tiny" else options.model
    model = CocoaTransformer(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    name = fingerprint(model)

    # 4. What is known from an earlier call. `IndexFlatIP` compares with every vector: exact, and fast enough up to
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

    # 5. How it is kept. The names are removed first and put in place last, so that an interruption leaves no vectors
    #    with the names of others. Neither file can hold code that would run when it is read.
    def keep() -> None:
        options.index.mkdir(parents=True, exist_ok=True)
        names_file.unlink(missing_ok=True)
        faiss.write_index(index, str(index_file))
        partial = names_file.with_suffix(".partial")
        partial.write_text(json.dumps({"model": name, "files": known}), encoding="utf-8")
        os.replace(partial, names_file)

    # 6. Embed what is new. Pictures that are gone or were changed leave the index; the new ones come at its end, and
    #    are kept every 1,024 pictures. A picture that cannot be read is left out, and tried again by the next call.
    before, now = set(known), set(files)
    gone = [row for row, file in enumerate(known) if file not in now]
    new = [file for file in files if file not in before]
    index.remove_ids(faiss.IDSelectorBatch(gone))
    known = [file for file in known if file in now]
    old, unreadable = len(known), []
    if gone:
        keep()
    encode = functools.partial(model.encode, show_progress_bar=True)
    for places, vectors, reasons in encode_readable(
        encode, [{"image": str(options.folder / path)} for path, _, _ in new]
    ):
        index.add(vectors)
        known += [new[place] for place in places]
        unreadable += reasons.values()
        keep()
    print(f"Embedded {len(known) - old} of {len(files)} pictures; {old} were in the index.")
    for line in filter(None, (describe_unreadable(unreadable), left_out)):
        print(line)

    # 7. Search. A text that is the path of a picture is taken as the picture. A model that was trained with
    #    instructions wants them here: `model.encode([options.query], prompt="...")`.
    scores, rows = index.search(model.encode([options.query]), min(options.top, len(known)))
    for score, row in zip(scores[0], rows[0], strict=True):
        print(f"  {score:.2f}  {known[row][0]}")


if __name__ == "__main__":
    main()
