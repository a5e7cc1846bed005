#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Cut a large file into pieces that travel one after another, and join them again.

    python .ci/pieces.py cut FILE --into .pieces --mib 40     .pieces/1/, .pieces/2/, ...
    python3 .ci/pieces.py join .pieces/*/ --into FOLDER       the file, with its name, once all pieces are there
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

MIB = 2**20
FACTS = "file.json"


def cut(file: Path, into: Path, mib: float) -> None:
    """Write a folder for each piece, with the file's name, size and digest in the first one."""
    content = file.read_bytes()
    shutil.rmtree(into, ignore_errors=True)
    size = int(mib * MIB)
    for number, start in enumerate(range(0, len(content), size)):
        folder = into / str(number + 1)
        folder.mkdir(parents=True)
        (folder / f"{number:03d}.piece").write_bytes(content[start : start + size])
        if number == 0:
            facts = {"name": file.name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (folder / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(f"{file.name}: {number + 1} pieces of up to {mib:g} MiB in {into}")


def join(folders: list[Path], into: Path) -> None:
    """Write the file that the pieces of some folders make; raise `SystemExit` where one is missing or damaged."""
    pieces = sorted((piece for folder in folders for piece in folder.glob("*.piece")), key=lambda piece: piece.name)
    facts = next((folder / FACTS for folder in folders if (folder / FACTS).is_file()), None)
    if facts is None:
        raise SystemExit(f"None of the folders has the first piece, with {FACTS}.")
    facts = json.loads(facts.read_text(encoding="utf-8"))
    content = b"".join(piece.read_bytes() for piece in pieces)
    if len(content) != facts["size"]:
        raise SystemExit(f"{len(pieces)} pieces have {len(content):,} of {facts['size']:,} bytes: one is missing.")
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise SystemExit("The pieces are damaged: what they make is another file.")
    into.mkdir(parents=True, exist_ok=True)
    partial = into / f"{facts['name']}.partial"
    partial.write_bytes(content)
    os.replace(partial, into / facts["name"])
    print(into / facts["name"])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cut")
    command.add_argument("file", type=Path)
    command.add_argument("--mib", type=float, default=40, help="size of a piece (default: %(default)s)")
    command.add_argument("--into", type=Path, required=True)
    command = commands.add_parser("join")
    command.add_argument("folders", type=Path, nargs="+")
    command.add_argument("--into", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "cut":
        cut(arguments.file, arguments.into, arguments.mib)
    else:
        join(arguments.folders, arguments.into)


if __name__ == "__main__":
    main()
