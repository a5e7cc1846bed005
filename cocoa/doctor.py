# SPDX-License-Identifier: Apache-2.0
"""`cocoa doctor`: what is installed, on which devices it runs, and how it attends."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version

import torch

from modeling_cocoa.packed_attention import sdpa_kernel

from .arguments import extras, missing

LIBRARIES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "peft", "trl")


def examine() -> Iterator[str]:
    """The lines that the command prints."""
    yield f"cocoa-embed {version('cocoa-embed')}, Python {platform.python_version()}, {platform.platform()}"
    yield "  ".join(f"{name} {version(name)}" for name in LIBRARIES)
    yield f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch; attention {attention('cpu')}"
    if not torch.cuda.is_available():
        yield f"GPU: none that this torch can use (built {describe_build()})"
    for index in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory
        yield f"GPU {index}: {name}, {memory / 2**30:.0f} GiB; attention {attention(f'cuda:{index}')} in bfloat16"
    for extra, needed in sorted(extras().items()):
        lacking = missing(needed)
        found = f'missing {", ".join(lacking)}: pip install "cocoa-embed[{extra}]"' if lacking else "installed"
        yield f"[{extra}]: {found}"


def attention(device: str) -> str:
    """How packed rows attend on a device by default."""
    return sdpa_kernel(torch.device(device), torch.bfloat16)


def describe_build() -> str:
    """For what torch was built."""
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
