# SPDX-License-Identifier: Apache-2.0
"""Equal content is equal, whatever it is called and whatever form it has."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from tests.trainers.test_contrastive_trainer import trainer_of
from trainers.data.content import content_key
from trainers.retrieval import retrieval_evaluator


@pytest.fixture
def forms(tmp_path):
    """One picture in every form that a cell may have."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    files = [tmp_path / name for name in ("one.png", "other.png", "third.bmp")]
    for file in files:
        image.save(file)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return [
        image,
        *map(str, files),
        {"image": str(files[0])},
        {"image": image},
        {"bytes": files[0].read_bytes(), "path": "called otherwise.png"},
        {"bytes": None, "path": str(files[1])},
        {"image": {"bytes": buffer.getvalue(), "path": None}},
        [{"role": "user", "content": [{"type": "image", "path": str(files[2])}]}],
    ]


def test_one_picture_has_one_key_in_every_form(forms, tmp_path):
    assert len({content_key(form) for form in forms}) == 1
    other = forms[0].copy()
    other.putpixel((0, 0), (1, 2, 3))
    others = [other, {"image": forms[0], "text": "a"}, "a", {"text": str(tmp_path / "one.png")}, " ", None]
    assert len({content_key(item) for item in [forms[0], *others]}) == len(others) + 1
    assert content_key("a") == content_key({"text": "a"})


@pytest.mark.parametrize("kind", [Value("string"), ImageFeature(), ImageFeature(decode=False)], ids=str)
@pytest.mark.parametrize("option", [{"no_duplicates": True}, {"batch_sampler": "no_duplicates"}], ids=str)
def test_no_step_has_equal_content_twice(tmp_path, model, processor, emoji, kind, option):
    """Four pictures, each as four files of other names and formats."""
    paths = []
    for number in range(4):
        for name in ("a.png", "b.png", "c.bmp", "d.tiff"):
            paths.append(str(tmp_path / f"{number}{name}"))
            emoji[number]["image"].convert("RGB").save(paths[-1])
    if isinstance(kind, Value):
        paths = [path.replace("d.tiff", "c.bmp") for path in paths]
    rows = {"query": [f"text {number}" for number in range(16)], "positive": paths}
    dataset = Dataset.from_dict(rows, features=Features({"query": Value("string"), "positive": kind}))
    options = {**option, "per_device_train_batch_size": 4}
    trainer = trainer_of(model, processor, dataset, tmp_path / "run", **options)
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert Counter(row for batch in batches for row in batch) == Counter(range(16))
    for batch in batches:
        assert len({row // 4 for row in batch}) == len(batch) == 4


def test_retrieval_counts_equal_content_once(forms, caplog):
    files = forms[1:4]
    rows = Dataset.from_dict({"query": ["a", "a", "b"], "positive": files})
    evaluator = retrieval_evaluator(rows).evaluators[0]
    assert len(evaluator.corpus) == 1 and len(evaluator.queries) == 2
    (told,) = caplog.messages
    assert "Held-out pairs: only 3, so figures of retrieval mean little. Queries: 2; candidates: 1," in told
    assert "chance finds 100 % first and 100 % among the first 10" in told


def test_of_queries_enough_nothing_is_said(caplog):
    many = Dataset.from_dict({"query": [f"q{i}" for i in range(50)], "positive": [f"p{i}" for i in range(50)]})
    retrieval_evaluator(many)
    assert not caplog.messages
    retrieval_evaluator({"birds": many.select(range(40))})
    assert "Held-out pairs (birds): only 40" in caplog.text and "2 % first and 25 % among" in caplog.text
