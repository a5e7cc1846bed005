# SPDX-License-Identifier: Apache-2.0
"""
A script for a process of its own: the vectors of a few inputs through a folder's loaders, without this package.

`python load_alone.py FOLDER LOADER ...` with loaders `stock` and `remote_code`; the last line printed is JSON.
"""

from __future__ import annotations

import gc
import importlib.abc
import json
import sys

PACKAGES = ("cocoa", "evaluation", "hub_cards", "modeling_cocoa", "trainers")


class HidePackages(importlib.abc.MetaPathFinder):
    """Makes this package look as if it were not installed, as it is where most people load a model."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse the package's own names."""
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}: a model's folder must load without it.")


def main(folder: str, *loaders: str) -> None:
    """Print the vectors of each loader."""
    sys.meta_path.insert(0, HidePackages())
    import torch
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    # The stock patch embedding is a convolution, for which GPUs use TF32 by default; ours is a matrix product.
    torch.backends.cudnn.allow_tf32 = False
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    inputs = ["a photo of a dog", image, {"image": image, "text": "from dark to light"}, "rain " * 40]
    vectors = {}
    for loader in loaders:
        model = SentenceTransformer(folder, trust_remote_code=loader == "remote_code")
        vectors[loader] = [
            model.encode([item], normalize_embeddings=True, show_progress_bar=False)[0].tolist() for item in inputs
        ]
        del model
        gc.collect()
    print(json.dumps(vectors))


if __name__ == "__main__":
    main(*sys.argv[1:])
