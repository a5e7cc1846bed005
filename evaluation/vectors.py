# SPDX-License-Identifier: Apache-2.0
"""Vectors of many inputs, each computed once and kept in a folder as they come."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors.numpy import load, save
from tqdm.auto import tqdm

from modeling_cocoa.files import atomic_write
from modeling_cocoa.inputs import CocoaInputError

from .digests import digest_content

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK = 1024
"""Inputs whose vectors are kept together: what an interruption may lose ..."""
CHUNKS = 16
"""... but fewer, so that there are this many chunks for processes to share ..."""
SMALLEST_CHUNK = 256
"""... and yet as many as make full batches, also of short texts: 64 take up to a fifth longer on two cores."""


class VectorStore:
    """
    Vectors by key, in a folder that several processes may add to.

    A file is named by the digest of its content: a damaged one is found by its name, and its vectors count as missing.
    Keep one folder for each model; see [`fingerprint`].

    Args:
        folder (`Path`): Need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._vectors: dict[str, np.ndarray] = {}
        self._files: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added."""
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            if path in self._files:
                continue
            content = path.read_bytes()
            if self._path(content) != path:
                logger.warning("%s is damaged; what it held is computed again.", path)
                path.unlink(missing_ok=True)
                continue
            held = load(content)
            keys = [bytes(key).hex() for key in held["keys"]]
            self._vectors.update(zip(keys, held["vectors"], strict=True))
            self._files.add(path)

    def __contains__(self, key: str) -> bool:
        return key in self._vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, keys: Sequence[str]) -> np.ndarray:
        """The vectors of some keys, `(keys, hidden)`, float32."""
        return np.stack([self._vectors[key] for key in keys])

    def add(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        """
        Keep some vectors, on disk before this returns.

        Args:
            keys (`Sequence[str]`): Digests as hexadecimal digits, all of one length.
            vectors (`np.ndarray` of shape `(keys, hidden)`).

        Raises:
            ValueError: a vector is not all numbers.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise ValueError("The model gives vectors that are not numbers; check its weights and dtype.")
        digits = np.stack([np.frombuffer(bytes.fromhex(key), dtype=np.uint8) for key in keys])
        content = save({"keys": digits, "vectors": vectors})
        path = self._path(content)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_bytes(content)
        self._vectors.update(zip(keys, vectors, strict=True))
        self._files.add(path)

    def _path(self, content: bytes) -> Path:
        return self.folder / f"{digest_content(content)[:40]}.safetensors"


def embed_missing(
    encode: Callable[[list[T]], np.ndarray],
    inputs: Mapping[str, T],
    store: VectorStore,
    *,
    title: str,
    process_index: int = 0,
    num_processes: int = 1,
    skip: Callable[[T, str], None] | None = None,
    show_progress_bar: bool = True,
) -> None:
    """
    Compute the vectors of those inputs that a store does not have.

    Inputs are embedded in chunks that depend on `inputs` alone, so that a run that was interrupted, or is shared by
    other processes, ends with the same vectors bit by bit as far as the model itself does.

    Args:
        encode (`Callable`): Gives the unit vectors of a list of inputs.
        inputs (`Mapping`): By key, a digest of all that decides the input's vector besides the model.
        store ([`VectorStore`]).
        title (`str`): What the inputs are, for the progress bar.
        process_index, num_processes (`int`): Take every `num_processes`-th chunk; see [`chunk_size`].
        skip (`Callable`, *optional*): Called with each input that cannot be read, and the reason; by default that is
            an error.
        show_progress_bar (`bool`, defaults to `True`).

    Raises:
        CocoaInputError: an input cannot be read; its position is the one in `inputs`.
    """
    keys = list(inputs)
    size = chunk_size(len(keys))
    chunks = range(process_index * size, len(keys), num_processes * size)
    total = sum(min(size, len(keys) - first) for first in chunks)
    with tqdm(total=total, desc=title, unit="input", disable=not show_progress_bar) as progress:
        for first in chunks:
            chunk = keys[first : first + size]
            missing = [key for key in chunk if key not in store]
            while missing:
                good, rest = missing, []
                try:
                    vectors = encode([inputs[key] for key in good])
                except CocoaInputError as error:
                    if error.position is None:
                        raise
                    good, bad, rest = missing[: error.position], missing[error.position], missing[error.position + 1 :]
                    if skip is None:
                        raise CocoaInputError(error.reason, first + chunk.index(bad)) from error
                    skip(inputs[bad], error.reason)
                    vectors = encode([inputs[key] for key in good]) if good else None
                if good:
                    store.add(good, vectors)
                missing = rest
            progress.update(len(chunk))


def chunk_size(inputs: int) -> int:
    """How many of all inputs are embedded together; it does not depend on how many processes share them."""
    return min(CHUNK, max(SMALLEST_CHUNK, math.ceil(inputs / CHUNKS)))
