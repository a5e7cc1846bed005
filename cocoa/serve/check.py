# SPDX-License-Identifier: Apache-2.0
"""`cocoa check-server`: whether a server gives a folder's vectors, and what it does wrong where it does not."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from evaluation.emoji import load_emoji
from evaluation.pages import data_url
from modeling_cocoa import CocoaProcessor, CocoaTransformer
from modeling_cocoa.sentence_transformer import read_settings

RIGHT = 0.99
"""Lowest cosine of a right vector: half precision stays above it, and each fault falls below."""
TIMEOUT = 120.0
"""Seconds that a server has for one input."""


@dataclass
class Finding:
    """
    What a server gave for one kind of input.

    Args:
        kind (`str`): Of input, and how it was sent.
        lowest (`float`, *optional*): Lowest cosine to the folder's vectors; none where the server refused.
        says (`str`): The verdict, in a sentence.
    """

    kind: str
    lowest: float | None
    says: str

    @property
    def is_right(self) -> bool:
        """Whether the vectors are the folder's."""
        return self.lowest is not None and self.lowest >= RIGHT


class Faults:
    """
    The vectors that engines give which read a folder wrongly, computed with the stock model.

    Args:
        folder (`str`): Folder or Hub name.
        processor ([`CocoaProcessor`]): The folder's.
    """

    def __init__(self, folder: str, processor: CocoaProcessor) -> None:
        self.processor = processor
        self.models: dict[bool, PreTrainedModel] = {}
        for is_causal in (False, True):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config.is_causal = config.text_config.is_causal = is_causal
            options: dict[str, Any] = {"config": config, "dtype": torch.float32, "trust_remote_code": False}
            self.models[is_causal] = AutoModel.from_pretrained(folder, **options).eval()
        prompts = read_settings(folder).get("prompts", {})
        self.ways: dict[str, Callable[[Sequence[Any]], np.ndarray]] = {
            "a causal attention mask (the engine ignores is_causal)": lambda items: self.states(True, items),
            "no <EOS> at the end (the engine tokenizes without special tokens)": self.without_eos,
            "a causal mask and no <EOS>": lambda items: self.without_eos(items, is_causal=True),
            "no chat template around the text": self.without_template,
            **{
                f"the prompt {name!r} in front of the input": lambda items, prompt=prompt: self.states(
                    False, items, prompt
                )
                for name, prompt in prompts.items()
                if prompt
            },
        }

    def states(self, is_causal: bool, items: Sequence[Any], prompt: str | None = None) -> np.ndarray:
        """The EOS states under one mask."""
        return last_states(self.models[is_causal], self.processor.preprocess(items, prompt=prompt))

    def without_eos(self, items: Sequence[Any], is_causal: bool = False) -> np.ndarray:
        """The states of the last token before the EOS, which is cut off."""
        rows = self.processor.preprocess(items)
        cut = [{**row, **{name: row[name][:-1] for name in ("input_ids", "mm_token_type_ids")}} for row in rows]
        return last_states(self.models[is_causal], cut)

    def without_template(self, items: Sequence[Any]) -> np.ndarray:
        """The states of bare texts, each with its EOS."""
        ids = [torch.tensor(self.processor.tokenizer(item["text"])["input_ids"]) for item in items]
        rows = [{"input_ids": row, "mm_token_type_ids": torch.zeros_like(row)} for row in ids]
        return last_states(self.models[False], rows)

    def closest(self, items: Sequence[Any], found: np.ndarray) -> str | None:
        """The fault whose vectors a server's are, if any."""
        has_images = any("image" in item for item in items)
        for fault, embed in self.ways.items():
            if has_images and embed == self.without_template:
                continue
            if (embed(items) * found).sum(-1).min() >= RIGHT:
                return fault
        return None


def last_states(model: PreTrainedModel, rows: Sequence[dict[str, Tensor]]) -> np.ndarray:
    """The last token's hidden state of each row, read alone, at length 1: `(rows, hidden)`."""
    found = []
    for row in rows:
        inputs = {name: value[None] if value.dim() == 1 else value for name, value in row.items()}
        with torch.inference_mode():
            found.append(model(**inputs).last_hidden_state[0, -1])
    return nn.functional.normalize(torch.stack(found), dim=-1).numpy()


def check_server(url: str, folder: str | os.PathLike, *, name: str | None = None) -> list[Finding]:
    """
    Compare a running server with an OpenAI-compatible API with a folder, on a few texts, images and pairs.

    Args:
        url (`str`): The server's address, such as `http://localhost:8000`.
        folder (`str` or `os.PathLike`): The model that it should serve: folder or Hub name.
        name (`str`, *optional*): The model's name in requests; by default the first that the server lists.

    Returns:
        `list[Finding]`: For texts as `input`, and texts, images and pairs as `messages`.

    Raises:
        OSError: the server cannot be reached.
    """
    url = url.rstrip("/").removesuffix("/v1")
    try:
        served = ask(f"{url}/v1/models")["data"]
    except OSError as error:
        raise OSError(f"No server with OpenAI's API answers at {url} ({error}).") from error
    name = name or served[0]["id"]
    module = CocoaTransformer(str(folder))
    faults = cache(lambda: Faults(str(folder), module.processor))  # only for a server that is wrong
    emoji = load_emoji().select(range(0, 400, 100))
    texts = [{"text": text} for text in [*emoji["name"], "no entry: a red circle with a white bar. " * 20]]
    images = [{"image": image.convert("RGB")} for image in emoji["noto"][:2]]
    pairs = [{**image, **text} for image, text in zip(images, texts, strict=False)]
    findings = []
    for kind, items, body in (
        ("texts as input", texts, lambda item: {"input": item["text"]}),
        ("texts as messages", texts, as_messages),
        ("images as messages", images, as_messages),
        ("images with texts as messages", pairs, as_messages),
    ):
        try:
            answers = [ask(f"{url}/v1/embeddings", {"model": name, **body(item)}) for item in items]
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:300]
            findings.append(Finding(kind, None, f"refused with {error.code}: {' '.join(reason.split())}"))
            continue
        found = np.array([answer["data"][0]["embedding"] for answer in answers], dtype=np.float32)
        width = module.get_embedding_dimension()
        if found.shape[1] != width:
            findings.append(Finding(kind, None, f"vectors of {found.shape[1]} dimensions; the folder's have {width}."))
            continue
        lengths = np.linalg.norm(found, axis=1)
        found = found / lengths[:, None]
        lowest = float((found * module.encode(items)).sum(-1).min())
        findings.append(Finding(kind, lowest, describe(lowest, lengths, items, found, faults)))
    return findings


def describe(
    lowest: float, lengths: np.ndarray, items: Sequence[Any], found: np.ndarray, faults: Callable[[], Faults]
) -> str:
    """The verdict on some vectors."""
    if not lowest >= RIGHT:  # NaN among them
        fault = faults().closest(items, found)
        return f"WRONG: {fault}." if fault else "WRONG, by none of the known faults: is it the same folder?"
    if abs(lengths - 1).max() > 0.01:
        return f"right, but not normalized (lengths of {lengths.min():.3g} to {lengths.max():.3g})."
    return "right."


def as_messages(item: dict[str, Any]) -> dict[str, Any]:
    """An input as the messages of a chat."""
    content: list[dict[str, Any]] = []
    if "image" in item:
        content.append({"type": "image_url", "image_url": {"url": data_url(item["image"])}})
    if "text" in item:
        content.append({"type": "text", "text": item["text"]})
    # Without special tokens vLLM leaves the EOS out.
    return {"messages": [{"role": "user", "content": content}], "add_special_tokens": True}


def ask(url: str, body: dict[str, Any] | None = None, timeout: float = TIMEOUT) -> dict[str, Any]:
    """A server's answer; with the key of the environment variable COCOA_API_KEY, where it is set."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("COCOA_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)
