# SPDX-License-Identifier: Apache-2.0
"""Whether a folder loads for its users: in a fresh process, without this package, through both loaders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from .folder_facts import FolderFacts

SCRIPT = Path(__file__).with_name("load_alone.py")
TOLERANCE, HALF_TOLERANCE = 1e-5, 2e-2
"""Largest difference between the loaders' vectors, for float32 weights and for smaller types."""


def find_loading_problems(folder: Path) -> list[str]:
    """What goes wrong when the model in `folder` is loaded, a sentence each; empty if nothing does."""
    facts = FolderFacts.read(folder)
    loaders = ["remote_code"] if facts.needs_remote_code else ["stock", "remote_code"]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": scratch,
        }
        isolated = "-P" if sys.version_info >= (3, 11) else "-E"
        command = [sys.executable, isolated, str(SCRIPT), str(folder.resolve()), *loaders]
        result = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        return [f"The folder does not load in a fresh process: {lines[-1]}"]
    vectors = {loader: np.array(values) for loader, values in json.loads(result.stdout.splitlines()[-1]).items()}
    problems = [
        f"The loader {loader!r} does not give unit vectors of {facts.dimension} dimensions: save the model again."
        for loader, values in vectors.items()
        if values.shape[1] != facts.dimension or not np.allclose(np.linalg.norm(values, axis=1), 1, atol=1e-2)
    ]
    if not problems and len(vectors) == 2:
        difference = float(np.abs(vectors["stock"] - vectors["remote_code"]).max())
        if not difference <= (TOLERANCE if facts.dtype == "float32" else HALF_TOLERANCE):
            problems.append(
                f"Stock classes and remote code give different vectors (by {difference:.1g}): weights or files are "
                "missing or wrong. Save the model again with modeling_cocoa.save_cocoa."
            )
    return problems
