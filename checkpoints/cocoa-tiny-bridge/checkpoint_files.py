# SPDX-License-Identifier: Apache-2.0
"""Where the files of a checkpoint are, what kind of model they hold, and how its weights are named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

KEY_MAPPING = {
    r"^(?:model\.)?visual\.": "visual.",
    r"^(?:model\.)?(?:language_model\.)?(?:model\.)?embed_tokens\.": "language_model.embed_tokens.",
    r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.": "language_model.layers.",
    r"^(?:model\.)?(?:language_model\.)?(?:model\.)?norm\.": "language_model.norm.",
}
"""From every layout that Qwen2-VL weights are published in to the base model's own names."""

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""Arguments of `from_pretrained` that say where the files are."""


def read_model_type(name_or_path: str | os.PathLike, **kwargs: Any) -> str | None:
    """
    The `model_type` of a checkpoint's configuration.

    Args:
        name_or_path: Folder or Hub name.
        kwargs: Those of [`HUB_ARGUMENTS`] that are among them say where the files are.

    Raises:
        FileNotFoundError: see [`check_is_there`].
    """
    path = os.fspath(name_or_path)
    check_is_there(path, has_owner=True)
    return PretrainedConfig.get_config_dict(path, **hub_arguments(kwargs))[0].get("model_type")


def check_is_there(path: str, *, has_owner: bool = False) -> None:
    """
    Raise `FileNotFoundError` for what is no folder and, by its form, no name on the Hub either.

    Args:
        path (`str`): Of a folder, or a name on the Hub.
        has_owner (`bool`, defaults to `False`): Names on the Hub have an owner (`owner/name`), as those of all models
            that CoCoA takes.
    """
    if os.path.isdir(path):
        return
    owner, *rest = path.split("/")
    can_be_a_name = not os.path.isabs(path) and not path.startswith((".", "~")) and has_owner <= len(rest) < 2
    if not can_be_a_name:
        raise FileNotFoundError(f"There is no checkpoint folder {path}; check the path.")
    if rest and os.path.isdir(owner) and not is_cached(path):
        raise FileNotFoundError(
            f"There is no checkpoint folder {path} in the folder {owner}; check the path (for a model of that name on "
            f"the Hub, work in a folder without a folder {owner})."
        )


def is_cached(name: str) -> bool:
    """Whether the configuration of a model on the Hub was fetched before."""
    try:
        return cached_file(name, "config.json", local_files_only=True) is not None
    except OSError:
        return False


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where the files are."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
