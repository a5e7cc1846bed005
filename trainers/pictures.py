# SPDX-License-Identifier: Apache-2.0
"""What a model rebuilds, to look at: a grid of images, and the texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from modeling_cocoa.attention import TARGET
from modeling_cocoa.files import atomic_write
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.reconstruction import ReconstructionOutput

from .data.collators import rows_of_units
from .data.masking import IGNORE_INDEX

COLUMNS = ("original", "what was masked", "rebuilt", "untrained decoder")
"""The last one where it is known what an untrained decoder makes of the same states."""
SIDE = 128
"""Pixels to which the longer side of an image is scaled."""
LINE = 18
"""Pixels of a line of writing."""
GREY = 0.5
"""Value of masked patches, on a scale from 0 to 1."""
CONTRAST = 0.2
"""On the same scale, what one standard deviation of a patch is drawn as where the model predicts only its pattern."""
FOOTNOTE = "Only the pattern of each patch is predicted: drawn around grey, at one contrast."
FOLDER = "reconstructions"
"""In a run's output folder: what was rebuilt at each evaluation."""


def draw_pictures(
    batch: Mapping[str, Any],
    output: ReconstructionOutput,
    processor: CocoaProcessor,
    *,
    normalized: bool,
    untrained: Tensor | None = None,
) -> Image.Image | None:
    """
    A grid of the images of a batch that were masked: original, what was masked, rebuilt. `None` where there is none.

    `normalized` says that the model predicts patches at zero mean and unit variance; see [`split_rows`]. `untrained`,
    like `output.pixels`, is what an untrained decoder makes of the same states, for a fourth column.
    """
    if output.pixels is None:
        return None
    rows = dict.fromkeys(rows_of_units(batch).tolist())
    versions = list(split_rows(batch, output, processor, normalized))
    columns = COLUMNS[:3]
    if untrained is not None:
        columns = COLUMNS
        drawn = split_rows(batch, ReconstructionOutput(pixels=untrained), processor, normalized)
        versions = [(*own, other[2]) for own, other in zip(versions, drawn, strict=True)]
    lines = [
        (f"{batch['directions'][row]}, row {batch['rows'][row]}", pictures)
        for row, pictures in zip(rows, versions, strict=True)
    ]
    tall = [max(picture.height for picture in pictures) + LINE for _, pictures in lines]
    wide = max(picture.width for _, pictures in lines for picture in pictures) + 8
    footnotes = [FOOTNOTE] if normalized else []
    width = max(len(columns) * wide, len(columns) * SIDE)
    grid = Image.new("RGB", (width, sum(tall) + LINE * (1 + len(footnotes))), "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(columns):
        draw.text((column * wide + 2, 3), title, fill="black")
    top = LINE
    for (title, pictures), height in zip(lines, tall, strict=True):
        draw.text((2, top + 3), title, fill="#666666")
        for column, picture in enumerate(pictures):
            grid.paste(picture, (column * wide + 2, top + LINE))
        top += height
    for footnote in footnotes:
        draw.text((2, top + 3), footnote, fill="#666666")
    return grid


def split_rows(
    batch: Mapping[str, Any], output: ReconstructionOutput, processor: CocoaProcessor, normalized: bool
) -> Iterator[tuple[Image.Image, ...]]:
    """
    The first masked image of each row: original, masked, rebuilt.

    What is rebuilt is what the model knows, and nothing of the original: where it predicts patches at zero mean and
    unit variance (`normalized`), each is drawn around mid-grey at one contrast.
    """
    settings = processor.image_processor
    units, grids = batch["unit_mask"], batch["image_grid_thw"]
    originals = batch["pixel_labels"].float().view(len(units), -1, batch["pixel_labels"].shape[1])
    mean, std = (torch.tensor(part, device=originals.device) for part in (settings.image_mean, settings.image_std))
    values = originals.shape[-1] // len(mean)
    grey = ((GREY - mean) / std).repeat_interleave(values)
    pixels = output.pixels.to(originals)
    if normalized:
        pixels = grey + pixels * (CONTRAST / std).repeat_interleave(values)
    rebuilt = originals.clone()
    rebuilt[units] = pixels
    masked = torch.where(units[:, None, None], grey, originals)
    sizes = (grids.prod(-1) // settings.merge_size**2).tolist()
    parts = zip(*(values.split(sizes) for values in (originals, masked, rebuilt)), units.split(sizes), strict=True)
    owners = torch.arange(len(batch["rows"])).repeat_interleave(batch["images_of_rows"].sum(1).cpu()).tolist()
    done = set()
    for row, grid, (*versions, hidden) in zip(owners, grids.tolist(), parts, strict=True):
        if row not in done and bool(hidden.any()):
            done.add(row)
            yield tuple(scaled(to_image(version, grid, settings)) for version in versions)


def to_image(units: Tensor, grid: list[int], settings: Any) -> Image.Image:
    """
    The first frame of an image from its units `(units, patches a unit, values)`, as the stock image processor
    (`settings`) orders them; `grid` is its patches in time, height, width.
    """
    merge, patch = settings.merge_size, settings.patch_size
    height, width = grid[1] // merge, grid[2] // merge
    values = units.reshape(grid[0], height, width, merge, merge, -1, settings.temporal_patch_size, patch, patch)[0]
    pixels = values[..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4).reshape(grid[1] * patch, grid[2] * patch, -1)
    mean, std = (torch.tensor(part, device=pixels.device) for part in (settings.image_mean, settings.image_std))
    pixels = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())


def scaled(image: Image.Image) -> Image.Image:
    """The image with its longer side [`SIDE`] pixels long."""
    method = Image.Resampling.NEAREST if max(image.size) < SIDE else Image.Resampling.BILINEAR
    return ImageOps.contain(image, (SIDE, SIDE), method)


def list_texts(
    batch: Mapping[str, Any], output: ReconstructionOutput, processor: CocoaProcessor
) -> list[dict[str, str]]:
    """
    The masked texts of a batch: which one (`row`), as it is (`original`), with `_` for each masked token (`masked`),
    and with the likeliest tokens (`rebuilt`).
    """
    if output.token_predictions is None:
        return []
    labels = batch["labels"]
    hidden = labels != IGNORE_INDEX
    rebuilt = batch["input_ids"].clone()
    rebuilt[hidden] = output.token_predictions
    original = torch.where(hidden, labels, batch["input_ids"])
    special = torch.tensor(sorted(set(processor.tokenizer.get_added_vocab().values())), device=labels.device)
    header = len(processor.tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"])
    is_content = ~torch.isin(original, special)
    is_content[:, :header] = False
    found = []
    for row, direction in enumerate(batch["directions"]):
        segments = batch["segment_ids"][row]
        for part, chosen in (("source", (segments != TARGET) & (segments != 0)), ("target", segments == TARGET)):
            if not bool((hidden[row] & chosen).any()):
                continue
            text = chosen & is_content[row]
            places = hidden[row][text].tolist()
            masked = "".join(
                "_" if is_hidden else processor.tokenizer.decode([token])
                for token, is_hidden in zip(original[row][text].tolist(), places, strict=True)
            )
            found.append(
                {
                    "row": f"{direction}, row {batch['rows'][row]}, {part}",
                    "original": processor.tokenizer.decode(original[row][text]),
                    "masked": masked,
                    "rebuilt": processor.tokenizer.decode(rebuilt[row][text]),
                }
            )
    return found


def write_texts(texts: Iterable[Mapping[str, str]]) -> str:
    """What [`list_texts`] gives, in lines."""
    return "".join(
        f"{text['row']}\n  original: {text['original']!r}\n  masked:   {text['masked']!r}\n"
        f"  rebuilt:  {text['rebuilt']!r}\n"
        for text in texts
    )


def save_reconstructions(output_dir: Path, step: int, grid: Image.Image | None, texts: str) -> Path | None:
    """
    Write `step-N.png` and `step-N.txt` into a run's folder of them, each whole or not at all; the path of the image.
    """
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if grid is not None:
        with atomic_write(folder / f"step-{step}.png") as path:
            grid.save(path)
    if texts:
        with atomic_write(folder / f"step-{step}.txt") as path:
            path.write_text(texts, encoding="utf-8")
    return None if grid is None else folder / f"step-{step}.png"


def last_picture(output_dir: Path, step: int) -> Path | None:
    """The last image that a run drew up to a step; none where it drew none."""
    steps = {int(path.stem.removeprefix("step-")): path for path in (output_dir / FOLDER).glob("step-*.png")}
    return max(((number, path) for number, path in steps.items() if number <= step), default=(0, None))[1]
