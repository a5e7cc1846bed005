# SPDX-License-Identifier: Apache-2.0
"""The app in a process of its own, and what it shows: a folder of emoji, and a small model of the bridge stage."""

from __future__ import annotations

import csv
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from cocoa.demo.demo import CHECKPOINT
from evaluation.assets import asset_path
from evaluation.emoji import load_emoji
from trainers.data.collators import DIRECTIONS
from trainers.reconstruction_config import CocoaReconstructionConfig
from trainers.reconstruction_trainer import CocoaReconstructionTrainer

CALLED_OUT = "CALLED OUT"
GUARD = f"""
import signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells switch off in the background

def watch(event, arguments):
    host = None
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    if host not in (None, "", "0.0.0.0", "127.0.0.1", "::1", "localhost"):
        print({CALLED_OUT!r}, event, host, file=sys.stderr, flush=True)

sys.addaudithook(watch)
"""
"""Reports on stderr when its process connects to another machine."""
SECONDS = 300
"""Until the page is served, on a machine that does much else."""


def emoji_rows(count: int) -> Dataset:
    """The cats among the emoji, and others, `count` in all."""
    rows = load_emoji().filter(lambda split: split == "train", input_columns="split")
    cats = [place for place, name in enumerate(rows["name"]) if "cat" in name.split()]
    others = [place for place in range(0, len(rows), len(rows) // count) if place not in cats]
    return rows.select([*cats, *others][:count])


def write_images(folder: Path, count: int, texts: bool = True, more: Sequence[tuple[str, str]] = ()) -> list[str]:
    """
    Emoji as a folder of images.

    Args:
        folder (`Path`): A new one.
        count (`int`): Number of images, the cats first.
        texts (`bool`, defaults to `True`): Write their names into `metadata.csv`.
        more (`Sequence[tuple[str, str]]`): Names of files, and texts; each another drawing of the first.

    Returns:
        `list[str]`: The texts, by image.
    """
    folder.mkdir()
    rows = emoji_rows(count)
    named = []
    for place, row in enumerate(rows):
        row["noto"].convert("RGB").save(folder / f"{place:03}.png")
        named.append((f"{place:03}.png", row["name"]))
    for file, text in more:
        rows[0]["twemoji"].convert("RGB").save(folder / file)
        named.append((file, text))
    if texts:
        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file_name", "text"), *named])
    return [text for _, text in named]


def train_bridge(folder: Path) -> CocoaReconstructionTrainer:
    """A trainer that made a few steps of the bridge stage from the tiny checkpoint, and saved its model."""
    rows = emoji_rows(16).select_columns(["noto", "name"]).rename_columns({"noto": "image", "name": "text"})
    args = CocoaReconstructionConfig(
        str(folder),
        stage="bridge",
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        normalize_pixels=False,
        source_mask_ratio=0.15,
        target_mask_ratio=0.6,
        direction_weights=dict.fromkeys(DIRECTIONS, 1.0),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = CocoaReconstructionTrainer(str(asset_path(CHECKPOINT)), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    return trainer


@dataclass
class RunningApp:
    """An app that is served: where, and the file of what it writes on stderr."""

    url: str
    errors: Path


@contextmanager
def running_app(code: str, folder: Path, errors: Path, **environment: str) -> Iterator[RunningApp]:
    """
    Within it, the app runs in a process of its own, watched for calls to other machines.

    Args:
        code (`str`): Python that serves it.
        folder (`Path`): The process's working directory, which it imports from first.
        errors (`Path`): File for its stderr.
        environment: Variables to set.
    """
    # Without what would keep it quiet: it is to be quiet by itself.
    other = ("COCOA_", "DO_NOT_TRACK", "GRADIO_", "HF_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    settings = {**kept, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(errors.parent / "gradio")}
    with open(errors, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", GUARD + code],
            cwd=folder,
            env={**settings, **environment},
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
        try:
            yield RunningApp(wait_for_url(process, errors), errors)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)
            process.stdout.close()


def wait_for_url(process: subprocess.Popen, errors: Path) -> str:
    """The address that the process says it serves at."""
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            if found := re.search(r"Running on local URL:\s+(\S+)", lines.get(timeout=0.5)):
                return found.group(1).rstrip("/") + "/"
        except queue.Empty:
            if process.poll() is not None:
                break
    raise AssertionError(f"The app is not served: {errors.read_text(encoding='utf-8')[-4000:]}")
