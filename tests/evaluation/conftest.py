# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for models, and one task of each kind in both layouts of MMEB-V1."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from evaluation.emoji_tasks import write_emoji_tasks
from evaluation.mmeb.data import load_tasks, read_task
from evaluation.mmeb.tasks import MMEB_V1

DIMENSIONS = 24
TINY = "checkpoints/cocoa-tiny"
MARKER = "<|image_1|>"
TASKS = {task.name: task for task in MMEB_V1}


class StubModel(torch.nn.Module):
    """`encode_query` and `encode_document` as sentence-transformers has them; the same input, the same vector."""

    def __init__(self):
        super().__init__()
        self.encoded = {"query": 0, "document": 0}

    def encode_query(self, inputs, **options):
        return self._encode("query", inputs, **options)

    def encode_document(self, inputs, **options):
        return self._encode("document", inputs, **options)

    def _encode(self, task, inputs, *, normalize_embeddings, show_progress_bar, batch_size=32):
        assert normalize_embeddings
        self.encoded[task] += len(inputs)
        return np.stack([self.vector(item) for item in inputs])

    @staticmethod
    def vector(item):
        data = item.tobytes() if isinstance(item, Image.Image) else item.encode()
        seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
        vector = np.random.default_rng(seed).normal(size=DIMENSIONS)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture(scope="session")
def stub_class():
    return StubModel


@pytest.fixture
def stub():
    return StubModel()


ROWS = {  # one task of each kind, as ziyjiang/MMEB_Test_Instruct has them
    "VOC2007": [
        {
            "qry_inst": f"{MARKER}\nIdentify the object", "qry_text": "", "qry_img_path": "a.png", "tgt_inst": "",
            "tgt_text": ["red", "blue", "red"], "tgt_img_path": ["", "", ""],
        },
        {
            "qry_inst": f"{MARKER}\nIdentify the object", "qry_text": "", "qry_img_path": "b.png", "tgt_inst": "",
            "tgt_text": ["blue", "red", "green"], "tgt_img_path": ["", "", ""],
        },
    ],
    "GQA": [
        {
            "qry_inst": f"{MARKER}\nAnswer:", "qry_text": "Which?", "qry_img_path": "a.png", "tgt_inst": "",
            "tgt_text": ["red", "blue"], "tgt_img_path": ["", ""],
        },
    ],
    "MSCOCO_t2i": [
        {
            "qry_inst": "Find it:", "qry_text": "red", "qry_img_path": "", "tgt_inst": f"{MARKER}\nRepresent it.",
            "tgt_text": ["", ""], "tgt_img_path": ["a.png", "b.png"],
        },
    ],
    "RefCOCO-Matching": [
        {
            "qry_inst": f"{MARKER}\nSelect", "qry_text": "'red'", "qry_img_path": "a.png",
            "tgt_inst": f"{MARKER}\nRepresent", "tgt_text": ["'red'", "'blue'"], "tgt_img_path": ["a.png", "a.png"],
        },
    ],
}  # fmt: skip
V1_ROWS = {  # the same as TIGER-Lab/MMEB-eval has them
    "VOC2007": [
        {
            "qry_text": f"{MARKER}\nIdentify the object\n", "qry_img_path": path,
            "tgt_text": texts, "tgt_img_path": [""] * 3,
        }
        for path, texts in (("a.png", ["red", "blue", "red"]), ("b.png", ["blue", "red", "green"]))
    ],
    "GQA": [
        {
            "qry_text": f"{MARKER}\nAnswer: Which?\n", "qry_img_path": "a.png",
            "tgt_text": ["red", "blue"], "tgt_img_path": ["", ""],
        }
    ],
    "MSCOCO_t2i": [
        {
            "qry_text": "Find it: red\n", "qry_img_path": "",
            "tgt_text": [f"{MARKER}\nRepresent it.\n"] * 2, "tgt_img_path": ["a.png", "b.png"],
        }
    ],
    "RefCOCO-Matching": [
        {
            "qry_text": f"{MARKER}\nSelect 'red'\n", "qry_img_path": "a.png",
            "tgt_text": [f"{MARKER}\nRepresent 'red'\n", f"{MARKER}\nRepresent 'blue'\n"],
            "tgt_img_path": ["a.png", "a.png"],
        }
    ],
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Writes rows below a folder, and pictures."""
    images = tmp_path / "images"
    images.mkdir()
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), color).save(images / f"{name}.png")

    def write(rows, name="data"):
        for task, of_task in rows.items():
            (tmp_path / name / task).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(of_task).to_parquet(str(tmp_path / name / task / "test-00000-of-00001.parquet"))
        return str(tmp_path / name)

    return write


def read(task, source, images, **options):
    """A task's queries and candidates, out of its files."""
    data = load_tasks([task], source, images)
    return read_task(task, data.rows[task], data.image_dir, **options)


RED, BLUE, BOTH = [1.0, 0.0], [0.0, 1.0], [2**-0.5, 2**-0.5]
VECTORS = {  # of an input, by its image and its text
    (None, "red"): RED,
    (None, "blue"): BLUE,
    (None, "green"): BLUE,  # ties with blue
    ("a.png", "Identify the object"): RED,
    ("b.png", "Identify the object"): BLUE,
    ("a.png", "Answer: Which?"): BLUE,  # wrong
    (None, "Find it: red"): RED,
    ("a.png", "Represent it."): RED,
    ("b.png", "Represent it."): BOTH,
    ("a.png", "Select 'red'"): BOTH,  # a tie of both candidates
    ("a.png", "Represent 'red'"): RED,
    ("a.png", "Represent 'blue'"): BLUE,
}


class Fixed:
    """An encoder with a given vector for each input, that counts."""

    name, fingerprint, weights = "fixed", "f" * 64, "w" * 64

    def __init__(self, table, image_resolution=None):
        self.table, self.image_resolution, self.seen = table, image_resolution, []

    def check(self, task, items):
        assert {item.image or item.text for item in items}

    def __call__(self, items):
        self.seen += items
        keys = [(item.image and Path(item.image).name, item.text.strip() or None) for item in items]
        return np.array([self.table[key] for key in keys], dtype=np.float32)


@pytest.fixture(scope="session")
def emoji(tmp_path_factory):
    return write_emoji_tasks(tmp_path_factory.mktemp("emoji") / "data", queries=6)
