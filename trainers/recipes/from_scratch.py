# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights: for tests, for trying out data, and for the checkpoint of this repository."""

from __future__ import annotations

from typing import Any

import torch

from modeling_cocoa.auto import BACKBONES
from modeling_cocoa.configuration_cocoa import CocoaSettings
from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from modeling_cocoa.processing_cocoa import CocoaProcessor


def build_model(
    processor: CocoaProcessor,
    text_config: dict[str, Any],
    vision_config: dict[str, Any],
    *,
    model_type: str = "qwen2_vl",
    image_decoder_layers: int = 1,
    seed: int = 0,
) -> CocoaModelMixin:
    """
    A CoCoA model with random weights that fits a processor.

    Args:
        processor ([`CocoaProcessor`]): Gives the vocabulary and the special tokens.
        text_config, vision_config (`dict`): Of the stock configuration; vocabulary, special tokens, patch sizes,
            rotary sections and the output width of the vision tower are filled in.
        model_type (`str`, defaults to `"qwen2_vl"`): One of [`BACKBONES`].
        image_decoder_layers (`int`, defaults to 1).
        seed (`int`, defaults to 0): Of the weights.
    """
    if model_type not in BACKBONES:
        raise ValueError(f"model_type must be one of {list(BACKBONES)}; got {model_type!r}.")
    model_class = BACKBONES[model_type]
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    hidden_size = text_config["hidden_size"]
    # Qwen2-VL's sections give time a quarter of the rotary pairs, height and width three eighths each.
    default = model_class.config_class()
    head_dim = text_config.get("head_dim", hidden_size // text_config["num_attention_heads"])
    pairs = head_dim // 2
    side = pairs * 3 // 8
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    rope["mrope_section"] = [pairs - 2 * side, side, side]
    if "mrope_interleaved" in default.text_config.ignore_keys_at_rope_validation:
        rope["mrope_interleaved"] = True  # Qwen3-VL always does it; vLLM reads it here
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": processor.eos_token_id,
        "pad_token_id": processor.pad_token_id,
        **text_config,
        **({"head_dim": head_dim} if hasattr(default.text_config, "head_dim") else {}),
        "rope_parameters": {**rope, **text_config.get("rope_parameters", {})},
    }
    # In Qwen2-VL, the width in which the vision tower hands over is its `hidden_size`.
    output_width = "out_hidden_size" if hasattr(default.vision_config, "out_hidden_size") else "hidden_size"
    vision = {
        "patch_size": image_processor.patch_size,
        "spatial_merge_size": image_processor.merge_size,
        "temporal_patch_size": image_processor.temporal_patch_size,
        **vision_config,
        output_width: hidden_size,
    }
    config = model_class.config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    config.cocoa = CocoaSettings(
        eos_token_id=processor.eos_token_id,
        mask_token_id=processor.mask_token_id,
        image_decoder_layers=image_decoder_layers,
    ).to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config)
