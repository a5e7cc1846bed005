# SPDX-License-Identifier: Apache-2.0
"""
What other libraries print at the start of every command, and a user can do nothing about. Only the command line leaves
it out; importing the package changes no setting of another library.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

LINES = {
    # torchao 0.18 (extra [int8]) registers two enums in a way that torch 2.14 deprecates.
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    # bitsandbytes (extra [qlora]) looks for a kernel on the Hub that is faster on CPUs, and works without it.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # transformers drops the oldest checkpoints by time, and by number where all are of one second, as in small runs.
    "transformers.trainer_utils": "mtime may not be reliable on this filesystem",
    # Ray (extra [ray]) says of each cluster that it starts that nobody else may use it.
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
}
"""By the logger: how the messages that are left out go."""

WARNINGS = (
    # transformers has the new names from 5.23 on, and this package takes 5.21 too, which has the old ones alone.
    (FutureWarning, "`gradient_checkpointing"),
    (FutureWarning, "`SentenceTransformer` only defines `gradient_checkpointing_enable`"),
    # torch's data loaders, which transformers asks to pin memory wherever it trains, on a CPU too.
    (UserWarning, "'pin_memory' argument is set as true but no accelerator"),
)
"""Warnings by their kind and how they begin."""

BARS = ("Loading weights", "Writing model shards")
"""transformers' progress bars of files that are read or written in less than a second, or a few for large models."""


def hide_lines() -> None:
    """Leave out the messages of [`LINES`] and [`WARNINGS`]; costs no import."""
    for name, text in LINES.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in str(record.msg))
    for kind, text in WARNINGS:
        warnings.filterwarnings("ignore", re.escape(text), kind)


def hide_bars() -> None:
    """Leave out the progress bars of [`BARS`]; imports transformers, without torch."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_tqdm_hook(_without_bars)


def _without_bars(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """transformers' hook that makes its progress bars."""
    return factory(*args, **{**kwargs, "disable": kwargs.get("desc") in BARS or kwargs.get("disable", False)})
