# SPDX-License-Identifier: Apache-2.0
"""Augmented pictures: changed a little, the same in every run, what they show still there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image

from trainers.data.augment import augment_images

ROOT = Path(__file__).parents[3]


@pytest.fixture
def source():
    rows = Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet")).select(range(0, 1900, 50))
    return rows.select_columns(["name", "noto", "twemoji"])


def pixels(pictures):
    return np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures])


def test_pictures_change_a_little_and_keep_what_they_show(source):
    changed = augment_images(source, ["noto"], seed=3)
    assert list(changed["name"]) == list(source["name"])
    assert (pixels(changed["twemoji"]) == pixels(source["twemoji"])).all()
    before, after = pixels(source["noto"]), pixels(changed["noto"])
    assert (before != after).any(axis=(1, 2, 3)).all()
    flat = [
        rows.reshape(len(rows), -1) - rows.reshape(len(rows), -1).mean(axis=1, keepdims=True)
        for rows in (before, after)
    ]
    flat = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in flat]
    nearest = (flat[1] @ flat[0].T).argmax(axis=1)
    assert (nearest == np.arange(len(source))).mean() > 0.7  # by chance 1 in 38


def test_the_seed_decides_and_the_run_s_own_draws_do_not_move(source):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = augment_images(source, ["noto"], seed=3)
    assert torch.equal(torch.rand(3), expected)
    same = augment_images(source, ["noto"], seed=3)
    other = augment_images(source, ["noto"], seed=4000)
    assert (pixels(first["noto"]) == pixels(same["noto"])).all()
    assert (pixels(first["noto"]) != pixels(other["noto"])).any()


def test_a_row_without_a_picture_stays_without():
    red = np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8)
    rows = Dataset.from_dict({"image": [red, None], "text": ["a", "b"]}).cast_column("image", Image())
    assert augment_images(rows, ["image"], seed=0)["image"][1] is None
