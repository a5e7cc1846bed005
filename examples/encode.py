# SPDX-License-Identifier: Apache-2.0
"""
Embed a text, a picture, both together and a conversation, and see how near they are.

    python examples/encode.py cat.png "a cat with heart eyes" --model my_model/final

Without `--model` the tiny model that comes with the package is used; it knows emoji and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from cocoa import CocoaInputError, CocoaTransformer, asset_path, load_image


def main() -> None:
    """Read the command line, embed, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="a picture")
    parser.add_argument("text", help="a text")
    parser.add_argument("--model", default="tiny", help="folder or Hub name of a CoCoA model, or 'tiny'")
    options = parser.parse_args()
    folder = str(asset_path("checkpoints/cocoa-tiny")) if options.model == "tiny" else options.model
    text = options.text
    try:
        picture = load_image(options.picture)
    except CocoaInputError as error:
        parser.error(error.reason)

    # 1. The model. A name on the Hub is downloaded, and a GPU is used where there is one.
    model = SentenceTransformer(folder)

    # 2. One line for each kind of input; each gives an array with a row, a vector of length 1, for each input. A
    #    picture may be a PIL image, an array or a path. Opened by `load_image` it is the same everywhere; of a path,
    #    sentence-transformers drops the transparency. A text may be a bare str too, but one that is the path of a
    #    picture is then read as the picture. Conversations need a call of their own here; step 6 takes all kinds at
    #    once.
    by_text = model.encode([{"text": text}])
    by_picture = model.encode([picture])
    by_both = model.encode([{"image": picture, "text": text}])
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    by_conversation = model.encode([[{"role": "user", "content": content}]])
    print(f"Vectors of {by_text.shape[1]} numbers, of length {np.linalg.norm(by_text):.2f}.")

    # 3. Compare. The cosine is 1 for inputs that are the same to the model. A picture with its text is the same input
    #    whether it comes as a dict or as a conversation.
    print(f"text and picture:          {model.similarity(by_text, by_picture).item():.2f}")
    print(f"text and both together:    {model.similarity(by_text, by_both).item():.2f}")
    print(f"picture and both together: {model.similarity(by_picture, by_both).item():.2f}")
    print(f"dict and conversation:     {model.similarity(by_both, by_conversation).item():.2f}")

    # 4. An instruction. A model that was trained with instructions finds more with them. It becomes a system message
    #    in front of the input, and changes the vector.
    told = model.encode([{"text": text}], prompt="Find the picture that the text describes.")
    print(f"text without and with an instruction: {model.similarity(by_text, told).item():.2f}")

    # 5. Queries and documents. A model keeps the instructions that it was trained with under the names "query" and
    #    "document", and these two calls put them in front. Use them for search. The tiny model has none.
    query = model.encode_query([{"text": text}])
    document = model.encode_document([picture])
    print(f"query and document:        {model.similarity(query, document).item():.2f}")

    # 6. The same vectors through two other loaders. `trust_remote_code=True` runs the Python code that lies in the
    #    model's folder: give it only for a folder that you trust. `CocoaTransformer(...).encode` needs this package,
    #    takes any mixture of inputs in one call, and is the fastest for many of them.
    remote = SentenceTransformer(folder, trust_remote_code=True).encode([{"text": text}])
    print(f"trust_remote_code:         differs by {np.abs(remote - by_text).max():.0e} at most")
    module = CocoaTransformer(folder).to(model.device)
    conversation = [{"role": "user", "content": content}]
    mixed = module.encode([{"text": text}, picture, {"image": picture, "text": text}, conversation])
    stock = np.concatenate([by_text, by_picture, by_both, by_conversation])
    print(f"CocoaTransformer.encode:   differs by {np.abs(mixed - stock).max():.0e} at most")


if __name__ == "__main__":
    main()
