# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks.faults`: how far from the right vectors are those of an engine that reads a folder wrongly.

The table of docs/serving.md, with the tiny checkpoint, in a minute on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import typer
from transformers import AutoConfig, Qwen2VLModel

from evaluation.assets import asset_path
from evaluation.emoji import load_emoji
from modeling_cocoa import CocoaTransformer

TEXTS, IMAGES = 200, 60


def last_states(model: Qwen2VLModel, rows: Sequence[dict[str, torch.Tensor]]) -> np.ndarray:
    """The last token's hidden state of each row, read alone, at length 1: `(rows, hidden)`."""
    found = []
    for row in rows:
        inputs = {name: value[None] if value.dim() == 1 else value for name, value in row.items()}
        with torch.inference_mode():
            found.append(model(**inputs).last_hidden_state[0, -1])
    return torch.nn.functional.normalize(torch.stack(found), dim=-1).numpy()


def without_last(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A row without its EOS."""
    return {**row, **{name: row[name][:-1] for name in ("input_ids", "mm_token_type_ids")}}


def bare(processor: Any, text: str) -> dict[str, torch.Tensor]:
    """A text with its EOS, and without the chat template."""
    ids = torch.tensor(processor.tokenizer(text)["input_ids"])
    return {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}


def main() -> None:
    """Print the cosines to the right vectors, the least and the median of each fault and kind of input."""
    folder = asset_path("checkpoints/cocoa-tiny")
    module = CocoaTransformer(folder)
    half = CocoaTransformer(folder, model_kwargs={"dtype": "bfloat16"})
    config = AutoConfig.from_pretrained(folder)
    stock = {}
    for is_causal in (False, True):
        config.text_config.is_causal = is_causal
        stock[is_causal] = Qwen2VLModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    emoji = load_emoji()
    names, images = list(emoji["name"][:TEXTS]), list(emoji["noto"][:IMAGES])
    kinds: dict[str, list[Any]] = {
        "texts": names,
        "images": images,
        "both": [{"image": image, "text": name} for image, name in zip(images, names, strict=False)],
    }
    encode = module.processor.encode
    ways: dict[str, Callable[[list[Any]], np.ndarray]] = {
        "a causal mask": lambda items: last_states(stock[True], encode(items)),
        "no EOS": lambda items: last_states(stock[False], [without_last(row) for row in encode(items)]),
        "no chat template": lambda items: last_states(stock[False], [bare(module.processor, text) for text in items]),
        "none, in bfloat16": lambda items: np.asarray(half.encode(items), dtype=np.float32),
        "none, stock": lambda items: last_states(stock[False], encode(items)),
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
