# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of the bridge stage reconstructs from the EOS of an image or a text."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hub_cards.training_record import RECORD_FILE, read_records
from modeling_cocoa.attention import TARGET
from modeling_cocoa.checkpoint_files import find_checkpoint_file
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.reconstruction import HEADS_FILE, CocoaForReconstruction
from trainers.data.collators import DIRECTION_WEIGHTS, DIRECTIONS, ReconstructionCollator, model_arguments
from trainers.data.masking import IGNORE_INDEX
from trainers.pictures import split_rows
from trainers.reconstruction_config import CocoaReconstructionConfig

SEED = 0
"""Seed of the masks: the same input is always masked alike."""


class Versions(NamedTuple):
    """A target: original, masked and reconstructed."""

    original: Any
    masked: Any
    reconstructed: Any


class Reconstruction(NamedTuple):
    """
    The result of one direction of the bridge.

    Args:
        direction (`str`): One of [`~trainers.data.collators.DIRECTIONS`].
        images (`Versions` of `PIL.Image.Image`, *optional*): The target's image.
        texts (`Versions` of `str`, *optional*): The target's text.
    """

    direction: str
    images: Versions | None
    texts: Versions | None


def read_bridge_settings(name: str | os.PathLike) -> dict[str, Any]:
    """
    The recorded settings of the bridge stage that a checkpoint (a folder or a Hub name) was last trained in.

    Raises:
        ValueError: it has no heads, no record, or was last trained in another stage, and so cannot reconstruct.
    """
    record = find_checkpoint_file(name, RECORD_FILE)
    stages = [] if record is None else read_records(Path(record).parent)
    if find_checkpoint_file(name, HEADS_FILE) is None:
        reason = f"has no {HEADS_FILE}, which only the reconstruction stages save"
    elif not stages:
        reason = f"has no {RECORD_FILE}, which says how it was trained"
    elif stages[-1].stage != "bridge":
        reason = (
            f"was last trained in the stage {stages[-1].stage!r}, and only the bridge reconstructs from the EOS alone"
        )
    else:
        return stages[-1].settings
    raise ValueError(
        f"{name} {reason}. Use a checkpoint of the bridge stage, such as runs/tiny/bridge/final of `cocoa train tiny`."
    )


class Reconstructor:
    """
    A model of the bridge stage, which reconstructs single inputs with the settings that it was trained with.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub name of a checkpoint that the bridge stage saved.

    Raises:
        ValueError: as [`read_bridge_settings`].
    """

    def __init__(self, name: str | os.PathLike) -> None:
        settings = read_bridge_settings(name)
        ratios = {
            option: settings.get(option, getattr(CocoaReconstructionConfig, option))  # defaults are not recorded
            for option in ("source_mask_ratio", "target_mask_ratio")
        }
        heads = {
            option: settings[option]
            for option in ("bridge", "eos_sees_target", "normalize_pixels")
            if option in settings
        }
        self.model = CocoaForReconstruction.from_pretrained(name, **heads).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = CocoaProcessor.from_pretrained(name)
        self.collator = ReconstructionCollator(self.processor, stage="bridge", **ratios)
        weights = settings.get("direction_weights") or DIRECTION_WEIGHTS
        self.directions = {name: parts for name, parts in DIRECTIONS.items() if weights.get(name)}

    @property
    def has_images(self) -> bool:
        """Whether the model was trained to reconstruct images."""
        return any("image" in target for _, target in self.directions.values())

    @torch.inference_mode()
    def __call__(self, query: dict[str, Any]) -> list[Reconstruction]:
        """
        Reconstruct an input in each direction that the model was trained in and that the input has the parts for.

        Args:
            query (`dict`): `image`, `text` or both.

        Raises:
            CocoaInputError: the input cannot be read, or there is no such direction.
        """
        possible = [name for name, (source, target) in self.directions.items() if {*source, *target} <= set(query)]
        if not possible:
            needed = " or ".join(sorted({" and ".join(dict.fromkeys((*s, *t))) for s, t in self.directions.values()}))
            raise CocoaInputError(f"this model was not trained to reconstruct such an input; give {needed}.")
        examples = [
            replace(self.collator, direction_weights={name: 1.0}).example({**query, "seed": SEED}) for name in possible
        ]
        batch = {
            name: value.to(self.model.model.device) if isinstance(value, Tensor) else value
            for name, value in self.collator.collate(examples).items()
        }
        output = self.model(**model_arguments(batch))
        images = iter(())
        if output.pixels is not None:
            images = split_rows(batch, output, self.processor, self.model.normalize_pixels)
        texts = self._texts(batch, output.token_predictions)
        return [
            Reconstruction(
                name,
                Versions(*next(images)) if "image" in DIRECTIONS[name][1] else None,
                texts[row] if "text" in DIRECTIONS[name][1] else None,
            )
            for row, name in enumerate(possible)
        ]

    def _texts(self, batch: dict[str, Any], predictions: Tensor | None) -> list[Versions]:
        """The target text of each row, without special tokens."""

        def decode(ids: Tensor | list[int]) -> str:
            return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

        is_masked = batch["labels"] != IGNORE_INDEX
        original = torch.where(is_masked, batch["labels"], batch["input_ids"])
        reconstructed = original.clone()
        if predictions is not None:
            reconstructed[is_masked] = predictions
        found = []
        for row, places in enumerate(batch["segment_ids"] == TARGET):
            masked = ""
            tokens = zip(is_masked[row][places].tolist(), original[row][places].tolist(), strict=True)
            for is_hidden, part in groupby(tokens, key=lambda token: token[0]):  # runs: a token may be half a letter
                ids = [token for _, token in part]
                masked += "_" * len(ids) if is_hidden else decode(ids)
            found.append(Versions(decode(original[row][places]), masked, decode(reconstructed[row][places])))
        return found
