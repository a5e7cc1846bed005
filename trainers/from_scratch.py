# SPDX-License-Identifier: Apache-2.0
"""Small models made from nothing: for tests, for trying out data, and for the checkpoint of this repository."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

from modeling_cocoa.configuration_cocoa import CocoaConfig
from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from modeling_cocoa.modeling_cocoa_qwen2_5_vl import CocoaQwen2_5_VLModel
from modeling_cocoa.modeling_cocoa_qwen2_vl import CocoaQwen2VLModel
from modeling_cocoa.processing_cocoa import CocoaProcessor

CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, CocoaQwen2VLModel),
    "qwen2_5_vl": (Qwen2_5_VLConfig, CocoaQwen2_5_VLModel),
}


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
            rotary sections and the width in which the vision tower hands over are filled in.
        model_type (`"qwen2_vl"` or `"qwen2_5_vl"`).
        image_decoder_layers (`int`, defaults to 1).
        seed (`int`, defaults to 0): Of the weights.

    Raises:
        ValueError: `model_type` is neither of the two.
    """
    if model_type not in CLASSES:
        raise ValueError(f"model_type must be one of {list(CLASSES)}; got {model_type!r}.")
    config_class, model_class = CLASSES[model_type]
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    hidden_size = text_config["hidden_size"]
    # Qwen2-VL's sections give time a quarter of the rotary pairs, height and width three eighths each.
    pairs = hidden_size // text_config["num_attention_heads"] // 2
    side = pairs * 3 // 8
    rope = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [pairs - 2 * side, side, side],
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": processor.eos_token_id,
        "pad_token_id": processor.pad_token_id,
        **text_config,
        "rope_parameters": {**rope, **text_config.get("rope_parameters", {})},
    }
    output_width = "hidden_size" if model_type == "qwen2_vl" else "out_hidden_size"
    vision = {
        "patch_size": image_processor.patch_size,
        "spatial_merge_size": image_processor.merge_size,
        "temporal_patch_size": image_processor.temporal_patch_size,
        **vision_config,
        output_width: hidden_size,
    }
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    config.cocoa = CocoaConfig(
        eos_token_id=processor.eos_token_id,
        mask_token_id=processor.mask_token_id,
        image_decoder_layers=image_decoder_layers,
    ).to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config)
