# SPDX-License-Identifier: Apache-2.0
"""Checks of a folder's files before anything is uploaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import ModelCard, get_token
from PIL import Image
from safetensors import SafetensorError, safe_open

from modeling_cocoa.auto import BACKBONES
from modeling_cocoa.saving import code_files

from .folder_facts import INDEX, FolderFacts, read_json, weight_files
from .results import check_results
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
LICENSES = {"LICENSE", "NOTICE"}
IMAGES = {".png", ".jpg", ".jpeg"}
ALLOWED = {*TEXT, *IMAGES, ".safetensors"}
MAX_FILE_SIZE = 50 * 10**9
"""The Hub's limit, in bytes."""
MACHINE_PATHS = re.compile(
    r"(?:(?<![\w./])|(?<=file://))(/(?:home|root|Users|tmp|mnt|media|scratch|workspace|var|opt)/[\w.+-]+|[A-Za-z]:\\+Users\\+[\w.+-]+)"
)
SECRETS = {
    "a Hub token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an AWS access key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def find_problems(folder: Path) -> list[str]:
    """
    What is wrong with the files of a model's folder, in sentences that name the file and the fix; empty if nothing is.

    Files of other types than safetensors, JSON, text and images; missing files; corrupt weights, NaN and infinity; a
    card, a record or a result that cannot be read; results of other weights; code that is not this package's; paths
    of this machine; secrets.
    """
    problems = [*find_wrong_files(folder), *find_missing_files(folder)]
    if not problems:  # these checks read the files
        problems = [*find_wrong_weights(folder), *find_wrong_card(folder), *find_wrong_code(folder)]
    if not problems:  # these read the weights and the card's sources
        problems = [*find_wrong_records(folder)]
    return problems + [*find_leaks(folder)]


def uploaded_files(folder: Path) -> list[Path]:
    """The files that are pushed, sorted: all that are not hidden, broken links included for the checks to find."""
    found = (path for path in folder.rglob("*") if path.is_file() or not path.exists())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def is_text(path: Path) -> bool:
    """Whether a file is of a text type, by its name."""
    return path.suffix in TEXT or path.name in LICENSES


def find_wrong_files(folder: Path) -> Iterator[str]:
    """Files that cannot be part of a pushed model."""
    for path in uploaded_files(folder):
        name = path.relative_to(folder)
        if not path.exists():
            yield f"{name} is a link to nothing; remove it."
        elif is_text(path):
            try:
                text = path.read_text(encoding="utf-8")
                if path.suffix == ".json":
                    json.loads(text)
            except UnicodeDecodeError:
                yield f"{name} is not a text file in UTF-8; remove it."
            except ValueError:
                yield f"{name} is not valid JSON: fix it, or save the model again with modeling_cocoa.save_cocoa."
        elif path.suffix in IMAGES:
            try:
                with Image.open(path, formats=("PNG", "JPEG")) as image:
                    image.verify()
            except Exception:  # Pillow raises many types
                yield f"{name} is not a PNG or JPEG image; remove it."
        elif path.suffix not in ALLOWED:
            yield (
                f"{name}: only {', '.join(sorted(ALLOWED))}, LICENSE and NOTICE are pushed (pickle files can run code "
                "when they are loaded); remove it, or push the folder that the trainer's save_model wrote."
            )
        elif path.stat().st_size > MAX_FILE_SIZE:
            yield f"{name} is larger than the Hub's limit of {MAX_FILE_SIZE // 10**9} GB; save in shards."


def find_missing_files(folder: Path) -> Iterator[str]:
    """Files without which the model does not load."""
    names = [*NEEDED]
    try:
        names += [path.name for path in weight_files(folder)]
    except ValueError:
        pass  # an index that is not valid JSON: find_wrong_files
    for name in names:
        if not (folder / name).is_file():
            fix = "Write it with `cocoa card`" if name == "README.md" else "Save the model again with save_cocoa"
            yield f"There is no {name}, so the folder is incomplete. {fix}."


def find_wrong_weights(folder: Path) -> Iterator[str]:
    """Weight files that are truncated, do not belong to the model, or hold NaN or infinity."""
    known = {path.name for path in weight_files(folder)}
    for path in folder.glob("model*.safetensors"):
        if path.name not in known:
            yield f"{path.name} is not part of the model ({INDEX} does not name it); remove it."
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as weights:
                bad = [name for name in weights.keys() if not torch.isfinite(weights.get_tensor(name)).all()]
        except SafetensorError as error:
            yield f"{path.name} cannot be read ({error}): save the model again."
            continue
        if bad:
            yield f"{path.name}: {len(bad)} weights hold NaN or infinity, the first is {bad[0]}; training diverged."


def find_wrong_card(folder: Path) -> Iterator[str]:
    """A card whose metadata cannot be read, or whose images are missing."""
    try:
        card = ModelCard.load(folder / "README.md")
    except Exception as error:  # of the YAML, or of the metadata in it
        yield f"README.md: its metadata is not valid ({error}). Write it again with `cocoa card`, or fix it."
        return
    if card.data.library_name != "sentence-transformers":
        yield "README.md: its metadata has no `library_name: sentence-transformers`. Write it again with `cocoa card`."
    for name in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", card.text):
        if not (folder / name).is_file():
            yield (
                f"README.md shows the image {name}, which is missing: copy it from where the model was saved first, "
                "or write the card again with `cocoa card`."
            )


def find_wrong_code(folder: Path) -> Iterator[str]:
    """Code files that differ from this package's, or are not part of it."""
    config = read_json(folder / "config.json")
    if config.get("model_type") not in BACKBONES:
        return
    ours = {path.name: path for path in code_files(config["model_type"], read_json(folder / "modules.json"))}
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        if name not in ours:
            yield f"{name} is not part of a model's code; remove it."
        elif path.read_bytes() != ours[name].read_bytes():
            yield (
                f"{name} differs from the code of the installed cocoa-embed: call modeling_cocoa.repair_cocoa on the "
                "folder to take the installed one, or install the version that wrote it."
            )


def find_wrong_records(folder: Path) -> Iterator[str]:
    """Facts, records or results that cannot be read, and results of other weights."""
    for check in (FolderFacts.read, read_records, check_results):
        try:
            check(folder)
        except Exception as error:  # of a file that somebody edited
            yield str(error)


def find_leaks(folder: Path) -> Iterator[str]:
    """Paths of this machine and secrets in text files."""
    token = get_token()
    for path in uploaded_files(folder):
        if not is_text(path) or not path.exists():
            continue
        name, text = path.relative_to(folder), path.read_text(encoding="utf-8", errors="replace")
        if path.name == "tokenizer.json":
            text = text.partition('"model":')[0]  # what follows is the vocabulary, which holds any string
        if found := MACHINE_PATHS.search(text):
            yield f"{name}, line {line_of(found)}: {found[0]!r} looks like a path of this machine; remove it."
        for kind, pattern in SECRETS.items():
            if found := pattern.search(text):
                yield f"{name}, line {line_of(found)}: looks like {kind}; remove it, and revoke it."
        if token and token in text:
            yield f"{name} contains your Hub token; remove it, and revoke it."


def line_of(match: re.Match) -> int:
    """The number of the line in which a match begins."""
    return match.string.count("\n", 0, match.start()) + 1
