# SPDX-License-Identifier: Apache-2.0
"""
All that users import, in one place: `from cocoa import CocoaTransformer`.

A name is looked up when it is asked for, so that `import cocoa` loads no library. The command line is cli.py.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cocoa.embed.embedder import CocoaEmbedder
    from cocoa.embed.run import embed_dataset
    from cocoa.embed.search import VectorFolder
    from evaluation.assets import asset_path
    from evaluation.digests import digest_files, fingerprint
    from evaluation.ranking import bootstrap_interval
    from hub_cards import CocoaModelCardData, write_card
    from modeling_cocoa import (
        CocoaForReconstruction,
        CocoaInputError,
        CocoaModelOutput,
        CocoaProcessor,
        CocoaQwen2_5_VLModel,
        CocoaQwen2VLModel,
        CocoaQwen3VLModel,
        CocoaSettings,
        CocoaTransformer,
        EosPooler,
        load_backbone,
        repair_cocoa,
        save_cocoa,
    )
    from modeling_cocoa.folders import describe_unreadable, encode_readable, list_images
    from modeling_cocoa.inputs import input_messages
    from modeling_cocoa.media import load_image
    from trainers import (
        CocoaContrastiveConfig,
        CocoaContrastiveTrainer,
        CocoaReconstructionConfig,
        CocoaReconstructionTrainer,
    )
    from trainers.adapters import merge_adapters

__all__ = [
    "CocoaContrastiveConfig",
    "CocoaContrastiveTrainer",
    "CocoaEmbedder",
    "CocoaForReconstruction",
    "CocoaInputError",
    "CocoaModelCardData",
    "CocoaModelOutput",
    "CocoaProcessor",
    "CocoaQwen2VLModel",
    "CocoaQwen2_5_VLModel",
    "CocoaQwen3VLModel",
    "CocoaReconstructionConfig",
    "CocoaReconstructionTrainer",
    "CocoaSettings",
    "CocoaTransformer",
    "EosPooler",
    "VectorFolder",
    "asset_path",
    "bootstrap_interval",
    "describe_unreadable",
    "digest_files",
    "embed_dataset",
    "encode_readable",
    "fingerprint",
    "input_messages",
    "list_images",
    "load_backbone",
    "load_image",
    "merge_adapters",
    "repair_cocoa",
    "save_cocoa",
    "write_card",
]

# Where they are; those that are not named here are in `modeling_cocoa`.
HOMES = {
    "CocoaContrastiveConfig": "trainers",
    "CocoaContrastiveTrainer": "trainers",
    "CocoaEmbedder": "cocoa.embed.embedder",
    "CocoaModelCardData": "hub_cards",
    "VectorFolder": "cocoa.embed.search",
    "CocoaReconstructionConfig": "trainers",
    "CocoaReconstructionTrainer": "trainers",
    "asset_path": "evaluation.assets",
    "bootstrap_interval": "evaluation.ranking",
    "describe_unreadable": "modeling_cocoa.folders",
    "digest_files": "evaluation.digests",
    "embed_dataset": "cocoa.embed.run",
    "encode_readable": "modeling_cocoa.folders",
    "fingerprint": "evaluation.digests",
    "input_messages": "modeling_cocoa.inputs",
    "list_images": "modeling_cocoa.folders",
    "load_image": "modeling_cocoa.media",
    "merge_adapters": "trainers.adapters",
    "write_card": "hub_cards",
}

PACKAGES = ("modeling_cocoa", "evaluation", "hub_cards", "trainers")
"""Ours, beside this one; each imports only from those before it."""


def check_packages(last: str = PACKAGES[-1]) -> None:
    """
    Check that no folder or file of a user hides a package of ours.

    Args:
        last (`str`, defaults to `"trainers"`): Of `PACKAGES`, the last one that is needed.

    Raises:
        ImportError: Python finds another module under the name of ours; says where, and what to do.
    """
    folder = Path(__file__).parents[1]
    for package in PACKAGES[: PACKAGES.index(last) + 1]:
        spec = find_spec(package)
        places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        found, ours = Path(places[-1]) if places else None, folder / package
        if found is not None and found.resolve() != ours.resolve():
            raise ImportError(
                f"{found} hides the {package!r} of cocoa-embed, which is {ours}: rename {found.name}, or run "
                f"elsewhere ({found.parent} must be neither the folder of the script nor in PYTHONPATH).",
                name=package,
                path=str(found),
            )


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in __all__:
            home = HOMES.get(name, "modeling_cocoa")
            package = home.split(".")[0]
            check_packages(PACKAGES[-1] if package == "cocoa" else package)
            value = getattr(import_module(home), name)
        elif name == "CocoaConfig":  # the former name of CocoaSettings, which warns
            return import_module("modeling_cocoa").CocoaConfig
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
