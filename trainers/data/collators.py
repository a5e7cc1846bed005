# SPDX-License-Identifier: Apache-2.0
"""From dataset rows to reconstruction batches: segments, masks and labels are decided here, once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from modeling_cocoa.attention import EOS, SOURCE, TARGET
from modeling_cocoa.inputs import CocoaInputError, input_parts
from modeling_cocoa.media import load_image
from modeling_cocoa.processing_cocoa import CocoaProcessor

from .masking import IGNORE_INDEX, check_ratios, choose, mask_text
from .rows import (
    NoTargetTextError,
    Part,
    fetch_image,
    is_pair,
    join_texts,
    open_images,
    parts_of,
    source_and_target,
)

DIRECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "image_to_text": (("image",), ("text",)),
    "text_to_image": (("text",), ("image",)),
    "text_to_text": (("text",), ("text",)),
    "image_to_image": (("image",), ("image",)),
    "both_to_both": (("image", "text"), ("image", "text")),
}
"""Bridge directions of rows of one side: what the source holds, what the target holds."""

DIRECTION_WEIGHTS = {name: 1.0 for name, (_, target) in DIRECTIONS.items() if target == ("text",)}
"""The directions that are trained where none are asked for: those whose target is a text, as in the authors' code."""

WARMUP = "warmup"

MEDIA = ("pixel_values", "pixel_labels", "image_grid_thw", "unit_mask")
"""What a segment holds of its images."""
DESCRIPTION = ("directions", "rows", "images_of_rows", "num_skipped")
"""What a batch says of itself, apart from the model's arguments."""


@dataclass
class Segment:
    """Source (with its EOS) or target of one row, as tensors."""

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    pixel_labels: Tensor | None = None
    image_grid_thw: Tensor | None = None
    unit_mask: Tensor | None = None


@dataclass
class Example:
    """
    One training row: `source · EOS`, and in the bridge a target. `direction` is one of [`DIRECTIONS`], [`WARMUP`], or
    for a pair `image_to_text`, `text_to_text` or `both_to_text`; `row` its number in the dataset.
    """

    direction: str
    source: Segment
    target: Segment | None = None
    row: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of source and target together."""
        return len(self.source.input_ids) + (0 if self.target is None else len(self.target.input_ids))


@dataclass
class ReconstructionCollator:
    """
    Turns rows, in any of the forms of [`~rows.parts_of`] and each with a `seed`, into the arguments of
    [`CocoaForReconstruction`].

    In the warm-up a row becomes one masked sequence. In the bridge, a pair's query is the source, encoded as the
    contrastive stage encodes it, and its positive's text the target (see [`~rows.source_and_target`]); for a row of
    one side a direction is drawn among those it can serve, in proportion to their weights. Every draw of a row comes
    from its `seed` alone, so neither the number of workers nor a resumed run changes what is masked.

    Args:
        processor ([`CocoaProcessor`]).
        image_size (`tuple[int, int]`, *optional*): Width and height that images are stretched to.
        on_bad_row (`"error"` or `"skip"`): What to do with a row that cannot be read. Skipped rows, and pairs without
            a text to rebuild, are counted in `num_skipped` of the batch.

        The others are options of [`CocoaReconstructionConfig`].

    Raises:
        ValueError: an option is out of range; a row cannot be read (names the row); no row of a batch can be read.
    """

    processor: CocoaProcessor
    stage: Literal["warmup", "bridge"] = "warmup"
    text_mask_ratio: float = 0.2
    image_mask_ratio: float = 0.5
    image_mask_fill: Literal["noise", "zeros"] = "noise"
    source_mask_ratio: float = 0.0
    target_mask_ratio: float = 0.7
    direction_weights: Mapping[str, float] = field(default_factory=lambda: dict(DIRECTION_WEIGHTS))
    image_size: tuple[int, int] | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        check_ratios(self)
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name} must be one of {get_args(hint)}; got {getattr(self, name)!r}.")
        unknown = sorted(set(self.direction_weights) - set(DIRECTIONS))
        if unknown or any(weight < 0 for weight in self.direction_weights.values()):
            raise ValueError(
                f"direction_weights takes weights of 0 or more for {list(DIRECTIONS)}; "
                f"got {dict(self.direction_weights)}."
            )
        if self.stage == "bridge" and not any(self.direction_weights.values()):
            raise ValueError("direction_weights are all 0: there is no direction to train.")
        tokenizer = self.processor.tokenizer
        # Around the content of a message: its header, and the EOS.
        self._frame = len(tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]) + 1
        self._start_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
        self._special = torch.tensor(sorted(set(tokenizer.get_added_vocab().values())))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of the rows; see [`CocoaForReconstruction.forward`] for its tensors."""
        read = [self.try_example(row) for row in rows]
        examples = [example for example, _ in read if example is not None]
        if not examples:
            raise ValueError(f"No row of this batch can be used; the first: {read[0][1]}")
        return {**self.collate(examples), "num_skipped": len(rows) - len(examples)}

    def try_example(self, row: Mapping[str, Any]) -> tuple[Example | None, str]:
        """The example of a row, or None and what is wrong with the row where it is skipped; see [`Example`]."""
        try:
            return self.example(row), ""
        except CocoaInputError as error:
            problem = f"row {row.get('index')} (the first is row 0): {error.reason}"
            if self.on_bad_row == "error" and not isinstance(error, NoTargetTextError):
                raise ValueError(f"Cannot train on {problem} Repair the row, or set on_bad_row='skip'.") from error
            return None, problem

    def example(self, row: Mapping[str, Any]) -> Example:
        """
        Choose a direction for one row, and its masks.

        Raises:
            NoTargetTextError: it is a pair without a text to rebuild.
            CocoaInputError: the row has neither image nor text, or one that cannot be read, or nothing to mask.
        """
        generator = np.random.default_rng(row["seed"])
        if self.stage == "bridge" and is_pair(row):
            return self._pair_example(row, generator)
        parts = parts_of(row)
        if self.stage == "bridge":
            direction = self._draw_direction({part["type"] for part in parts}, generator)
            return self._direction_example(direction, parts, row, generator)
        ratios = {"text_ratio": self.text_mask_ratio, "image_ratio": self.image_mask_ratio}
        source = self._segment(self._encode_parts(parts), generator, **ratios)
        return checked(Example(WARMUP, source, row=row.get("index")))

    def check(self, row: Mapping[str, Any]) -> None:
        """
        Make every example that a row can become, reading all of its parts.

        Raises:
            CocoaInputError: it cannot be trained on.
        """
        if self.stage == "warmup" or is_pair(row):
            self.example(row)
            return
        parts = parts_of(row)
        for part in parts:
            if part["type"] == "image":
                part["image"] = load_image(fetch_image(part["image"]), self.image_size)
        generator = np.random.default_rng(row["seed"])
        for direction in self._possible_directions({part["type"] for part in parts}):
            self._direction_example(direction, parts, row, generator)

    def _pair_example(self, row: Mapping[str, Any], generator: np.random.Generator) -> Example:
        source, text = source_and_target(row)
        encoded_source = self._encode(source)
        encoded_target = self._encode({"text": text}, max_length=sys.maxsize, add_special_tokens=False)
        length = len(encoded_target["input_ids"])
        if length > self.processor.max_length:
            raise CocoaInputError(
                f"the text to rebuild has {length} tokens, more than max_length={self.processor.max_length}; raise "
                "max_length, or shorten the text."
            )
        kinds = {part["type"] for part in input_parts(source)}
        direction = f"{'both' if len(kinds) > 1 else kinds.pop()}_to_text"
        return self._bridge_example(direction, encoded_source, encoded_target, row, generator)

    def _direction_example(
        self, direction: str, parts: list[Part], row: Mapping[str, Any], generator: np.random.Generator
    ) -> Example:
        source, target = (choose_parts(parts, kinds) for kinds in DIRECTIONS[direction])
        encoded_target = self._encode_parts(target, add_special_tokens=False)
        return self._bridge_example(direction, self._encode_parts(source), encoded_target, row, generator)

    def _bridge_example(
        self,
        direction: str,
        encoded_source: Mapping[str, Tensor],
        encoded_target: Mapping[str, Tensor],
        row: Mapping[str, Any],
        generator: np.random.Generator,
    ) -> Example:
        source = self._segment(encoded_source, generator, text_ratio=self.source_mask_ratio)
        target = self._segment(encoded_target, generator, text_ratio=self.target_mask_ratio, image_ratio=1.0)
        return checked(Example(direction, source, target, row.get("index")))

    def count_tokens(self, image: int, text: int, is_pair: int, seed: Any) -> int:
        """Tokens of the example that a row becomes, before it is cut to `max_length`; see [`count_row_tokens`]."""
        of = {name: count for name, count in (("image", image), ("text", text)) if count}
        if self.stage == "warmup" or is_pair or not of:
            return self._frame + sum(of.values())
        try:
            source, target = DIRECTIONS[self._draw_direction(set(of), np.random.default_rng(seed))]
        except CocoaInputError:
            return self._frame
        return self._frame + sum(of[kind] for kind in (*source, *target))

    def _draw_direction(self, kinds: set[str], generator: np.random.Generator) -> str:
        possible = self._possible_directions(kinds)
        total = sum(possible.values())
        return str(generator.choice(list(possible), p=[weight / total for weight in possible.values()]))

    def _possible_directions(self, kinds: set[str]) -> dict[str, float]:
        """Those that a row with such parts can serve, with their weights."""
        possible = {
            name: self.direction_weights[name]
            for name, (source, target) in DIRECTIONS.items()
            if set(source) | set(target) <= kinds and self.direction_weights.get(name)
        }
        if not possible:
            raise CocoaInputError(f"it has only {sorted(kinds)}, which no direction with a weight above 0 can use.")
        return possible

    def _encode(self, item: Any, **options: Any) -> dict[str, Tensor]:
        """An input of any form, encoded with the `options` of the processor's `preprocess`."""
        return self.processor.preprocess([open_images(item, self.image_size)], prompt="", **options)[0]

    def _encode_parts(self, parts: list[Part], **options: Any) -> dict[str, Tensor]:
        """The parts as one message."""
        return self._encode([{"role": "user", "content": parts}], **options)

    def _is_template(self, ids: Tensor) -> Tensor:
        """Which tokens the chat template wrote: special ones, roles, and the line breaks around them."""
        is_special = torch.isin(ids, self._special)
        is_template = is_special.clone()
        for start in (ids == self._start_id).nonzero()[:, 0].tolist():
            if start and not is_special[start - 1]:
                is_template[start - 1] = True  # the line break behind the message before
            for place in range(start + 1, len(ids)):
                if is_special[place]:
                    break
                is_template[place] = True
                # The last token of a header, which may hold line breaks of the text as well.
                if "\n" in self.processor.tokenizer.decode(ids[place]):
                    break
        return is_template

    def _segment(
        self,
        encoded: Mapping[str, Tensor],
        generator: np.random.Generator,
        *,
        text_ratio: float,
        image_ratio: float | None = None,
    ) -> Segment:
        ids = encoded["input_ids"]
        masked_ids, labels = mask_text(
            ids, ~self._is_template(ids), text_ratio, self.processor.mask_token_id, generator
        )
        segment = Segment(masked_ids, labels)
        if "pixel_values" in encoded:
            pixels, grid = encoded["pixel_values"], encoded["image_grid_thw"]
            segment.image_grid_thw, segment.pixel_labels = grid, pixels
            patches_per_unit = self.processor.image_processor.merge_size**2
            units = pixels.shape[0] // patches_per_unit
            segment.unit_mask = (
                choose(units, image_ratio, generator) if image_ratio else torch.zeros(units, dtype=torch.bool)
            )
            fill = torch.zeros(pixels.shape[1])
            if self.image_mask_fill == "noise":
                fill = torch.from_numpy(generator.standard_normal(pixels.shape[1], dtype=np.float32))
            hidden = segment.unit_mask.repeat_interleave(patches_per_unit)
            segment.pixel_values = torch.where(hidden[:, None], fill.to(pixels), pixels)
        return segment

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Pad examples (on the right) into one batch."""
        width = max(example.tokens for example in examples)
        device = examples[0].source.input_ids.device
        input_ids = torch.full((len(examples), width), self.processor.pad_token_id, device=device)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        segment_ids = torch.zeros_like(input_ids)
        images: list[tuple[Segment, bool]] = []
        for row, example in enumerate(examples):
            end = len(example.source.input_ids)
            input_ids[row, :end], labels[row, :end] = example.source.input_ids, example.source.labels
            segment_ids[row, :end] = SOURCE
            segment_ids[row, end - 1] = EOS
            images.append((example.source, False))
            if example.target is not None:
                stop = end + len(example.target.input_ids)
                input_ids[row, end:stop], labels[row, end:stop] = example.target.input_ids, example.target.labels
                segment_ids[row, end:stop] = TARGET
                images.append((example.target, True))
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": (segment_ids != 0).long(),
            "segment_ids": segment_ids,
            "labels": labels,
            "directions": [example.direction for example in examples],
            "rows": [example.row for example in examples],
            "images_of_rows": torch.tensor(
                [[count_images(example.source), count_images(example.target)] for example in examples]
            ),
        }
        images = [(segment, is_target) for segment, is_target in images if segment.pixel_values is not None]
        if images:
            for name in MEDIA:
                batch[name] = torch.cat([getattr(segment, name) for segment, _ in images])
            batch["image_is_target"] = torch.tensor(
                [is_target for segment, is_target in images for _ in segment.image_grid_thw], device=device
            )
        return batch


def model_arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of [`CocoaForReconstruction`] in a batch."""
    return {name: value for name, value in batch.items() if name not in DESCRIPTION}


def choose_parts(parts: list[Part], kinds: Sequence[str]) -> list[Part]:
    """The parts of some kinds, in their order; texts that become neighbours are joined."""
    return join_texts(part for part in parts if part["type"] in kinds)


def checked(example: Example) -> Example:
    """The same example; raises [`CocoaInputError`] where nothing of what it has to rebuild is masked."""
    segment = example.source if example.target is None else example.target
    if not bool((segment.labels != IGNORE_INDEX).any()) and not (
        segment.unit_mask is not None and bool(segment.unit_mask.any())
    ):
        raise CocoaInputError(
            "nothing in it can be masked: its text has no tokens of its own left within max_length, and it has no "
            "image to rebuild."
        )
    return example


def count_images(segment: Segment | None) -> int:
    """Images of a segment."""
    return 0 if segment is None or segment.image_grid_thw is None else len(segment.image_grid_thw)


def split_batch(batch: Mapping[str, Any]) -> list[Example]:
    """The examples that [`ReconstructionCollator.collate`] made a batch of."""
    counts = batch["images_of_rows"].flatten().tolist()  # of a source and a target in turn
    media: list[dict[str, Tensor]] = [{} for _ in counts]
    if "image_grid_thw" in batch:
        grids = batch["image_grid_thw"].split(counts)
        patches = [int(grid.prod(-1).sum()) for grid in grids]
        merged = len(batch["pixel_labels"]) // len(batch["unit_mask"])
        pixels, labels = batch["pixel_values"].split(patches), batch["pixel_labels"].split(patches)
        masks = batch["unit_mask"].split([number // merged for number in patches])
        found = zip(pixels, labels, grids, masks, strict=True)
        media = [dict(zip(MEDIA, own, strict=True)) if count else {} for own, count in zip(found, counts, strict=True)]
    examples = []
    for row, segment_ids in enumerate(batch["segment_ids"]):
        is_target = segment_ids == TARGET
        source, target = (
            Segment(batch["input_ids"][row][places], batch["labels"][row][places], **media[2 * row + number])
            for number, places in enumerate(((segment_ids == SOURCE) | (segment_ids == EOS), is_target))
        )
        target = target if is_target.any() else None
        examples.append(Example(batch["directions"][row], source, target, batch["rows"][row]))
    return examples


def swap_sources(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """
    The examples that share their direction with another one, and the same examples with that one's source: what their
    targets lose by it is what their own EOS carries.
    """
    by_direction: dict[str, list[Example]] = {}
    for example in examples:
        if example.target is not None:
            by_direction.setdefault(example.direction, []).append(example)
    kept, swapped = [], []
    for members in by_direction.values():
        if len(members) > 1:
            kept += members
            others = [*members[1:], members[0]]
            swapped += [replace(own, source=other.source) for own, other in zip(members, others, strict=True)]
    return kept, swapped


def rows_of_units(batch: Mapping[str, Any]) -> Tensor:
    """The row of each predicted image unit, in the order of `unit_mask.nonzero()`."""
    patches = batch["image_grid_thw"].prod(-1)
    merged = len(batch["pixel_labels"]) // len(batch["unit_mask"])
    counts = batch["images_of_rows"].sum(1)
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return rows.to(patches.device).repeat_interleave(patches // merged)[batch["unit_mask"]]
