# SPDX-License-Identifier: Apache-2.0
"""Facts about a model, read from its folder without loading the weights."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from modeling_cocoa.auto import BACKBONES

INDEX = "model.safetensors.index.json"
"""Maps each weight to its file, where there are several."""


@dataclass
class FolderFacts:
    """Facts about a CoCoA model that its card and the checks before a push use."""

    backbone: str  # class of the model code
    model_type: str
    dimension: int
    full_dimension: int | None  # before truncation, if the folder has a `truncate_dim`
    parameters: int
    dtype: str
    max_length: int
    min_pixels: int
    max_pixels: int
    similarity: str
    prompts: dict[str, str]  # without empty ones
    needs_remote_code: bool  # whether it loads only with `trust_remote_code=True`

    @classmethod
    def read(cls, folder: str | os.PathLike) -> FolderFacts:
        """
        Read the folder of a model saved by [`save_cocoa`].

        Raises:
            FileNotFoundError, ValueError: the folder is incomplete, or holds another kind of model.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        backbone = BACKBONES.get(config.get("model_type"))
        if backbone is None or "cocoa" not in config:
            raise ValueError(f"{folder} holds no CoCoA model: its config.json has no entry `cocoa`.")
        settings = read_json(folder / "config_sentence_transformers.json")
        size = read_json(folder / "processor_config.json")["image_processor"]["size"]
        modules = read_json(folder / "modules.json")
        hidden_size, truncate_dim = config["text_config"]["hidden_size"], settings.get("truncate_dim")
        return cls(
            backbone=backbone.__name__,
            model_type=config["model_type"],
            dimension=truncate_dim or hidden_size,
            parameters=count_parameters(folder),
            dtype=config["dtype"],
            max_length=read_json(folder / "tokenizer_config.json")["model_max_length"],
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
            similarity=settings.get("similarity_fn_name") or "cosine",
            prompts={name: prompt for name, prompt in settings["prompts"].items() if prompt},
            needs_remote_code=any(not module["type"].startswith("sentence_transformers.") for module in modules),
            full_dimension=hidden_size if truncate_dim else None,
        )


def read_json(path: Path) -> Any:
    """The content of a JSON file of a model's folder; a missing file is a `FileNotFoundError` that names the fix."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}: it is incomplete. Save the model again with "
            "modeling_cocoa.save_cocoa, or use the folder that a trainer's save_model wrote."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def weight_files(folder: Path) -> list[Path]:
    """The files of the model's own weights, without those of heads or adapters."""
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [folder / "model.safetensors"]


def count_parameters(folder: Path) -> int:
    """The number of parameters, from the headers of the weight files."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return total
