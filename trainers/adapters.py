# SPDX-License-Identifier: Apache-2.0
"""What of a backbone trains: parts of it, or adapters inside it; and the plain weights that come out."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from modeling_cocoa.auto import BACKBONES
from modeling_cocoa.modeling_cocoa import keep_quantized_weights

NEED_THEIR_TRAINER = ("ADALORA", "POLY", "XLORA")
"""Kinds of adapters that a training loop has to call, or give more than inputs."""
PARTS = ("vision_tower", "merger", "language_model")
"""Parts of a backbone: what reads patches, what makes tokens of four of them, and the rest with its embeddings."""


def part_of(name: str) -> str:
    """Which of [`PARTS`] a module or weight of a backbone belongs to, by its name."""
    if name.startswith("visual.merger"):
        return "merger"
    return "vision_tower" if name.startswith("visual") else "language_model"


def prepare_parts(backbone: nn.Module, freeze_parts: Sequence[str], peft_config: PeftConfig | None) -> None:
    """
    Freeze parts of a backbone, and put adapters into the others, in place; with adapters nothing else of it trains.

    Raises:
        ValueError: nothing is left to train; no module that may train has a name that `peft_config.target_modules`
            asks for (said by peft, with the names); adapters are of a kind that cannot be put into a backbone or
            merged into its weights; the backbone has adapters already, and others are asked for, or those do not
            train.
    """
    keep_quantized_weights(backbone)
    given = getattr(backbone, "peft_config", {}) if has_adapter(backbone) else {}
    if given and (peft_config is not None or len(given) > 1):
        raise ValueError(
            f"The backbone has the adapters {sorted(given)} already: merge them into its weights first, with "
            "trainers.adapters.merge_adapters(backbone)."
        )
    for config in given.values():
        check_mergeable(config)
    if peft_config is not None:
        check_mergeable(peft_config)
        if frozen := [name for name, _ in backbone.named_modules() if name and part_of(name) in freeze_parts]:
            excluded = peft_config.exclude_modules or []
            if isinstance(excluded, str):
                excluded = [name for name, _ in backbone.named_modules() if re.fullmatch(excluded, name)]
            peft_config = copy.copy(peft_config)
            peft_config.exclude_modules = [*excluded, *frozen]
        check_kind(backbone, peft_config)
        inject_adapter_in_model(peft_config, backbone)
    is_adapted = has_adapter(backbone)
    for name, parameter in backbone.named_parameters():
        if part_of(name) in freeze_parts or ".base_layer." in name:
            parameter.requires_grad_(False)
        elif is_adapted and parameter.requires_grad:
            # As in peft's own models: steps are too small for half precision, whatever the base is in.
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        if given:
            raise ValueError(
                "The adapters of the backbone do not train: load them with load_adapter(..., is_trainable=True), or "
                "merge them into its weights, with trainers.adapters.merge_adapters(backbone)."
            )
        raise ValueError(f"Nothing of the backbone is left to train with freeze_parts={list(freeze_parts)}.")


def check_kind(backbone: Any, peft_config: PeftConfig) -> None:
    """
    Raise `ValueError` where adapters are of a kind that cannot be put into a backbone alone or merged into its
    weights; tried on a copy without weights.
    """
    kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    trial = without_weights(backbone)
    try:
        if kind in NEED_THEIR_TRAINER:
            raise ValueError("it needs to be called between steps")
        inject_adapter_in_model(copy.deepcopy(peft_config), trial)
        layers = [module for module in trial.modules() if isinstance(module, BaseTunerLayer)]
        if not all(getattr(layer, "supports_merging", True) for layer in layers):
            raise ValueError("it cannot be merged")
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        if "arget module" in str(error):  # which there are, or what kind of module: said by peft, with the names
            raise ValueError(str(error)) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"peft_config is of the kind {kind}, which these trainers cannot train and merge into the weights that "
            f"are saved ({reason}). Use LoRA, DoRA, or another kind that is merged into the layers, such as LoHa, "
            "LoKr, IA3, OFT or MiSS."
        ) from error


def check_mergeable(peft_config: PeftConfig) -> None:
    """Raise `ValueError` where adapters are more than something added to the weights of layers."""
    plain = {"modules_to_save": None, "trainable_token_indices": None, "lora_bias": False, "bias": "none"}
    asked = {name: getattr(peft_config, name, default) for name, default in plain.items()}
    wrong = {name: value for name, value in asked.items() if value and value != plain[name]}
    start = getattr(peft_config, "init_lora_weights", True)
    if str(start).lower().startswith(("pissa", "olora", "corda", "loftq")):  # these change the base's own weights
        wrong["init_lora_weights"] = start
    if wrong:
        raise ValueError(
            f"peft_config asks for {wrong}, which cannot be merged into the weights that are saved; leave it at its "
            "default."
        )


def has_adapter(model: nn.Module) -> bool:
    """Whether the model holds adapters; not layers alone that held some."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return any(getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names)


def merge_adapters(backbone: Any, state_dict: Mapping[str, Tensor] | None = None) -> Any:
    """
    A backbone of plain weights, as a saved folder holds it: adapters merged, quantized weights as numbers again.

    The backbone itself stays as it is: merging and unmerging in place would not be exact.

    Args:
        backbone: With or without adapters.
        state_dict (`Mapping[str, Tensor]`, *optional*): Its weights, where it holds parts of them only because
            processes share them out.

    Returns:
        The backbone itself where nothing has to be done, or another one.

    Raises:
        ValueError: some weights are missing.
    """
    is_adapted = has_adapter(backbone)
    if state_dict is None:
        if not is_adapted:
            return backbone
        state_dict = dequantized_state_dict(backbone)
    plain = without_weights(backbone)
    plain.pooler = backbone.pooler
    if is_adapted:
        plain.config.name_or_path = ""  # it is no longer the model of that name
        for name, peft_config in backbone.peft_config.items():
            inject_adapter_in_model(peft_config, plain, adapter_name=name)
    plain.load_state_dict(state_dict, assign=True)
    for name, buffer in list(plain.named_buffers()):
        if buffer.is_meta:  # no state dict has it: frequencies of the rotary positions
            parent_name, _, child = name.rpartition(".")
            plain.get_submodule(parent_name).register_buffer(child, backbone.get_buffer(name), persistent=False)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            base.weight = nn.Parameter(base.weight.clone(), requires_grad=False)  # merging writes into it
            module.merge()
            parent_name, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent_name), child, module.get_base_layer())  # some put another in its place
    return plain


def merged(backbone: Any, state_dict: Mapping[str, Tensor] | None = None) -> Any:
    """The former name of [`merge_adapters`]; goes in the next release."""
    warnings.warn("trainers.adapters.merged is now called merge_adapters.", FutureWarning, stacklevel=2)
    return merge_adapters(backbone, state_dict)


def without_weights(backbone: Any) -> Any:
    """A backbone of the same configuration, not quantized, whose weights have shapes only."""
    config = copy.deepcopy(backbone.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return BACKBONES[config.model_type](config)


def dequantized_state_dict(backbone: nn.Module) -> dict[str, Tensor]:
    """The weights by name; of layers that bitsandbytes keeps in 4 or 8 bits, those that they compute with."""
    state = backbone.state_dict()
    for name, module in backbone.named_modules():
        kind = type(module.weight).__name__ if isinstance(module, nn.Linear) else None
        if kind not in ("Params4bit", "Int8Params"):
            continue
        from bitsandbytes import functional

        # PEFT's dequantize_module_weight takes the scales of an 8-bit layer on a CPU away.
        if kind == "Params4bit":
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
            weight = functional.int8_vectorwise_dequant(module.weight.data, scales)
        packed = (f"{name}.weight", f"{name}.SCB")
        state = {key: value for key, value in state.items() if not key.startswith(packed)}
        state[f"{name}.weight"] = weight.to(backbone.dtype)
    return state
