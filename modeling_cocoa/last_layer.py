# SPDX-License-Identifier: Apache-2.0
"""
The last layer's MLP for the EOS tokens alone, where only embeddings are asked for: nobody reads the other tokens'
output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

ROWS: ContextVar[tuple[Tensor, int] | None] = ContextVar("ROWS", default=None)
"""Which tokens are computed, and of how many; of each thread, since threads share models."""


@contextmanager
def compute_rows(rows: Tensor, tokens: int) -> Iterator[None]:
    """
    Have modules that [`select_rows`] knows compute some tokens of a packed row, and give zero for the others.

    Args:
        rows (`Tensor`): Places of these tokens.
        tokens (`int`): Of the packed row.
    """
    before = ROWS.set((rows, tokens))
    try:
        yield
    finally:
        ROWS.reset(before)


def select_rows(module: nn.Module) -> None:
    """Have a module that takes and gives `(1, tokens, hidden)`, token by token, heed [`compute_rows`]."""
    module.register_forward_pre_hook(_take_rows)
    module.register_forward_hook(_put_rows)


def _take_rows(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    if (asked := ROWS.get()) is None:
        return None
    return (args[0].index_select(1, asked[0].to(args[0].device)),)


def _put_rows(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
    if (asked := ROWS.get()) is None:
        return None
    rows, tokens = asked
    return output.new_zeros(1, tokens, output.shape[-1]).index_copy(1, rows.to(output.device), output)
