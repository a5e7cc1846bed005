# SPDX-License-Identifier: Apache-2.0
"""What the configurations of all stages have in common, and checks of what a trainer is given."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers.trainer_utils import HubStrategy

from evaluation.mmeb.tasks import IMAGE_SIZES
from modeling_cocoa.checkpoint_files import check_is_there
from modeling_cocoa.processing_cocoa import CocoaProcessor

from .adapters import PARTS

MAX_LENGTH = 1280
"""Most tokens of an input where none are asked for and no processor is given."""


@dataclass
class SharedOptions:
    """What the configurations of all stages have: how rows become inputs, and which parts of the model train."""

    learning_rate: float = field(
        default=2e-5, metadata={"help": "Peak learning rate of AdamW (CoCoA's authors: 2e-5, with DoRA adapters)."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest input (in the bridge: source or target), in tokens; text is cut, images never. A pair "
            "whose text to rebuild is longer is a bad row. By default the checkpoint's, "
            f"{MAX_LENGTH} at most, or what a processor that is given has."
        },
    )
    min_pixels: int | None = field(default=None, metadata={"help": "Smaller images are enlarged to this many pixels."})
    max_pixels: int | None = field(default=None, metadata={"help": "Larger images are reduced to this many pixels."})
    image_resolution: str | None = field(
        default=None,
        metadata={
            "help": "Stretch every image to a square: a side in pixels, such as 336, or VLM2Vec's 'high' (1344), "
            "'mid' (672), 'low' (128). By default images keep their shape, between min_pixels and max_pixels."
        },
    )
    check_data: bool = field(
        default=True,
        metadata={"help": "Read every row once before the first step, and act on bad ones then (see on_bad_row)."},
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "A row that cannot be read: 'error' names it and stops; 'skip' leaves it out, counted in the log.",
            "choices": ["error", "skip"],
        },
    )
    on_bad_sample: str | None = field(
        default=None, metadata={"help": "The former name of on_bad_row, with 'raise' for 'error'; deprecated."}
    )

    freeze_parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Parts of the backbone that stay as they are, in themselves and without adapters: {list(PARTS)}."
        },
    )
    save_adapters: str = field(
        default="merged",
        metadata={
            "help": "What is saved of a model with adapters: 'merged', one of plain weights; 'adapter', a folder of "
            "adapters as PEFT saves them, which loads on the base it names; 'both', the first with the second in "
            "adapter/.",
            "choices": ["merged", "adapter", "both"],
        },
    )
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of from_pretrained (dtype, attn_implementation, revision, ...), where the model is "
            "given by name. By default weights are float32, since small steps are lost in bfloat16."
        },
    )

    def __post_init__(self) -> None:
        if self.on_bad_sample is not None:
            warnings.warn(
                "on_bad_sample is now called on_bad_row, and its value 'raise' is 'error'; the old name goes in the "
                "next release.",
                FutureWarning,
                stacklevel=4,
            )
            self.on_bad_row = "error" if self.on_bad_sample == "raise" else self.on_bad_sample
            self.on_bad_sample = None
        check_choices(self, "on_bad_row", "save_adapters")
        self.model_init_kwargs = parsed_json("model_init_kwargs", self.model_init_kwargs)
        if self.image_resolution is not None:
            self.image_resolution = str(self.image_resolution)  # a number in a recipe
            known = self.image_resolution in IMAGE_SIZES
            if not known and not re.fullmatch(r"[1-9][0-9]*", self.image_resolution):
                raise ValueError(
                    f"image_resolution must be a side in pixels or one of {list(IMAGE_SIZES)}; got "
                    f"{self.image_resolution!r}."
                )
        if unknown := [part for part in self.freeze_parts if part not in PARTS]:
            raise ValueError(f"freeze_parts must be of {list(PARTS)}; got {unknown}.")
        if self.push_to_hub:
            if self.hub_model_id is None:
                raise ValueError("push_to_hub=True needs the model's name: hub_model_id='organization/name'.")
            if self.save_adapters == "adapter":
                raise ValueError(
                    "push_to_hub=True checks a whole model, and save_adapters='adapter' saves none: set "
                    "save_adapters='merged' or 'both'."
                )
            if self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                raise ValueError(
                    f"hub_strategy={str(self.hub_strategy)!r} would upload checkpoints unchecked, with the "
                    "optimizer's pickled state: leave it out, and the model is checked and pushed at the end."
                )
            self.hub_strategy = HubStrategy.END
        super().__post_init__()

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Width and height to which images are stretched, in pixels; none where they keep their shape."""
        if self.image_resolution is None:
            return None
        return IMAGE_SIZES.get(self.image_resolution) or (int(self.image_resolution),) * 2

    def load_processor(self, name: str | os.PathLike, **kwargs: Any) -> CocoaProcessor:
        """
        A checkpoint's processor, with the sizes that are asked for.

        Args:
            name (`str` or `os.PathLike`): Folder or Hub name.
            kwargs: Further ones of [`CocoaProcessor.from_pretrained`].

        Raises:
            FileNotFoundError: the name is the path of a folder that is not there.
        """
        check_is_there(os.fspath(name), has_owner=True)
        sizes = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels, "max_length": self.max_length}
        processor = CocoaProcessor.from_pretrained(name, **sizes, **kwargs)
        if self.max_length is None:
            processor.tokenizer.model_max_length = min(processor.max_length, MAX_LENGTH)
        return processor


def parsed_json(name: str, value: Any) -> Any:
    """The value of a field that a command line gives as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a JSON object; got {value!r}.") from error


def check_given(args: SharedOptions, model: Any) -> None:
    """
    Raise `ValueError` where transformers would share each batch out over several GPUs, which cuts pixels apart, or
    where a trainer is given a model that it cannot train, or arguments to load one that is loaded.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are in sight of one process: start one for each with `accelerate launch`, or show it "
            "a single one with CUDA_VISIBLE_DEVICES=0."
        )
    if args.model_init_kwargs and not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"model_init_kwargs={args.model_init_kwargs} are for a model that is given by name, and one in memory was "
            "given: load it with them, or give its name."
        )
    inner = model[0].model if isinstance(model, SentenceTransformer) and hasattr(model[0], "model") else model
    if isinstance(inner, PeftModel):
        raise ValueError(
            "The model is a PeftModel: give model.merge_and_unload(), to go on from its weights, and adapters to "
            "train as peft_config; or its base, with base.load_adapter(folder, is_trainable=True)."
        )


def check_choices(options: Any, *names: str) -> None:
    """Raise `ValueError` where a dataclass field is none of the choices in its metadata."""
    for name in names:
        choices = type(options).__dataclass_fields__[name].metadata["choices"]
        if getattr(options, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}; got {getattr(options, name)!r}.")


def check_sizes(options: SharedOptions, processor: Any) -> None:
    """Raise `ValueError` where sizes were asked for that a processor, which was given, does not have."""
    size = processor.image_processor.size
    has = {
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "max_length": processor.max_length,
    }
    for name, value in has.items():
        if getattr(options, name) not in (None, value):
            raise ValueError(
                f"{name} is {getattr(options, name)}, and the processor that was given has {value}: load it with "
                f"CocoaProcessor.from_pretrained(..., {name}={getattr(options, name)}), or leave {name} out."
            )
