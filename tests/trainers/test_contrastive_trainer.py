# SPDX-License-Identifier: Apache-2.0
"""Stage 3 on real rows: it learns, GradCache changes nothing, it resumes bit for bit, and it says what is wrong."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler, RoundRobinBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize
from torch.utils.data import SequentialSampler

from modeling_cocoa.saving import save_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer
from trainers.contrastive_config import CocoaContrastiveConfig
from trainers.contrastive_trainer import CocoaContrastiveTrainer
from trainers.recipes.recipe_data import contrastive_data
from trainers.retrieval import retrieval_evaluator


@pytest.fixture(scope="module")
def pairs(emoji):
    """Names and their pictures."""
    return emoji.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-3,
        "max_steps": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 2,
        "check_data": False,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
    }
    return CocoaContrastiveConfig(output_dir=str(folder), **{**defaults, **options})


def trainer_of(model, processor, dataset, folder, **options):
    return CocoaContrastiveTrainer(
        model, arguments(folder, **options), train_dataset=dataset, processing_class=processor
    )


def ranks(model, pairs):
    queries, targets = model.encode(list(pairs["query"])), model.encode(list(pairs["positive"]))
    scores = queries @ targets.T
    return (scores >= scores.diagonal()[:, None]).sum(1)


def test_it_learns_64_pairs_beyond_any_constant(tmp_path, model, processor, pairs):
    """The best constant embedding has a loss of log(16) and finds 1 in 64."""
    trainer = trainer_of(model, processor, pairs, tmp_path, max_steps=120)
    result = trainer.train()
    last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last < 0.75 * np.log(16), result
    assert (ranks(trainer.model, pairs) == 1).mean() > 4 / 64


def mixed_rows(emoji):
    """Texts, pictures and dicts of both in one batch, with two hard negatives."""
    rows = emoji.select(range(6))
    return Dataset.from_dict(
        {
            "query": list(rows["text"]),
            "positive": [row["image"] for row in rows],
            "negative_1": [{"image": row["twemoji"], "text": "other"} for row in rows],
            "negative_2": list(reversed(rows["text"])),
        }
    )


def gradients_of(model, processor, rows, folder, **options):
    """The loss of all rows as one batch, and its gradients by name; in float64, so that a difference is an error."""
    trainer = trainer_of(copy.deepcopy(model).double(), processor, rows, folder, **options)
    features, labels = trainer.collect_features(trainer.data_collator([rows[index] for index in range(len(rows))]))
    assert len(features) == len(trainer.train_dataset.column_names)
    trainer.model.eval()
    loss = trainer.loss(features, labels)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.loss.named_parameters() if p.grad is not None}


def check_gradients(found, expected):
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True},
        {"matryoshka_dims": [64, 32, 16], "matryoshka_weights": [1.0, 0.5, 0.25]},
        {"matryoshka_dims": [16, 64], "symmetric": True},
        {"learnable_temperature": True, "symmetric": True},
        {"learnable_temperature": True, "matryoshka_dims": [64, 16]},
        {"num_hard_negatives": 0},
    ],
    ids=str,
)
def test_gradcache_gradients_are_those_without(tmp_path, model, processor, emoji, options):
    rows = mixed_rows(emoji)
    if options.get("num_hard_negatives") == 0:
        rows = rows.select_columns(["query", "positive"])
    plain_loss, plain = gradients_of(model, processor, rows, tmp_path, **options)
    sizes = [{"mini_batch_size": 1}, {"mini_batch_size": 4}]
    sizes += [{"mini_batch_num_tokens": tokens} for tokens in (1, 30, 45, 10_000)]
    for size in sizes:
        loss, cached = gradients_of(model, processor, rows, tmp_path, **options, **size)
        assert abs(loss - plain_loss) < 1e-4, size
        check_gradients(cached, plain)
    assert ("log_scale" in plain) == options.get("learnable_temperature", False)


@pytest.mark.parametrize("margin", [0.0, 0.3, -0.2])
def test_false_negatives_within_the_margin_are_dropped(tmp_path, model, processor, emoji, margin):
    """Held against a plain loss; the last positive is the first one again, which is always dropped."""
    rows = mixed_rows(emoji).to_dict()
    rows["positive"][-1] = rows["positive"][0]
    rows = Dataset.from_dict(rows, features=mixed_rows(emoji).features)
    options = {"false_negative_margin": margin, "temperature": 0.1}
    loss, found = gradients_of(model, processor, rows, tmp_path, **options, mini_batch_size=2)
    trainer = trainer_of(model, processor, rows, tmp_path)
    features, _ = trainer.collect_features(trainer.data_collator([rows[index] for index in range(6)]))
    query, *targets = (trainer.model(feature)["sentence_embedding"] for feature in features)
    scores = query @ torch.cat(targets).T
    own = torch.eye(6, scores.shape[1], dtype=torch.bool)
    dropped = (scores > scores[own][:, None] - margin - 1e-6) & ~own
    assert bool(dropped[0, 5]) == bool(dropped[5, 0]) == (margin >= 0) and not bool(dropped.all())
    masked = (scores / 0.1).masked_fill(dropped, -torch.inf)
    expected = torch.nn.functional.cross_entropy(masked, torch.arange(6))
    expected.backward()
    assert abs(loss - expected.item()) < 1e-4
    check_gradients(found, {f"model.{n}": p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})


def test_dropout_does_not_hide_that_two_positives_are_the_same(tmp_path, model, processor, emoji):
    """Three positives, 16 times each: every negative that equals the positive is dropped, whatever adapters add."""
    names = [emoji[row % 3]["text"] for row in range(48)]
    rows = Dataset.from_dict({"query": [f"{name} {row}" for row, name in enumerate(names)], "positive": names})
    adapters = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    trainer = CocoaContrastiveTrainer(
        copy.deepcopy(model),
        arguments(tmp_path, false_negative_margin=0.0, per_device_train_batch_size=48),
        train_dataset=rows,
        processing_class=processor,
        peft_config=adapters,
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    trainer.model.train()
    guide = trainer.loss.guide
    features, _ = trainer.collect_features(trainer.data_collator([rows[index] for index in range(48)]))
    one, other = (guide(features[1])["sentence_embedding"] for _ in range(2))
    assert torch.equal(one, other) and trainer.model.training and guide.training
    noisy = [trainer.model(features[1])["sentence_embedding"] for _ in range(2)]
    assert not torch.allclose(*noisy, atol=1e-3), "else this test says nothing"
    scores = trainer.loss.sim_matrix(one, one)
    same = torch.tensor([[a == b for b in names] for a in names])
    assert (scores[same] > 1 - 1e-6).all()


def test_the_guided_loss_needs_no_more_than_a_matrix_of_cosines(tmp_path, model, processor, pairs):
    trainer = trainer_of(model, processor, pairs, tmp_path, false_negative_margin=0.1)
    one, other = torch.randn(5, 8), torch.randn(7, 8)
    expected = torch.nn.functional.cosine_similarity(one[:, None], other[None], dim=-1)
    torch.testing.assert_close(trainer.loss.sim_matrix(one, other), expected, atol=1e-6, rtol=0)


def test_the_loss_is_infonce_at_the_temperature(tmp_path, model, processor, emoji):
    rows = mixed_rows(emoji)
    trainer = trainer_of(model, processor, rows, tmp_path, temperature=0.1)
    features, labels = trainer.collect_features(trainer.data_collator([rows[index] for index in range(6)]))
    with torch.no_grad():
        loss = trainer.loss.eval()(copy.deepcopy(features), labels)
        query, positive, *negatives = (
            torch.tensor(trainer.model.encode(list(rows[name]))) for name in rows.column_names
        )
    scores = query @ torch.cat([positive, *negatives]).T / 0.1
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, torch.arange(6)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, model, processor, pairs, emoji, stop_at):
    """Two datasets of 64 pairs, 32 a step: step 4 ends an epoch, step 2 is in the middle of one."""
    styles = emoji.select_columns(["image", "twemoji"]).rename_columns({"image": "query", "twemoji": "positive"})
    data = DatasetDict({"names": pairs, "styles": styles})
    options = {
        "max_steps": 7,
        "per_device_train_batch_size": 32,
        "save_strategy": "steps",
        "save_steps": stop_at,
    }
    whole = trainer_of(copy.deepcopy(model), processor, data, tmp_path / "whole", **options)
    whole.train()

    class Killed(Exception):
        pass

    first = trainer_of(copy.deepcopy(model), processor, data, tmp_path / "killed", **options)
    step = first.training_step

    def killed_later(*args, **kwargs):
        if first.state.global_step == stop_at + 1:
            raise Killed
        return step(*args, **kwargs)

    first.training_step = killed_later
    with pytest.raises(Killed):
        first.train()
    second = trainer_of(copy.deepcopy(model), processor, data, tmp_path / "killed", **options)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.zero_()
    second.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_a_run_that_had_ended_makes_no_further_step(tmp_path, model, processor, pairs):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = trainer_of(copy.deepcopy(model), processor, pairs, tmp_path, **options)
    whole.train()
    again = trainer_of(copy.deepcopy(model), processor, pairs, tmp_path, **options)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    again.is_deepspeed_enabled = True  # of which a run that makes no step has no engine
    again.save_model(str(tmp_path / "final"))
    saved = CocoaTransformer(str(tmp_path / "final"))
    for name, value in whole.model[0].model.state_dict().items():
        assert torch.equal(saved.model.state_dict()[name], value), name


def test_a_saved_model_gives_the_trained_vectors_through_the_stock_loader(tmp_path, model, processor, pairs):
    trainer = trainer_of(model, processor, pairs, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    items = [pairs[0]["query"], pairs[1]["positive"]]
    expected = trainer.model.encode(items)
    stock = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert type(stock[0]) is not CocoaTransformer
    np.testing.assert_allclose(stock.encode(items), expected, atol=1e-5)
    names = {path.name for path in (tmp_path / "final").rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_lora_trains_adapters_and_saves_plain_weights(tmp_path, model, processor, pairs):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = CocoaContrastiveTrainer(
        model,
        arguments(tmp_path / "run"),
        train_dataset=pairs,
        processing_class=processor,
        peft_config=config,
    )
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    items = [pairs[0]["query"], pairs[1]["positive"]]
    saved = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    np.testing.assert_allclose(saved.encode(items), trainer.model.encode(items), atol=1e-5)


def test_other_modules_are_refused(tmp_path, model, processor, pairs):
    stack = SentenceTransformer(modules=[CocoaTransformer(model, processor), Normalize()])
    with pytest.raises(ValueError, match="'CocoaTransformer', 'Normalize'.*alone"):
        CocoaContrastiveTrainer(stack, arguments(tmp_path), train_dataset=pairs)


@pytest.mark.parametrize("lora", [False, True])
def test_prompts_and_dimensions_of_the_model_are_saved(tmp_path, model, processor, pairs, lora):
    whole = SentenceTransformer(
        modules=[CocoaTransformer(model, processor)],
        prompts={"query": "find: ", "document": ""},
        default_prompt_name="query",
        truncate_dim=16,
    )
    config = LoraConfig(r=4, target_modules=["q_proj"]) if lora else None
    trainer = CocoaContrastiveTrainer(whole, arguments(tmp_path), train_dataset=pairs, peft_config=config)
    trainer.save_model(str(tmp_path / "final"))
    saved = SentenceTransformer(str(tmp_path / "final"), device="cpu", truncate_dim=16)
    assert (saved.prompts, saved.default_prompt_name) == (whole.prompts, "query")
    np.testing.assert_allclose(saved.encode(["a"]), whole.encode(["a"]), atol=1e-5)


@pytest.mark.parametrize(
    "columns",
    [
        ["positive", "query"],
        ["positive", "anchor"],
        ["query", "negative", "positive"],
        ["anchor", "negative_1", "positive"],
        ["query"],
        ["query", "label"],
    ],
)
def test_wrong_columns_are_named(tmp_path, model, processor, columns):
    dataset = Dataset.from_dict({name: ["a"] for name in columns})
    with pytest.raises(ValueError, match="'query', 'positive'.*rename_column"):
        trainer_of(model, processor, dataset, tmp_path)


def test_other_columns_are_named_and_not_used(tmp_path, model, processor, pairs, caplog):
    logging.getLogger("transformers").propagate = True
    rows = pairs.add_column("id", list(range(64))).select_columns(["query", "id", "positive"])
    trainer = trainer_of(model, processor, rows, tmp_path)
    assert "train_dataset: columns ['id'] are not used; used are ['query', 'positive']" in caplog.text
    assert trainer.train_dataset.column_names == ["query", "positive"]
    trainer.train()


@pytest.mark.parametrize(
    "columns", [["anchor", "positive", "negative"], ["question", "answer", "wrong", "score"], ["query", "b", "c"]]
)
@pytest.mark.parametrize("by_dataset", [False, True])
def test_columns_are_read_by_position_as_sentence_transformers_does(tmp_path, model, processor, columns, by_dataset):
    rows = {name: [f"{number} {name}" for number in range(4)] for name in columns}
    rows.update({"score": [1.0] * 4} if "score" in rows else {})
    prompts = {columns[0]: "Find it.", columns[1]: "It is here."}
    data = Dataset.from_dict(rows)
    trainer = trainer_of(
        model,
        processor,
        DatasetDict({"a": data}) if by_dataset else data,
        tmp_path,
        prompts={"a": prompts} if by_dataset else prompts,
    )
    read = trainer.train_dataset["a"] if by_dataset else trainer.train_dataset
    assert read.column_names == ["query", "positive", "negative_1"]
    assert [list(read[name]) for name in read.column_names] == [rows[name] for name in columns[:3]]
    expected = {"query": "Find it.", "positive": "It is here."}
    assert trainer.args.prompts == ({"a": expected} if by_dataset else expected)
    assert trainer.model.prompts == {
        **trainer.model.prompts,
        **({} if by_dataset else {"query": "Find it.", "document": "It is here."}),
    }
    words = trainer.model.tokenizer.decode(trainer.data_collator([read[0]])["query_input_ids"][0])
    assert "Find it." in words and f"0 {columns[0]}" in words


def test_a_prompt_for_a_column_of_two_meanings_is_refused(tmp_path, model, processor):
    one, other = {"a": ["x"] * 2, "b": ["y"] * 2}, {"b": ["x"] * 2, "a": ["y"] * 2}
    data = {"one": Dataset.from_dict(one), "other": Dataset.from_dict(other)}
    with pytest.raises(ValueError, match=r"the column 'a' is \['positive', 'query'\] in different datasets"):
        trainer_of(model, processor, data, tmp_path, prompts={"a": "Find it."})


def test_a_streamed_dataset_is_refused(tmp_path, model, processor, pairs):
    for data in (pairs.to_iterable_dataset(), {"a": pairs, "b": pairs.to_iterable_dataset()}):
        with pytest.raises(ValueError, match="is streamed, and contrastive training draws its rows by number"):
            trainer_of(model, processor, data, tmp_path)


def test_a_pair_that_is_alone_has_nothing_to_learn_from(tmp_path, model, processor, pairs):
    """Its loss and its gradient are 0."""
    with pytest.raises(ValueError, match="per_device_train_batch_size is 1, and the pairs have no negatives"):
        trainer_of(model, processor, pairs, tmp_path, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="has 1 row, and the pairs have no negatives"):
        trainer_of(model, processor, {"a": pairs, "b": pairs.select([0])}, tmp_path)
    trainer = trainer_of(model, processor, pairs.select(range(9)), tmp_path, per_device_train_batch_size=4)
    assert [len(batch) for batch in trainer.get_train_dataloader().batch_sampler] == [4, 4], "the last one is left out"
    with_negatives = pairs.select(range(3)).add_column("negative_1", ["a", "b", "c"])
    with_negatives = with_negatives.select_columns(["query", "positive", "negative_1"])
    trainer = trainer_of(model, processor, with_negatives, tmp_path, per_device_train_batch_size=1, max_steps=2)
    trainer.train()
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_bad_rows_stop_before_the_first_step_or_are_skipped_and_counted(tmp_path, model, processor):
    picture = Image.new("RGB", (64, 64), "red")
    dataset = Dataset.from_dict({"query": ["red", " ", "again"], "positive": [picture] * 3})
    with pytest.raises(ValueError, match="Row 1 of the training data .*: the text is empty.*on_bad_row"):
        trainer_of(model, processor, dataset, tmp_path, check_data=True)
    trainer = trainer_of(model, processor, dataset, tmp_path, check_data=True, on_bad_row="skip")
    assert trainer.train_dataset["query"] == ["red", "again"]
    trainer = trainer_of(
        model, processor, dataset, tmp_path, on_bad_row="skip", per_device_train_batch_size=3, logging_steps=1
    )
    trainer.train()
    skipped = [entry["skipped_rows"] for entry in trainer.state.log_history if "loss" in entry]
    assert skipped[0] >= 1 and len(skipped) == 4


def test_a_corrupt_picture_in_an_image_column_is_a_bad_row(tmp_path, model, processor, emoji):
    rows = {"query": ["red", "blue"], "positive": [emoji[0]["image"], {"bytes": b"not a picture", "path": None}]}
    features = Features({"query": Value("string"), "positive": ImageFeature()})
    positives = [emoji[0]["image"], {"bytes": b"not a picture", "path": "b.png"}]
    named = Dataset.from_dict({**rows, "positive": positives}, features)
    with pytest.raises(ValueError, match=r"Row 1 of the training data \(the first is row 0\): b.png cannot be read"):
        trainer_of(model, processor, named, tmp_path, check_data=True)
    dataset = Dataset.from_dict(rows, features=features)
    with pytest.raises(ValueError, match=r"Row 1 of the training data .*: the image cannot be read"):
        trainer_of(model, processor, dataset, tmp_path, check_data=True)
    trainer = trainer_of(model, processor, dataset, tmp_path, on_bad_row="skip", per_device_train_batch_size=2)
    trainer.train()
    assert trainer.state.log_history[0]["skipped_rows"] >= 1


def test_rows_that_workers_leave_out_are_counted(tmp_path, model, processor):
    dataset = Dataset.from_dict({"query": ["red", " ", "blue", "green"] * 4, "positive": ["a", "b", "c", "d"] * 4})
    counts = []
    for workers in (0, 1):
        trainer = trainer_of(
            copy.deepcopy(model),
            processor,
            dataset,
            tmp_path,
            on_bad_row="skip",
            per_device_train_batch_size=8,
            logging_steps=1,
            dataloader_num_workers=workers,
        )
        trainer.train()
        counts.append([entry["skipped_rows"] for entry in trainer.state.log_history if "loss" in entry])
    assert counts[0] == counts[1] and counts[0][1] == 4 and counts[0][3] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": 0.005, "learnable_temperature": True}, "never below 0.01, where it would begin; got 0.005"),
        ({"distillation_weight": 0.0}, "distillation_weight must be above 0; got 0.0"),
        ({"distillation_temperature": 0.0}, "distillation_temperature must be above 0; got 0.0"),
        ({"mini_batch_size": 0}, "mini_batch_size must be 1 or more"),
        ({"mini_batch_size": 2, "mini_batch_num_tokens": 9}, "not both"),
        ({"num_hard_negatives": -1}, "num_hard_negatives must be 0 or more"),
        ({"image_resolution": "huge"}, "image_resolution must be a side in pixels or one of"),
        ({"image_resolution": 0}, "image_resolution must be a side in pixels"),
        ({"matryoshka_dims": [16, 16]}, "different numbers"),
        ({"matryoshka_dims": [64, 16], "matryoshka_weights": [1.0]}, "a number for each"),
        ({"false_negative_margin": 0.1, "symmetric": True}, "cannot go with symmetric"),
        ({"false_negative_margin": 0.1, "learnable_temperature": True}, "cannot go with learnable_temperature"),
        ({"sampling_alpha": -1.0}, "sampling_alpha must be 0 or more"),
        ({"query_prompt": "a", "prompts": "b"}, "not both"),
        ({"multi_dataset_batch_sampler": "round_robin"}, "leave multi_dataset_batch_sampler"),
        ({"early_stopping_patience": 2}, "load_best_model_at_end"),
        ({"on_bad_row": "drop"}, "on_bad_row must be one of"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_a_best_checkpoint_that_cannot_be_loaded_is_an_error(tmp_path, model, processor, pairs):
    trainer = trainer_of(model, processor, pairs, tmp_path)
    trainer.state.best_model_checkpoint = str(tmp_path / "gone")
    with pytest.raises(OSError):
        trainer._load_best_model()


def two_tasks(emoji):
    """Names and their pictures, and two pictures to a name, the same name once again."""
    names = emoji.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})
    first = emoji.select(range(8)).select_columns(["image", "text"]).rename_columns({"image": "query"})
    second = emoji.select(range(8)).select_columns(["twemoji", "text"]).rename_columns({"twemoji": "query"})
    styles = concatenate_datasets([first, second]).rename_columns({"text": "positive"})
    return DatasetDict({"names": names, "styles": styles})


def test_the_best_checkpoint_by_retrieval_is_what_is_left(tmp_path, model, processor, emoji, caplog):
    data = two_tasks(emoji)
    trainer = CocoaContrastiveTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=30,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            evaluate_retrieval=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_sequential_score",
            early_stopping_patience=1,
            learning_rate=8e-3,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_sequential_score" in entry]
    scores = [entry["eval_sequential_score"] for entry in logs]
    assert trainer.state.global_step < 30, "a score that does not rise stops the run"
    assert trainer.state.best_metric == max(scores) > scores[-1]
    found = trainer.evaluate()
    assert "early stopping" not in caplog.text, "it is at work, and not disabled"
    ours = [name for name in found if "cosine" in name or "sequential" in name]
    assert sorted(ours) == sorted(name for name in logs[0] if "cosine" in name or "sequential" in name)
    assert found["eval_sequential_score"] == pytest.approx(trainer.state.best_metric)
    assert {"eval_names_loss", "eval_styles_loss"} <= set(found)
    for metric in ("recall@1", "recall@10", "mrr@10", "ndcg@10"):
        for task in data:
            assert f"eval_{task}_cosine_{metric}" in logs[0]
    queries, corpus = (
        trainer.model.encode(list(data["names"]["query"])),
        trainer.model.encode(list(data["names"]["positive"])),
    )
    ranks = ((queries @ corpus.T) >= (queries * corpus).sum(1)[:, None] - 1e-6).sum(1)
    expected = float(np.mean(ranks <= 10))
    assert abs(found["eval_names_cosine_recall@10"] - expected) <= 1 / 64


@pytest.mark.parametrize("warmup_steps", [1, 0])
def test_a_best_model_that_was_never_trained_is_told(tmp_path, model, processor, pairs, caplog, warmup_steps):
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options.update(load_best_model_at_end=True, metric_for_best_model="eval_loss", warmup_steps=warmup_steps)
    options.update(greater_is_better=True, learning_rate=8e-3)  # so that no evaluation is better than the first
    trainer = CocoaContrastiveTrainer(
        copy.deepcopy(model),
        arguments(tmp_path, **options),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=processor,
    )
    trainer.train()
    is_base = all(map(torch.equal, trainer.backbone.parameters(), model.parameters()))
    assert trainer.state.best_global_step == 1 and is_base == (warmup_steps == 1)
    assert ("is the one that training began with" in caplog.text) == is_base


def test_early_stopping_goes_on_counting(tmp_path, model, processor, pairs):
    options = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options.update(load_best_model_at_end=True, metric_for_best_model="eval_loss", early_stopping_patience=2)
    options.update(learning_rate=0.0)  # no evaluation is better than the first

    def run(max_steps, resume):
        trainer = CocoaContrastiveTrainer(
            copy.deepcopy(model),
            arguments(tmp_path, **{**options, "max_steps": max_steps}),
            train_dataset=pairs,
            eval_dataset=pairs,
            processing_class=processor,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step

    assert run(4, None) == 4
    assert run(12, True) == 6, "one more evaluation, and not two"
    assert run(12, True) == 6, "a run that has stopped is at its end"


@pytest.mark.parametrize(
    ("prompts", "query", "positive"),
    [
        ("Find it.", "Find it.", "Find it."),
        ({"query": "Find it."}, "Find it.", ""),
        ({"names": "Find it."}, "Find it.", "Find it."),
        ({"names": {"positive": "It."}}, "", "It."),
        ({"styles": "Find it."}, "", ""),
    ],
)
def test_retrieval_has_the_prompts_of_training(tmp_path, model, processor, emoji, prompts, query, positive):
    data = two_tasks(emoji)
    options = {"evaluate_retrieval": True, "prompts": prompts}
    trainer = CocoaContrastiveTrainer(
        model, arguments(tmp_path, **options), train_dataset=data, eval_dataset=data, processing_class=processor
    )
    evaluator = trainer.evaluator.evaluators[0]
    assert (evaluator.query_prompt, evaluator.corpus_prompt) == (query, positive)
    batch = trainer.data_collator([{**data["names"][0], "dataset_name": "names"}])
    for column, prompt in (("query", query), ("positive", positive)):
        expected = trainer.model.preprocess([data["names"][0][column]], prompt=prompt)["input_ids"]
        assert torch.equal(batch[f"{column}_input_ids"], expected)


def test_an_evaluator_beside_retrieval_is_refused(tmp_path, model, processor, pairs):
    with pytest.raises(ValueError, match="another one was given"):
        CocoaContrastiveTrainer(
            model,
            arguments(tmp_path, evaluate_retrieval=True),
            train_dataset=pairs,
            eval_dataset=pairs,
            processing_class=processor,
            evaluator=retrieval_evaluator(pairs),
        )


@pytest.mark.parametrize("option", [{"max_length": 9}, {"max_pixels": 1024}, {"min_pixels": 64}])
def test_sizes_that_a_given_processor_does_not_have_are_refused(tmp_path, model, processor, pairs, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is .*the processor that was given has"):
        trainer_of(model, processor, pairs, tmp_path, **option)
    whole = SentenceTransformer(modules=[CocoaTransformer(model, processor)])
    with pytest.raises(ValueError, match=f"{name} is .*the processor that was given has"):
        trainer_of(whole, None, pairs, tmp_path, **option)
    trainer_of(model, processor, pairs, tmp_path, max_length=processor.max_length)


def test_an_evaluation_set_may_have_fewer_negatives_and_rows_than_training(tmp_path, model, processor, emoji):
    names = list(emoji["text"])
    train = Dataset.from_dict({"query": names, "positive": names, "negative_1": names, "negative_2": names})
    few = train.select(range(5)).remove_columns("negative_2")
    options = {"num_hard_negatives": 2, "dataloader_drop_last": True, "per_device_eval_batch_size": 8}
    trainer = CocoaContrastiveTrainer(
        model, arguments(tmp_path, **options), train_dataset=train, eval_dataset=few, processing_class=processor
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert [len(batch["query_input_ids"]) for batch in trainer.get_eval_dataloader()] == [5]


def test_prompts_go_to_queries_and_targets_of_their_dataset(tmp_path, model, processor, emoji):
    data = two_tasks(emoji)
    options = {
        "query_prompt": {"names": "Find its picture."},
        "target_prompt": {"names": "A picture.", "styles": "A name."},
    }
    trainer = trainer_of(model, processor, data, tmp_path, **options)
    assert trainer.args.prompts == {
        "names": {"query": "Find its picture.", "positive": "A picture."},
        "styles": {"positive": "A name."},
    }
    for name, query, target in (("names", "Find its picture.", "A picture."), ("styles", None, "A name.")):
        batch = trainer.data_collator([trainer.train_dataset[name][0]])
        row = data[name][0]
        for column, prompt in (("query", query), ("positive", target)):
            expected = trainer.model.preprocess([row[column]], prompt=prompt)["input_ids"]
            assert torch.equal(batch[f"{column}_input_ids"], expected)
    with pytest.raises(ValueError, match=r"name the datasets \['nmes'\]; the datasets are \['names', 'styles'\]"):
        trainer_of(model, processor, data, tmp_path, query_prompt={"nmes": "Find."})
    trainer = trainer_of(model, processor, data["names"], tmp_path, query_prompt="Find.")
    assert trainer.args.prompts == {"query": "Find."}


def test_pixels_stay_on_the_cpu_until_the_model_reads_them(tmp_path, model, processor, pairs, monkeypatch):
    trainer = trainer_of(model, processor, pairs, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    prepared = trainer._prepare_inputs(batch)
    assert list(prepared) == list(batch)
    assert prepared["positive_pixel_values"] is batch["positive_pixel_values"]
    assert {value.device.type for name, value in prepared.items() if name != "positive_pixel_values"} == {"meta"}


def test_a_learned_temperature_is_trained_logged_saved_and_taken_up_again(tmp_path, model, processor, pairs):
    options = {"learnable_temperature": True, "temperature": 0.2, "save_strategy": "steps", "save_steps": 2}
    options.update(gradient_accumulation_steps=2, weight_decay=0.5, mini_batch_size=8)
    whole = trainer_of(copy.deepcopy(model), processor, pairs, tmp_path, **options)
    whole.train()
    logged = [entry["temperature"] for entry in whole.state.log_history if "temperature" in entry]
    assert len(set(logged)) == len(logged) == 2 and abs(logged[0] - 0.2) < 0.05
    again = trainer_of(copy.deepcopy(model), processor, pairs, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.loss.log_scale, whole.loss.log_scale)
    decayed = whole.get_decay_parameter_names(whole.loss)
    assert decayed and not any("log_scale" in name for name in decayed)


@pytest.mark.parametrize("cached", [{}, {"mini_batch_size": 3}])
def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path, model, processor, pairs, cached):
    trainer = trainer_of(model, processor, pairs, tmp_path, per_device_train_batch_size=4, **cached)
    with torch.no_grad():
        trainer.model[0].model.language_model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 1, of the rows \[['\"].*[a-z]{3}"):
        trainer.train()


def test_hard_negatives_are_counted(tmp_path, model, processor, emoji):
    rows = mixed_rows(emoji)
    trainer = trainer_of(model, processor, rows, tmp_path, num_hard_negatives=1)
    assert trainer.train_dataset.column_names == ["query", "positive", "negative_1"]
    with pytest.raises(ValueError, match="has 2 negatives a row; num_hard_negatives is 3"):
        trainer_of(model, processor, rows, tmp_path, num_hard_negatives=3)


def test_images_are_stretched_as_asked(tmp_path, model, processor, emoji):
    rows = mixed_rows(emoji)
    trainer = trainer_of(model, processor, rows, tmp_path, image_resolution="low")
    assert trainer.data_collator.image_size == (128, 128)
    wide = rows[0]["positive"].resize((401, 2))  # a shape that is refused where it is kept
    wide.save(tmp_path / "picture.png")
    expected = trainer.model.preprocess([wide.resize((128, 128))])
    forms = [wide, str(tmp_path / "picture.png"), {"image": str(tmp_path / "picture.png")}]
    forms.append([{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "picture.png")}]}])
    for positive in forms:
        low = trainer.data_collator([{"query": "a text", "positive": positive}])
        assert torch.equal(low["positive_pixel_values"], expected["pixel_values"])
        assert torch.equal(low["query_input_ids"], trainer.model.preprocess(["a text"])["input_ids"])
    evaluator = retrieval_evaluator(trainer.train_dataset, image_size=(128, 128)).evaluators[0]
    np.testing.assert_allclose(
        trainer.model.encode(evaluator.corpus[:1]),
        trainer.model.encode([rows[0]["positive"].resize((128, 128))]),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("sharded", "options", "message"),
    [
        ("fsdp", {"mini_batch_num_tokens": 40}, "use mini_batch_size"),
        ("fsdp", {"learnable_temperature": True}, "A learned temperature"),
        ("fsdp", {"mini_batch_size": 4, "on_bad_row": "skip"}, "equally many rows.*check_data=True"),
        (
            "fsdp",
            {"mini_batch_size": 4, "task_homogeneous": False},
            "same number of negatives; set num_hard_negatives",
        ),
        ("deepspeed", {"mini_batch_size": 4}, "several backward passes a step, which DeepSpeed does not take"),
        ("deepspeed", {"false_negative_margin": 0.1}, "several backward passes a step, which DeepSpeed does not take"),
    ],
    ids=str,
)
def test_what_processes_that_share_weights_would_wait_for_is_refused(
    tmp_path, model, processor, emoji, monkeypatch, sharded, options, message
):
    data = DatasetDict({"pairs": two_tasks(emoji)["names"], "hard": mixed_rows(emoji)})
    trainer = trainer_of(model, processor, data, tmp_path, **options)
    trainer.check_sharding()
    setattr(trainer, f"is_{sharded}_enabled", True)
    if sharded == "fsdp":
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", None, raising=False)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match=message):
        trainer.check_sharding()


def test_two_entries_of_one_name_are_an_error(tmp_path, emoji):
    emoji.to_parquet(str(tmp_path / "rows.parquet"))
    source = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}
    entry = {"query": "text", "positive": "image"}
    data = {"sources": {"rows": source}, "contrastive": {"a": {**entry, "variants": 2}, "a_2": entry}}
    with pytest.raises(ValueError, match="two datasets would be called 'a_2'"):
        contrastive_data(data, Path)


def test_matryoshka_needs_the_whole_length(tmp_path, model, processor, pairs):
    with pytest.raises(ValueError, match="must include the full size, 64"):
        trainer_of(model, processor, pairs, tmp_path, matryoshka_dims=[32, 16])


@pytest.mark.parametrize("source", ["options", "processor"])
def test_prompts_of_training_are_those_of_the_saved_model(tmp_path, model, processor, pairs, source):
    processor = copy.deepcopy(processor)
    options = {"query_prompt": "find", "target_prompt": "this"}
    if source == "processor":
        processor.prompt, options = "find", {}
    trainer = trainer_of(model, processor, pairs, tmp_path, **options)
    trainer.save_model(str(tmp_path / "final"))
    saved = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    target = "this" if source == "options" else "find"
    expected = [model_vectors(model, processor, "a cat", prompt) for prompt in ("find", target)]
    np.testing.assert_allclose([saved.encode_query("a cat"), saved.encode_document("a cat")], expected, atol=1e-5)


def model_vectors(model, processor, text, prompt):
    """The vector of a text behind a prompt."""
    return CocoaTransformer(model, processor).encode([text], prompt=prompt)[0]


@pytest.mark.parametrize("form", ["instance", "callable", "by dataset"])
def test_a_loss_of_ones_own_is_used(tmp_path, model, processor, pairs, form):
    module = SentenceTransformer(modules=[CocoaTransformer(model, processor)])
    loss = {
        "instance": CoSENTLike(module),
        "callable": CoSENTLike,
        "by dataset": {"one": CoSENTLike(module), "two": MultipleNegativesRankingLoss(module)},
    }[form]
    data = pairs if form != "by dataset" else DatasetDict({"one": pairs, "two": pairs})
    args = arguments(tmp_path)
    trainer = CocoaContrastiveTrainer(module, args, train_dataset=data, loss=loss)
    trainer.train()
    own = trainer.loss["one"] if form == "by dataset" else trainer.loss
    assert isinstance(own, CoSENTLike) and own.calls > 0
    with pytest.raises(ValueError, match=r"\['temperature'\] describe the trainer's own loss"):
        CocoaContrastiveTrainer(module, arguments(tmp_path, temperature=0.1), train_dataset=data, loss=loss)


class CoSENTLike(torch.nn.Module):
    """Distance of each query from its positive."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, sentence_features, labels=None):
        self.calls += 1
        query, positive = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return (1 - (query * positive).sum(-1)).mean()


def test_values_are_compared_in_several_datasets_with_prompts(tmp_path, model, processor, pairs):
    """sentence-transformers then adds the name of its dataset to every row, which is no equal value."""
    data = DatasetDict({"one": pairs, "two": pairs.select(range(32))})
    options = {"batch_sampler": "no_duplicates", "query_prompt": "Find it."}
    trainer = trainer_of(model, processor, data, tmp_path, **options)
    sizes = [len(batch) for batch in trainer.get_train_dataloader().batch_sampler]
    assert sum(sizes) == 96 and set(sizes) == {16}


def test_samplers_of_ones_own_are_used(tmp_path, model, processor, pairs):
    """By sentence-transformers' arguments, cut into the parts of processes as any other."""
    made = []

    def batch_sampler(dataset, **kwargs):
        made.append(len(dataset))
        kwargs.pop("valid_label_columns", None)
        seed, generator = kwargs.pop("seed"), kwargs.pop("generator")
        sampler = DefaultBatchSampler(SequentialSampler(dataset), generator=generator, seed=seed, **kwargs)
        return sampler

    def several(dataset, batch_samplers, generator, seed):
        return RoundRobinBatchSampler(dataset, batch_samplers=batch_samplers, generator=generator, seed=seed)

    data = DatasetDict({"one": pairs, "two": pairs.select(range(32))})
    options = {"batch_sampler": batch_sampler, "multi_dataset_batch_sampler": several}
    trainer = trainer_of(model, processor, data, tmp_path, **options)
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert made == [64, 32]
    assert batches[:2] == [list(range(16)), list(range(64, 80))]
    trainer.train()
    with pytest.raises(ValueError, match="no_duplicates=True has a batch_sampler of its own"):
        arguments(tmp_path, no_duplicates=True, batch_sampler=batch_sampler)


def test_a_model_given_by_name_is_loaded_with_model_init_kwargs(tmp_path, model, processor, pairs):
    save_cocoa(model, processor, tmp_path / "start")
    options = {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}}
    args = arguments(tmp_path / "run", **options)
    trainer = CocoaContrastiveTrainer(str(tmp_path / "start"), args, train_dataset=pairs)
    assert trainer.backbone.dtype == torch.bfloat16 and trainer.backbone.config._attn_implementation == "eager"
    trainer.train()
    plain = CocoaContrastiveTrainer(str(tmp_path / "start"), arguments(tmp_path / "run2"), train_dataset=pairs)
    assert plain.backbone.dtype == torch.float32
    assert arguments(tmp_path, model_init_kwargs='{"dtype": "float16"}').model_init_kwargs == {"dtype": "float16"}
    with pytest.raises(ValueError, match="are for a model that is given by name"):
        trainer_of(model, processor, pairs, tmp_path, **options)
