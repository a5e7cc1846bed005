# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks.faults`: how far from the right vectors are those of an engine that reads a folder wrongly.

The table of docs/serving.md, with the tiny checkpoint, in a minute on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import typer

from cocoa.serve.check import Faults
from evaluation.assets import asset_path
from evaluation.emoji import load_emoji
from modeling_cocoa import CocoaTransformer

TEXTS, IMAGES = 200, 60


def main() -> None:
    """Print the cosines to the right vectors, the least and the median of each fault and kind of input."""
    folder = asset_path("checkpoints/cocoa-tiny")
    module = CocoaTransformer(folder)
    half = CocoaTransformer(folder, model_kwargs={"dtype": "bfloat16"})
    faults = Faults(str(folder), module.processor)
    emoji = load_emoji()
    names, images = list(emoji["name"][:TEXTS]), list(emoji["noto"][:IMAGES])
    kinds: dict[str, list[Any]] = {
        "texts": names,
        "images": images,
        "both": [{"image": image, "text": name} for image, name in zip(images, names, strict=False)],
    }
    ways: dict[str, Callable[[list[Any]], np.ndarray]] = {
        "a causal mask": lambda items: faults.states(True, items),
        "no EOS": faults.without_eos,
        "no chat template": lambda items: faults.without_template([{"text": text} for text in items]),
        "none, in bfloat16": lambda items: np.asarray(half.encode(items), dtype=np.float32),
        "none, stock": lambda items: faults.states(False, items),
    }
    typer.echo("| fault | " + " | ".join(f"{kind}: least, median" for kind in kinds) + " |")
    typer.echo("|---|" + "---|" * len(kinds))
    for fault, embed in ways.items():
        cells = []
        for kind, items in kinds.items():
            if fault == "no chat template" and kind != "texts":
                cells.append("")
                continue
            cosines = (np.asarray(module.encode(items)) * embed(items)).sum(-1)
            cells.append(f"{cosines.min():.2f}, {np.median(cosines):.2f}")
        typer.echo(f"| {fault} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
