# SPDX-License-Identifier: Apache-2.0
"""What would be wrong with a folder on the Hub: found in its files, before anything is uploaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import ModelCard, get_token
from safetensors import SafetensorError, safe_open

from modeling_cocoa.auto import BACKBONES
from modeling_cocoa.saving import code_files

from .folder_facts import INDEX, FolderFacts, read_json, weight_files
from .results import check_results, read_results
from .training_record import read_records

NEEDED = (
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)
"""Files that every CoCoA model's folder holds, beside its weights and its code."""
TEXT = {".json", ".jinja", ".md", ".py", ".txt", ".yaml"}
IMAGES = {".png": b"\x89PNG", ".jpg": b"\xff\xd8\xff", ".jpeg": b"\xff\xd8\xff"}
LICENCES = {"LICENSE", "NOTICE"}
ALLOWED = {*TEXT, *IMAGES, ".safetensors"}
LARGEST = 50 * 10**9
"""Bytes of a file that the Hub takes."""
MACHINE_PATHS = re.compile(
    r"(?:(?<![\w./])|(?<=file://))(/(?:home|root|Users|tmp|mnt|media|scratch|workspace|var|opt)/[\w.+-]+|[A-Za-z]:\\+Users\\+[\w.+-]+)"
)
SECRETS = {
    "a Hub token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an access key of AWS": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def uploaded_files(folder: Path) -> list[Path]:
    """The files that are pushed: all but hidden ones, in order."""
    found = (path for path in folder.rglob("*") if path.is_file() or not path.exists())  # a link to nothing
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def find_problems(folder: Path) -> list[str]:
    """
    What would be wrong with a folder on the Hub, each in a sentence that names the file and the fix; empty where
    nothing is.

    Files of other kinds than safetensors, JSON, text and pictures; missing ones; weights that are not whole or not
    all numbers; a card, a record or a result that cannot be read; results of other weights; code that is not this
    package's; paths of this machine; secrets.

    Args:
        folder (`Path`): Of a model.
    """
    problems = [*wrong_files(folder), *missing_files(folder)]
    if not problems:  # what follows reads them
        problems += [*wrong_weights(folder), *wrong_card(folder), *wrong_code(folder)]
    if not problems:  # what follows loads the model
        problems += [*wrong_results(folder)]
    return problems + [*told_too_much(folder)]


def wrong_files(folder: Path) -> Iterator[str]:
    """Files that have no place in a pushed model."""
    for path in uploaded_files(folder):
        name = path.relative_to(folder)
        if path.is_symlink() and not path.exists():
            yield f"{name} is a link to nothing."
        elif path.suffix not in ALLOWED and path.name not in LICENCES:
            yield (
                f"{name}: only {', '.join(sorted(ALLOWED))}, LICENSE and NOTICE are pushed (pickled files can run "
                "code where they are loaded); remove it, or push the folder that the trainer's save_model wrote."
            )
        elif path.suffix in IMAGES and not path.read_bytes().startswith(IMAGES[path.suffix]):
            yield f"{name} is not the picture that its name says; remove it."
        elif is_text(path) and b"\0" in path.read_bytes():
            yield f"{name} is not the text that its name says; remove it."
        elif path.suffix == ".json" and not is_json(path):
            yield f"{name} is not valid JSON: fix it, or save the model again with modeling_cocoa.save_cocoa."
        elif path.stat().st_size > LARGEST:
            yield f"{name} has more than {LARGEST // 10**9} GB, which the Hub does not take; save in shards."


def is_text(path: Path) -> bool:
    """Whether a file is of a kind that holds text, by its name."""
    return path.suffix in TEXT or path.name in LICENCES


def is_json(path: Path) -> bool:
    """Whether a file can be read as JSON."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def missing_files(folder: Path) -> Iterator[str]:
    """Files without which the model does not load."""
    for name in NEEDED:
        if name == "README.md" and not (folder / name).is_file():
            yield "There is no README.md: write the card with `cocoa card`."
        elif not (folder / name).is_file():
            yield f"There is no {name}: the folder is not whole. Save the model again with modeling_cocoa.save_cocoa."
    if (folder / INDEX).is_file() and not is_json(folder / INDEX):
        return  # found among the wrong files
    for path in weight_files(folder):
        if not path.is_file():
            yield f"There is no {path.name}: weights are missing. Save the model again with modeling_cocoa.save_cocoa."


def wrong_weights(folder: Path) -> Iterator[str]:
    """Weights that are cut off, beside the model's own, or not all numbers."""
    known = {path.name for path in weight_files(folder)}
    for path in folder.glob("model*.safetensors"):
        if path.name not in known:
            yield f"{path.name} is no part of the model ({INDEX} does not name it); remove it."
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as weights:
                bad = [name for name in weights.keys() if not all_numbers(weights.get_tensor(name))]
        except SafetensorError as error:
            yield f"{path.name} cannot be read ({error}): save the model again."
            continue
        if bad:
            yield f"{path.name}: {len(bad)} weights hold NaN or infinity, the first is {bad[0]}; it is of no use."


def all_numbers(values: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity among values."""
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def wrong_card(folder: Path) -> Iterator[str]:
    """A card, a record or a result that cannot be read, or a card whose pictures are missing."""
    try:
        card = ModelCard.load(folder / "README.md")
    except Exception as error:  # of YAML, or of what it holds
        yield f"README.md: its head is not valid ({error}). Write it again with `cocoa card`, or fix it."
    else:
        if card.data.library_name != "sentence-transformers":
            yield "README.md: its head has no `library_name: sentence-transformers`. Write it again with `cocoa card`."
        for name in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", card.text):
            if not (folder / name).is_file():
                yield (
                    f"README.md shows the picture {name}, which is not there: copy it from where the model was saved "
                    "first, or write the card again with `cocoa card`."
                )
    for read in (FolderFacts.read, read_records, read_results):
        try:
            read(folder)
        except SafetensorError:
            continue  # found with the weights
        except Exception as error:
            yield f"{error}"


def wrong_results(folder: Path) -> Iterator[str]:
    """Results that were measured with other weights."""
    try:
        check_results(folder)
    except ValueError as error:
        yield f"{error}"


def wrong_code(folder: Path) -> Iterator[str]:
    """Files of code that differ from this package's, or are not of it."""
    config, modules = read_json(folder / "config.json"), read_json(folder / "modules.json")
    if config.get("model_type") not in BACKBONES:
        return
    ours = {path.name: path for path in code_files(config["model_type"], modules)}
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        if name not in ours:
            yield f"{name} is no part of a model's code; remove it."
        elif path.read_bytes() != ours[name].read_bytes():
            yield (
                f"{name} differs from the code of the cocoa-embed that is installed: call modeling_cocoa.repair_cocoa "
                "on the folder to take the installed one, or install the version that wrote it."
            )


def told_too_much(folder: Path) -> Iterator[str]:
    """Paths of the machine and secrets in files of text."""
    token = get_token()
    for path in uploaded_files(folder):
        if not is_text(path) or not path.exists():
            continue
        name = path.relative_to(folder)
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.name == "tokenizer.json" and is_json(path):  # its vocabulary holds any string
            text = json.dumps({key: value for key, value in json.loads(text).items() if key != "model"})
        if found := MACHINE_PATHS.search(text):
            yield f"{name}, line {line_of(text, found)}: {found[0]!r} looks like a path of this machine; remove it."
        for kind, pattern in SECRETS.items():
            if found := pattern.search(text):
                yield f"{name}, line {line_of(text, found)}: looks like {kind}; remove it, and have it revoked."
        if token and token in text:
            yield f"{name} holds your Hub token; remove it, and have it revoked."


def line_of(text: str, found: re.Match) -> int:
    """The number of the line that a match begins in."""
    return text.count("\n", 0, found.start()) + 1
