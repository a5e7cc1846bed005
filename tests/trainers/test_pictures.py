# SPDX-License-Identifier: Apache-2.0
"""What is shown is what was masked and what the model made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_cocoa.losses import normalize_patches
from modeling_cocoa.media import load_image
from modeling_cocoa.reconstruction import ReconstructionOutput
from trainers import CocoaReconstructionConfig, CocoaReconstructionTrainer
from trainers.data.collators import ReconstructionCollator
from trainers.data.masking import IGNORE_INDEX
from trainers.pictures import LINE, SIDE, draw_pictures, last_picture, list_texts, save_reconstructions, write_texts


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
def test_a_perfect_model_rebuilds_the_original(processor, emoji, stage):
    batch = batch_of(processor, emoji, stage)
    grid = draw_pictures(batch, perfect(batch, False), processor, normalized=False)
    for row in range(4):
        original, masked, rebuilt = cells(grid, row)
        shown = load_image(emoji[row]["image"]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
        assert np.abs(original.astype(int) - np.asarray(shown)).mean() < 1
        assert np.abs(rebuilt.astype(int) - original).max() <= 2
        grey = (np.abs(masked.astype(int) - 128) <= 1).all(-1).mean()
        assert grey == pytest.approx(0.5 if stage == "warmup" else 1.0, abs=0.05)


def test_of_patterns_nothing_of_the_original_is_drawn(processor, emoji):
    """What is drawn of a target follows from the prediction alone: other originals, the same drawing."""
    batch = batch_of(processor, emoji, "bridge")
    other = dict(batch, pixel_labels=torch.randn_like(batch["pixel_labels"]))
    for output in (perfect(batch, True), ReconstructionOutput(pixels=torch.zeros_like(perfect(batch, True).pixels))):
        grids = [draw_pictures(each, output, processor, normalized=True) for each in (batch, other)]
        for row in range(4):
            (original, _, rebuilt), (changed, _, again) = (cells(grid, row) for grid in grids)
            assert np.array_equal(rebuilt, again) and not np.array_equal(original, changed)
    assert (np.abs(rebuilt.astype(int) - 128) <= 1).all(), "a model that knows nothing draws grey"


def test_what_an_untrained_decoder_draws_stands_beside_it(tmp_path, model, processor, emoji):
    data = emoji.select_columns(["image", "text"])
    options = {"direction_weights": {"text_to_image": 1.0}, "max_steps": 2, "per_device_train_batch_size": 8}
    args = CocoaReconstructionConfig(
        str(tmp_path), stage="bridge", report_to="none", use_cpu=True, disable_tqdm=True, **options
    )
    trainer = CocoaReconstructionTrainer(
        model, args, train_dataset=data, eval_dataset=data.select(range(4)), processing_class=processor
    )
    decoder = trainer.model.image_decoder
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    trainer.evaluate()
    grid = Image.open(tmp_path / "reconstructions" / "step-0.png")
    assert grid.width >= 4 * SIDE, "a fourth column"
    assert trainer.model.image_decoder is decoder
    assert all(torch.equal(decoder.state_dict()[name], value) for name, value in before.items())
    place = (3 * (SIDE + 8) + 2, 2 * LINE, 4 * (SIDE + 8), 2 * LINE + SIDE)
    last = grid.crop(place)
    trainer.train()
    trainer.evaluate()
    after = Image.open(tmp_path / "reconstructions" / "step-2.png")
    assert np.array_equal(
        np.asarray(after.crop((3 * (SIDE + 8) + 2, 2 * LINE, 4 * (SIDE + 8), 2 * LINE + SIDE))), last
    )


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
    texts = write_texts(list_texts(batch, output, processor))
    assert texts.count(repr(emoji[0]["text"])) >= 2, "the original, and the same rebuilt"
    wrong = ReconstructionOutput(token_predictions=torch.full_like(output.token_predictions, 70))
    rebuilt = [line for line in write_texts(list_texts(batch, wrong, processor)).splitlines() if "rebuilt:" in line]
    assert "".join(rebuilt).count(processor.tokenizer.decode([70])) == len(wrong.token_predictions)
    assert "_" in texts and "target" in texts and "user" not in texts
    assert list_texts(batch, ReconstructionOutput(), processor) == []


def test_the_last_picture_is_the_one_of_the_last_step(tmp_path):
    for step in (5, 20, 100):
        save_reconstructions(tmp_path, step, Image.new("RGB", (4, 4), (step, 0, 0)), f"step {step}")
    assert last_picture(tmp_path, 100).name == "step-100.png" and last_picture(tmp_path / "nothing", 100) is None
    assert last_picture(tmp_path, 99).name == "step-20.png" and last_picture(tmp_path, 4) is None
    assert (tmp_path / "reconstructions" / "step-20.txt").read_text() == "step 20"
