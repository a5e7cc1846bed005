# SPDX-License-Identifier: Apache-2.0
"""What a model's folder says of the model, without loading it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from modeling_cocoa.auto import BACKBONES

INDEX = "model.safetensors.index.json"
"""Names the file of each weight, where there are several."""


@dataclass
class FolderFacts:
    """
    What a CoCoA model's folder says of the model.

    Args:
        backbone (`str`): Class of the model code, such as `"CocoaQwen2VLModel"`.
        model_type (`str`): Of the generative model: `"qwen2_vl"` or `"qwen2_5_vl"`.
        dimension (`int`): Length of a vector.
        parameters (`int`), dtype (`str`): Of the weights.
        max_length (`int`): Tokens of an input.
        min_pixels, max_pixels (`int`): Of a picture, once it is resized.
        similarity (`str`): Function that vectors are compared with.
        prompts (`dict[str, str]`): Instructions by name, those that are not empty.
        needs_remote_code (`bool`): Whether it loads with `trust_remote_code=True` only.
        shortened_from (`int`, *optional*): Length of a whole vector, where the folder shortens them (`truncate_dim`).
    """

    backbone: str
    model_type: str
    dimension: int
    parameters: int
    dtype: str
    max_length: int
    min_pixels: int
    max_pixels: int
    similarity: str
    prompts: dict[str, str] = field(default_factory=dict)
    needs_remote_code: bool = False
    shortened_from: int | None = None

    @classmethod
    def read(cls, folder: str | os.PathLike) -> FolderFacts:
        """
        Args:
            folder (`str` or `os.PathLike`): Of a model saved by [`save_cocoa`].

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
        whole, shortened = config["text_config"]["hidden_size"], settings.get("truncate_dim")
        return cls(
            backbone=backbone.__name__,
            model_type=config["model_type"],
            dimension=shortened or whole,
            parameters=count_parameters(folder),
            dtype=config["dtype"],
            max_length=read_json(folder / "tokenizer_config.json")["model_max_length"],
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
            similarity=settings.get("similarity_fn_name") or "cosine",
            prompts={name: prompt for name, prompt in settings["prompts"].items() if prompt},
            needs_remote_code=any(not module["type"].startswith("sentence_transformers.") for module in modules),
            shortened_from=whole if shortened else None,
        )


def read_json(path: Path) -> Any:
    """
    What a file of a model's folder holds.

    Raises:
        FileNotFoundError: there is none; says how to make the folder whole.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}: it is not whole. Save the model again with modeling_cocoa.save_cocoa, "
            "or push the folder that a trainer's save_model wrote."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def weight_files(folder: Path) -> list[Path]:
    """The files of the model's own weights, without those of heads or adapters."""
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [folder / "model.safetensors"]


def count_parameters(folder: Path) -> int:
    """How many numbers the weights are, from the heads of their files."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return total
