# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end on the whole emoji set, with a stand-in for the model."""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from cocoa.demo.demo import load_checkpoint, run_demo
from cocoa.demo.scores import EmojiBaselines, EmojiEmbeddings, embed_emoji, score_emoji
from evaluation.emoji import load_emoji
from evaluation.vectors import VectorStore

SCRIPT = '<script>alert("1")</script> & [red]'


@pytest.fixture(scope="module")
def demo(tmp_path_factory, stub_class):
    """A run of the demo with a model that knows nothing: its folder, what it printed, and the model."""
    folder, model, output = tmp_path_factory.mktemp("demo"), stub_class(), io.StringIO()
    console = Console(file=output, width=80)
    result = run_demo(model, folder / "page", queries=["red heart", SCRIPT], console=console)
    return folder / "page", result, output.getvalue(), model


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


def test_the_set_is_whole_and_its_splits_are_apart(emoji):
    splits = np.array(emoji["split"])
    assert {split: int((splits == split).sum()) for split in set(splits)} == {
        "train": 1500,
        "validation": 156,
        "test": 250,
    }
    assert len(set(emoji["name"])) == len(emoji) == 1906
    assert emoji[0]["noto"].size == emoji[0]["twemoji"].size == (64, 64)


def test_names_are_queries_and_pictures_documents(demo, emoji):
    pictures = {image.convert("RGB").tobytes() for style in ("noto", "twemoji") for image in emoji[style]}
    assert demo[3].encoded == {"query": 1906 + 2, "document": len(pictures)}, "and each once"


def test_a_model_that_knows_nothing_scores_as_chance_and_below_both_baselines(demo):
    scores = demo[1]["scores"]
    assert [(score["split"], score["style"], score["direction"]) for score in scores] == [
        (split, style, direction)
        for split in ("train", "test")
        for style in ("noto", "twemoji")
        for direction in ("name_to_image", "image_to_name")
    ]
    for score in scores:
        assert score["candidates"] == {"train": 1500, "test": 250}[score["split"]]
        for k in (1, 5, 10):
            key = f"recall@{k}"
            assert score["chance"][key] == pytest.approx(k / score["candidates"])
            spread = 4 * np.sqrt(score["chance"][key] / score["candidates"])
            assert abs(score["model"][key]["value"] - score["chance"][key]) < spread
            assert score["baseline"][key]["low"] > score["model"][key]["high"]
            assert score["baseline"][key]["low"] <= score["baseline"][key]["value"] <= score["baseline"][key]["high"]


def test_the_baselines_are_those_that_the_readme_quotes(demo):
    at_one = {
        (score["split"], score["style"], score["direction"]): score["baseline"]["recall@1"]["value"]
        for score in demo[1]["scores"]
    }
    # A picture shrunk or a matrix product taken on another machine may move a few ranks, not more.
    assert at_one["train", "twemoji", "name_to_image"] == pytest.approx(0.367, abs=0.005)
    assert at_one["train", "noto", "name_to_image"] == pytest.approx(0.419, abs=0.005)
    assert at_one["test", "noto", "name_to_image"] == pytest.approx(0.104, abs=0.02)
    assert at_one["test", "noto", "image_to_name"] == pytest.approx(0.064, abs=0.02)


def test_a_model_that_knows_its_seen_pictures_only_is_told_apart_from_one_that_knows_all(emoji):
    names = np.random.default_rng(0).normal(size=(len(emoji), 64)).astype(np.float32)
    names /= np.linalg.norm(names, axis=1, keepdims=True)
    held_out = np.array(emoji["split"]) == "test"
    shuffled = names.copy()
    shuffled[held_out] = np.roll(names[held_out], 1, axis=0)
    sizes = {"train": 1500, "test": 250}
    nothing = {(split, style): np.zeros((sizes[split],) * 2) for split in sizes for style in ("noto", "twemoji")}
    baselines = EmojiBaselines(nothing, {"train": "none", "test": "none"})
    scores = score_emoji(emoji, EmojiEmbeddings(names, {"noto": names, "twemoji": shuffled}), baselines)
    assert all(score.baseline[10].value == 0 for score in scores)
    at_one = {(score.split, score.style, score.direction): score.model[1].value for score in scores}
    for direction in ("name_to_image", "image_to_name"):
        assert at_one["train", "noto", direction] == at_one["test", "noto", direction] == 1
        assert at_one["train", "twemoji", direction] == 1 and at_one["test", "twemoji", direction] == 0


def test_embeddings_come_in_the_order_of_the_inputs_and_are_kept(stub, emoji, tmp_path):
    names, images = emoji["name"][:7], {"noto": emoji[:7]["noto"], "twemoji": emoji[:7]["noto"]}
    for vectors in (names, names[:3] + ["another"] + names[4:]):
        embeddings = embed_emoji(stub, vectors, images, VectorStore(tmp_path), batch_size=3)
        np.testing.assert_array_equal(embeddings.names, np.stack([stub.vector(name) for name in vectors]))
        for style, of_style in images.items():
            expected = np.stack([stub.vector(image) for image in of_style])
            np.testing.assert_array_equal(embeddings.images[style], expected)
    assert stub.encoded == {"query": 7 + 1, "document": 7}, "each once"


def test_another_query_embeds_nothing_else_and_another_model_all_anew(demo, stub_class, tmp_path):
    shutil.copytree(demo[0], tmp_path, dirs_exist_ok=True)
    again, other = stub_class(), stub_class()
    found = run_demo(again, tmp_path, queries=["red heart"], console=Console(file=io.StringIO()))
    assert again.encoded == {"query": 1, "document": 0}
    assert found["scores"] == demo[1]["scores"]
    assert found["queries"]["red heart"] == pytest.approx(demo[1]["queries"]["red heart"], abs=1e-6)
    other.register_buffer("weight", torch.ones(1))
    run_demo(other, tmp_path, queries=["red heart"], console=Console(file=io.StringIO()))
    assert other.encoded["query"] == 1906 + 1


def test_what_is_printed_fits_a_narrow_terminal_and_says_where_the_page_is(demo):
    folder, _, output, _ = demo
    unwrapped = [line for line in output.splitlines() if str(folder) not in line]
    assert max(map(len, unwrapped)) <= 80 and "…" not in output
    for text in ("1,500 candidates", "250 candidates", "CoCoA", "look-up", "ridge", "chance", "red heart", SCRIPT):
        assert text in output
    assert str(folder / "index.html") in output


def test_the_page_holds_all_that_it_shows_and_no_query_can_become_markup(demo):
    folder, result, _, _ = demo
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; [red]" in page
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 10
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import', page)
    for name, score in result["queries"]["red heart"].items():
        assert f"{score:.3f}" in page and name.replace("&", "&amp;").replace("'", "&#x27;") in page
    assert page.count("<table>") == 2


def test_the_five_found_are_the_nearest_in_order(demo, emoji):
    _, result, _, model = demo
    documents = np.stack([model.vector(image.convert("RGB")) for image in emoji["noto"]])
    cosines = documents @ model.vector("red heart")
    best = np.argsort(-cosines)[:5]
    found = result["queries"]["red heart"]
    assert list(found) == [emoji["name"][int(row)] for row in best]
    np.testing.assert_allclose(list(found.values()), cosines[best], rtol=1e-5)


def test_the_numbers_are_written_as_returned(demo):
    folder, result, _, _ = demo
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))


def test_what_cannot_be_run_says_so_first(tmp_path, stub):
    with pytest.raises(FileNotFoundError, match="holds no sentence-transformers checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere holds no"):
        run_demo(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match="Query 1: there is no image file cat.png"):
        run_demo(stub, tmp_path, queries=["cat", "cat.png"])
    with pytest.raises(ValueError, match="Query 1 is empty"):
        run_demo(stub, tmp_path, queries=["red heart", "  "])
    assert not stub.encoded["document"]
