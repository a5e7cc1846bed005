# SPDX-License-Identifier: Apache-2.0
"""What the command line checks of its arguments before it loads a library."""

from __future__ import annotations

import re
import socket
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

MODEL_FILES = ("config.json", "modules.json", "adapter_config.json")
"""One of them is in each folder that a model or an adapter can be loaded from."""


def recipe_file(name: str) -> Path:
    """The file of a recipe, looked up only after `check_packages`, since a user's folder may hide `evaluation`."""
    from evaluation.assets import find_recipe

    return find_recipe(name)


def find_model(name: str) -> str:
    """
    The name of a model as it is: a folder, or a possible name on the Hub.

    Raises:
        FileNotFoundError: it is neither, or the folder holds no model; names the nearest folder.
    """
    if Path(name).is_dir():
        return check_model_folder(name)
    form = re.fullmatch(r"(?:(\w[\w.-]*)/)?\w[\w.-]*", name)
    if form is not None and (form[1] is None or not Path(form[1]).is_dir()):
        return name
    from huggingface_hub import try_to_load_from_cache

    # A local folder with the name of the owner makes a mistyped path likely, unless the model was fetched before.
    if form is None or not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise no_folder(name)
    return name


def find_checkpoint(name: str) -> str:
    """The same for CoCoA models, whose names on the Hub have an owner."""
    if "/" not in name and not Path(name).is_dir():
        raise no_folder(name)
    return find_model(name)


def find_folder(name: str) -> Path:
    """The same for models that must be a folder."""
    if not Path(name).is_dir():
        raise no_folder(name)
    return Path(check_model_folder(name))


def no_folder(name: str, kind: str = "checkpoint folder") -> FileNotFoundError:
    """The error of a folder that does not exist, with the nearest that does."""
    from evaluation.naming import nearest_path

    found = nearest_path(name, folders_only=True)
    return FileNotFoundError(f"There is no {kind} {name}{found or '; check the path'}.")


def find_images(name: str) -> Path:
    """A folder of images, or of anything else; raises `FileNotFoundError` with the nearest where there is none."""
    if not Path(name).is_dir():
        raise no_folder(name, "folder")
    return Path(name)


def find_vectors(name: str) -> Path:
    """A folder of vectors; raises `FileNotFoundError` where it holds none; says how they are made."""
    if not (Path(name) / "manifest.json").is_file():
        what = "holds no vectors" if Path(name).is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{name} {what}: make them with `cocoa embed SOURCE --model MODEL --output-dir {name}`."
        )
    return Path(name)


def check_model_folder(name: str) -> str:
    """The name of a folder that holds a model; raises `FileNotFoundError` where it holds none."""
    if not any((Path(name) / file).is_file() for file in MODEL_FILES):
        raise FileNotFoundError(
            f"{name} holds no model (no config.json); give the folder that a trainer or save_cocoa wrote, such as "
            "runs/contrastive/final."
        )
    return name


def find_repo(name: str) -> str:
    """A possible name of a repository on the Hub."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(name)
    return name


def find_hub_model(name: str) -> str:
    """A possible name of a model on the Hub, and no folder of this machine."""
    if Path(name).exists():
        raise ValueError(f"{name} is on this machine, where a Space cannot read it: push it, and give its Hub name.")
    return find_repo(name)


def check_port(host: str, port: int) -> None:
    """Raise `OSError` where something listens on a port already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"Port {port} of {host} cannot be used ({error.strerror}); choose another with --port."
            ) from error


def extras() -> dict[str, list[Requirement]]:
    """What each extra of the package requires, by its name; those for developers are left out."""
    found: dict[str, list[Requirement]] = {}
    for line in requires("cocoa-embed") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.name == "cocoa-embed":
            continue
        if (extra := re.search(r"""extra == ['"](\w+)['"]""", str(requirement.marker))) is not None:
            found.setdefault(extra[1], []).append(requirement)
    return {name: needed for name, needed in found.items() if name not in ("dev", "docs")}


def missing(needed: list[Requirement]) -> list[str]:
    """Requirements that are not installed, or installed in another version."""
    lacking = []
    for requirement in needed:
        try:
            if not requirement.specifier.contains(found := version(requirement.name), prereleases=True):
                lacking.append(f"{requirement.name}{requirement.specifier} (installed: {found})")
        except PackageNotFoundError:
            lacking.append(requirement.name)
    return lacking


def check_extra(name: str) -> None:
    """Raise `ImportError` where a package of an extra is missing; says how to install it."""
    if lacking := missing(extras()[name]):
        raise ImportError(f'Not installed: {", ".join(lacking)}. Run pip install "cocoa-embed[{name}]".')
