# SPDX-License-Identifier: Apache-2.0
"""Digests: of contents, of files, and of everything that decides a model's vectors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from safetensors import safe_open

from modeling_cocoa.media import IMAGE_READING
from modeling_cocoa.model_folder import name_in_any_layout

LIBRARIES = ("cocoa-embed", "sentence-transformers", "torch", "transformers")


def digest_content(content: Any) -> str:
    """The SHA-256 of bytes, or of a value as JSON writes it, as hexadecimal digits."""
    return hashlib.sha256(content if isinstance(content, bytes) else json.dumps(content).encode()).hexdigest()


def digest_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    summary = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            summary.update(block)
    return summary.hexdigest()


def digest_files(files: Sequence[Path], folder: Path) -> str:
    """
    A digest of files, and of their names below a folder.

    Args:
        files (`Sequence[Path]`): In an order that is always the same.
        folder (`Path`): Above them all.
    """
    lines = [f"{path.relative_to(folder).as_posix()} {digest_file(path)}\n" for path in files]
    return digest_content("".join(lines).encode())


def weights_digest(folder: str | os.PathLike) -> str:
    """
    A digest of the weights in a CoCoA checkpoint's folder, from its files: the same under whichever names and in
    however many files they were saved. Heads of reconstruction and a run's adapters, which are merged, do not count.

    Raises:
        FileNotFoundError: there are none.
    """
    found = {}
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                value = file.get_tensor(name).contiguous()
                content = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy()).hexdigest()
                found[name_in_any_layout(name)] = [str(value.dtype), list(value.shape), content]
    if not found:
        raise FileNotFoundError(f"{folder} has no weights (model*.safetensors); save the model again with save_cocoa.")
    return digest_content(sorted(found.items()))


def fingerprint(model: torch.nn.Module, weights: str | None = None) -> str:
    """
    A name for what decides a model's vectors: its weights, how it reads inputs, and the libraries that run it.

    Args:
        model ([`~torch.nn.Module`]): A sentence-transformers model or module.
        weights (`str`, *optional*): A digest of its weights, where one is known, such as the [`weights_digest`] of
            the folder that it was loaded from; by default they are read from the model.
    """
    summary = hashlib.sha256((weights or _digest_state(model)).encode())
    for name, part in model.named_modules(remove_duplicate=False):
        summary.update(repr([name, *_reading_of(part)]).encode())
    summary.update(repr([IMAGE_READING, *map(installed_version, LIBRARIES)]).encode())
    return summary.hexdigest()


def _digest_state(model: torch.nn.Module) -> str:
    """A digest of a model's weights in memory."""
    summary = hashlib.sha256()
    for name, value in model.state_dict().items():
        summary.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        summary.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return summary.hexdigest()


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


def installed_version(name: str) -> str | None:
    """The version of a library; none where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
