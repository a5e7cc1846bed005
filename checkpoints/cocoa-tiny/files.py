# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Within it, write to the path that it gives; only what was finished takes the name that was asked for. Several
    processes may write the same file at once.

    Args:
        path (`str` or `os.PathLike`): Of the file, which may exist. Its folder must.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, last: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """
    Within it, write to the folder that it gives; the files take their places only once all are there.

    Args:
        folder (`Path`): Where they go to; may exist, and what else is in it stays.
        last (`str`): The file that makes the folder loadable. Where it is among those that are written, it is the last
            one to take its place: whoever is cut off leaves a folder that does not load, not one of two models' files.
        stale (`Sequence[str]`): Patterns of files that belong together: where some are written, others are removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        files = [path for path in staging.rglob("*") if path.is_file()]
        if files and not folder.exists():
            os.chmod(staging, 0o755)
            os.replace(staging, folder)
            return
        old = [folder / last] if (staging / last).is_file() else []
        if any(path.match(pattern) for path in files for pattern in stale):
            old += [path for pattern in stale for path in folder.glob(pattern) if not (staging / path.name).exists()]
        for path in old:
            path.unlink(missing_ok=True)
        for path in sorted(files, key=lambda path: (path.name == last, path)):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
