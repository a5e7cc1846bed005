# SPDX-License-Identifier: Apache-2.0
"""The models that are measured, with random weights, and what they are measured on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_cocoa import CocoaProcessor, save_cocoa
from modeling_cocoa.auto import BACKBONES
from trainers.recipes.from_scratch import build_model
from trainers.recipes.tiny_processor import processor_around

from .qwen2_tokenizer import build_qwen2_tokenizer

TEXT_118M = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 151_680,
}
VISION_118M = {
    "qwen2_vl": {"depth": 6, "embed_dim": 320, "num_heads": 4, "mlp_ratio": 4},
    "qwen3_vl": {
        "depth": 6,
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_heads": 4,
        "deepstack_visual_indexes": [1, 2, 3],
    },
}

WORDS = (
    "a red bicycle leans against the old stone wall while two children watch boats drift slowly along quiet water "
    "under heavy clouds and someone sells warm bread near the station before evening comes"
).split()


def build_processor(
    max_length: int = 4096, max_pixels: int = 224 * 224, model_type: str = "qwen2_vl"
) -> CocoaProcessor:
    """Qwen2-VL's real tokenizer, and images in a backbone's own patches, by default of 56 to 224 pixels a side."""
    return processor_around(
        build_qwen2_tokenizer(),
        patch_size=BACKBONES[model_type].config_class().vision_config.patch_size,
        min_pixels=56 * 56,
        max_pixels=max_pixels,
        max_length=max_length,
        model_type=model_type,
    )


def save_118m(folder: Path, model_type: str = "qwen2_vl") -> Path:
    """Write a configuration of 118M parameters with random weights, loadable through every loader."""
    processor = build_processor(model_type=model_type)
    save_cocoa(build_model(processor, TEXT_118M, VISION_118M[model_type], model_type=model_type), processor, folder)
    return folder


def device() -> str:
    """Where everything is measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_texts(count: int, low: int = 5, high: int = 80, seed: int = 0) -> list[str]:
    """Texts of `low` to `high` words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(low, high))) for _ in range(count)]


def make_images(count: int, low: int = 56, high: int = 224, seed: int = 0) -> list[Image.Image]:
    """Pictures of `low` to `high` pixels a side, each side by itself."""
    generator = np.random.default_rng(seed)
    sides = generator.integers(low, high + 1, (count, 2))
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sides.tolist()]


def make_workloads(count: int) -> dict[str, list[Any]]:
    """What is encoded, by name: `count` items each."""
    texts, images = make_texts(count), make_images(count)
    pairs = [{"text": text, "image": image} for text, image in zip(texts, images, strict=True)]
    third = count // 3
    mixed = [*texts[:third], *images[third : 2 * third], *pairs[2 * third :]]
    random.Random(1).shuffle(mixed)
    return {"texts": texts, "images": images, "image+text": pairs, "mixed list": mixed}
