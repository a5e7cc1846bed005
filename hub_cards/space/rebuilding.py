# SPDX-License-Identifier: Apache-2.0
"""What a model of the bridge stage rebuilds from the EOS of a picture or of words."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hub_cards.training_record import RECORD_FILE, StageRecord, read_records
from modeling_cocoa.attention import TARGET
from modeling_cocoa.heads import find_checkpoint_file
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.reconstruction import HEADS_FILE, CocoaForReconstruction
from trainers.collators import DIRECTION_WEIGHTS, DIRECTIONS, ReconstructionCollator, model_arguments
from trainers.masking import IGNORE_INDEX
from trainers.pictures import split_rows
from trainers.reconstruction_config import CocoaReconstructionConfig

BEFORE_EOS_OPTION = {
    "eos_sees_target": False,
    "source_mask_ratio": 0.15,
    "target_mask_ratio": 0.7,
    "direction_weights": dict.fromkeys(DIRECTIONS, 1.0),
}
"""Defaults of runs whose record does not say what the EOS saw: there was no choice, and it did not see the target."""
SEED = 0
"""Of what is hidden: the same input is always masked alike."""


class Versions(NamedTuple):
    """A target as it is, with what is hidden of it, and as it is rebuilt."""

    original: Any
    hidden: Any
    rebuilt: Any


class Rebuilt(NamedTuple):
    """
    What came of one direction of the bridge.

    Args:
        direction (`str`): One of [`~trainers.collators.DIRECTIONS`].
        pictures (`Versions` of `PIL.Image.Image`, *optional*): Of the target's picture.
        texts (`Versions` of `str`, *optional*): Of the target's text.
    """

    direction: str
    pictures: Versions | None
    texts: Versions | None


def read_stages(name: str | os.PathLike) -> list[StageRecord]:
    """
    The stages that a checkpoint was trained in, the last one last; none where it has no record.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub name.
    """
    record = find_checkpoint_file(name, RECORD_FILE)
    return [] if record is None else read_records(Path(record).parent)


def can_rebuild(name: str | os.PathLike) -> bool:
    """Whether a checkpoint (a folder or a Hub name) is one that the bridge stage saved."""
    stages = read_stages(name)
    return find_checkpoint_file(name, HEADS_FILE) is not None and bool(stages) and stages[-1].stage == "bridge"


class Rebuilder:
    """
    A model of the bridge stage, asked for what it makes of single inputs.

    Args:
        model ([`CocoaForReconstruction`]).
        processor ([`CocoaProcessor`]): The model's.
        source_mask_ratio, target_mask_ratio (`float`): How much of a text is hidden; by default as in
            [`CocoaReconstructionConfig`]. Target pictures are hidden whole.
        direction_weights (`dict[str, float]`, *optional*): The directions that the model was trained in, those above
            0; by default those whose target is a text.
    """

    def __init__(
        self,
        model: CocoaForReconstruction,
        processor: CocoaProcessor,
        *,
        source_mask_ratio: float = CocoaReconstructionConfig.source_mask_ratio,
        target_mask_ratio: float = CocoaReconstructionConfig.target_mask_ratio,
        direction_weights: dict[str, float] | None = None,
    ) -> None:
        self.model = model.eval()
        weights = DIRECTION_WEIGHTS if direction_weights is None else direction_weights
        self.directions = {name: DIRECTIONS[name] for name in DIRECTIONS if weights.get(name)}
        self.processor = processor
        self.collator = ReconstructionCollator(
            processor, stage="bridge", source_mask_ratio=source_mask_ratio, target_mask_ratio=target_mask_ratio
        )

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike) -> Rebuilder:
        """
        Load a checkpoint that the bridge stage saved, with the options that it was trained with.

        Args:
            name (`str` or `os.PathLike`): Folder or Hub name.

        Raises:
            ValueError: it has no heads, or does not say how they were trained, or was last trained in another stage.
        """
        if find_checkpoint_file(name, HEADS_FILE) is None:
            raise ValueError(
                f"{name} has no {HEADS_FILE}, which rebuilds: name a checkpoint that the bridge stage saved, such as "
                "runs/tiny/bridge/final of `cocoa train tiny`."
            )
        stages = read_stages(name)
        if not stages or stages[-1].stage != "bridge":
            trained = f"was last trained in the stage {stages[-1].stage!r}" if stages else f"has no {RECORD_FILE}"
            raise ValueError(
                f"{name} {trained}, and only the bridge stage teaches to rebuild from the EOS alone: name a "
                "checkpoint that its save_model wrote."
            )
        # Settings at their defaults are not recorded.
        recorded, defaults = dict(stages[-1].settings), CocoaReconstructionConfig
        if "eos_sees_target" not in recorded:
            recorded = {**BEFORE_EOS_OPTION, **recorded}
        settings = {
            option: recorded.get(option, getattr(defaults, option))
            for option in ("bridge", "eos_sees_target", "normalize_pixels")
        }
        asked = {
            option: recorded[option]
            for option in ("source_mask_ratio", "target_mask_ratio", "direction_weights")
            if option in recorded
        }
        model = CocoaForReconstruction.from_pretrained(name, **settings)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model, CocoaProcessor.from_pretrained(name), **asked)

    @property
    def rebuilds_images(self) -> bool:
        """Whether the model was trained to rebuild images from the EOS."""
        return any("image" in target for _, target in self.directions.values())

    def rebuild(self, query: dict[str, Any]) -> list[Rebuilt]:
        """
        Rebuild an input in each direction that the model was trained in and that its picture and text can serve.

        Args:
            query (`dict`): `image`, `text` or both.

        Raises:
            CocoaInputError: the input cannot be read, has nothing that the model was trained to rebuild, or nothing of
                it can be hidden.
        """
        possible = [name for name, (source, target) in self.directions.items() if {*source, *target} <= set(query)]
        if not possible:
            needed = " or ".join(sorted({" and ".join(dict.fromkeys((*s, *t))) for s, t in self.directions.values()}))
            raise CocoaInputError(f"there is nothing that this model was trained to rebuild; give {needed}.")
        examples = [
            replace(self.collator, direction_weights={name: 1.0}).example({**query, "seed": SEED}) for name in possible
        ]
        device = self.model.model.device
        batch = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.collator.collate(examples).items()
        }
        with torch.inference_mode():
            output = self.model(**model_arguments(batch))
            pictures = iter(())
            if output.pixels is not None:
                pictures = split_rows(batch, output, self.processor, self.model.normalize_pixels)
            texts = self._texts(batch, output)
            return [
                Rebuilt(
                    name,
                    Versions(*next(pictures)) if "image" in DIRECTIONS[name][1] else None,
                    texts[row] if "text" in DIRECTIONS[name][1] else None,
                )
                for row, name in enumerate(possible)
            ]

    def _texts(self, batch: dict[str, Any], output: Any) -> list[Versions]:
        """Of each row, its target's text; special tokens, those around a picture among them, are left out."""
        decode = self.processor.tokenizer.decode
        hidden = batch["labels"] != IGNORE_INDEX
        original = torch.where(hidden, batch["labels"], batch["input_ids"])
        rebuilt = original.clone()
        if output.token_predictions is not None:
            rebuilt[hidden] = output.token_predictions
        found = []
        for row, places in enumerate(batch["segment_ids"] == TARGET):
            masked = ""
            tokens = zip(hidden[row][places].tolist(), original[row][places].tolist(), strict=True)
            for is_hidden, part in groupby(tokens, key=itemgetter(0)):  # whole parts: a token may be half a letter
                ids = [token for _, token in part]
                masked += "_" * len(ids) if is_hidden else decode(ids, skip_special_tokens=True)
            versions = (decode(ids[row][places], skip_special_tokens=True) for ids in (original, rebuilt))
            found.append(Versions(next(versions), masked, next(versions)))
        return found
