# SPDX-License-Identifier: Apache-2.0
import collections
import contextlib
import copy

import pytest
import torch
from numpy.random import default_rng as rng

from modeling_cocoa.attention import EOS, PADDING, SOURCE, TARGET
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.processing_cocoa import CocoaProcessor
from trainers.data.collators import (
    DIRECTION_WEIGHTS,
    DIRECTIONS,
    WARMUP,
    ReconstructionCollator,
    rows_of_units,
    split_batch,
    swap_sources,
)

ALL = dict.fromkeys(DIRECTIONS, 1.0)


def rows(emoji, count, epoch=0):
    return [{**emoji[index], "index": index, "seed": (5, epoch, index)} for index in range(count)]


def only(direction):
    return {name: float(name == direction) for name in DIRECTIONS}


def text_of(processor, ids):
    special = set(processor.tokenizer.get_added_vocab().values())
    return processor.tokenizer.decode([token for token in ids.tolist() if token not in special])


def unmasked(batch):
    return torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])


def test_warmup_masks_content_and_nothing_else(processor, emoji):
    collator = ReconstructionCollator(processor, stage="warmup")
    batch = collator(rows(emoji, 16))
    assert batch["directions"] == [WARMUP] * 16
    original = processor([{"image": emoji[i]["image"], "text": emoji[i]["text"]} for i in range(16)])
    assert torch.equal(unmasked(batch), original["input_ids"])
    assert torch.equal(batch["attention_mask"], original["attention_mask"])
    masked = batch["labels"] != -100
    assert (batch["input_ids"][masked] == processor.mask_token_id).all()
    segments = batch["segment_ids"]
    assert ((segments == EOS).sum(1) == 1).all() and not (segments == TARGET).any()
    assert (batch["input_ids"][segments == EOS] == processor.eos_token_id).all()
    header = len(processor.tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"])
    assert not masked[:, :header].any(), "the template is not content"
    for row in range(16):
        content = len(processor.tokenizer(emoji[row]["text"], add_special_tokens=False)["input_ids"])
        assert int(masked[row].sum()) == max(1, round(0.2 * content))


@pytest.mark.parametrize("fill", ["noise", "zeros"])
def test_warmup_hides_half_of_the_units_before_the_vision_tower(processor, emoji, fill):
    batch = ReconstructionCollator(processor, stage="warmup", image_mask_fill=fill)(rows(emoji, 8))
    assert batch["unit_mask"].shape == (8 * 4,)
    assert (batch["unit_mask"].view(8, 4).sum(1) == 2).all()
    hidden = batch["unit_mask"].repeat_interleave(4)
    assert torch.equal(batch["pixel_values"][~hidden], batch["pixel_labels"][~hidden])
    filled = batch["pixel_values"][hidden].view(8, 8, -1)
    assert (filled == filled[:, :1]).all(), "one vector an image"
    assert (filled == 0).all() == (fill == "zeros")
    original = processor([emoji[i]["image"] for i in range(8)])
    assert torch.equal(batch["pixel_labels"], original["pixel_values"])


@pytest.mark.parametrize("source_mask_ratio", [0.0, 0.15])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bridge_rows_are_source_eos_target(processor, emoji, direction, source_mask_ratio):
    collator = ReconstructionCollator(
        processor, stage="bridge", direction_weights=only(direction), source_mask_ratio=source_mask_ratio
    )
    batch = collator(rows(emoji, 6))
    assert batch["directions"] == [direction] * 6
    sources, targets = DIRECTIONS[direction]
    original = unmasked(batch)
    for row in range(6):
        segments = batch["segment_ids"][row]
        length = int((segments != PADDING).sum())
        order = segments[:length].tolist()
        eos = order.index(EOS)
        assert order == [SOURCE] * eos + [EOS] + [TARGET] * (length - eos - 1)
        assert original[row, eos] == processor.eos_token_id
        item = {kind: emoji[row][kind] for kind in sources}
        assert torch.equal(original[row, : eos + 1], processor.preprocess([item])[0]["input_ids"])
        target = original[row, eos + 1 : length]
        if "text" in targets:
            assert text_of(processor, target) == emoji[row]["text"]
        assert int((target == processor.image_token_id).sum()) == 4 * ("image" in targets)
        masked = batch["labels"][row] != -100
        content = len(processor.tokenizer(emoji[row]["text"], add_special_tokens=False)["input_ids"])
        for part, present, ratio in (
            (masked[: eos + 1], "text" in sources, source_mask_ratio),
            (masked[eos + 1 :], "text" in targets, 0.7),
        ):
            assert int(part.sum()) == (max(1, round(ratio * content)) if present and ratio else 0)
    if "image" in sources + targets:
        assert torch.equal(batch["unit_mask"], batch["image_is_target"].repeat_interleave(4))
        seen = (~batch["image_is_target"]).repeat_interleave(16)
        assert torch.equal(batch["pixel_values"][seen], batch["pixel_labels"][seen]), "sources are not masked"
    else:
        assert "pixel_values" not in batch


def test_masks_come_from_the_rows_seed_alone(processor, emoji):
    collator = ReconstructionCollator(processor, stage="bridge", direction_weights=ALL)
    many = rows(emoji, 8)
    together = collator(many)
    for index in range(8):
        alone = collator([many[index]])
        width = alone["input_ids"].shape[1]
        assert alone["directions"][0] == together["directions"][index]
        assert torch.equal(together["input_ids"][index, :width], alone["input_ids"][0])
    later = collator(rows(emoji, 8, epoch=1))
    assert later["directions"] != together["directions"] or not torch.equal(later["labels"], together["labels"])


def test_directions_are_drawn_by_weight_among_the_possible(processor, emoji):
    weights = {"image_to_text": 3.0, "text_to_image": 1.0, "text_to_text": 1.0}
    collator = ReconstructionCollator(processor, stage="bridge", direction_weights=weights)
    batch = [{**emoji[i % 64], "index": i, "seed": (0, 0, i)} for i in range(400)]
    counts = collections.Counter(collator.example(row).direction for row in batch)
    assert set(counts) == set(weights)
    assert 0.5 < counts["image_to_text"] / 400 < 0.7
    text_only = [{"text": "hello", "image": None, "index": i, "seed": (0, 0, i)} for i in range(20)]
    assert {collator.example(row).direction for row in text_only} == {"text_to_text"}


def test_by_default_a_text_is_rebuilt(processor, emoji):
    assert DIRECTION_WEIGHTS == {"image_to_text": 1.0, "text_to_text": 1.0}
    batch = ReconstructionCollator(processor, stage="bridge")(rows(emoji, 16))
    assert set(batch["directions"]) == set(DIRECTION_WEIGHTS)
    assert not batch["image_is_target"].any() and not batch["unit_mask"].any()
    assert (batch["labels"] != -100).any(1).all(), "something of each row is rebuilt"
    assert not ((batch["labels"] != -100) & (batch["segment_ids"] != TARGET)).any(), "nothing of the source"


def test_rows_without_one_side_mix_with_others(processor, emoji):
    mixed = rows(emoji, 3)
    mixed[0]["image"] = None
    del mixed[1]["text"]
    for stage in ("warmup", "bridge"):
        batch = ReconstructionCollator(processor, stage=stage, direction_weights=ALL)(mixed)
        assert batch["input_ids"].shape[0] == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"image": None, "text": None}, "neither an image nor a text"),
        ({"image": None, "text": "  "}, "neither an image nor a text"),
        ({"image": "missing.png", "text": None}, "missing.png"),
    ],
)
def test_bad_rows_are_named_or_skipped(processor, emoji, bad, reason):
    good = rows(emoji, 2)
    batch = [good[0], {**bad, "index": 17, "seed": (0, 0, 17)}, good[1]]
    with pytest.raises(ValueError, match=rf"row 17 \(the first is row 0\): .*{reason}.*on_bad_row"):
        ReconstructionCollator(processor, stage="warmup")(batch)
    kept = ReconstructionCollator(processor, stage="warmup", on_bad_row="skip")(batch)
    assert kept["num_skipped"] == 1 and kept["input_ids"].shape[0] == 2
    with pytest.raises(ValueError, match=f"No row of this batch can be used.*{reason}"):
        ReconstructionCollator(processor, stage="warmup", on_bad_row="skip")(batch[1:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_mask_ratio": 0.0}, r"text_mask_ratio must be in \(0, 1\]"),
        ({"target_mask_ratio": 1.5}, "target_mask_ratio"),
        ({"stage": "both"}, "stage must be one of"),
        ({"image_mask_fill": "mean"}, "image_mask_fill"),
        ({"direction_weights": {"up": 1.0}}, "direction_weights"),
        ({"stage": "bridge", "direction_weights": {"text_to_text": 0.0}}, "all 0"),
        ({"on_bad_row": "ignore"}, "on_bad_row"),
    ],
)
def test_wrong_options_are_named(processor, options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionCollator(processor, **options)


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_a_batch_comes_apart_into_its_examples(processor, emoji, stage):
    collator = ReconstructionCollator(processor, stage=stage, direction_weights=ALL)
    mixed = rows(emoji, 12)
    mixed[0]["image"] = mixed[5]["text"] = None
    batch = collator(mixed)
    again = collator.collate(split_batch(batch))
    assert set(again) == set(batch) - {"num_skipped"}
    for name, value in again.items():
        same = torch.equal(value, batch[name]) if isinstance(value, torch.Tensor) else value == batch[name]
        assert same, name
    assert batch["rows"] == list(range(12))
    texts = collator([{**row, "image": None} for row in mixed if row["text"]])
    assert len(split_batch(texts)) == 11


def test_swapped_sources_are_those_of_other_rows_of_the_direction(processor, emoji):
    collator = ReconstructionCollator(processor, stage="bridge", direction_weights=ALL)
    examples = [collator.example(row) for row in rows(emoji, 24)]
    kept, swapped = swap_sources(examples)
    counts = collections.Counter(example.direction for example in examples)
    assert len(kept) == sum(count for count in counts.values() if count > 1)
    sources = {id(example.source): example for example in examples}
    for own, other in zip(kept, swapped, strict=True):
        assert other.target is own.target and other.row == own.row
        giver = sources[id(other.source)]
        assert giver.row != own.row and giver.direction == own.direction
    assert swap_sources(examples[:1]) == ([], [])
    warmup = ReconstructionCollator(processor, stage="warmup")
    assert swap_sources([warmup.example(row) for row in rows(emoji, 2)]) == ([], [])


def test_predicted_units_know_their_rows(processor, emoji):
    mixed = rows(emoji, 6)
    mixed[2]["image"] = None
    batch = ReconstructionCollator(
        processor, stage="bridge", direction_weights={"both_to_both": 1, "text_to_text": 1}
    )(mixed)
    expected = [
        row for row, direction in enumerate(batch["directions"]) for _ in range(4) if direction != "text_to_text"
    ]
    assert rows_of_units(batch).tolist() == expected


def test_a_row_with_nothing_to_mask_is_a_bad_row(processor, emoji):
    """Its image fills max_length, so that no text is left for the target."""
    tight = copy.deepcopy(processor)
    image = {"image": emoji[0]["image"], "text": "a long text about it"}
    tight.tokenizer.model_max_length = len(processor.preprocess([{"image": image["image"]}])[0]["input_ids"])
    collator = ReconstructionCollator(tight, stage="warmup")
    kept = collator.example({**image, "index": 0, "seed": 0})
    assert bool(kept.source.unit_mask.any()) and not bool((kept.source.labels != -100).any())
    tight.tokenizer.model_max_length = len(processor.tokenizer("<|im_start|>user\n")["input_ids"])
    with pytest.raises(ValueError, match=r"row 3 \(the first is row 0\): nothing in it can be masked"):
        collator([{"text": "hello", "index": 3, "seed": 0}])


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_a_processors_own_prompt_has_no_part_in_it(processor, emoji, stage):
    batch = rows(emoji, 4)
    plain = ReconstructionCollator(processor, stage=stage)(batch)
    prompted = CocoaProcessor(processor.processor, prompt="Represent it.")
    found = ReconstructionCollator(prompted, stage=stage)(batch)
    assert torch.equal(found["input_ids"], plain["input_ids"]) and torch.equal(found["labels"], plain["labels"])


@pytest.mark.parametrize(("max_length", "fits"), [(5, False), (7, True)])
def test_a_target_picture_that_leaves_no_room_is_a_bad_row_in_every_epoch(processor, emoji, max_length, fits):
    """Six tokens of its own: a target has neither header nor EOS."""
    processor = copy.deepcopy(processor)
    processor.tokenizer.model_max_length = max_length
    row = {"image": emoji[0]["image"], "text": "a", "index": 0}
    collator = ReconstructionCollator(processor, stage="bridge", direction_weights=only("text_to_image"))
    if fits:
        assert int((collator([{**row, "seed": (5, 0, 0)}])["segment_ids"] == TARGET).sum()) == 6
    else:
        with pytest.raises(CocoaInputError, match=f"take 6 tokens, which exceed max_length={max_length}"):
            collator.example({**row, "seed": (5, 0, 0)})
    collator = ReconstructionCollator(processor, stage="bridge", direction_weights=ALL)
    seeds = ((5, epoch, 0) for epoch in range(100))
    lucky = next(seed for seed in seeds if collator._draw_direction({"image", "text"}, rng(seed)) == "text_to_text")
    row["seed"] = lucky
    assert collator.example(row).direction == "text_to_text"
    with contextlib.nullcontext() if fits else pytest.raises(CocoaInputError, match="exceed max_length"):
        collator.check(row)
