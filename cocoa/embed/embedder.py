# SPDX-License-Identifier: Apache-2.0
"""The model of a worker: rows to vectors of the type that is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evaluation.digests import LIBRARIES, fingerprint, installed_version
from modeling_cocoa import CocoaTransformer
from modeling_cocoa.encoding import encode_inputs
from modeling_cocoa.sentence_transformer import read_settings

DTYPES = ("float32", "float16", "int8", "binary")


class CocoaEmbedder:
    """
    Embeds batches of rows, such as those of Ray Data:

    ```python
    rows.map_batches(
        CocoaEmbedder, fn_constructor_args=["org/model"], fn_constructor_kwargs={"image": "path"}, concurrency=2,
        num_cpus=0.5,  # less than a core each: with all of them taken, Ray Data could read nothing and would hang
    )
    ```

    Args:
        model (`str`): Folder or Hub name of a CoCoA checkpoint.
        text (`str`, *optional*): Column of texts.
        image (`str`, *optional*): Column of images.
        video (`str`, *optional*): Column of videos.
        prompt_name (`str`, defaults to `"document"`): The checkpoint's prompt; nothing where it is empty.
        dtype (`str`, defaults to `"float32"`): `"float32"`, `"float16"`, `"int8"` (each vector scaled so that its
            largest number is 127) or `"binary"` (signs, packed into bytes).
        truncate_dim (`int`, *optional*): Keep the first numbers only, brought to length 1 again.
        device (`str`, *optional*): By default a GPU, where there is one.
        threads (`int`, *optional*): Of the CPU; by default torch's own choice.

    Attributes:
        dim (`int`): Numbers of a vector.
        threads (`int`): Those that torch has.

    Raises:
        ValueError: an argument does not fit the model.
    """

    def __init__(
        self,
        model: str,
        *,
        text: str | None = None,
        image: str | None = None,
        video: str | None = None,
        prompt_name: str = "document",
        dtype: str = "float32",
        truncate_dim: int | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}; got {dtype!r}.")
        self.threads = torch.get_num_threads()
        self.columns = {"text": text, "image": image, "video": video}
        settings = read_settings(model)
        prompts = settings.get("prompts") or {}
        if prompt_name not in (*prompts, "query", "document"):
            raise ValueError(f"prompt_name {prompt_name!r} is none of the model's: {sorted(prompts)}.")
        self.prompt = prompts.get(prompt_name) or None
        self.module = CocoaTransformer(model).to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        self.dtype = dtype
        whole = self.module.get_embedding_dimension()
        self.dim = truncate_dim or settings.get("truncate_dim") or whole
        if not 1 <= self.dim <= whole:
            raise ValueError(f"truncate_dim must be between 1 and {whole}; got {self.dim}.")
        if dtype == "binary" and self.dim % 8:
            raise ValueError(f"binary vectors need a number of dimensions that 8 divides; got {self.dim}.")

    def describe(self) -> dict[str, Any]:
        """What decides the vectors."""
        return {
            "libraries": {name: installed_version(name) for name in LIBRARIES},
            "fingerprint": fingerprint(self.module),
            "prompt": self.prompt,
            "dim": self.dim,
        }

    def embed(self, inputs: Iterable[Any]) -> tuple[np.ndarray, dict[int, str]]:
        """
        Embed inputs, which are read as they are needed.

        Args:
            inputs (`Iterable`): As [`CocoaProcessor`] takes them, or a `ValueError` that says why there is none.

        Returns:
            Vectors `(inputs, dim)`, or `(inputs, dim / 8)` of uint8 for binary ones; and by position why some inputs
            have none. What stands in the place of those means nothing.

        Raises:
            RuntimeError: no input at all could be embedded, for one reason that is not theirs.
        """
        unread: dict[int, str] = {}

        def readable() -> Iterable[Any]:
            for position, value in enumerate(inputs):
                if isinstance(value, ValueError):
                    unread[position] = str(value)
                yield value

        failed: dict[int, str] = {}
        module = self.module
        vectors = encode_inputs(module.model, module.processor, readable(), prompt=self.prompt, failed=failed).numpy()
        failed.update(unread)
        reasons = set(failed.values())
        if len(failed) == len(vectors) > 1 and len(reasons) == 1 and re.match(r"\w*Error: ", reason := reasons.pop()):
            raise RuntimeError(f"The model embeds nothing. {reason}")
        vectors = shorten(vectors, self.dim)
        for position in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
            failed.setdefault(position, "the model gives a vector that is not finite; check its weights and dtype.")
        return convert(vectors, self.dtype), dict(sorted(failed.items()))

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """
        Embed a batch of columns.

        Returns:
            `dict`: The batch with `embedding`, `(rows, dim)`, and `error`, None or why a row has no vector. Its
            vector is then NaN, or None in the types that have no NaN.
        """
        columns = {kind: batch[name] for kind, name in self.columns.items() if name is not None}
        if not columns:
            raise ValueError("Name the columns to embed: text, image or video.")
        names, rows = list(columns), zip(*columns.values(), strict=True)
        vectors, failed = self.embed(dict(zip(names, map(plain, row), strict=True)) for row in rows)
        errors = np.array([failed.get(row) for row in range(len(vectors))], dtype=object)
        if failed and vectors.dtype.kind == "f":
            vectors[list(failed)] = np.nan
        elif failed:
            kept = [None if row in failed else vector for row, vector in enumerate(vectors)]
            vectors = np.empty(len(kept), dtype=object)
            vectors[:] = kept
        return {**batch, "embedding": vectors, "error": errors}


def plain(value: Any) -> Any:
    """A cell as Python's own type, where it is a text of numpy."""
    return str(value) if isinstance(value, np.str_) else value


def shorten(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The first numbers of unit vectors `(rows, hidden)`, as unit vectors `(rows, dim)`."""
    if dim == vectors.shape[1]:
        return vectors
    with np.errstate(invalid="ignore", divide="ignore"):
        return vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)


def convert(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Unit vectors in another type; see [`CocoaEmbedder`]."""
    if dtype == "binary":
        return np.packbits(vectors > 0, axis=1)
    if dtype != "int8":
        return vectors.astype(dtype, copy=False)
    with np.errstate(invalid="ignore"):
        return np.rint(vectors * (127 / np.abs(vectors).max(axis=1, keepdims=True, initial=1e-9))).astype(np.int8)
