# SPDX-License-Identifier: Apache-2.0
"""Distillation: the loss is a plain reference's, each input is read once, and what does not fit is said."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from evaluation.assets import find_file
from trainers.contrastive_config import CocoaContrastiveConfig
from trainers.contrastive_trainer import CocoaContrastiveTrainer
from trainers.recipes.recipe import Recipe, run_recipe

TINY = str(Path(__file__).parents[2] / "checkpoints" / "cocoa-tiny")


class Counted(SentenceTransformer):
    """A model that keeps what it is asked to embed."""

    seen: list

    def encode(self, inputs, *args, **kwargs):
        """As ever."""
        self.seen += inputs
        return super().encode(inputs, *args, **kwargs)


@pytest.fixture
def text_teacher(processor):
    """A model of texts alone, with vectors of another length, which is not the student's."""
    return text_model(processor, seed=5)


def text_model(processor, seed):
    torch.manual_seed(seed)
    teacher = Counted(modules=[StaticEmbedding(processor.tokenizer, embedding_dim=24)], device="cpu")
    teacher.prompts = {"query": "query: ", "document": "passage: "}
    teacher.seen = []
    return teacher


@pytest.fixture
def image_teacher():
    return SentenceTransformer(TINY, device="cpu")


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "max_steps": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "temperature": 0.1,
    }
    return CocoaContrastiveConfig(output_dir=str(folder), **{**defaults, **options})


def cell(emoji, text=None, image=None):
    return {"text": text, "image": None if image is None else emoji[image]["image"]}


@pytest.fixture
def rows(emoji):
    """
    Texts and pictures on either side, a pair of two pictures, a text with a picture, an equal text twice, and two
    negatives: a text, and a picture.
    """
    kind = {"text": Value("string"), "image": ImageFeature()}
    queries = [cell(emoji, text=f"a {emoji[i]['text']}") for i in range(4)]
    queries += [cell(emoji, image=4), cell(emoji, image=5), cell(emoji, text="which?", image=6), cell(emoji, text="a")]
    positives = [*(cell(emoji, image=i) for i in (0, 1)), *(cell(emoji, text=emoji[i]["text"]) for i in (2, 3, 4))]
    positives += [cell(emoji, image=7), cell(emoji, text="this one"), cell(emoji, text=emoji[2]["text"])]
    columns = {
        "query": queries,
        "positive": positives,
        "negative_1": [cell(emoji, text=f"no {emoji[i]['text']}") for i in range(8)],
        "negative_2": [cell(emoji, image=8 + i) for i in range(8)],
    }
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, kind)))


def vectors_of(teacher, rows):
    """The teacher's vectors by column, each read by itself, `teacher` for both sides; None of what has none."""
    reads_images = teacher.supports("image")

    def form(value):
        if not reads_images or not any(value.values()):
            return None if value["image"] is not None else value["text"]
        content = [{"type": kind, kind: value[kind]} for kind in ("image", "text") if value[kind] is not None]
        return [{"role": "user", "content": content}]

    columns = {name: [form(row[name]) for row in rows] for name in rows.column_names}
    if (instead := columns.pop("teacher", None)) is not None:
        for name in ("query", "positive"):
            columns[name] = [first or own for first, own in zip(instead, columns[name], strict=True)]
    asked = {
        "query": [own or other for own, other in zip(columns["query"], columns["positive"], strict=True)],
        "positive": [own or other for own, other in zip(columns["positive"], columns["query"], strict=True)],
    }
    found = []
    for name, inputs in {**columns, **asked}.items():
        encode = teacher.encode_query if name == "query" else teacher.encode_document
        found.append([None if item is None else torch.tensor(encode([item])[0]).double() for item in inputs])
    return found


def cosine(one, other):
    return (one @ other) / one.norm() / other.norm()


def divergence(student, teacher, temperature):
    """The formula, a pair of a query and a document at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for query, known in zip(student[0], teacher[0], strict=True):
        if known is None:
            continue
        pairs = [
            (cosine(query, vector), cosine(known, wanted))
            for vectors, wanteds in zip(student[1:], teacher[1:], strict=True)
            for vector, wanted in zip(vectors, wanteds, strict=True)
            if wanted is not None
        ]
        found, wanted = (torch.stack(part) / temperature for part in zip(*pairs, strict=True))
        found, wanted = found.exp() / found.exp().sum(), wanted.exp() / wanted.exp().sum()
        total = total + (wanted * (wanted / found).log()).sum()
    return total / len(student[0])


def batch_of(trainer):
    dataset = trainer.train_dataset
    return trainer.collect_features(trainer.data_collator([dataset[row] for row in range(len(dataset))]))


def gradients_of(loss):
    return {name: value.grad for name, value in loss.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize(
    "options",
    [
        {"mini_batch_size": None},
        {"mini_batch_size": 3, "symmetric": True},
        {"mini_batch_num_tokens": 40},
        {"mini_batch_size": None, "matryoshka_dims": [64, 16], "matryoshka_weights": [1.0, 0.5]},
        {"mini_batch_size": 3, "matryoshka_dims": [64, 16], "matryoshka_weights": [1.0, 0.5]},
        {"mini_batch_size": 3, "learnable_temperature": True},
        {"mini_batch_size": None, "distillation_temperature": 0.3},
        {"mini_batch_size": 3, "false_negative_margin": 0.1},
        {"mini_batch_size": 3, "num_hard_negatives": 1},
        {"mini_batch_size": None, "num_hard_negatives": 0},
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_a_plain_reference(
    tmp_path, model, processor, rows, text_teacher, image_teacher, options, kind
):
    """What is added to the loss without a teacher; in float64, so that a difference is an error."""
    teacher = text_teacher if kind == "text" else image_teacher
    if options == {"mini_batch_size": None}:
        translations = [{"text": text, "image": None} for text in (*"abcde", None, *"fg")]
        rows = rows.add_column("teacher", translations, feature=rows.features["query"])
    plain_options = {name: value for name, value in options.items() if name != "distillation_temperature"}
    trainers = [
        CocoaContrastiveTrainer(
            copy.deepcopy(model).double(),
            arguments(tmp_path, **(options | {"distillation_weight": 0.7} if given else plain_options)),
            train_dataset=rows,
            processing_class=processor,
            teacher=given,
        )
        for given in (teacher, None)
    ]
    for trainer in trainers:
        trainer.model.eval()
    distilled, plain = trainers
    features, labels = batch_of(distilled)
    loss = distilled.loss(copy.copy(features), labels)
    (2 * loss).backward()  # gradient accumulation divides in this way
    features, _ = batch_of(plain)
    expected = plain.loss(features, None)
    expected.backward()
    columns = [plain.model(dict(part))["sentence_embedding"] for part in features]
    wanted = vectors_of(teacher, rows.select_columns(distilled.train_dataset.column_names))
    assert len(columns) == len(wanted), "the model does not read what the teacher does"
    assert any(vector is None for vector in wanted[1]) == (kind == "text")
    temperature = options.get("distillation_temperature", 0.1)
    weights = zip(options.get("matryoshka_dims", [64]), options.get("matryoshka_weights", [1.0]), strict=True)
    terms = [(weight, divergence([part[:, :dim] for part in columns], wanted, temperature)) for dim, weight in weights]
    added = 0.7 * sum(weight * term for weight, term in terms)
    added.backward()
    assert added > 0.01, "else this test says nothing"
    torch.testing.assert_close(loss, expected + added, atol=1e-5, rtol=1e-5, check_dtype=False)
    mean = torch.stack([term for _, term in terms]).mean()
    torch.testing.assert_close(distilled.distillation.take(), mean.detach(), atol=1e-5, rtol=1e-5, check_dtype=False)
    found, expected = gradients_of(distilled.loss), gradients_of(plain.loss)
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert (found[name] / 2 - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_each_input_is_read_once_and_teachers_are_not_mixed_up(tmp_path, model, processor, rows, text_teacher):
    def train(teacher, folder="run"):
        return CocoaContrastiveTrainer(
            copy.deepcopy(model),
            arguments(tmp_path / folder),
            train_dataset=rows,
            eval_dataset=rows.select(range(2)),
            processing_class=processor,
            teacher=teacher,
        ).distillation.vectors

    first = train(text_teacher)
    seen = list(text_teacher.seen)
    # 8 pairs less one of pictures, of which one has the same document as another; and the negatives.
    assert len(seen) == len(first) == 7 + 6 + 8
    again = train(text_teacher)
    assert text_teacher.seen == seen and torch.equal(again, first)
    other = text_model(processor, seed=6)
    changed = train(other)
    assert len(other.seen) == len(seen) and not torch.allclose(changed, first, atol=0.1)
    assert len(list((tmp_path / "run" / "teacher").iterdir())) == 2
    file, _ = next((tmp_path / "run" / "teacher").iterdir()).glob("*.safetensors")  # queries and documents
    file.write_bytes(file.read_bytes()[:-10])
    text_teacher.seen, other.seen = [], []
    assert torch.equal(train(text_teacher), first) and torch.equal(train(other), changed)
    assert len(text_teacher.seen + other.seen) in (7, 6 + 8), "of the damaged file"


@pytest.mark.parametrize("options", [{}, {"bf16": True, "mini_batch_size": None}], ids=str)
def test_a_run_follows_its_teacher_and_names_it(tmp_path, emoji, processor, options):
    pairs = emoji.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})
    steps = {"max_steps": 20, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1, **options}
    steps |= {"learning_rate": 3e-4, "save_strategy": "steps", "save_steps": 10, "distillation_weight": 5.0}
    trainer = CocoaContrastiveTrainer(
        TINY,
        arguments(tmp_path, **steps),
        train_dataset=pairs.select(range(16)),
        eval_dataset=pairs.select(range(16, 32)),
        teacher=text_model(processor, seed=5),
    )
    trainer.train()
    logged = [entry["loss_distillation"] for entry in trainer.state.log_history if "loss_distillation" in entry]
    assert len(logged) == 20 and sum(logged[-4:]) < 0.9 * sum(logged[:4]), logged
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "final"))
    record = json.loads((tmp_path / "final" / "training.json").read_text())["stages"][-1]
    assert record["settings"]["teacher"] == "StaticEmbedding" and record["settings"]["distillation_weight"] == 5.0
    assert record["losses"]["loss_distillation"] == logged[-1]
    assert "| `teacher` |" in (tmp_path / "final" / "README.md").read_text()
    other = CocoaContrastiveTrainer(
        TINY,
        arguments(tmp_path, **{**steps, "max_steps": 22}),
        train_dataset=pairs.select(range(16)),
        teacher=text_model(processor, seed=6),
    )
    with pytest.raises(ValueError, match="teacher_weights was"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("reads", [{}, {"teacher": "text"}], ids=["both sides", "the text for both"])
def test_a_recipe_has_a_teacher_by_folder(tmp_path, emoji, reads):
    emoji.select(range(16)).select_columns(["text", "image"]).to_parquet(str(tmp_path / "rows.parquet"))
    options = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    values = {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": TINY},
        "data": {
            "sources": {"rows": {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}},
            "contrastive": {"rows": {"query": "text", "positive": "image", **reads}},
        },
        "stages": {"contrastive": {**options, "teacher": TINY, "distillation_weight": 0.3}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    folder = Path(run_recipe(Recipe.load(tmp_path / "recipe.yaml"), find_file))
    record = json.loads((folder / "training.json").read_text())["stages"][-1]
    assert record["settings"]["teacher"].endswith("checkpoints/cocoa-tiny")
    begins_as_its_teacher = record["losses"]["loss_distillation"] < 1e-3
    assert begins_as_its_teacher != bool(reads), "which reads the image, or the text in its place"


def test_pairs_that_the_teacher_reads_no_side_of_are_counted_or_refused(
    tmp_path, model, processor, rows, text_teacher, caplog
):
    given = {"processing_class": processor, "teacher": text_teacher}
    CocoaContrastiveTrainer(model, arguments(tmp_path), train_dataset=rows, **given)
    assert "training data: the teacher reads neither side of 1 of 8 pairs" in caplog.text
    pictures = rows.select([5, 5]).select_columns(["query", "positive"])
    with pytest.raises(ValueError, match=r"The teacher reads \['text'\], and that is neither side of any pair"):
        CocoaContrastiveTrainer(model, arguments(tmp_path), train_dataset=pictures, **given)


@pytest.mark.parametrize(
    ("options", "has_teacher", "loss", "message"),
    [
        ({"distillation_weight": 0.7}, False, None, "there is no teacher; give one"),
        ({"distillation_temperature": 0.7}, False, None, "there is no teacher; give one"),
        ({"teacher": "./nofolder"}, False, None, "teacher: ./nofolder is neither the folder of a model"),
        ({"teacher": TINY}, True, None, "args.teacher is .*; leave one of them out"),
        ({}, True, MultipleNegativesRankingLoss, "A teacher adds to the trainer's own loss"),
        ({"teacher": TINY}, False, MultipleNegativesRankingLoss, r"'teacher'\] describe the trainer's own loss"),
    ],
)
def test_what_does_not_fit_is_said_before_a_model_is_loaded(
    tmp_path, rows, text_teacher, options, has_teacher, loss, message
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CocoaContrastiveTrainer(
            "no/such/model",
            arguments(tmp_path, **options),
            train_dataset=rows,
            teacher=text_teacher if has_teacher else None,
            loss=loss,
        )
