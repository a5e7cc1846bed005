# SPDX-License-Identifier: Apache-2.0
"""The folder that is pushed as a Space: the app, and all that it needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import files
from pathlib import Path

from huggingface_hub import SpaceCard
from huggingface_hub.utils import validate_repo_id

from evaluation.assets import asset_path
from evaluation.demo import BRIDGE_CHECKPOINT, CHECKPOINT

ROOT = Path(__file__).parents[1]
"""Where the packages lie side by side, in a checkout and when installed alike."""
PACKAGES = ("evaluation", "hub_cards", "modeling_cocoa", "trainers")
KINDS = (".jinja", ".md", ".py", ".txt", ".yaml")
"""Of a package's files: code, recipes and templates."""
DATA = ("data/emoji.parquet", "data/NOTICE", "data/README.md")
CARD, REQUIREMENTS = "README.md", "requirements.txt"

APP = '''# SPDX-License-Identifier: Apache-2.0
"""The app of this Space; its variables COCOA_MODEL and COCOA_REBUILD_MODEL name other models."""

from __future__ import annotations

import os
{defaults}
from hub_cards.space.app import main

main()
'''


def write_space(
    folder: str | os.PathLike, *, model: str | None = None, rebuild_model: str | None = None
) -> list[Path]:
    """
    Write the folder of a Space, whole or not at all.

    Args:
        folder (`str` or `os.PathLike`): A new one, or an empty one.
        model (`str`, *optional*): Hub name of the model that the Space searches with. Without it the Space carries the
            tiny checkpoint that comes with this project.
        rebuild_model (`str`, *optional*): Hub name of a checkpoint that the bridge stage saved, to rebuild with.
            Without both, the Space carries that of the tiny checkpoint.

    Returns:
        `list[Path]`: The files, relative to the folder.

    Raises:
        FileExistsError: there is something in the folder.
        ValueError: a model is not named as on the Hub.
    """
    folder = Path(folder)
    names = {"COCOA_MODEL": model, "COCOA_REBUILD_MODEL": rebuild_model}
    named = {variable: check_name(name) for variable, name in names.items() if name is not None}
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; name a new folder for the Space.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for package in PACKAGES:
            copy_files(ROOT / package, staging / package)
        shutil.copyfile(ROOT / "cocoa.py", staging / "cocoa.py")
        for name in DATA:
            copy_file(asset_path(name), staging / name)
        carried = [] if model is not None else [CHECKPOINT, *([BRIDGE_CHECKPOINT] if rebuild_model is None else [])]
        for checkpoint in carried:
            copy_files(asset_path(checkpoint), staging / checkpoint, (*KINDS, ".json", ".safetensors"))
        shutil.copyfile(licence_file(), staging / "LICENSE")
        defaults = "".join(f'\nos.environ.setdefault("{variable}", "{name}")' for variable, name in named.items())
        (staging / "app.py").write_text(APP.format(defaults=defaults), encoding="utf-8")
        for name in (CARD, REQUIREMENTS):
            (staging / "hub_cards" / "space" / name).replace(staging / name)
        if named:
            card = SpaceCard.load(staging / CARD)
            card.data.models = list(dict.fromkeys(named.values()))
            card.save(staging / CARD)
        os.chmod(staging, 0o755)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def check_name(model: str) -> str:
    """
    The same name.

    Raises:
        ValueError: it is a folder's, or none that a repository can have.
    """
    if Path(model).exists():
        raise ValueError(f"{model} is on this machine, where a Space cannot read it: push it, and give its Hub name.")
    validate_repo_id(model)
    return model


def copy_files(source: Path, target: Path, kinds: tuple[str, ...] = KINDS) -> None:
    """Copy a folder's files of some kinds, without what is hidden, made by Python, or carried by a wheel only."""
    for path in source.rglob("*"):
        parts = path.relative_to(source).parts
        if path.is_file() and path.suffix in kinds and not any(part.startswith((".", "_assets")) for part in parts):
            copy_file(path, target.joinpath(*parts))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to a place whose folder may not be there yet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def licence_file() -> Path:
    """The licence of this project: of a checkout, or as it was installed."""
    if (path := ROOT / "LICENSE").is_file():
        return path
    return next(Path(file.locate()) for file in files("cocoa-embed") or [] if file.name == "LICENSE")
