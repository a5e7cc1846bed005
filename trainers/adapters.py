# SPDX-License-Identifier: Apache-2.0
"""LoRA and its kin inside a backbone: put in, taken out as plain weights."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling_cocoa.auto import load_backbone

ADAPTER_FILE = "adapter_state.safetensors"
"""File of a checkpoint that holds the adapters of the run; the weights beside it have them folded in."""


def add_adapter(backbone: nn.Module, peft_config: PeftConfig) -> None:
    """
    Put adapters into a backbone, in place, and freeze the rest of it.

    Raises:
        ValueError: no module has a name that `peft_config.target_modules` asks for (said by peft, with the names).
    """
    inject_adapter_in_model(peft_config, backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)


def has_adapter(model: nn.Module) -> bool:
    """Whether the model holds adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights that train, by name: what a checkpoint must keep beside the frozen base."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(backbone: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapters of a run into its checkpoint, whole or not at all; nothing where there are none."""
    if has_adapter(backbone):
        path = Path(folder) / ADAPTER_FILE
        partial = path.with_suffix(".partial")
        save_file(adapter_state_dict(backbone), partial)
        os.replace(partial, path)


def load_checkpoint(backbone: Any, folder: str | os.PathLike) -> None:
    """
    Put the weights of a checkpoint into the backbone that goes on training: its adapters, or all of them.

    Raises:
        ValueError: the checkpoint's adapters are not those of the backbone.
    """
    if not has_adapter(backbone):
        backbone.load_state_dict(load_backbone(folder, dtype=backbone.dtype).state_dict())
        return
    state = load_file(Path(folder) / ADAPTER_FILE)
    if set(state) != set(adapter_state_dict(backbone)):
        raise ValueError(f"The adapters in {folder} are not those of this run's peft_config.")
    backbone.load_state_dict(state, strict=False)


def merged(backbone: Any) -> Any:
    """
    A copy of the backbone with its adapters folded into plain weights; the backbone itself if it has none.

    The adapters of the original stay as they are: folding and unfolding in place would not be exact.
    """
    if not has_adapter(backbone):
        return backbone
    folded = copy.deepcopy(backbone)
    for name, module in list(folded.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent_name, _, child = name.rpartition(".")
            setattr(folded.get_submodule(parent_name), child, module.get_base_layer())
    return folded
