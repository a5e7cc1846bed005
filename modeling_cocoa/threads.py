# SPDX-License-Identifier: Apache-2.0
"""Work that threads do ahead of who asks for it, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


def map_ahead(
    pool: Executor,
    work: Callable[[T], R],
    items: Iterable[T],
    ahead: int,
    is_little: Callable[[T], bool] = lambda item: False,
) -> Iterator[R]:
    """
    `map` in the threads of a pool, in order.

    Args:
        ahead (`int`): Items that are worked on beyond the one that is asked for.
        is_little (`Callable`, *optional*): Whether an item is less work than handing it to a thread.
    """
    pending: deque[Future[R]] = deque()
    for item in items:
        if not pending and is_little(item):
            yield work(item)
            continue
        pending.append(pool.submit(work, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next of which is made in a thread while one is used."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        future = worker.submit(next, items, None)
        while (item := future.result()) is not None:
            future = worker.submit(next, items, None)
            yield item
