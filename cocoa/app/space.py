# SPDX-License-Identifier: Apache-2.0
"""The app as a Space: a folder with all that it needs, and its upload."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import files
from pathlib import Path

from huggingface_hub import SpaceCard
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from evaluation.assets import asset_path
from hub_cards.folder_checks import find_leaks
from hub_cards.push import FolderError, list_files, upload

from .. import PACKAGES
from ..demo.demo import BRIDGE_CHECKPOINT, CHECKPOINT

ROOT = Path(__file__).parents[2]
"""Where the packages lie side by side, in a checkout and when installed alike."""
CARRIED = ("cocoa", *PACKAGES)
DATA = ("data/emoji.parquet", "data/NOTICE", "data/README.md")
CARD, REQUIREMENTS = "README.md", "requirements.txt"

APP = '''# SPDX-License-Identifier: Apache-2.0
"""The app of this Space; its variables COCOA_MODEL and COCOA_REBUILD_MODEL name other models."""

from __future__ import annotations

import os
{defaults}
from cocoa.app.app import main

main()
'''


def write_space(folder: str | os.PathLike, *, model: str | None = None, rebuild_model: str | None = None) -> None:
    """
    Write the folder of a Space.

    Args:
        folder (`str` or `os.PathLike`): Must not exist.
        model (`str`, *optional*): Hub name of the model to search with. By default the folder gets the tiny
            checkpoint that comes with this project.
        rebuild_model (`str`, *optional*): Hub name of a checkpoint of the bridge stage. By default, if there is no
            `model` either, the folder gets that of the tiny checkpoint.

    Raises:
        ValueError: a model is a folder of this machine, or not a valid name on the Hub.
    """
    folder = Path(folder)
    named = {"COCOA_MODEL": model, "COCOA_REBUILD_MODEL": rebuild_model}
    named = {variable: name for variable, name in named.items() if name is not None}
    for name in named.values():
        if Path(name).exists():
            raise ValueError(
                f"{name} is on this machine, where a Space cannot read it: push it, and give its Hub name."
            )
        validate_repo_id(name)
    sources = {ROOT / package: package for package in CARRIED}
    if model is None:
        sources[asset_path(CHECKPOINT)] = CHECKPOINT
    if not named:
        sources[asset_path(BRIDGE_CHECKPOINT)] = BRIDGE_CHECKPOINT
    # Hidden files, what Python makes, and the data of a wheel, which is copied below.
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "_assets")
    for source, name in sources.items():
        shutil.copytree(source, folder / name, ignore=unwanted)
    (folder / "data").mkdir()
    for name in DATA:
        shutil.copyfile(asset_path(name), folder / name)
    shutil.copyfile(license_file(), folder / "LICENSE")
    defaults = "".join(f'\nos.environ.setdefault("{variable}", "{name}")' for variable, name in named.items())
    (folder / "app.py").write_text(APP.format(defaults=defaults), encoding="utf-8")
    for name in (CARD, REQUIREMENTS):
        (folder / "cocoa" / "app" / name).replace(folder / name)
    if named:
        card = SpaceCard.load(folder / CARD)
        card.data.models = list(dict.fromkeys(named.values()))
        card.save(folder / CARD)


def push_space(
    repo_id: str,
    *,
    model: str | None = None,
    rebuild_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> str | None:
    """
    Upload the app as a Space, as one commit; see [`write_space`].

    Args:
        repo_id (`str`): `organization/name`; created if it does not exist.
        model, rebuild_model (`str`, *optional*): Hub names, as in [`write_space`].
        private, token, dry_run, console (*optional*): As in [`~push.push_model`].

    Returns:
        `str`: URL of the commit; None for a dry run.

    Raises:
        ValueError: `repo_id` or a model is not a valid name on the Hub.
        FolderError: a file of the package contains a path of this machine or a secret.
        PushError: the Hub did not accept the push; says what happened to the repository.
    """
    console = console or Console()
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="cocoa-space-") as scratch:
        folder = Path(scratch) / "space"
        write_space(folder, model=model, rebuild_model=rebuild_model)
        if problems := [*find_leaks(folder)]:
            raise FolderError(Path("the Space"), problems)
        console.print(list_files(folder, repo_id))
        if dry_run:
            console.print("Nothing was uploaded: this was a dry run.")
            return None
        return upload(folder, repo_id, private, None, token, "Upload the app", repo_type="space", space_sdk="gradio")


def license_file() -> Path:
    """The license of this project, in a checkout or when installed."""
    if (path := ROOT / "LICENSE").is_file():
        return path
    return next(Path(file.locate()) for file in files("cocoa-embed") or [] if file.name == "LICENSE")
