# SPDX-License-Identifier: Apache-2.0
"""Vectors of many inputs, each computed once and kept in a folder as they come."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pprint import pformat
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.numpy import load, save
from tqdm.auto import tqdm

from modeling_cocoa.inputs import IMAGE_READING, CocoaInputError

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

    A file is named by the digest of what it holds: one that was damaged is found by its name, and its vectors count as
    missing. One that a process is writing has another name, which a kill may leave behind. Keep one folder for each
    model; see [`fingerprint`].

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
            if _digest(content) != path.stem:
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
        path = self.folder / f"{_digest(content)}.safetensors"
        partial = self.folder / f".partial-{os.getpid()}-{path.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._vectors.update(zip(keys, vectors, strict=True))
        self._files.add(path)


def embed_missing(
    encode: Callable[[list[T]], np.ndarray],
    inputs: Mapping[str, T],
    store: VectorStore,
    *,
    title: str,
    process_index: int = 0,
    num_processes: int = 1,
    skip: Callable[[T, str], None] | None = None,
    readable: Callable[[T], None] = lambda item: None,
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
        process_index, num_processes (`int`): Take every so-many-th chunk; see [`chunk_size`].
        skip (`Callable`, *optional*): Told each input that cannot be read, with the reason; by default that raises.
        readable (`Callable`, *optional*): Raises `CocoaInputError` where an input cannot be read, at less cost than
            `encode`; used to find all bad ones of a chunk that has one.
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
                try:
                    store.add(missing, encode([inputs[key] for key in missing]))
                    break
                except CocoaInputError as error:
                    if error.position is None:
                        raise
                    key = missing[error.position]
                    if skip is None:
                        raise CocoaInputError(error.reason, first + chunk.index(key)) from error
                    bad = {**unreadable({key: inputs[key] for key in missing}, readable), key: error.reason}
                for key, reason in bad.items():
                    skip(inputs[key], reason)
                missing = [key for key in missing if key not in bad]
            progress.update(len(chunk))


def chunk_size(inputs: int) -> int:
    """How many of so many inputs are embedded together; it does not depend on how many processes share them."""
    return min(CHUNK, max(SMALLEST_CHUNK, math.ceil(inputs / CHUNKS)))


def unreadable(inputs: Mapping[str, T], readable: Callable[[T], None]) -> dict[str, str]:
    """The reason by key of each input that cannot be read."""
    found = {}
    for key, item in inputs.items():
        try:
            readable(item)
        except CocoaInputError as error:
            found[key] = error.reason
    return found


def weights_digest(model: torch.nn.Module) -> str:
    """
    A name for a model's weights, the same wherever they are loaded.

    Args:
        model ([`~torch.nn.Module`]): A sentence-transformers model or module.
    """
    summary = hashlib.sha256()
    for name, value in model.state_dict().items():
        summary.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        summary.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return summary.hexdigest()


def fingerprint(model: torch.nn.Module, weights: str | None = None) -> str:
    """
    A name for what decides a model's vectors: its weights, how it reads inputs, and the libraries that run it.

    Args:
        model ([`~torch.nn.Module`]): A sentence-transformers model or module.
        weights (`str`, *optional*): Its [`weights_digest`], where that is known.
    """
    summary = hashlib.sha256((weights or weights_digest(model)).encode())
    for name, part in model.named_modules(remove_duplicate=False):
        summary.update(repr([name, *_reading_of(part)]).encode())
    summary.update(repr([IMAGE_READING, *(_version(name) for name in LIBRARIES)]).encode())
    return summary.hexdigest()


LIBRARIES = ("cocoa-embed", "sentence-transformers", "torch", "transformers")


def _reading_of(module: Any) -> list[Any]:
    """Settings of a module that are not in its weights: configuration, processors, tokenizer, template, prompts."""
    found: list[Any] = [type(module).__qualname__]
    found += [getattr(module, name, None) for name in ("max_seq_length", "truncate_dim", "default_prompt_name")]
    found.append(pformat(getattr(module, "prompts", None)))
    if hasattr(module, "get_config_dict"):  # of sentence-transformers' modules
        found.append(pformat(module.get_config_dict()))
    if (backbone := getattr(module, "auto_model", None)) is not None:
        found.append(backbone.config.to_json_string())
    processor = getattr(module, "processor", None)
    for part in (processor, *(getattr(processor, name, None) for name in ("image_processor", "video_processor"))):
        if hasattr(part, "to_json_string"):
            found.append(part.to_json_string())
    found += [getattr(processor, name, None) for name in ("prompt", "chat_template")]
    tokenizer = getattr(module, "tokenizer", None)
    if hasattr(tokenizer, "backend_tokenizer"):
        found.append(tokenizer.backend_tokenizer.to_str())
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]
