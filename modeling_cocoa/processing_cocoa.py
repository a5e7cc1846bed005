# SPDX-License-Identifier: Apache-2.0
"""`CocoaProcessor`: inputs of any kind to tensors, the EOS last."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.video_utils import VideoMetadata

from .auto import BACKBONES, PROCESSOR_CLASSES
from .chat_template import PROCESSOR_PLACEHOLDER, build_chat_template
from .inputs import CocoaInputError, Conversation, check_list, read_input
from .media import load_images, media_kind, read_videos
from .modeling_cocoa import CocoaModelMixin
from .threads import map_ahead

logger = logging.getLogger(__name__)

EOS_TOKEN = "<|im_end|>"
MASK_TOKEN = "<|mask|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MEDIA_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")

HEADERS_KEPT = 1000
"""Kinds of inputs, each with its prompt, of which what the chat template writes in front of the text is kept."""
TIMESTAMP = re.compile(r"<\d+\.\d seconds>")
"""What Qwen3-VL's processor writes before each frame of a video."""
READ_AHEAD = 8
"""Inputs that threads read beyond the one that is asked for: photos, decoded, are large."""
PIXELS_AT_ONCE = 2**22
"""Pixels of decoded images and frames from which patches are made of them, so that few are in memory at once."""

__all__ = ["CocoaInputError", "CocoaProcessor"]


class CocoaProcessor(ProcessorMixin):
    """
    Turns texts, images, videos and conversations into the tensors of a CoCoA model.

    Wraps a stock processor and prepares it: adds the token `<|mask|>`, sets the chat template, and lets the tokenizer
    close each input with the EOS. All of it lives in the stock processor's own files, so whoever loads the saved
    folder with `AutoProcessor` or sentence-transformers gets the same ids.

    Args:
        processor (`ProcessorMixin`): Of Qwen2-VL, Qwen2.5-VL or Qwen3-VL; changed in place.
        min_pixels (`int`, *optional*): Pixels to which a smaller image is scaled up, and in Qwen2-VL and Qwen2.5-VL a
            video frame; by default as saved. Qwen3-VL limits all frames of a video together, by its
            `video_processor.size`.
        max_pixels (`int`, *optional*): Pixels to which a larger one is scaled down; by default as saved.
        max_length (`int`, *optional*): Tokens of an input with its EOS; by default as saved.
        prompt (`str`, *optional*): Instruction put in front of every input as a system message. Not saved.

    Raises:
        ValueError: the processor is of another kind or lacks a special token of Qwen2-VL; a size is out of range.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
    ) -> None:
        if not isinstance(processor, tuple(PROCESSOR_CLASSES.values())):
            kinds = " or ".join(kind.__name__ for kind in PROCESSOR_CLASSES.values())
            raise ValueError(
                f"CocoaProcessor wraps a {kinds}; got {type(processor).__name__}. Load it from a Qwen-VL or CoCoA "
                "checkpoint."
            )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.video_processor = processor.video_processor
        self.prompt = prompt
        self._prepare_tokenizer()
        super().__init__(chat_template=processor.chat_template)
        self._set_pixels(min_pixels, max_pixels)
        if getattr(self.video_processor, "cap_pixels_per_frame", False) is None:
            # Set explicitly, because transformers is about to change what leaving it out means.
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
        Load from a CoCoA checkpoint, or from a generative Qwen-VL checkpoint.

        Args:
            name_or_path (`str` or `os.PathLike`): Folder, or name on the Hub.
            min_pixels (`int`, *optional*): See the class, as for the next three.
            max_pixels (`int`, *optional*): See the class.
            max_length (`int`, *optional*): See the class.
            prompt (`str`, *optional*): See the class.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like of
                [`~transformers.AutoProcessor.from_pretrained`].

        Raises:
            ValueError: the checkpoint has another kind of processor.
        """
        processor = AutoProcessor.from_pretrained(name_or_path, **hub_kwargs)
        return cls(processor, min_pixels=min_pixels, max_pixels=max_pixels, max_length=max_length, prompt=prompt)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """
        Write the stock processor's files; the prompt is not among them. See
        [`~transformers.ProcessorMixin.save_pretrained`].
        """
        # The backend keeps the padding and truncation of its last call and would save them.
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        return self.processor.save_pretrained(save_directory, **kwargs)

    def _prepare_tokenizer(self) -> None:
        """Add and check special tokens, and set the chat template, the EOS and the side that is truncated."""
        tokenizer = self.tokenizer
        added = tokenizer.get_added_vocab()
        missing = [token for token in (EOS_TOKEN, "<|im_start|>", *VISION_TOKENS) if token not in added]
        if missing:
            raise ValueError(f"The tokenizer lacks the special tokens {missing} of Qwen2-VL; load one that has them.")
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no pad token; set tokenizer.pad_token (Qwen's is <|endoftext|>).")
        if MASK_TOKEN not in added:
            tokenizer.add_tokens([AddedToken(MASK_TOKEN, special=True, normalized=False)], special_tokens=True)
        tokenizer.eos_token = EOS_TOKEN
        tokenizer.truncation_side = "right"
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_id, self.mask_token_id = tokenizer.convert_tokens_to_ids([EOS_TOKEN, MASK_TOKEN])
        self.image_token_id = self.processor.image_token_id
        self.video_token_id = self.processor.video_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {EOS_TOKEN}", pair=f"$A $B {EOS_TOKEN}", special_tokens=[(EOS_TOKEN, self.eos_token_id)]
        )
        control_tokens = sorted({*tokenizer.get_added_vocab(), PROCESSOR_PLACEHOLDER})
        template = build_chat_template(control_tokens, self.backbone_class.has_timestamps)
        self.processor.chat_template = tokenizer.chat_template = template
        self._control_tokens = re.compile("|".join(map(re.escape, control_tokens)))
        self._headers: dict[tuple[str | None, ...], str] = {}
        self._vision_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)))

    def _set_pixels(self, min_pixels: int | None, max_pixels: int | None) -> None:
        given = {"shortest_edge": ("min_pixels", min_pixels), "longest_edge": ("max_pixels", max_pixels)}
        changed = {edge: _positive(*value) for edge, value in given.items() if value[1] is not None}
        parts = [self.image_processor]
        if not self.backbone_class.has_timestamps:
            parts.append(self.video_processor)
        for part in parts if changed else ():
            size = {"shortest_edge": part.size["shortest_edge"], "longest_edge": part.size["longest_edge"], **changed}
            if size["shortest_edge"] > size["longest_edge"]:
                raise ValueError(
                    f"min_pixels ({size['shortest_edge']}) is above max_pixels ({size['longest_edge']}) for the "
                    f"{type(part).__name__}; give both."
                )
            part.size = type(part.size)(**size)

    @property
    def backbone_class(self) -> type[CocoaModelMixin]:
        """The class of the models that read what this processor gives."""
        return next(BACKBONES[kind] for kind, cls in PROCESSOR_CLASSES.items() if isinstance(self.processor, cls))

    @property
    def token_pixels(self) -> int:
        """Pixels of an image that make one token."""
        return (self.image_processor.patch_size * self.image_processor.merge_size) ** 2

    @property
    def max_length(self) -> int:
        """Tokens of an input, the EOS among them, beyond which text is cut."""
        return self.tokenizer.model_max_length

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of a batch."""
        return self.processor.model_input_names

    def __call__(
        self,
        inputs: Sequence[Any] | None = None,
        *,
        text: str | list[str] | None = None,
        images: Any = None,
        videos: Any = None,
        prompt: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Tensors of a batch, from inputs of any kind or as [`~transformers.Qwen2VLProcessor`] takes them:

        ```python
        batch = processor(["a red apple", "cat.png", {"text": "a cat", "image": image}])

        text = processor.apply_chat_template(messages)
        batch = processor(text=[text], images=[image], return_tensors="pt")
        ```

        Both end each input with the EOS, and read images and videos in the same way ([`~media.load_image`],
        [`~media.read_video`]).

        Args:
            inputs (`Sequence`): As in [`~CocoaProcessor.preprocess`]; padded by [`~CocoaProcessor.collate`].
            text (`str` or `list[str]`, *optional*): Filled chat templates, instead of inputs. Special tokens in them
                are special.
            images, videos (*optional*): Of all texts, in their order; lists of one text's may be nested in a list.
            prompt (`str`, *optional*): Instruction for these inputs instead of the processor's own; `""` for none.
            kwargs: With inputs, `max_length` (`int`, *optional*) of [`~CocoaProcessor.preprocess`]; with text, images
                or videos, the options of [`~transformers.Qwen2VLProcessor`] (`padding`, `return_tensors`, ...).

        Raises:
            CocoaInputError: an input, an image or a video cannot be read; names its position.
            TypeError: `inputs` is one input instead of a list of inputs, or comes with text, images or videos.
        """
        if text is None and images is None and videos is None:
            return self.collate(self.preprocess(inputs, prompt=prompt, **kwargs))
        if inputs is not None or prompt is not None:
            raise TypeError("Give inputs (and a prompt), or text, images and videos; not both.")
        return self._call_stock(text, load_images(images), read_videos(videos, self.video_processor), **kwargs)

    def read(
        self, inputs: Iterable[Any], pool: Executor | None = None, keep_errors: bool = False
    ) -> Iterator[Conversation | CocoaInputError]:
        """
        Check inputs and load their images and videos, one by one as they are asked for. The first bare str that ends
        like an image or a video file and is none is logged as a warning, since it is read as a text.

        Args:
            inputs (`Iterable`): As in [`~CocoaProcessor.preprocess`].
            pool (`Executor`, *optional*): Threads that read [`READ_AHEAD`] inputs ahead.
            keep_errors (`bool`, defaults to `False`): Give the error in the place of an input that cannot be read.

        Raises:
            CocoaInputError: an input cannot be read; names its position.
        """

        def read_one(numbered: tuple[int, Any]) -> Conversation | CocoaInputError:
            try:
                conversation = read_input(numbered[1], self.video_processor)
            except CocoaInputError as error:
                if keep_errors:
                    return error
                raise CocoaInputError(error.reason, numbered[0]) from error
            if pool is not None:
                conversation.digest  # noqa: B018 - computed here, in the thread, and kept
            return conversation

        def is_text(numbered: tuple[int, Any]) -> bool:
            return isinstance(numbered[1], str) and media_kind(numbered[1]) is None

        numbered = enumerate(inputs)
        read = map(read_one, numbered) if pool is None else map_ahead(pool, read_one, numbered, READ_AHEAD, is_text)
        has_warned = False
        for position, conversation in enumerate(read):
            if not has_warned and getattr(conversation, "missing_file", ""):
                has_warned = True
                logger.warning(
                    'Item %d is embedded as the words of its path: %s For a text, pass {"text": ...}, which is never '
                    "read as a path. Other such items of this call are not named.",
                    position,
                    conversation.missing_file,
                )
            yield conversation

    def preprocess(
        self,
        inputs: Iterable[Any],
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        device: torch.device | str | None = None,
    ) -> list[dict[str, Tensor]]:
        """
        Token ids and pixels of a list of inputs, without padding. Images become patches a few at a time, so that few
        are held decoded.

        Args:
            inputs (`Iterable`): Each a text, an image (PIL, path, bytes or array, see [`~media.load_image`]), a dict
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
        make_tensors = partial(
            self.make_tensors,
            prompt=prompt,
            max_length=max_length,
            add_special_tokens=add_special_tokens,
            device=device,
        )
        rows: list[dict[str, Tensor]] = []
        pending: dict[int, Conversation] = {}
        pixels = 0
        for position, conversation in enumerate(self.read(inputs)):
            pending[position] = conversation
            pixels += conversation.pixels()
            if pixels >= PIXELS_AT_ONCE:
                rows += make_tensors(pending)
                pending, pixels = {}, 0
                del conversation
                malloc_trim()(0)
        return rows + make_tensors(pending)

    def encode(self, *args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
        """Former name of [`~CocoaProcessor.preprocess`], for one release."""
        warnings.warn("CocoaProcessor.encode is now called preprocess.", FutureWarning, stacklevel=2)
        return self.preprocess(*args, **kwargs)

    def make_tensors(
        self,
        conversations: Mapping[int, Conversation],
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        device: torch.device | str | None = None,
    ) -> list[dict[str, Tensor]]:
        """[`~CocoaProcessor.preprocess`] of inputs that were read, by their positions, which errors name."""
        limit = self.max_length if max_length is None else _positive("max_length", max_length)
        if not conversations:
            return []
        read = list(conversations.values())
        if not add_special_tokens:
            prompt = ""  # content alone
        elif prompt is None:
            prompt = self.prompt
        texts = self._render([conversation.messages for conversation in read], prompt)
        if not add_special_tokens:
            # Cut before tokenizing: a text that begins with a line break shares a token with the header's.
            texts = [text.partition("\n")[2] for text in texts]
        images = [image for conversation in read for image in conversation.images]
        videos = [video for conversation in read for video in conversation.videos]
        options = {"padding": False, "truncation": False, "verbose": False}
        if images or videos:
            media_kwargs = {"images_kwargs": {"device": device}, "videos_kwargs": {"device": device}}
            features = self._call_stock(texts, images, videos, text_kwargs=options, **media_kwargs)
        else:  # what the stock processor gives, without its search for images in each text
            features = self.tokenizer(texts, **options)
        all_ids = map(torch.tensor, features["input_ids"])
        rows = []
        for position, ids, media in zip(conversations, all_ids, _split_media(features, read), strict=True):
            if ids[-1] != self.eos_token_id:
                raise CocoaInputError(f"its last token is not {EOS_TOKEN}: the tokenizer was changed.", position)
            ids = self._truncate(ids if add_special_tokens else ids[:-1], limit, position, has_eos=add_special_tokens)
            types = (ids == self.image_token_id).long() + 2 * (ids == self.video_token_id).long()
            rows.append({"input_ids": ids, "mm_token_type_ids": types, **media})
        return rows

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> BatchFeature:
        """
        Pad what [`~CocoaProcessor.preprocess`] gave to one batch, on the tokenizer's `padding_side`.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` and `mm_token_type_ids` of shape `(batch, tokens)`, media
            tensors of all rows one after another, and `num_images_per_sample` / `num_videos_per_sample` of shape
            `(batch,)` where there are any.

        Raises:
            ValueError: `rows` is empty.
        """
        if not rows:
            raise ValueError("There is nothing to collate; give at least one encoded input.")
        pad = partial(pad_sequence, batch_first=True, padding_side=self.tokenizer.padding_side)
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids]),
            "mm_token_type_ids": pad([row["mm_token_type_ids"] for row in rows]),
        }
        for key in MEDIA_KEYS:
            values = [row[key] for row in rows if key in row]
            if values:
                batch[key] = torch.cat(values)
        for key, grid in (("num_images_per_sample", "image_grid_thw"), ("num_videos_per_sample", "video_grid_thw")):
            if grid in batch:
                batch[key] = torch.tensor([len(row.get(grid, ())) for row in rows])
        return BatchFeature(batch)

    def _call_stock(
        self,
        text: str | list[str] | None,
        images: list[Image.Image],
        videos: list[tuple[np.ndarray, VideoMetadata]],
        **options: Any,
    ) -> BatchFeature:
        """The stock processor's call, on images and videos that were loaded."""
        if images:
            options["images"] = images
        if videos:
            frames, metadata = map(list, zip(*videos, strict=True))
            sampled = {"video_metadata": metadata, "do_sample_frames": False}
            options |= {"videos": frames, "videos_kwargs": {**options.get("videos_kwargs", {}), **sampled}}
        return self.processor(text=text, **options)

    def _render(self, conversations: Sequence[list[dict[str, Any]]], prompt: str | None) -> list[str]:
        """The chat template of conversations, filled in."""
        system = [{"role": "system", "content": [{"type": "text", "text": prompt}]}] if prompt else []
        rendered: list[str] = []
        for messages in conversations:
            role, content = messages[0]["role"], messages[0]["content"]
            texts = [part["text"] for part in content if part["type"] == "text"]
            if len(messages) > 1 or len(texts) > 1 or self._control_tokens.search("".join(texts)):
                rendered.append(self.processor.apply_chat_template([*system, *messages], tokenize=False))
                continue
            # At most one text, without a control token: the template puts it last, as it is, behind a header that is
            # the same for all inputs of its kind, and kept, since the template takes half of the time of a text.
            media = [part["type"] for part in content if part["type"] != "text"]
            kind = (self.processor.chat_template, prompt, role, *media)
            if kind not in self._headers:
                if len(self._headers) == HEADERS_KEPT:
                    self._headers.clear()
                parts = [*({"type": name} for name in media), {"type": "text", "text": ""}]
                message = {"role": role, "content": parts}
                self._headers[kind] = self.processor.apply_chat_template([*system, message], tokenize=False)
            rendered.append(self._headers[kind] + "".join(texts))
        return rendered

    def _truncate(self, ids: Tensor, limit: int, position: int, has_eos: bool) -> Tensor:
        """Drop the last text tokens, so that `limit` remain; those of media and the EOS stay."""
        excess = len(ids) - limit
        if excess <= 0:
            return ids
        is_media = torch.isin(ids[: len(ids) - has_eos], self._vision_ids)
        for frame in (ids == self._vision_ids[0]).nonzero()[:, 0].tolist():
            before = next(
                (n for n in range(1, 16) if TIMESTAMP.fullmatch(self.tokenizer.decode(ids[frame - n : frame]))), 0
            )
            is_media[frame - before : frame] = True
        droppable = (~is_media).nonzero()[:, 0]
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


def _split_media(features: Mapping[str, Any], conversations: Sequence[Conversation]) -> list[dict[str, Tensor]]:
    """What each conversation has of the features of all images and videos."""
    rows: list[dict[str, Tensor]] = [{} for _ in conversations]
    images = [len(conversation.images) for conversation in conversations]
    videos = [len(conversation.videos) for conversation in conversations]
    for grid, pixels, counts in (
        ("image_grid_thw", "pixel_values", images),
        ("video_grid_thw", "pixel_values_videos", videos),
    ):
        if grid in features:
            grids = torch.as_tensor(features[grid]).split(counts)
            values = torch.as_tensor(features[pixels]).split([int(part.prod(-1).sum()) for part in grids])
            for row, *parts in zip(rows, values, grids, strict=True):
                row.update(zip((pixels, grid), parts, strict=True) if len(parts[1]) else ())
    if "second_per_grid_ts" in features:
        seconds = torch.as_tensor(features["second_per_grid_ts"], dtype=torch.float32).split(videos)
        for row, part in zip(rows, seconds, strict=True):
            row.update({"second_per_grid_ts": part} if len(part) else {})
    return rows


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more; got {value!r}.")
    return value
