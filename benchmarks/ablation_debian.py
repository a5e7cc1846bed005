# SPDX-License-Identifier: Apache-2.0
"""Short and long descriptions of Debian's packages, of which apt downloads the list."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from .ablation_pairs import FOLDER, PairTask, without_near_duplicates

LENGTHS = (24, 90)
"""Tokens of a long description: those with fewer are left out, longer ones end with a whole sentence before."""


def read_packages(tokenizer: Any) -> Dataset:
    """
    `short` and `long` descriptions, one package of each source package: the first in the alphabet whose long one has
    enough tokens. Left out are those whose short description another has, or whose long one is nearly another's
    (half of their runs of three words are the same).

    Args:
        tokenizer: Counts tokens.

    Raises:
        SystemExit: there is no apt.
    """
    files = download_lists(FOLDER / "apt")
    sources = {}
    for file in files:
        if file.name.endswith("_Packages"):
            for fields in paragraphs(file):
                sources[fields["Package"]] = fields.get("Source", fields["Package"]).split(" ")[0]
    described = {}
    for file in files:
        if file.name.endswith("_Translation-en"):
            for fields in paragraphs(file):
                described.setdefault(fields["Package"], fields["Description-en"])
    rows, shorts = {}, set()
    for name, description in sorted(described.items()):
        short, _, long = description.partition("\n")
        source = sources.get(name)
        if source is None or source in rows or short.lower() in shorts:
            continue
        text = shorten(plain(long), tokenizer)
        if text is not None:
            shorts.add(short.lower())
            rows[source] = {"source": source, "short": short.strip(), "long": text}
    found = list(rows.values())
    return Dataset.from_list([found[place] for place in without_near_duplicates([row["long"] for row in found])])


def download_lists(folder: Path) -> list[Path]:
    """
    The lists of the packages that this system's apt knows, with their descriptions in English; the system's own lists
    stay as they are.

    Args:
        folder (`Path`): Where to.
    """
    lists, cache = folder.resolve() / "lists", folder.resolve() / "cache"
    for path in (lists / "partial", cache / "archives" / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    options = [f"Dir::State::Lists={lists}", f"Dir::Cache={cache}", "Acquire::Languages=en"]
    options += ["Acquire::GzipIndexes=false", "APT::Sandbox::User=root"]
    command = ["apt-get", "update", "-qq", *(part for option in options for part in ("-o", option))]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError as error:
        raise SystemExit("The descriptions of packages come by apt-get, which this system does not have.") from error
    return sorted(path for path in lists.iterdir() if path.is_file())


def paragraphs(file: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a file in Debian's control format, fields by name; further lines of one keep their indent."""
    for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
        fields = re.split(r"\n(?=\S)", paragraph.strip("\n"))
        if fields != [""]:
            yield {name: value.strip(" ") for name, _, value in (field.partition(":") for field in fields)}


def plain(long: str) -> str:
    """A long description as running text."""
    return " ".join(line.strip() for line in long.split("\n") if line.strip() != ".")


def shorten(text: str, tokenizer: Any) -> str | None:
    """A text up to its last sentence within [`LENGTHS`]; `None` where that is too short."""
    least, most = LENGTHS
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > most:
        beginning = tokenizer.decode(ids[:most])
        text = beginning[: max(beginning.rfind(end) for end in (". ", "! ", "? ")) + 1]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if least <= len(ids) <= most else None


TASK = PairTask(
    name="debian",
    columns=("short", "long"),
    titles=("short description", "long one"),
    sizes={"validation": 1000, "test": 5000},
    read=read_packages,
)
