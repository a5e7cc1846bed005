# SPDX-License-Identifier: Apache-2.0
"""The error for an input that cannot be encoded."""

from __future__ import annotations

from typing import Any


class CocoaInputError(ValueError):
    """
    An input that cannot be encoded.

    Args:
        message (`str`): What is wrong, and how to fix it.
        position (`int`, *optional*): Index of the item in the list that was passed; named in front of the message.
        counted (`str`, defaults to `""`): What the position counts, where that is not the caller's own list.

    Attributes:
        reason (`str`): The message without the position.
        position (`int` or `None`): As given.
        counted (`str`): As given.
    """

    def __init__(self, message: str, position: int | None = None, counted: str = "") -> None:
        super().__init__(message if position is None else f"Item {position}{counted}: {message}")
        self.reason = message
        self.position = position
        self.counted = counted

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.position, self.counted)
