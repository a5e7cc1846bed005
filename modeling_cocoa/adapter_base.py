# SPDX-License-Identifier: Apache-2.0
"""The model that saved adapters belong to: its name, and a digest of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .checkpoint_files import hub_arguments
from .files import atomic_write
from .model_folder import name_in_any_layout, read_json

BASE_FILE = "adapter_base.json"
"""Beside saved adapters: the model that they were trained in."""


@dataclass(frozen=True)
class AdapterBase:
    """
    The model that adapters were trained in.

    Args:
        name_or_path (`str`): Folder or Hub name.
        revision (`str`, *optional*): Commit on the Hub.
        weights (`str`, *optional*): Digest of its weights; see [`checkpoint_digest`].
    """

    name_or_path: str
    revision: str | None = None
    weights: str | None = None

    @classmethod
    def of_model(cls, backbone: PreTrainedModel) -> AdapterBase:
        """
        The checkpoint that a backbone was loaded from.

        Raises:
            ValueError: it was loaded from none.
        """
        name = backbone.config.name_or_path
        if not name:
            raise ValueError(
                "Saved adapters name the model that they belong to, and this one was not loaded from a folder or the "
                'Hub: save it with save_cocoa and load it from there, or set save_adapters="merged".'
            )
        revision = None
        if os.path.isdir(name):
            name = os.path.abspath(name)
        else:
            revision = getattr(backbone.config, "_commit_hash", None)
        return cls(name, revision, checkpoint_digest(name, revision=revision))

    @classmethod
    def read(cls, adapters: str | os.PathLike, **kwargs: Any) -> AdapterBase:
        """
        What a folder of adapters, or one on the Hub, says of its model.

        Args:
            adapters (`str` or `os.PathLike`): Folder or Hub name.
            kwargs: Of `from_pretrained`; those that say where the files are.

        Raises:
            ValueError: it names no model.
        """
        where = hub_arguments(kwargs)
        config = read_json(Path(cached_file(adapters, ADAPTER_CONFIG_NAME, **where)))
        if not config.get("base_model_name_or_path"):
            raise ValueError(
                f"{adapters} holds adapters ({ADAPTER_CONFIG_NAME}), not a model, and names none as "
                "base_model_name_or_path: load the model that they were trained in and call "
                f"backbone.load_adapter({str(adapters)!r}), then trainers.adapters.merge_adapters(backbone) for plain "
                "weights."
            )
        try:
            weights = read_json(Path(cached_file(adapters, BASE_FILE, **where)))["weights"]
        except OSError:  # written by PEFT or another library, which keeps no digest
            weights = None
        return cls(config["base_model_name_or_path"], config.get("revision"), weights)

    def write(self, folder: str | os.PathLike) -> None:
        """Write it beside adapters."""
        with atomic_write(Path(folder, BASE_FILE)) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def check(self, adapters: str | os.PathLike, **kwargs: Any) -> None:
        """
        Raise `ValueError` where the model has other weights than the adapters were trained in.

        Args:
            adapters (`str` or `os.PathLike`): What the adapters are called.
            kwargs: Of `from_pretrained`, for the model.
        """
        if self.weights is None:
            return
        if self.weights != checkpoint_digest(self.name_or_path, **{**kwargs, "revision": self.revision}):
            raise ValueError(
                f"{adapters} holds adapters of {self.name_or_path}, which has other weights now than those that they "
                "were trained in: restore that checkpoint, or train the adapters again."
            )


def checkpoint_digest(name_or_path: str | os.PathLike, **kwargs: Any) -> str:
    """
    A digest of a checkpoint's weights as they are stored, whatever type they are loaded as: names, shapes, and one row
    of each; the same in every layout of names and files.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub name.
        kwargs: Of `from_pretrained`; those that say where the files are.

    Raises:
        OSError: it has no safetensors weights.
    """
    where = hub_arguments(kwargs)
    try:
        index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **where)
    except OSError:
        names = [SAFE_WEIGHTS_NAME]
    else:
        names = sorted(set(read_json(Path(index))["weight_map"].values()))
    found = {}
    for name in names:
        with safe_open(cached_file(name_or_path, name, **where), framework="pt") as weights:
            for key in weights.keys():
                weight = weights.get_slice(key)
                shape = weight.get_shape()
                values = weight[shape[0] // 2 : shape[0] // 2 + 1] if len(shape) > 1 else weights.get_tensor(key)
                content = values.reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name_in_any_layout(key)] = f"{shape}".encode() + content
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(found):
        digest.update(key.encode() + found[key])
    return digest.hexdigest()
