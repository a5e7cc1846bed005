# SPDX-License-Identifier: Apache-2.0
"""The chat template: how messages become text, the same for every reader of the saved processor."""

from __future__ import annotations

import json
from collections.abc import Iterable

TEMPLATE = r"""
{%- set control_tokens = CONTROL_TOKENS -%}
{%- macro plain(text) -%}
    {%- set escaped = namespace(text=text) -%}
    {%- for token in control_tokens if token in text -%}
        {%- set escaped.text = escaped.text | replace(token, token[0] ~ ' ' ~ token[1:]) -%}
    {%- endfor -%}
    {{- escaped.text -}}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if not loop.first -%}{{- '<|im_end|>\n' -}}{%- endif -%}
    {{- '<|im_start|>' ~ plain(message.role) ~ '\n' -}}
    {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
    {%- set state = namespace(texts=0, media=0, pending='') -%}
    {%- for part in parts or [] -%}
        {%- if part.type not in ['text', 'image', 'video'] -%}
            {{- raise_exception(part.type ~ UNKNOWN_PART) -}}
        {%- elif part.type in part and part[part.type] is none -%}
        {%- elif part.type != 'text' -%}
            {%- set state.media = state.media + 1 -%}
        {%- elif part.text is string -%}
            {%- set state.texts = state.texts + 1 -%}
        {%- else -%}
            {{- raise_exception('a text must be a string') -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if state.texts + state.media == 0 -%}{{- raise_exception('a message has no content') -}}{%- endif -%}
    {%- for part in parts if not (part.type in part and part[part.type] is none) -%}
        {%- if part.type == 'text' -%}
            {%- set state.pending = state.pending ~ part.text -%}
        {%- else -%}
            {%- if state.texts > 1 -%}
                {{- plain(state.pending) -}}
                {%- set state.pending = '' -%}
            {%- endif -%}
            {{- MEDIA -}}
        {%- endif -%}
    {%- endfor -%}
    {{- plain(state.pending) -}}
{%- endfor -%}
"""

UNKNOWN_PART = (
    " is no type of a content part; use text, image or video. An array of 1 or 2 dimensions is read as audio, which "
    "is not supported; and conversations (read as message) cannot be encoded together with other inputs: encode them "
    "in a call of their own."
)
"""Says what sentence-transformers would drop without a word."""

MEDIA = "'<|vision_start|><|' ~ part.type ~ '_pad|><|vision_end|>'"
"""What stands for an image or a video, each of which the processor replaces the inner token of."""
MEDIA_WITH_BARE_VIDEOS = f"'<|video_pad|>' if part.type == 'video' else {MEDIA}"
"""The same where the processor writes the tokens around a video's frames itself."""

PROCESSOR_PLACEHOLDER = "<|placeholder|>"
"""transformers before 5.3 turns this string into image tokens, though it is no token of the vocabulary."""


def build_chat_template(control_tokens: Iterable[str], has_bare_videos: bool = False) -> str:
    """
    The Jinja chat template of a CoCoA processor.

    Each message becomes `<|im_start|>{role}\\n{content}`, with `<|im_end|>\\n` between messages. Nothing closes the
    last one: the tokenizer's post-processor does, after truncation, so that the EOS is never cut off.

    In a message with at most one text, images and videos come first, in their order, then the text; a message with
    several texts keeps its order. Parts that are None are left out, as columns of an Arrow table have them. Texts that
    touch are joined, then each control token in them, and in roles, gets a space after its first character
    (`<|im_end|>` becomes `< |im_end|>`), so no text can end its message or stand for an image. A part of another type
    and a message without content raise an error.

    Args:
        control_tokens (`Iterable[str]`): Strings of a text that its readers would take for more than a text: what the
            tokenizer reads as one token wherever it occurs, and [`PROCESSOR_PLACEHOLDER`].
        has_bare_videos (`bool`, defaults to `False`): Write `<|video_pad|>` for a video without the tokens around it,
            which the processor of Qwen3-VL writes around each frame.

    Returns:
        `str`: The template, with the control tokens written into it.
    """
    values = {"CONTROL_TOKENS": list(control_tokens), "UNKNOWN_PART": UNKNOWN_PART}
    template = TEMPLATE.strip().replace("MEDIA", MEDIA_WITH_BARE_VIDEOS if has_bare_videos else MEDIA)
    for name, value in values.items():
        template = template.replace(name, json.dumps(value, ensure_ascii=False))
    return template
