# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks.memory`: what pre-training needs on a GPU, from what a layer of each model really keeps.

What one layer of the true width keeps for its backward pass is measured, by counting the tensors that autograd saves;
the rest is arithmetic on the number of weights. Runs on a CPU, in two minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers.utils import logging

from modeling_cocoa.auto import BACKBONES
from modeling_cocoa.configuration_cocoa import CocoaSettings
from modeling_cocoa.files import atomic_write
from modeling_cocoa.packed_attention import attend_row
from modeling_cocoa.packing import pack

logging.set_verbosity_error()

RESULT = Path(__file__).parent / "results" / "memory.json"
GIB = 2**30

TOKENS = 488
"""Tokens (and patches) that a layer is measured with; no side of a weight, or casts could be taken for states."""
BUDGET = 12_800
"""Tokens of a step on each device."""

TRAINED = 4 + 4 + 8
"""Bytes of a weight that trains: itself and its gradient in float32, and the two moments of AdamW."""
FROZEN = 2
"""Bytes of a weight in bfloat16 that does not."""
QUANTIZED = 0.5 + 0.127 / 8
"""Bytes of a weight in NF4: four bits, and the scale of each 64 in 8 bits and a little (QLoRA, arXiv 2305.14314)."""

QWEN2_VL_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
QWEN2_5_VL_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
QWEN3_VL_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
QWEN3_VL_8B_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}


@dataclass
class Shape:
    """
    A published model's sizes.

    Args:
        model_type (`str`).
        text, vision (`dict`): Of its configuration.
        tied (`bool`): Whether the text head is the embedding matrix.
    """

    model_type: str
    text: dict[str, int]
    vision: dict[str, Any]
    tied: bool

    @property
    def vision_width(self) -> int:
        """Hidden size of the vision tower."""
        return self.vision.get("embed_dim") or self.vision["hidden_size"]


def text_shape(
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, head: int | None = None
) -> dict[str, int]:
    """The text configuration's fields of a size; `head`: of a head, where it is not the hidden size's share."""
    return {
        **({} if head is None else {"head_dim": head}),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }


SHAPES = {
    "Qwen2-VL-2B": Shape("qwen2_vl", text_shape(1536, 8960, 28, 12, 2, 151_936), QWEN2_VL_VISION, True),
    "Qwen2-VL-7B": Shape("qwen2_vl", text_shape(3584, 18_944, 28, 28, 4, 152_064), QWEN2_VL_VISION, False),
    "Qwen2.5-VL-3B": Shape("qwen2_5_vl", text_shape(2048, 11_008, 36, 16, 2, 151_936), QWEN2_5_VL_VISION, True),
    "Qwen2.5-VL-7B": Shape("qwen2_5_vl", text_shape(3584, 18_944, 28, 28, 4, 152_064), QWEN2_5_VL_VISION, False),
    "Qwen3-VL-2B": Shape("qwen3_vl", text_shape(2048, 6144, 28, 16, 8, 151_936, 128), QWEN3_VL_VISION, True),
    "Qwen3-VL-4B": Shape("qwen3_vl", text_shape(2560, 9728, 36, 32, 8, 151_936, 128), QWEN3_VL_VISION, True),
    "Qwen3-VL-8B": Shape("qwen3_vl", text_shape(4096, 12_288, 36, 32, 8, 151_936, 128), QWEN3_VL_8B_VISION, False),
}


def build(shape: Shape, layers: int, blocks: int, device: str) -> nn.Module:
    """A backbone of a shape, with so many layers and vision blocks, in bfloat16."""
    config_class = BACKBONES[shape.model_type].config_class
    width = "out_hidden_size" if hasattr(config_class().vision_config, "out_hidden_size") else "hidden_size"
    pairs = shape.text.get("head_dim", shape.text["hidden_size"] // shape.text["num_attention_heads"]) // 2
    side = pairs * 3 // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2 * side, side, side]}
    config = config_class(
        text_config={**shape.text, "num_hidden_layers": layers, "rope_parameters": rope},
        vision_config={**shape.vision, "depth": blocks, width: shape.text["hidden_size"]},
        tie_word_embeddings=shape.tied,
        dtype=torch.bfloat16,
    )
    config.cocoa = CocoaSettings(eos_token_id=151_645, mask_token_id=151_657).to_dict()
    with torch.device(device):
        return BACKBONES[shape.model_type](config).to(torch.bfloat16)


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward pass, weights and casts of them apart; views of a tensor count once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    casts = {2 * parameter.numel() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() not in casts:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def bytes_kept(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """
    What one decoder layer keeps of a token, and one vision block of a patch.

    Args:
        shape ([`Shape`]).
        dtype (`torch.dtype`): Of the weights. In float32 they compute in bfloat16 by autocast.
    """
    small = Shape(shape.model_type, {**shape.text, "vocab_size": 64}, shape.vision, shape.tied)
    model = build(small, 1, 1, "cpu").to(dtype)
    layer, block = model.language_model.layers[0], model.visual.blocks[0]
    states = torch.randn(TOKENS, shape.text["hidden_size"], dtype=dtype, requires_grad=True)
    segments = torch.ones(2, TOKENS // 2, dtype=torch.long)
    positions = torch.arange(TOKENS).expand(3, 1, TOKENS)
    rotary = model.language_model.rotary_emb(states[None], positions)
    attend = partial(attend_row, packing=pack(segments), implementation=model.attention)
    patches = torch.randn(TOKENS, shape.vision_width, dtype=dtype, requires_grad=True)
    head = shape.vision_width // shape.vision["num_heads"]
    turns = (torch.randn(TOKENS, head), torch.randn(TOKENS, head))
    ends = torch.arange(0, TOKENS + 1, TOKENS // 8, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        token = saved_bytes(model, lambda: layer(states[None], packed_attention=attend, position_embeddings=rotary))
        patch = saved_bytes(model, lambda: block(patches, cu_seqlens=ends, position_embeddings=turns))
    return {"token": token / TOKENS, "patch": patch / TOKENS}


def count_weights(shape: Shape) -> dict[str, int]:
    """Weights by part; `linear`: those of linear layers, which adapters sit in and NF4 packs."""
    model = build(shape, shape.text["num_hidden_layers"], shape.vision["depth"], "meta")
    size = {name: parameter.numel() for name, parameter in model.named_parameters()}
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    head = 0 if shape.tied else model.get_input_embeddings().weight.numel()
    return {
        "backbone": sum(size.values()),
        "vision": sum(count for name, count in size.items() if name.startswith("visual.")),
        "linear": linear,
        "embeddings": model.get_input_embeddings().weight.numel(),
        "head": head,
        # Rank 16 at every linear layer.
        "adapters": sum(16 * sum(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)),
    }


def activations(
    shape: Shape, kept: dict[str, float], value_bytes: int, tokens: int = BUDGET, patches: int = 2 * BUDGET
) -> dict[str, float]:
    """
    Bytes that a step keeps.

    Args:
        shape ([`Shape`]).
        kept (`dict`): Of [`bytes_kept`].
        value_bytes (`int`): Of a value that one layer hands to the next.
        tokens, patches (`int`): Of the step; by default half of the tokens are those of source images, four patches
            each.

    Returns:
        `dict`: `kept`, everything of every layer; `checkpointed`, the input of each layer, and all of the one that
            is computed anew; `vision`, the part of that which is left when the text layers' gradients are there.
    """
    layers, blocks = shape.text["num_hidden_layers"], shape.vision["depth"]
    text, vision = value_bytes * tokens * shape.text["hidden_size"], value_bytes * patches * shape.vision_width
    anew = max(tokens * kept["token"], patches * kept["patch"])
    return {
        "kept": tokens * kept["token"] * layers + patches * kept["patch"] * blocks,
        "checkpointed": text * layers + vision * blocks + anew,
        "vision": vision * blocks + anew,
    }


def needed(shape: Shape, weights: dict[str, int], kept: dict[str, dict[str, float]]) -> dict[str, float]:
    """GiB on each GPU, by the way of training, with gradient checkpointing."""
    everything = weights["backbone"] + weights["head"]
    others = everything - weights["linear"]
    adapters = TRAINED * weights["adapters"]
    full = activations(shape, kept["float32"], 4)["checkpointed"]
    lean = activations(shape, kept["bfloat16"], 2)["checkpointed"]
    # Of shared-out weights, the embeddings and heads are put together for the whole step, and so are their gradients.
    together = 2 * FROZEN * (weights["embeddings"] + weights["head"])
    found = {
        "full, one GPU": TRAINED * everything + full,
        "full, eight GPUs": TRAINED * everything / 8 + together + full,
        "LoRA": FROZEN * everything + adapters + lean,
        "QLoRA": QUANTIZED * weights["linear"] + FROZEN * others + adapters + lean,
    }
    return {name: value / GIB for name, value in found.items()}


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The tables of docs/training.md."""
    ways = list(next(iter(found.values()))["gib"])
    lines = ["| model | weights | " + " | ".join(ways) + " |", "|---|---|" + "---|" * len(ways)]
    for name, model in found.items():
        count = (model["weights"]["backbone"] + model["weights"]["head"]) / 1e9
        lines.append(
            f"| {name} | {count:.2f} B | " + " | ".join(f"{model['gib'][way]:.0f} GiB" for way in ways) + " |"
        )
    lines += ["", "| model | token and layer, bfloat16 | float32 | patch and block, bfloat16 | float32 |"]
    lines.append("|---|---|---|---|---|")
    for name, model in found.items():
        cells = [f"{model['kept'][dtype][of]:,.0f}" for of in ("token", "patch") for dtype in ("bfloat16", "float32")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measure() -> dict[str, dict[str, Any]]:
    """Of each model: what its layers keep, its weights, and what training it needs."""
    found = {}
    for name, shape in SHAPES.items():
        kept = {str(dtype)[6:]: bytes_kept(shape, dtype) for dtype in (torch.bfloat16, torch.float32)}
        weights = count_weights(shape)
        found[name] = {"kept": kept, "weights": weights, "gib": needed(shape, weights, kept)}
    return found


def main(output: Annotated[Path, typer.Option(help="JSON file of what was measured.")] = RESULT) -> None:
    """Measure a layer of each model, and print what pre-training needs."""
    found = measure()
    with atomic_write(output) as path:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    typer.echo(markdown(found))


if __name__ == "__main__":
    typer.run(main)
