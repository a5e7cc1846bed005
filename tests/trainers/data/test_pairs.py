# SPDX-License-Identifier: Apache-2.0
"""Pre-training on the pairs of contrastive training: what is read, what is rebuilt, what is skipped and said."""

from __future__ import annotations

import copy
import logging
import unicodedata

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLProcessor

from benchmarks.qwen2_tokenizer import build_qwen2_tokenizer
from modeling_cocoa.attention import EOS, PADDING, SOURCE, TARGET
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.processing_cocoa import CocoaProcessor
from trainers.data.batching import count_row_tokens
from trainers.data.collators import ReconstructionCollator
from trainers.data.datasets import ReconstructionDataset, drop_pairs_without_text
from trainers.data.rows import NoTargetTextError
from trainers.reconstruction_config import CocoaReconstructionConfig
from trainers.reconstruction_trainer import CocoaReconstructionTrainer


def unmasked(segment):
    return torch.where(segment.labels != -100, segment.labels, segment.input_ids)


def with_seed(row):
    return {**row, "index": 0, "seed": (0, 0, 0)}


def forms(picture):
    """A side of a pair in each form, and whether it holds an image and a text."""
    conversation = [
        {"role": "system", "content": "Find it."},
        {"role": "user", "content": [{"type": "text", "text": "a cat"}, {"type": "image", "image": picture}]},
    ]
    return {
        "text": ("a cat", "text"),
        "image": (picture, "image"),
        "dict": ({"text": "a cat", "image": picture}, "both"),
        "text dict": ({"text": "a cat", "image": None}, "text"),
        "conversation": (conversation, "both"),
    }


@pytest.mark.parametrize("query", ["text", "image", "dict", "text dict", "conversation"])
@pytest.mark.parametrize("positive", ["text", "image", "dict", "text dict", "conversation"])
def test_the_query_is_read_as_contrastive_training_reads_it_and_the_positives_text_rebuilt(
    processor, emoji, query, positive
):
    """Or the other way round where the positive alone holds an image."""
    sides = forms(emoji[0]["image"])
    (asked, asked_kind), (found, found_kind) = sides[query], sides[positive]
    row = with_seed({"query": asked, "positive": found})
    collator = ReconstructionCollator(processor, stage="bridge")
    if "text" not in (asked_kind, found_kind):
        with pytest.raises(NoTargetTextError, match="both hold an image"):
            collator.example(row)
        return
    swapped = found_kind != "text"
    source, kind = (found, found_kind) if swapped else (asked, asked_kind)
    example = collator.example(row)
    assert example.direction == f"{kind}_to_text"
    expected = processor.preprocess([source])[0]
    assert torch.equal(unmasked(example.source), expected["input_ids"])
    assert not (example.source.labels != -100).any(), "nothing of the source is masked"
    if kind != "text":
        assert torch.equal(example.source.pixel_values, expected["pixel_values"])
    target = unmasked(example.target).tolist()
    assert processor.tokenizer.decode(target) == "a cat"
    masked = int((example.target.labels != -100).sum())
    assert masked == max(1, round(0.7 * len(target)))


def test_stage_one_joins_a_pair(processor, emoji):
    """The query and then the positive, one EOS, both images in place, 20 % of the text masked."""
    first, second = emoji[0]["image"], emoji[1]["image"]
    row = with_seed(
        {"query": {"image": first, "text": "which one"}, "positive": {"image": second, "text": "that one"}}
    )
    segment = ReconstructionCollator(processor, stage="warmup").example(row).source
    content = [
        {"type": "image", "image": first},
        {"type": "text", "text": "which one"},
        {"type": "image", "image": second},
        {"type": "text", "text": "that one"},
    ]
    expected = processor.preprocess([[{"role": "user", "content": content}]])[0]
    assert torch.equal(unmasked(segment), expected["input_ids"])
    assert int((segment.input_ids == processor.eos_token_id).sum()) == 1
    assert torch.equal(segment.pixel_labels, expected["pixel_values"]) and len(segment.image_grid_thw) == 2
    assert int(segment.unit_mask.sum()) == 4
    words = len(processor.tokenizer("which one", add_special_tokens=False)["input_ids"])
    words += len(processor.tokenizer("that one", add_special_tokens=False)["input_ids"])
    assert int((segment.labels != -100).sum()) == round(0.2 * words)


def test_roles_and_prompts_of_a_conversation_are_never_masked(processor):
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    row = with_seed({"query": turns, "positive": "z"})
    collator = ReconstructionCollator(processor, stage="bridge", source_mask_ratio=1.0, target_mask_ratio=1.0)
    example = collator.example(row)
    kept = example.source.input_ids[example.source.labels == -100]
    assert processor.tokenizer.decode(kept) == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>"


@pytest.fixture(scope="module")
def qwen(processor) -> CocoaProcessor:
    """A processor over Qwen2's own vocabulary, in which `\\n\\n` and many more line breaks are one token."""
    stock = Qwen2VLProcessor(
        copy.deepcopy(processor.image_processor),
        build_qwen2_tokenizer(),
        copy.deepcopy(processor.video_processor),
        chat_template="",
    )
    return CocoaProcessor(stock, max_length=64)


ENDS = ["", "\n", "\n\n", " ", "  \n", "\t", "7", "你", "e\u0301", "\u0301", "🤓", "👩\u200d🚀", "\r\n", "."]
texts = st.tuples(st.sampled_from(ENDS), st.text("ab 1\n你", max_size=6), st.sampled_from(ENDS)).map(
    lambda parts: f"{parts[0]}x{parts[1]}{parts[2]}"
)


@given(texts, texts)
@settings(max_examples=80, deadline=None)
def test_targets_keep_what_they_begin_and_end_with(qwen, query, target):
    """With the real vocabulary: nothing of a header is cut off with them, and nothing of them with it."""
    row = with_seed({"query": query, "positive": target})
    collator = ReconstructionCollator(qwen, stage="bridge", source_mask_ratio=1.0, target_mask_ratio=1.0)
    example = collator.example(row)
    ids = unmasked(example.target)
    assert qwen.tokenizer.decode(ids) == unicodedata.normalize("NFC", target)  # as the tokenizer does
    assert ids.tolist() == qwen.tokenizer(target, add_special_tokens=False)["input_ids"]
    assert (example.target.labels != -100).all()
    assert torch.equal(unmasked(example.source), qwen.encode([query])[0]["input_ids"])
    # Of the source, what is masked is its text, but for line breaks that share a token with the header's.
    kept = qwen.tokenizer.decode(example.source.input_ids[example.source.labels == -100])
    assert kept.startswith("<|im_start|>user\n") and kept.endswith("<|im_end|>")
    assert not kept.removeprefix("<|im_start|>user").removesuffix("<|im_end|>").strip()
    one_side = {"image": None, "text": target}
    assert torch.equal(unmasked(collator.example(with_seed(one_side)).target), ids)


def test_user_text_in_a_target_is_no_control_token(processor):
    row = with_seed({"query": "a", "positive": "before<|im_end|>after <|image_pad|>"})
    ids = unmasked(ReconstructionCollator(processor, stage="bridge").example(row).target)
    assert processor.eos_token_id not in ids and processor.image_token_id not in ids
    assert processor.tokenizer.decode(ids) == "before< |im_end|>after < |image_pad|>"


BAD_PAIRS = {
    "empty query": ({"query": "", "positive": "a"}, "its query: the text is empty"),
    "no positive": ({"query": "a", "positive": None}, "its positive: it is None"),
    "blank positive": ({"query": "a", "positive": " \n"}, "its positive: the text is empty"),
    "video": ({"query": {"video": ["f.png"]}, "positive": "a"}, "its query holds a video"),
    "unknown key": ({"query": {"img": 1}, "positive": "a"}, r"its query: it has unknown keys \['img'\]"),
}


@pytest.mark.parametrize("row, reason", BAD_PAIRS.values(), ids=BAD_PAIRS)
@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_a_pair_that_cannot_be_read_is_a_bad_row(processor, row, reason, stage):
    with pytest.raises(CocoaInputError, match=reason):
        ReconstructionCollator(processor, stage=stage).example(with_seed(row))


def test_a_text_longer_than_max_length_is_a_bad_row_of_the_bridge(processor, tmp_path, model, caplog):
    """It would be rebuilt in part only; in stage 1 texts are cut as everywhere."""
    long = " ".join(["smiling face"] * 60)
    data = Dataset.from_dict({"query": ["a face", "a cat"], "positive": [long, "an animal"]})
    with pytest.raises(
        ValueError, match=r"Row 0 of the training data .*: the text to rebuild has \d+ tokens, more than"
    ):
        trainer_of(model, processor, data, tmp_path)
    logging.getLogger("transformers").propagate = True
    trainer = trainer_of(model, processor, data, tmp_path, on_bad_row="skip")
    assert trainer.train_dataset.kept[""].tolist() == [1]
    warmup = ReconstructionCollator(processor, stage="warmup").example(with_seed(data[0]))
    assert len(warmup.source.input_ids) == processor.max_length


def trainer_of(model, processor, data, folder, **options):
    args = CocoaReconstructionConfig(
        str(folder),
        **{
            "stage": "bridge",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": True,
            **options,
        },
    )
    return CocoaReconstructionTrainer(copy.deepcopy(model), args, train_dataset=data, processing_class=processor)


def pair_datasets(emoji):
    """As contrastive training has them: columns of other kinds in each, and one without a text."""
    names = list(emoji["text"])
    return {
        "name_to_image": Dataset.from_dict({"query": names, "positive": emoji["image"], "negative_1": names}),
        "image_to_name": Dataset.from_dict({"query": emoji["image"], "positive": names}),
        "image_to_image": Dataset.from_dict({"query": emoji["image"], "positive": emoji["twemoji"]}),
        "texts": Dataset.from_dict({"query": names, "positive": names[::-1]}),
    }


@pytest.mark.parametrize("check_data", [True, False])
def test_pairs_without_a_text_are_skipped_and_counted_by_dataset(
    tmp_path, model, processor, emoji, caplog, monkeypatch, check_data
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    data = pair_datasets(emoji.select(range(8)))
    trainer = trainer_of(model, processor, data, tmp_path, check_data=check_data)
    assert "Skipped training pairs in which both sides hold an image" in caplog.text
    assert "8 of 'image_to_image'." in caplog.text and "'texts'" not in caplog.text
    assert len(trainer.train_dataset) == 24
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"text_image_to_text", "text_text_to_text"} <= logged and "loss_image" not in logged
    with pytest.raises(ValueError, match="No training row has a text to rebuild"):
        trainer_of(model, processor, data["image_to_image"], tmp_path)


def test_pairs_of_paths_and_conversations_are_looked_at_without_opening_images(emoji, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    paths = []
    for number in range(2):
        paths.append(str(tmp_path / f"{number}.png"))
        (tmp_path / f"{number}.png").write_bytes(b"no image, and nobody looks")
    content = [{"type": Value("string"), "text": Value("string"), "image": ImageFeature()}]
    turns = [
        [{"role": "user", "content": [{"type": "image", "text": None, "image": paths[0]}]}],
        [{"role": "user", "content": [{"type": "text", "text": "words", "image": None}]}],
    ]
    messages = [{"role": Value("string"), "content": content}]
    data = Dataset.from_dict(
        {"query": paths, "positive": turns}, features=Features({"query": Value("string"), "positive": messages})
    )
    rows = ReconstructionDataset(data, seed=0)
    drop_pairs_without_text(rows, "training")
    assert rows.kept[""].tolist() == [1]
    assert "image: 1." in caplog.text.replace("rebuild: 1.", "image: 1.")


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_the_token_count_of_a_pair_is_no_less_than_its_example(processor, emoji, stage):
    collator = ReconstructionCollator(processor, stage=stage)
    rows = ReconstructionDataset(
        {name: part for name, part in pair_datasets(emoji.select(range(6))).items() if name != "image_to_image"},
        seed=1,
    )
    for key in range(len(rows)):
        name, row, seed = rows.visit(key)
        counts = count_row_tokens(rows.parts[name], processor)[row].tolist()
        tokens = collator.count_tokens(*counts, seed)
        assert 0 <= tokens - collator.example(rows[key]).tokens <= 1


def test_streams_of_pairs_mix_and_skip_what_has_no_text(tmp_path, model, processor, emoji):
    parts = {name: part.to_iterable_dataset() for name, part in pair_datasets(emoji.select(range(8))).items()}
    trainer = trainer_of(model, processor, parts, tmp_path, max_steps=6)
    assert isinstance(trainer.train_dataset.dataset, IterableDataset)
    trainer.train()
    skipped = sum(entry.get("skipped_rows", 0) for entry in trainer.state.log_history if "loss" in entry)
    assert skipped > 0


def test_a_streamed_pair_is_the_row_it_was(processor, emoji):
    """Its roles stay, although streams of several kinds mix as conversations."""
    from trainers.data.streaming import mix_streams

    turns = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "a cat"}]
    parts = {
        "images": Dataset.from_dict({"query": emoji["image"][:1], "positive": ["a face"]}),
        "turns": Dataset.from_dict({"query": [turns], "positive": ["an animal"]}).to_iterable_dataset(),
    }
    collator = ReconstructionCollator(processor, stage="bridge")
    found = [collator.example(with_seed(row)) for row in mix_streams(parts, None, 0)]
    expected = [collator.example(with_seed(part)) for part in (parts["images"][0], next(iter(parts["turns"])))]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.source.input_ids, other.source.input_ids)
        assert torch.equal(one.target.input_ids, other.target.input_ids)


@pytest.mark.parametrize("columns", [("qry", "pos_text"), ("anchor", "positive"), ("query", "document")])
def test_other_columns_are_named(tmp_path, model, processor, columns):
    data = Dataset.from_dict(dict.fromkeys(columns, ["a"]))
    with pytest.raises(ValueError, match=r"needs the columns \['query', 'positive'\], or one of .*; it has .*rename"):
        trainer_of(model, processor, data, tmp_path)


def test_an_eos_option_that_cannot_be_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="eos_sees_target=True needs bridge='layerwise'"):
        CocoaReconstructionConfig("x", use_cpu=True, bridge="embedding", eos_sees_target=True)


def test_a_bridge_batch_of_pairs_is_source_eos_target(processor, emoji):
    data = pair_datasets(emoji.select(range(6)))
    rows = ReconstructionDataset({"a": data["name_to_image"], "b": data["texts"]}, seed=0)
    batch = ReconstructionCollator(processor, stage="bridge")([rows[key] for key in range(len(rows))])
    for row in range(len(rows)):
        segments = [segment for segment in batch["segment_ids"][row].tolist() if segment != PADDING]
        assert segments == sorted(segments) and segments.count(EOS) == 1
        assert {SOURCE, TARGET} < set(segments)
    assert not batch["image_is_target"].any()
