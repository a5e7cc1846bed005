# SPDX-License-Identifier: Apache-2.0
"""Which CoCoA class a checkpoint is loaded with."""

from __future__ import annotations

import os
from typing import Any

from transformers.utils import find_adapter_config_file

from .checkpoint_files import hub_arguments, read_model_type
from .modeling_cocoa import CocoaModelMixin
from .modeling_cocoa_qwen2_5_vl import CocoaQwen2_5_VLModel
from .modeling_cocoa_qwen2_vl import CocoaQwen2VLModel

BACKBONES: dict[str, type[CocoaModelMixin]] = {
    "qwen2_vl": CocoaQwen2VLModel,
    "qwen2_5_vl": CocoaQwen2_5_VLModel,
}
"""The backbone class of each `model_type`."""


def load_backbone(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> CocoaModelMixin:
    """
    Load a CoCoA checkpoint or a generative Qwen2-VL / Qwen2.5-VL one as the backbone of its kind.

    Args:
        pretrained_model_name_or_path: Folder or Hub name.
        kwargs: For the class's `from_pretrained`.

    Raises:
        ValueError: the checkpoint is of another kind of model.
        FileNotFoundError: there is no such folder.
    """
    model_type = check_backbone(pretrained_model_name_or_path, **kwargs)
    return BACKBONES[model_type].from_pretrained(pretrained_model_name_or_path, **kwargs)


def check_backbone(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> str:
    """
    The `model_type` of a checkpoint that [`load_backbone`] loads.

    Args:
        pretrained_model_name_or_path: Folder or Hub name.
        kwargs: Of the class's `from_pretrained`.

    Raises:
        ValueError: the checkpoint is of another kind of model, holds adapters alone, or no model.
        FileNotFoundError: there is no such folder.
    """
    name = pretrained_model_name_or_path
    try:
        model_type = read_model_type(name, **kwargs)
    except FileNotFoundError:
        raise
    except OSError:
        if not holds_adapters(name, **kwargs):
            raise
        model_type = None
    if model_type is None and holds_adapters(name, **kwargs):
        raise ValueError(
            f"{name} holds adapters (adapter_config.json), not a model: load the model that they were trained in and "
            f"call backbone.load_adapter({str(name)!r}), then trainers.adapters.merge_adapters(backbone) for plain "
            "weights."
        )
    if model_type is None and os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{name} holds no model: it has no config.json.")
    if model_type not in BACKBONES:
        raise ValueError(f"{name} is a checkpoint of model type {model_type!r}; CoCoA takes {sorted(BACKBONES)}.")
    return model_type


def holds_adapters(name_or_path: str | os.PathLike, **kwargs: Any) -> bool:
    """Whether a folder or a name on the Hub has the configuration of adapters."""
    return find_adapter_config_file(os.fspath(name_or_path), **hub_arguments(kwargs)) is not None
