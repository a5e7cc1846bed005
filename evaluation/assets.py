# SPDX-License-Identifier: Apache-2.0
"""Where the files that are not code lie: the emoji set, the tiny checkpoints, the recipes."""

from __future__ import annotations

import os
from pathlib import Path

from .naming import nearest, nearest_path

INSTALLED = Path(__file__).parent / "_assets"
"""A wheel carries `data/` and `checkpoints/` here; a checkout has them beside the packages."""


def asset_path(name: str) -> Path:
    """
    The path of a file or folder that comes with this project, in a checkout and when installed alike.

    Args:
        name (`str`): Relative to the root of the project, such as `"data/emoji.parquet"`.

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
    """The path of a file that a recipe names: as it stands, or one that comes with this project."""
    if (path := Path(name)).exists():
        return path
    try:
        return asset_path(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file {name}, neither from {Path.cwd()} on nor among what comes with this project; check the "
            "path in the recipe."
        ) from error


def find_recipe(name: str | os.PathLike) -> Path:
    """
    The path of a recipe: a file, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: there is neither; names the nearest, and lists those that come with the package.
    """
    if (path := Path(name)).is_file():
        return path
    recipes = Path(__file__).parents[1] / "trainers" / "recipes"
    installed = {recipe.stem: recipe for recipe in sorted(recipes.glob("*.yaml"))}
    if str(name) not in installed:
        meant = (nearest_path(path) if path.suffix else "") or nearest(path.stem, installed)
        raise FileNotFoundError(f"There is no recipe {str(name)!r}{meant}: give a file, or one of {list(installed)}.")
    return installed[str(name)]
