# SPDX-License-Identifier: Apache-2.0
"""What of a backbone trains: parts of it, adapters inside it; and the plain weights that come out."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from modeling_cocoa.auto import BACKBONES, load_backbone
from modeling_cocoa.files import atomic_write
from modeling_cocoa.modeling_cocoa import keep_quantized_weights

ADAPTER_FILE = "adapter_state.safetensors"
"""File of a checkpoint that holds the adapters of the run; the weights beside it have them folded in."""
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

    Args:
        backbone: A CoCoA backbone.
        freeze_parts (`Sequence[str]`): Some of [`PARTS`].
        peft_config ([`~peft.PeftConfig`], *optional*): The adapters; by names of modules as in peft.

    Raises:
        ValueError: nothing is left to train; no module that may train has a name that `peft_config.target_modules`
            asks for (said by peft, with the names); adapters are of a kind that cannot be put into a backbone or
            folded into its weights; the backbone has adapters already, and others are asked for, or those do not
            train.
    """
    keep_quantized_weights(backbone)
    given = getattr(backbone, "peft_config", {}) if has_adapter(backbone) else {}
    if given and (peft_config is not None or len(given) > 1):
        raise ValueError(
            f"The backbone has the adapters {sorted(given)} already: fold them into its weights first, with "
            "trainers.adapters.merge_adapters(backbone)."
        )
    for config in given.values():
        check_mergeable(config)
    if peft_config is not None:
        check_mergeable(peft_config)
        frozen = [name for name, _ in backbone.named_modules() if name and part_of(name) in freeze_parts]
        if frozen:
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
                "fold them into its weights, with trainers.adapters.merge_adapters(backbone)."
            )
        raise ValueError(f"Nothing of the backbone is left to train with freeze_parts={list(freeze_parts)}.")


def check_kind(backbone: Any, peft_config: PeftConfig) -> None:
    """
    Raise `ValueError` where adapters are of a kind that cannot be put into a backbone alone, or cannot be folded into
    its weights; seen on a copy without weights, before anything is trained.
    """
    kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    whole = without_weights(backbone)
    adapters = (module for module in whole.modules() if isinstance(module, BaseTunerLayer))
    try:
        if kind in NEED_THEIR_TRAINER:
            raise ValueError("it needs to be called between steps")
        inject_adapter_in_model(copy.deepcopy(peft_config), whole)
        if any(not getattr(type(module), "supports_merging", True) for module in adapters):
            raise ValueError("it cannot be merged")
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        if "arget module" in str(error):  # which there are, or what kind of module: said by peft, with the names
            raise ValueError(str(error)) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"peft_config is of the kind {kind}, which these trainers cannot train and fold into the weights that are "
            f"saved ({reason}). Use LoRA, DoRA, or another kind that is merged into the layers, such as LoHa, LoKr, "
            "IA3, OFT or MiSS."
        ) from error


def check_mergeable(peft_config: PeftConfig) -> None:
    """
    Raise `ValueError` where adapters are more than something added to the weights of layers, since what is saved are
    plain weights.
    """
    asked = {name: getattr(peft_config, name, None) for name in ("modules_to_save", "trainable_token_indices")}
    asked["lora_bias"] = getattr(peft_config, "lora_bias", False)
    asked["bias"] = {"none": None}.get(getattr(peft_config, "bias", "none"), getattr(peft_config, "bias", None))
    start = getattr(peft_config, "init_lora_weights", True)
    # These take their start out of the base's own weights.
    asked["init_lora_weights"] = start if str(start).lower().startswith(("pissa", "olora", "corda", "loftq")) else None
    if wrong := {name: value for name, value in asked.items() if value}:
        raise ValueError(
            f"peft_config asks for {wrong}, which cannot be folded into the weights that are saved; leave it at its "
            "default."
        )


def has_adapter(model: nn.Module) -> bool:
    """Whether the model holds adapters; not layers alone that held some."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return any(getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names)


def adapter_state_dict(backbone: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """
    The weights that train, by name: what a checkpoint must keep beside the frozen base.

    Args:
        backbone: With adapters.
        state_dict (`Mapping[str, Tensor]`, *optional*): Its weights, where it holds parts of them only.
    """
    state_dict = backbone.state_dict() if state_dict is None else state_dict
    return {name: state_dict[name] for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def save_adapter(
    backbone: nn.Module, folder: str | os.PathLike, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapters of a run into its checkpoint, whole or not at all; nothing where there are none."""
    if has_adapter(backbone):
        with atomic_write(Path(folder) / ADAPTER_FILE) as path:
            save_file(adapter_state_dict(backbone, state_dict), path)


def load_checkpoint(backbone: Any, folder: str | os.PathLike) -> None:
    """
    Put the weights of a checkpoint into the backbone that goes on training: its adapters, or all of them.

    Raises:
        ValueError: the checkpoint's adapters are not those of the backbone.
    """
    file = Path(folder) / ADAPTER_FILE
    if has_adapter(backbone) != file.is_file():
        there, here = ("has", "has none") if file.is_file() else ("has no", "has some")
        raise ValueError(
            f"The checkpoint {folder} {there} adapters, and this run {here}: give the peft_config of then."
        )
    if not has_adapter(backbone):
        load_weights(backbone, load_backbone(folder, dtype=backbone.dtype).state_dict(), strict=True)
        return
    state = load_file(file)
    found = {name: value.shape for name, value in state.items()}
    own = {name: unsharded_shape(value) for name, value in backbone.named_parameters() if value.requires_grad}
    if found != own:
        names = sorted(name for name in {*found, *own} if found.get(name) != own.get(name))
        raise ValueError(
            f"The adapters in {folder} are not those of this run's peft_config; they differ in {names[:3]}"
            f"{' and others' if len(names) > 3 else ''}."
        )
    load_weights(backbone, state, strict=False)


def unsharded_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight, also where DeepSpeed has shared it out."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def submodule_state_dict(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of a part of a model, by their names in it."""
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, strict: bool) -> None:
    """
    Put weights in their places, in each process its part of those that are shared out.

    Raises:
        RuntimeError: one has no place, or with `strict` one is missing; names them.
    """
    options = StateDictOptions(full_state_dict=True, strict=strict)
    if unknown := set_model_state_dict(module, dict(weights), options=options).unexpected_keys:
        raise RuntimeError(f"The weights {sorted(unknown)} have no place in {type(module).__name__}.")


def merge_adapters(backbone: Any, state_dict: Mapping[str, Tensor] | None = None) -> Any:
    """
    A backbone of plain weights, as a saved folder holds it: adapters folded in, quantized weights as numbers again.

    The backbone itself stays as it is: folding and unfolding in place would not be exact.

    Args:
        backbone: With or without adapters.
        state_dict (`Mapping[str, Tensor]`, *optional*): Its weights, where it holds parts of them only because
            processes share them out.

    Returns:
        The backbone itself where nothing has to be done, or another one.

    Raises:
        ValueError: some weights are missing.
    """
    if state_dict is None:
        if not has_adapter(backbone):
            return backbone
        state_dict = dequantized_state_dict(backbone)
    whole = without_weights(backbone)
    whole.pooler = backbone.pooler
    if has_adapter(backbone):
        for name, peft_config in backbone.peft_config.items():
            inject_adapter_in_model(peft_config, whole, adapter_name=name)
    whole.load_state_dict(state_dict, assign=True)
    for name, buffer in list(whole.named_buffers()):
        if buffer.is_meta:  # no state dict has it: frequencies of the rotary positions
            parent_name, _, child = name.rpartition(".")
            own = backbone.get_buffer(name)
            whole.get_submodule(parent_name).register_buffer(child, own, persistent=False)
    for name, module in list(whole.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            base.weight = nn.Parameter(base.weight.clone(), requires_grad=False)  # merging writes into it
            module.merge()
            parent_name, _, child = name.rpartition(".")
            setattr(whole.get_submodule(parent_name), child, module.get_base_layer())  # some put another in its place
    return whole


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

        if kind == "Params4bit":
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
            weight = functional.int8_vectorwise_dequant(module.weight.data, scales)
        packed = (f"{name}.weight", f"{name}.SCB")
        state = {key: value for key, value in state.items() if not key.startswith(packed)}
        state[f"{name}.weight"] = weight.to(backbone.dtype)
    return state
