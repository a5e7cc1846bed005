# SPDX-License-Identifier: Apache-2.0
"""What a CoCoA checkpoint adds to the stock configuration: one dict, `config.cocoa`, read through a dataclass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PretrainedConfig


@dataclass(frozen=True)
class CocoaSettings:
    """
    The `cocoa` entry of a checkpoint's `config.json`.

    Args:
        eos_token_id (`int`, defaults to 151645, Qwen2's `<|im_end|>`):
            Token that closes every input; its final hidden state is the embedding.
        mask_token_id (`int`, *optional*):
            Token that stands for masked text in pre-training (`<|mask|>`). `None` until a processor with that token
            has been attached; embedding does not need it.
        image_decoder_layers (`int`, defaults to 1):
            Decoder layers of the image reconstruction head (MoCa, arXiv 2506.23115, uses one).

    Raises:
        ValueError: a value is out of range, or `config.cocoa` holds a field this version does not know.
    """

    eos_token_id: int = 151645
    mask_token_id: int | None = None
    image_decoder_layers: int = 1

    def __post_init__(self) -> None:
        for name in ("eos_token_id", "mask_token_id"):
            value = getattr(self, name)
            if value is None and name == "mask_token_id":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"cocoa.{name} must be a token id, a whole number of 0 or more; got {value!r}.")
        if not isinstance(self.image_decoder_layers, int) or self.image_decoder_layers < 1:
            raise ValueError(
                f"cocoa.image_decoder_layers must be a whole number of 1 or more; got {self.image_decoder_layers!r}."
            )

    @classmethod
    def from_model_config(cls, config: PretrainedConfig) -> CocoaSettings:
        """Read and check `config.cocoa`; a stock configuration, which has none, gives the defaults and its own EOS."""
        values: Any = getattr(config, "cocoa", None)
        if values is None:
            eos = config.get_text_config().eos_token_id
            return cls(eos_token_id=eos) if isinstance(eos, int) else cls()
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"config.cocoa has unknown fields {unknown}; this version knows {sorted(known)}. "
                "Load the checkpoint with the version that wrote it, or remove the fields."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The dict that goes into `config.json`."""
        return asdict(self)
