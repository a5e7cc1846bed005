# SPDX-License-Identifier: Apache-2.0
"""The backbones, and which of them a checkpoint is loaded with."""

from __future__ import annotations

import os
from typing import Any

from transformers import PROCESSOR_MAPPING
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from .adapter_base import AdapterBase
from .checkpoint_files import check_is_there, find_checkpoint_file, hub_arguments, read_model_type
from .modeling_cocoa import CocoaModelMixin
from .modeling_cocoa_qwen2_5_vl import CocoaQwen2_5_VLModel
from .modeling_cocoa_qwen2_vl import CocoaQwen2VLModel
from .modeling_cocoa_qwen3_vl import CocoaQwen3VLModel

BACKBONES: dict[str, type[CocoaModelMixin]] = {
    cls.config_class.model_type: cls for cls in (CocoaQwen2VLModel, CocoaQwen2_5_VLModel, CocoaQwen3VLModel)
}
"""The backbone class of each `model_type`: it names its configuration class, and how it calls its weights."""

CAUSAL_BY_NATURE = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
"""Models most of whose layers are linear attention: a recurrence from left to right, which no mask makes two-sided."""

PROCESSOR_CLASSES = {model_type: PROCESSOR_MAPPING[cls.config_class] for model_type, cls in BACKBONES.items()}
"""The stock processor of each `model_type`."""


def load_backbone(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> CocoaModelMixin:
    """
    Load a CoCoA checkpoint or a generative Qwen-VL one as the backbone of its kind; of a folder of
    adapters, the model that they belong to with the adapters in it.

    Args:
        pretrained_model_name_or_path: Folder or Hub name.
        kwargs: For the class's `from_pretrained`.

    Raises:
        ValueError: the checkpoint is of another kind of model, or the model of adapters has other weights now.
        FileNotFoundError: there is no such folder.
    """
    name = pretrained_model_name_or_path
    if holds_adapters_alone(name, **kwargs):
        base = AdapterBase.read(name, **kwargs)
        # These two say where the adapters are.
        of_base = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        base.check(name, **of_base)
        model = load_backbone(base.name_or_path, revision=base.revision, **of_base)
        model.load_adapter(os.fspath(name), adapter_kwargs=hub_arguments(kwargs))
        return model
    return BACKBONES[_model_type(name, **kwargs)].from_pretrained(name, **kwargs)


def check_backbone(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> str:
    """
    The `model_type` of a checkpoint that [`load_backbone`] loads.

    Args:
        pretrained_model_name_or_path: Folder or Hub name.
        kwargs: Of the class's `from_pretrained`.

    Raises:
        ValueError: the checkpoint is of another kind of model, holds adapters that name none, or no model.
        FileNotFoundError: there is no such folder.
    """
    name = pretrained_model_name_or_path
    if holds_adapters_alone(name, **kwargs):
        base = AdapterBase.read(name, **kwargs)
        return check_backbone(base.name_or_path, **{**kwargs, "revision": base.revision, "subfolder": ""})
    return _model_type(name, **kwargs)


def _model_type(name: str | os.PathLike, **kwargs: Any) -> str:
    """The `model_type` of a checkpoint that holds a model."""
    if os.path.isdir(name) and find_checkpoint_file(name, CONFIG_NAME, **kwargs) is None:
        raise ValueError(f"{name} holds no model: it has no {CONFIG_NAME}.")
    model_type = read_model_type(name, **kwargs)
    if model_type in CAUSAL_BY_NATURE:
        raise ValueError(
            f"{name} is a checkpoint of model type {model_type!r}. Three of four of its layers are linear attention, "
            "which reads from left to right only, and CoCoA's attention is two-sided. Take one of "
            f"{sorted(BACKBONES)}."
        )
    if model_type not in BACKBONES:
        raise ValueError(f"{name} is a checkpoint of model type {model_type!r}; CoCoA takes {sorted(BACKBONES)}.")
    return model_type


def holds_adapters_alone(name_or_path: str | os.PathLike, **kwargs: Any) -> bool:
    """Whether a folder or a name on the Hub has the configuration of adapters, and none of a model."""
    check_is_there(os.fspath(name_or_path), has_owner=True)
    if find_checkpoint_file(name_or_path, CONFIG_NAME, **kwargs) is not None:
        return False
    return find_checkpoint_file(name_or_path, ADAPTER_CONFIG_NAME, **kwargs) is not None
