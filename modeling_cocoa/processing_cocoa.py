# SPDX-License-Identifier: Apache-2.0
"""`CocoaProcessor`: inputs of any kind to tensors, the EOS last."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, Qwen2_5_VLProcessor, Qwen2VLProcessor

from .chat_template import build_chat_template, control_tokens_of
from .inputs import CocoaInputError, Conversation, ResizedImage, media_kind, read_input
from .threads import map_ahead

logger = logging.getLogger(__name__)

EOS_TOKEN = "<|im_end|>"
MASK_TOKEN = "<|mask|>"
MEDIA_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")

FRAMES_KEPT = 1000
"""Forms of inputs, each with its prompt, of which what the chat template writes in front of the text is kept."""
READ_AHEAD = 8
"""Inputs that threads read beyond the one that is asked for: photos, decoded, are large."""
PIXELS_AT_ONCE = 2**22
"""Pixels of decoded images and frames from which patches are made of them, so that few are in memory at once."""

__all__ = ["CocoaInputError", "CocoaProcessor"]


class CocoaProcessor:
    """
    Turns texts, images, videos and conversations into the tensors of a CoCoA model.

    Wraps a stock processor and prepares it: adds the token `<|mask|>`, sets the chat template, and lets the tokenizer
    close each input with the EOS. All of it lives in the stock processor's own files, so whoever loads the saved
    folder with `AutoProcessor` or sentence-transformers gets the same ids.

    Args:
        processor (`Qwen2VLProcessor` or `Qwen2_5_VLProcessor`): Changed in place.
        min_pixels, max_pixels (`int`, *optional*): Pixels to which an image or a video frame is scaled up or down; by
            default as saved.
        max_length (`int`, *optional*): Tokens of an input with its EOS; by default as saved.
        prompt (`str`, *optional*): Instruction put in front of every input as a system message. Not saved.

    Raises:
        ValueError: the processor is of another kind or lacks a special token of Qwen2-VL; a size is out of range.
    """

    def __init__(
        self,
        processor: Qwen2VLProcessor | Qwen2_5_VLProcessor,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        if not isinstance(processor, (Qwen2VLProcessor, Qwen2_5_VLProcessor)):
            raise ValueError(
                f"CocoaProcessor wraps a Qwen2VLProcessor or Qwen2_5_VLProcessor; got {type(processor).__name__}. "
                "Load it from a Qwen2-VL, Qwen2.5-VL or CoCoA checkpoint."
            )
        self.processor = processor
        self.prompt = prompt
        self._prepare_tokenizer()
        self._set_pixels(min_pixels, max_pixels)
        if getattr(self.video_processor, "cap_pixels_per_frame", False) is None:
            # Said outright, because transformers is about to change what leaving it out means.
            self.video_processor.cap_pixels_per_frame = False
        if max_length is not None:
            self.tokenizer.model_max_length = _positive("max_length", max_length)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        **hub_kwargs: Any,
    ) -> CocoaProcessor:
        """
        Load from a CoCoA checkpoint, or from a generative Qwen2-VL / Qwen2.5-VL checkpoint.

        Args:
            name_or_path (`str` or `os.PathLike`): Folder, or name on the Hub.
            min_pixels, max_pixels, max_length, prompt (*optional*): See the class.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like of
                [`~transformers.AutoProcessor.from_pretrained`].

        Raises:
            ValueError: the checkpoint has another kind of processor.
        """
        processor = AutoProcessor.from_pretrained(name_or_path, **hub_kwargs)
        return cls(processor, min_pixels=min_pixels, max_pixels=max_pixels, max_length=max_length, prompt=prompt)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the stock processor's files; the prompt is not among them."""
        # The backend keeps the padding and truncation of its last call and would save them.
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        self.processor.save_pretrained(folder)

    def _prepare_tokenizer(self) -> None:
        tokenizer = self.processor.tokenizer
        added = tokenizer.get_added_vocab()
        needed = (EOS_TOKEN, "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        missing = [token for token in needed if token not in added]
        if missing:
            raise ValueError(f"The tokenizer lacks the special tokens {missing} of Qwen2-VL; load one that has them.")
        if MASK_TOKEN not in added:
            tokenizer.add_tokens([AddedToken(MASK_TOKEN, special=True, normalized=False)], special_tokens=True)
        tokenizer.eos_token = EOS_TOKEN
        tokenizer.truncation_side = "right"
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no pad token; set tokenizer.pad_token (Qwen's is <|endoftext|>).")
        eos_id = tokenizer.convert_tokens_to_ids(EOS_TOKEN)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {EOS_TOKEN}", pair=f"$A $B {EOS_TOKEN}", special_tokens=[(EOS_TOKEN, eos_id)]
        )
        control_tokens = control_tokens_of(tokenizer.get_added_vocab())
        template = build_chat_template(control_tokens)
        self.processor.chat_template = tokenizer.chat_template = template
        self._control_tokens = re.compile("|".join(map(re.escape, control_tokens)))
        self._frames: dict[tuple[str | None, ...], str] = {}
        self._vision_ids = torch.tensor(
            tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
        )

    def _set_pixels(self, min_pixels: int | None, max_pixels: int | None) -> None:
        for part in (self.image_processor, self.video_processor):
            size = {"shortest_edge": part.size["shortest_edge"], "longest_edge": part.size["longest_edge"]}
            if min_pixels is not None:
                size["shortest_edge"] = _positive("min_pixels", min_pixels)
            if max_pixels is not None:
                size["longest_edge"] = _positive("max_pixels", max_pixels)
            if min_pixels is None and max_pixels is None:
                continue
            if size["shortest_edge"] > size["longest_edge"]:
                raise ValueError(
                    f"min_pixels ({size['shortest_edge']}) is above max_pixels ({size['longest_edge']}) for the "
                    f"{type(part).__name__}; give both."
                )
            part.size = type(part.size)(**size)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_processor(self) -> Any:
        return self.processor.image_processor

    @property
    def video_processor(self) -> Any:
        return self.processor.video_processor

    @property
    def token_pixels(self) -> int:
        """Pixels of an image that make one token."""
        return (self.image_processor.patch_size * self.image_processor.merge_size) ** 2

    @property
    def max_length(self) -> int:
        """Tokens of an input, the EOS among them, beyond which text is cut."""
        return self.tokenizer.model_max_length

    @property
    def eos_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(EOS_TOKEN)

    @property
    def mask_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(MASK_TOKEN)

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def image_token_id(self) -> int:
        return self.processor.image_token_id

    @property
    def video_token_id(self) -> int:
        return self.processor.video_token_id

    def __call__(
        self, inputs: Sequence[Any], *, prompt: str | None = None, max_length: int | None = None
    ) -> BatchFeature:
        """
        Encode and pad a list of inputs; see [`~CocoaProcessor.encode`] and [`~CocoaProcessor.collate`].

        Raises:
            CocoaInputError: an input cannot be encoded; names its position.
        """
        return self.collate(self.encode(inputs, prompt=prompt, max_length=max_length))

    def read(self, inputs: Iterable[Any], pool: Executor | None = None) -> Iterator[Conversation]:
        """
        Check inputs and load their images and videos, one by one as they are asked for. The first bare str that ends
        like an image or a video file and is none is logged as a warning, since it is read as a text.

        Args:
            inputs (`Iterable`): As in [`~CocoaProcessor.encode`], which takes the result too.
            pool (`Executor`, *optional*): Threads that read [`READ_AHEAD`] inputs ahead.

        Raises:
            CocoaInputError: an input cannot be read; names its position.
        """

        def read_one(item: Any) -> tuple[Conversation, bool]:
            conversation = read_input(item, self.video_processor)
            if pool is not None:
                conversation.digest  # noqa: B018 - worked out here, in the thread, and kept
            return conversation, conversation is not item

        readings = map(read_one, inputs) if pool is None else map_ahead(pool, read_one, inputs, READ_AHEAD, is_text)
        has_warned = False
        for position in count():
            try:
                conversation, is_new = next(readings)
            except StopIteration:
                return
            except CocoaInputError as error:
                raise CocoaInputError(error.reason, position) from error
            if conversation.missing_file and not has_warned and is_new:
                has_warned = True
                logger.warning(
                    'Item %d is embedded as the words of its path: %s For a text, pass {"text": ...}, which is never '
                    "read as a path. Other such items of this call are not named.",
                    position,
                    conversation.missing_file,
                )
            yield conversation

    def encode(
        self,
        inputs: Iterable[Any],
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        device: torch.device | str | None = None,
    ) -> list[dict[str, Tensor]]:
        """
        Encode a list of inputs, without padding. Images become patches a few at a time: they are not held decoded.

        Args:
            inputs (`Iterable`): Each a text, an image (PIL, path, bytes or array, see [`~inputs.load_image`]), a dict
                with any of `text`, `image`, `images` and `video`, a message, or a conversation; any mixture. A str
                that is the path of an existing image or video file is that image or video; `{"text": path}` is text.
            prompt (`str`, *optional*): Instruction for these inputs instead of the processor's own; `""` for none.
            max_length (`int`, *optional*): Tokens of an input, the EOS among them; by default the tokenizer's. The
                last text tokens are dropped beyond it, never tokens of an image or a video.
            add_special_tokens (`bool`, defaults to `True`): Without them an input is its content alone, with neither
                the header of its first message nor the EOS: what a target of reconstruction is.
            device (`torch.device` or `str`, *optional*): Where images and frames are resized and cut into patches, and
                where these stay; by default the CPU. A GPU rounds resized pixels otherwise: some by 1 of 255.

        Returns:
            `list[dict]`: One an input, with `input_ids` and `mm_token_type_ids` (0 text, 1 image, 2 video) of shape
            `(tokens,)`, and where it has images or videos `pixel_values` `(patches, values)`, `image_grid_thw`
            `(images, 3)`, `pixel_values_videos`, `video_grid_thw`, and for Qwen2.5-VL `second_per_grid_ts`
            `(videos,)`.

        Raises:
            CocoaInputError: an input cannot be encoded, or its images alone exceed `max_length`; names its position.
            TypeError: `inputs` is one input instead of a list of inputs.
        """
        check_list(inputs)
        limit = self.max_length if max_length is None else _positive("max_length", max_length)
        prompt = self.prompt if prompt is None else prompt
        rows: list[dict[str, Tensor]] = []
        pending: list[Conversation] = []
        pixels = 0
        for conversation in self.read(inputs):
            pending.append(conversation)
            pixels += conversation.pixels(0, sys.maxsize)
            if pixels >= PIXELS_AT_ONCE:
                rows += self._encode_part(pending, len(rows), prompt, limit, add_special_tokens, device)
                pending, pixels = [], 0
                del conversation
                malloc_trim()(0)
        if pending:
            rows += self._encode_part(pending, len(rows), prompt, limit, add_special_tokens, device)
        return rows

    def _encode_part(
        self,
        conversations: Sequence[Conversation],
        first: int,
        prompt: str | None,
        limit: int,
        with_frame: bool,
        device: torch.device | str | None,
    ) -> list[dict[str, Tensor]]:
        """[`~CocoaProcessor.encode`] of some inputs, of which `first` is the position of the first."""
        features = self._call_stock(conversations, prompt, with_frame, device)
        images = _split_media(features, "pixel_values", "image_grid_thw", [len(c.images) for c in conversations])
        videos = _split_media(
            features, "pixel_values_videos", "video_grid_thw", [len(c.videos) for c in conversations]
        )
        rows = []
        for place, ids in enumerate(map(torch.tensor, features["input_ids"])):
            if ids[-1] != self.eos_token_id:
                raise CocoaInputError(f"its last token is not {EOS_TOKEN}: the tokenizer was changed.", first + place)
            if not with_frame:
                ids = ids[:-1]
            ids = self._truncate(ids, limit, first + place, has_eos=with_frame)
            types = (ids == self.image_token_id).long() + 2 * (ids == self.video_token_id).long()
            rows.append({"input_ids": ids, "mm_token_type_ids": types, **images[place], **videos[place]})
        return rows

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> BatchFeature:
        """
        Pad what [`~CocoaProcessor.encode`] gave to one batch, on the tokenizer's `padding_side`.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` and `mm_token_type_ids` of shape `(batch, tokens)`, media
            tensors of all rows one after another, and `num_images_per_sample` / `num_videos_per_sample` of shape
            `(batch,)` where there are any.

        Raises:
            ValueError: `encoded` is empty.
        """
        if not encoded:
            raise ValueError("There is nothing to collate; give at least one encoded input.")
        lengths = torch.tensor([len(row["input_ids"]) for row in encoded])
        columns = torch.arange(int(lengths.max()))
        if self.tokenizer.padding_side == "left":
            mask = columns >= (lengths.max() - lengths)[:, None]
        else:
            mask = columns < lengths[:, None]
        batch = {"input_ids": torch.full(mask.shape, self.pad_token_id), "attention_mask": mask.long()}
        batch["mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
        for key in ("input_ids", "mm_token_type_ids"):
            batch[key][mask] = torch.cat([row[key] for row in encoded])
        for key in MEDIA_KEYS:
            values = [row[key] for row in encoded if key in row]
            if values:
                batch[key] = torch.cat(values)
        for key, grid in (("num_images_per_sample", "image_grid_thw"), ("num_videos_per_sample", "video_grid_thw")):
            if grid in batch:
                batch[key] = torch.tensor([len(row.get(grid, ())) for row in encoded])
        return BatchFeature(batch)

    def _call_stock(
        self,
        conversations: Sequence[Conversation],
        prompt: str | None,
        with_header: bool = True,
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Render and tokenize with the stock processor, with neither padding nor truncation."""
        texts = self._render([c.messages for c in conversations], prompt)
        if not with_header:
            # Cut before tokenizing: a text that begins with a line break shares a token with the header's.
            texts = [text.partition("\n")[2] for text in texts]
        media: dict[str, Any] = {}
        if images := [image for c in conversations for image in c.images]:
            media["images"] = images
            media["images_kwargs"] = {"device": device}
        if videos := [video for c in conversations for video in c.videos]:
            metadata = [entry for c in conversations for entry in c.video_metadata]
            media["videos"] = videos
            media["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata, "device": device}
        options = {"padding": False, "truncation": False, "verbose": False}
        if not media:  # what the stock processor gives, without its search for images in each text
            return self.tokenizer(texts, **options)
        return self.processor(text=texts, text_kwargs=options, **media)

    def _render(self, conversations: Sequence[list[dict[str, Any]]], prompt: str | None) -> list[str]:
        """The chat template of conversations, filled in."""
        rendered: list[str | None] = []
        others: list[list[dict[str, Any]]] = []
        system = [{"role": "system", "content": [{"type": "text", "text": prompt}]}] if prompt else []
        for messages in conversations:
            texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
            if len(messages) > 1 or len(texts) != 1 or self._control_tokens.search(texts[0]):
                rendered.append(None)
                others.append(system + messages)
                continue
            # One text in which nothing has to be escaped: the template puts it last, as it is, behind what is the same
            # for all inputs of its form. That is worked out once, since the template takes half of the time of a text.
            media = [{"type": part["type"]} for part in messages[0]["content"] if part["type"] != "text"]
            form = (self.processor.chat_template, prompt, messages[0]["role"], *(part["type"] for part in media))
            if form not in self._frames:
                if len(self._frames) == FRAMES_KEPT:
                    self._frames.clear()
                message = {"role": messages[0]["role"], "content": [*media, {"type": "text", "text": ""}]}
                self._frames[form] = self.processor.apply_chat_template([*system, message], tokenize=False)
            rendered.append(self._frames[form] + texts[0])
        filled = iter(self.processor.apply_chat_template(others, tokenize=False) if others else [])
        return [next(filled) if text is None else text for text in rendered]

    def _truncate(self, ids: Tensor, limit: int, position: int, has_eos: bool) -> Tensor:
        """Drop the last text tokens, so that `limit` remain; those of media and the EOS stay."""
        excess = len(ids) - limit
        if excess <= 0:
            return ids
        droppable = (~torch.isin(ids[: len(ids) - has_eos], self._vision_ids)).nonzero()[:, 0]
        if excess > len(droppable):
            vision = len(ids) - has_eos - len(droppable)
            raise CocoaInputError(
                f"its images and videos take {vision} tokens, which {'with the EOS ' * has_eos}exceed "
                f"max_length={limit}; raise max_length, or lower max_pixels.",
                position,
            )
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[droppable[-excess:]] = False
        return ids[keep]


def is_text(item: Any) -> bool:
    """Whether an input is read as a text without a look at any file."""
    return isinstance(item, str) and media_kind(item) is None


def check_list(inputs: Any) -> None:
    """
    Raise `TypeError` where one input (or a table, whose columns Python would go through) was given instead of several:
    a list, or anything else that can be gone through, such as a Series, an array of objects or a generator.
    """
    is_one = isinstance(inputs, (str, bytes, bytearray, memoryview, Mapping, os.PathLike, Image.Image, ResizedImage))
    is_one = is_one or isinstance(inputs, torch.Tensor)
    is_one = is_one or (isinstance(inputs, np.ndarray) and (inputs.ndim != 1 or inputs.dtype.kind not in "OUS"))
    if is_one or hasattr(inputs, "columns") or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs must be a list of inputs; got one {type(inputs).__name__}. Put it in a list.")


@cache
def malloc_trim() -> Callable[[int], Any]:
    """
    glibc's function that gives freed memory back to the system; elsewhere one that does nothing. Between decoded
    photos small tensors are made that stay, so that the next photo does not fit where the last one was, and without it
    memory grows by 5 MiB a photo.
    """
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda pad: 0


def _split_media(features: BatchFeature, pixels: str, grid: str, counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """What each row has of the batch's images, or of its videos."""
    if grid not in features:
        return [{} for _ in counts]
    grids = torch.as_tensor(features[grid]).split(list(counts))
    values = torch.as_tensor(features[pixels]).split([int(row.prod(-1).sum()) for row in grids])
    rows = [{pixels: v, grid: g} if len(g) else {} for v, g in zip(values, grids, strict=True)]
    if grid == "video_grid_thw" and "second_per_grid_ts" in features:
        seconds = torch.as_tensor(features["second_per_grid_ts"], dtype=torch.float32).split(list(counts))
        for row, second in zip(rows, seconds, strict=True):
            if row:
                row["second_per_grid_ts"] = second
    return rows


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more; got {value!r}.")
    return value
