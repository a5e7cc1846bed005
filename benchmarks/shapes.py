# SPDX-License-Identifier: Apache-2.0
"""Models of the published shapes with random weights, ours and stock ones over the same weights, and their inputs."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from modeling_cocoa import CocoaProcessor, CocoaTransformer
from modeling_cocoa.model_folder import stock_class
from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from trainers.recipes.from_scratch import build_model

from .memory import SHAPES, Shape, text_shape
from .models import build_processor, device, make_images, make_texts

VOCABULARY = 151_936
MAX_IMAGE_TOKENS = 1280
SMALL_VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 4},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "deepstack_visual_indexes": [0],
    },
}
SMALL_TEXT = text_shape(32, 64, 3, 2, 1, VOCABULARY)
NEARLY_NOTHING = text_shape(16, 16, 1, 1, 1, VOCABULARY)


@dataclass(frozen=True)
class Scale:
    """
    Which shapes are measured, and on how much.

    Args:
        shapes (`dict[str, Shape]`).
        texts, images, large_images, mixed (`int`): Inputs of the workloads; `images` of those with text too.
        full_rows, adapter_rows (`int`): Rows (or pairs) of a step, where all weights train and where adapters do.
        kept_rows (`int`): Of a step without gradient checkpointing.
        checked_rows (`int`): Of a step whose gradients are compared.
        sides (`tuple[int, int]`): Pixels a side of square images, and of large ones.
    """

    shapes: dict[str, Shape]
    texts: int
    images: int
    large_images: int
    mixed: int
    full_rows: int
    adapter_rows: int
    kept_rows: int
    checked_rows: int
    sides: tuple[int, int] = (448, 896)


PUBLISHED = Scale(
    SHAPES,
    texts=512,
    images=64,
    large_images=16,
    mixed=48,
    full_rows=24,
    adapter_rows=16,
    kept_rows=8,
    checked_rows=4,
)
SMALL = Scale(
    {name: Shape(s.model_type, SMALL_TEXT, SMALL_VISION[s.model_type], s.tied) for name, s in SHAPES.items()},
    texts=8,
    images=3,
    large_images=2,
    mixed=6,
    full_rows=2,
    adapter_rows=2,
    kept_rows=2,
    checked_rows=2,
    sides=(112, 168),
)


@dataclass
class Models:
    """
    Several models of one processor, on the device.

    Args:
        ours ([`CocoaTransformer`]), stock (`SentenceTransformer`): Of the same weights; the second of stock modules.
        reader ([`CocoaTransformer`]): With nearly no weights: embedding with it takes the time of reading.
    """

    ours: CocoaTransformer
    stock: SentenceTransformer
    reader: CocoaTransformer


@cache
def shared_processor(model_type: str) -> CocoaProcessor:
    """Qwen2-VL's real tokenizer, images of up to 1,280 tokens; takes seconds the first time."""
    processor = build_processor(model_type=model_type)
    return CocoaProcessor(processor.processor, max_pixels=MAX_IMAGE_TOKENS * processor.token_pixels)


@contextmanager
def creating(dtype: torch.dtype) -> Iterator[None]:
    """Within it, weights are made on the device and in a precision at once; rotary frequencies stay in float32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device()):
            yield
    finally:
        torch.set_default_dtype(default)


def build_backbone(shape: Shape, dtype: torch.dtype) -> CocoaModelMixin:
    """A backbone of a shape with random weights, in evaluation mode."""
    text = {**shape.text, "rope_parameters": {"rope_theta": 1e6}}
    with creating(dtype):
        return build_model(shared_processor(shape.model_type), text, shape.vision, model_type=shape.model_type).eval()


def build_models(shape: Shape, dtype: torch.dtype) -> Models:
    """Models of a shape."""
    processor = shared_processor(shape.model_type)
    nothing = Shape(shape.model_type, NEARLY_NOTHING, SMALL_VISION[shape.model_type], True)
    tiny, backbone = build_backbone(nothing, dtype), build_backbone(shape, dtype)
    with creating(dtype):
        twin = stock_class(type(backbone))(copy.deepcopy(backbone.config)).eval()
    twin.load_state_dict(backbone.state_dict(), assign=True)
    with TemporaryDirectory() as folder:
        # sentence-transformers reads a module from a folder only: a small one, whose model is then exchanged.
        tiny.save_pretrained(folder)
        processor.save_pretrained(folder)
        transformer = Transformer(folder, model_kwargs={"local_files_only": True, "attn_implementation": "sdpa"})
    transformer.model = twin
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    stock = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device())
    return Models(CocoaTransformer(backbone, processor), stock, CocoaTransformer(tiny, processor))


def shape_workloads(scale: Scale) -> dict[str, list[Any]]:
    """What is encoded, by name, the most worthwhile first; in the mixed list sides vary."""
    side, large = scale.sides
    texts, images = make_texts(scale.texts), make_images(scale.images, side, side)
    captions = make_texts(scale.images, seed=1)
    third = scale.mixed // 3
    pictures, words = make_images(2 * third, side // 2, large), make_texts(2 * third, seed=2)
    mixed = [*words[:third], *pictures[:third], *captioned(words[third:], pictures[third:])]
    random.Random(1).shuffle(mixed)
    return {
        "texts": texts,
        f"images of {tokens_of(side):,} tokens": images,
        "mixed list": mixed,
        "image + text": captioned(captions, images),
        f"images of {tokens_of(large):,} tokens": make_images(scale.large_images, large, large),
    }


def captioned(texts: list[str], images: list[Any]) -> list[dict[str, Any]]:
    """Texts with an image each."""
    return [{"text": text, "image": image} for text, image in zip(texts, images, strict=True)]


def tokens_of(side: int) -> int:
    """Image tokens of a square image; `side` is in pixels."""
    return (side // 28) ** 2
