# SPDX-License-Identifier: Apache-2.0
"""Where the files that are not code lie: the emoji set and the tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

INSTALLED = Path(__file__).parent / "_assets"
"""A wheel carries `data/` and `checkpoints/` here; a checkout has them beside the packages."""


def asset_path(name: str) -> Path:
    """
    The path of a file or folder that comes with this project, in a checkout and when installed alike.

    Args:
        name (`str`): Relative to the root of the project, such as `"data/emoji.parquet"` or
            `"checkpoints/cocoa-tiny"`.

    Raises:
        FileNotFoundError: there is none of that name; says where it was looked for.
    """
    root = INSTALLED if INSTALLED.is_dir() else INSTALLED.parent.parent
    path = root / name
    if not path.exists():
        raise FileNotFoundError(
            f"{name} is not in {root}; install cocoa-embed again, or run from a complete checkout of the project."
        )
    return path


def find_file(name: str) -> Path:
    """
    The path of a file that a recipe names: as it stands, or one that comes with this project.

    Args:
        name (`str`): A path, or relative to the root of the project.

    Raises:
        FileNotFoundError: there is neither; says where it was looked for.
    """
    if (path := Path(name)).exists():
        return path
    try:
        return asset_path(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file {name}, neither from {Path.cwd()} on nor among what comes with this project; check the "
            "path in the recipe."
        ) from error
