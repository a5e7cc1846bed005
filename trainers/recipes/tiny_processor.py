# SPDX-License-Identifier: Apache-2.0
"""A processor for small models, its tokenizer trained on one's own texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PROCESSOR_MAPPING, PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen2VLImageProcessor

from modeling_cocoa.auto import BACKBONES
from modeling_cocoa.processing_cocoa import CocoaProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's, in the order of their ids."""


def build_tiny_processor(
    texts: Iterable[str],
    *,
    vocab_size: int = 2048,
    patch_size: int = 8,
    min_pixels: int = 16 * 16,
    max_pixels: int = 64 * 64,
    max_length: int = 256,
    model_type: str = "qwen2_vl",
) -> CocoaProcessor:
    """
    A processor for a small model: its backbone's pipeline, with small patches and a small vocabulary.

    The tokenizer is a byte-level BPE with Qwen2's normalisation and pre-tokenisation and Qwen2-VL's special tokens.
    The same texts in the same order give the same tokenizer.

    Args:
        texts (`Iterable[str]`): What the merges are learned from.
        vocab_size (`int`, defaults to 2048): Tokens, with the 256 bytes and the special tokens; fewer where the texts
            have fewer pairs to merge.
        patch_size (`int`, defaults to 8): Pixels of a patch's side; 2x2 patches make one image token.
        min_pixels, max_pixels (`int`, defaults to 16 * 16 and 64 * 64): Pixels to which an image is scaled up or down.
        max_length (`int`, defaults to 256): Tokens of an input, the EOS among them.
        model_type (`str`, defaults to `"qwen2_vl"`): One of [`BACKBONES`].

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes and the special tokens, or a size is out of range.
    """
    learned = vocab_size - len(SPECIAL_TOKENS) - 1  # one for the mask token
    if learned < 256:
        least = vocab_size - learned + 256
        raise ValueError(f"vocab_size must be at least {least}, for the bytes and special tokens; got {vocab_size}.")
    stock = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(BPE())
    backend.normalizer, backend.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    trainer = BpeTrainer(vocab_size=learned, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    first = len(model["vocab"])
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_length,
        added_tokens_decoder={
            first + offset: AddedToken(token, special=True, normalized=False)
            for offset, token in enumerate(SPECIAL_TOKENS)
        },
    )
    return processor_around(
        tokenizer,
        patch_size=patch_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_length=max_length,
        model_type=model_type,
    )


def processor_around(
    tokenizer: PreTrainedTokenizerBase,
    *,
    patch_size: int,
    min_pixels: int,
    max_pixels: int,
    max_length: int,
    model_type: str = "qwen2_vl",
) -> CocoaProcessor:
    """The pipeline of a backbone around a tokenizer that has Qwen2-VL's special tokens, which is changed in place."""
    backbone = BACKBONES[model_type]
    video_processor_class = backbone.video_processor_class
    sizes = {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}, "patch_size": patch_size}
    normal = {"image_mean": video_processor_class.image_mean, "image_std": video_processor_class.image_std}
    processor = PROCESSOR_MAPPING[backbone.config_class](
        image_processor=Qwen2VLImageProcessor(**sizes, **normal),
        tokenizer=tokenizer,
        video_processor=video_processor_class(**sizes),
    )
    processor = CocoaProcessor(processor, min_pixels=min_pixels, max_pixels=max_pixels, max_length=max_length)
    with TemporaryDirectory() as folder:
        # Saved and loaded, for transformers picks another image processor class on loading than the one named above.
        processor.save_pretrained(folder)
        return CocoaProcessor.from_pretrained(folder)
