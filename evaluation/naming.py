# SPDX-License-Identifier: Apache-2.0
"""The name that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` with the closest known name; empty where none is close."""
    found = get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
