# SPDX-License-Identifier: Apache-2.0
"""The name that was probably meant."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` with the closest known name; empty where none is close."""
    found = get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def nearest_path(name: str | os.PathLike, *, folders_only: bool = False) -> str:
    """The same with the closest file or folder that exists beside a path that does not."""
    parent = Path(name).parent
    found = parent.iterdir() if parent.is_dir() else ()
    return nearest(Path(name).name, [path.name for path in found if path.is_dir() or not folders_only])
