# SPDX-License-Identifier: Apache-2.0
"""What is shown is what was masked and what the model made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_cocoa.losses import normalize_patches
from modeling_cocoa.reconstruction import ReconstructionOutput
from trainers.collators import ReconstructionCollator
from trainers.masking import IGNORE_INDEX
from trainers.pictures import LINE, SIDE, draw_pictures, last_picture, save_reconstructions, write_texts


def batch_of(processor, emoji, stage, count=4):
    collator = ReconstructionCollator(
        processor, stage=stage, direction_weights={"text_to_image": 1, "both_to_both": 1}
    )
    return collator([{**emoji[index], "index": index, "seed": (5, 0, index)} for index in range(count)])


def perfect(batch, normalized):
    """The output of a model that rebuilds everything exactly."""
    units = batch["pixel_labels"].view(len(batch["unit_mask"]), 4, -1)[batch["unit_mask"]]
    return ReconstructionOutput(
        pixels=normalize_patches(units) if normalized else units,
        token_predictions=batch["labels"][batch["labels"] != IGNORE_INDEX],
    )


def cells(grid, row):
    top = LINE + row * (SIDE + LINE) + LINE
    return [np.asarray(grid.crop((left, top, left + SIDE, top + SIDE))) for left in (2, SIDE + 10, 2 * (SIDE + 8) + 2)]


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_perfect_model_rebuilds_the_original(processor, emoji, stage, normalized):
    batch = batch_of(processor, emoji, stage)
    grid = draw_pictures(batch, perfect(batch, normalized), processor, normalized=normalized)
    for row in range(4):
        original, masked, rebuilt = cells(grid, row)
        shown = emoji[row]["image"].convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
        assert np.abs(original.astype(int) - np.asarray(shown)).mean() < 1
        assert np.abs(rebuilt.astype(int) - original).max() <= 2
        grey = (np.abs(masked.astype(int) - 128) <= 1).all(-1).mean()
        assert grey == pytest.approx(0.5 if stage == "warmup" else 1.0, abs=0.05)


def test_several_pictures_of_several_sizes_keep_their_rows(processor, emoji):
    rows = [{**emoji[index], "index": index, "seed": (5, 0, index)} for index in range(3)]
    rows[1]["image"] = None
    rows[2]["image"] = rows[2]["image"].resize((96, 32))
    batch = ReconstructionCollator(processor, stage="warmup")(rows)
    grid = draw_pictures(batch, perfect(batch, True), processor, normalized=True)
    assert grid.height < 3 * (SIDE + LINE), "two pictures, one of them flat"
    assert draw_pictures(batch, ReconstructionOutput(), processor, normalized=True) is None


def test_texts_show_what_was_hidden_and_what_was_rebuilt(processor, emoji):
    batch = batch_of(processor, emoji, "bridge", count=2)
    output = perfect(batch, True)
    texts = write_texts(batch, output, processor)
    assert texts.count(repr(emoji[0]["text"])) >= 2, "the original, and the same rebuilt"
    wrong = ReconstructionOutput(token_predictions=torch.full_like(output.token_predictions, 70))
    assert processor.tokenizer.decode([70]) * 3 in write_texts(batch, wrong, processor)
    assert "_" in texts and "target" in texts and "user" not in texts
    assert write_texts(batch, ReconstructionOutput(), processor) == ""


def test_the_last_picture_is_the_one_of_the_last_step(tmp_path):
    for step in (5, 20, 100):
        save_reconstructions(tmp_path, step, Image.new("RGB", (4, 4), (step, 0, 0)), f"step {step}")
    assert last_picture(tmp_path).name == "step-100.png" and last_picture(tmp_path / "nothing") is None
    assert (tmp_path / "reconstructions" / "step-20.txt").read_text() == "step 20"
