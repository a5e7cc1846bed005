# SPDX-License-Identifier: Apache-2.0
"""Where the files of a checkpoint are, in a folder or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

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
    if rest and os.path.isdir(owner) and not find_checkpoint_file(path, "config.json", local_files_only=True):
        raise FileNotFoundError(
            f"There is no checkpoint folder {path} in the folder {owner}; check the path (for a model of that name on "
            f"the Hub, work in a folder without a folder {owner})."
        )


def find_checkpoint_file(name_or_path: str | os.PathLike, file: str, **kwargs: Any) -> str | None:
    """
    The path of a checkpoint's file, fetched where it is on the Hub; `None` where the checkpoint has no such file.

    Args:
        name_or_path: Folder or Hub name.
        file (`str`): Its name.
        kwargs: Those of [`HUB_ARGUMENTS`] that are among them say where the files are.
    """
    try:
        return cached_file(name_or_path, file, **hub_arguments(kwargs))
    except OSError:  # how transformers says that there is no such file
        return None


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where the files are."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
