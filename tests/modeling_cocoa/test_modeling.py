# SPDX-License-Identifier: Apache-2.0
"""The forward pass against plain references: both directions, any batch, either padding side, every backend."""

import pytest
import torch

from modeling_cocoa.packed_attention import FLEX_ATTENTION
from tests.conftest import (
    CLASSES,
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    sharpen,
    tiny_config,
)

CPU_BACKENDS = ("sdpa", "eager", FLEX_ATTENTION)
PATCH_VALUES = 3 * 2 * 8 * 8


def rows(model_type="qwen2_vl"):
    """Text, image, two images, video, text: ids, pixels and grids of one row each, the same at every call."""
    generator = torch.Generator().manual_seed(3)

    def text(length):
        return torch.randint(0, 280, (length,), generator=generator).tolist()

    def media(token, grid):
        units = grid[0] * grid[1] * grid[2] // 4
        pixels = torch.randn(4 * units, PATCH_VALUES, generator=generator)
        return framed(token, units), pixels, torch.tensor([grid])

    def framed(token, units):
        return [VISION_START_ID, *[token] * units, VISION_END_ID]

    image, pixels, grid = media(IMAGE_ID, (1, 4, 6))
    second, second_pixels, second_grid = media(IMAGE_ID, (1, 4, 4))
    video, video_pixels, video_grid = media(VIDEO_ID, (2, 4, 4))
    if CLASSES[model_type][1].has_timestamps:  # each frame behind its time
        video = [7, *framed(VIDEO_ID, 4), 8, *framed(VIDEO_ID, 4)]
    return [
        {"ids": [*text(9), EOS_ID]},
        {"ids": [*image, EOS_ID], "image": (pixels, grid)},
        {
            "ids": [*text(2), *image, *text(3), *second, *text(1), EOS_ID],
            "image": (torch.cat([pixels, second_pixels]), torch.cat([grid, second_grid])),
        },
        {"ids": [*video, *text(2), EOS_ID], "video": (video_pixels, video_grid)},
        {"ids": [*text(1), EOS_ID]},
    ]


def batch_of(rows, padding_side="right"):
    """Model arguments for some rows."""
    width = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), width), PAD_ID)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row["ids"])
        place = slice(0, length) if padding_side == "right" else slice(width - length, width)
        ids[index, place] = torch.tensor(row["ids"])
        mask[index, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for kind, pixels_name, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        parts = [row[kind] for row in rows if kind in row]
        if parts:
            batch[pixels_name] = torch.cat([pixels for pixels, _ in parts])
            batch[grid_name] = torch.cat([grid for _, grid in parts])
    return batch


def with_backend(model_type, implementation):
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = CLASSES[model_type][1]._from_config(config, attn_implementation=implementation)
    return sharpen(model)


@torch.no_grad()
@pytest.mark.parametrize("implementation", CPU_BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_last_token_moves_the_first_hidden_state(model_type, implementation, padded):
    model = with_backend(model_type, implementation)
    ids = torch.tensor([[3, 4, 5, 6, EOS_ID], [3, 4, 5, 6, EOS_ID]])
    mask = torch.ones_like(ids)
    if padded:
        ids[1], mask[1] = torch.tensor([3, 4, EOS_ID, PAD_ID, PAD_ID]), torch.tensor([1, 1, 1, 0, 0])
    other = ids.clone()
    other[0, 3] = 9
    first = model(input_ids=ids, attention_mask=mask).last_hidden_state[0, 0]
    moved = model(input_ids=other, attention_mask=mask).last_hidden_state[0, 0]
    assert (first - moved).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("implementation", CPU_BACKENDS)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batch_of_many_is_batches_of_one(model_type, implementation, padding_side):
    model = with_backend(model_type, implementation)
    reference = with_backend(model_type, "eager")
    items = rows(model_type)
    together = model(**batch_of(items, padding_side)).pooler_output
    for index, row in enumerate(items):
        alone = reference(**batch_of([row])).pooler_output[0]
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_stock_class_gives_the_same_hidden_states(tmp_path, model_type, backbone):
    """Ours differs from the stock class by its attention flag and its pooler, and by nothing else."""
    backbone.save_pretrained(tmp_path)
    stock = CLASSES[model_type][2].from_pretrained(tmp_path).eval()
    batch = batch_of(rows(model_type))
    expected = stock(**batch, mm_token_type_ids=backbone.media_types(batch["input_ids"])).last_hidden_state
    ours = backbone(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours.last_hidden_state[real], expected[real], atol=1e-5, rtol=0)


@torch.no_grad()
def test_nothing_stays_from_call_to_call(backbone):
    text = batch_of([{"ids": [3, 4, 5, EOS_ID]}])
    image = batch_of(rows()[1:2])
    before = backbone(**text).pooler_output
    backbone(**image)
    assert torch.equal(backbone(**text).pooler_output, before)


def test_inputs_embeds_need_positions(backbone):
    with pytest.raises(ValueError, match="position_ids"):
        backbone(inputs_embeds=torch.zeros(1, 3, 64))


@torch.no_grad()
def test_inputs_embeds_give_what_the_ids_give(backbone):
    batch = batch_of([{"ids": [3, 4, 5, EOS_ID]}])
    embeds = backbone.get_input_embeddings()(batch["input_ids"])
    positions = backbone.mrope_positions(batch["input_ids"])
    given = backbone(inputs_embeds=embeds, position_ids=positions).pooler_output
    torch.testing.assert_close(given, backbone(**batch).pooler_output)


def test_gradients_are_those_without_checkpointing(backbone):
    batch = batch_of(rows(backbone.config.model_type))

    def gradients():
        backbone.zero_grad()
        backbone(**batch).pooler_output[:, :8].sum().backward()
        return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}

    backbone.train()
    plain = gradients()
    backbone.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and plain
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-5, rtol=1e-4)
