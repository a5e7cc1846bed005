# SPDX-License-Identifier: Apache-2.0
"""What the app's events do, without a browser: what is found, what is rebuilt, and how errors are said."""

from __future__ import annotations

import json
import logging
import re
import runpy
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from evaluation.assets import asset_path
from evaluation.demo import CHECKPOINT
from hub_cards.training_record import StageRecord, read_records, write_records
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.reconstruction import HEADS_FILE
from modeling_cocoa.sentence_transformer import CocoaTransformer
from tests.hub_cards.app_server import train_bridge, write_pictures
from tests.trainers.conftest import ROOT

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'cocoa-embed[app]'")

from hub_cards.space.app import Page, about_rebuilding, build_app, caption, read_box, serve  # noqa: E402
from hub_cards.space.index import Found, PictureSet, SearchIndex, read_prompts  # noqa: E402
from hub_cards.space.rebuilding import Rebuilder  # noqa: E402

PICTURES = 24


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of emoji, and their names."""
    folder = tmp_path_factory.mktemp("app") / "pictures"
    return folder, write_pictures(folder, PICTURES)


@pytest.fixture(scope="session")
def encoder() -> CocoaTransformer:
    """The tiny checkpoint."""
    return CocoaTransformer(asset_path(CHECKPOINT))


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """A run of the bridge stage; its model is saved in its `output_dir`."""
    return train_bridge(tmp_path_factory.mktemp("bridge"))


@pytest.fixture(scope="session")
def page(pictures, encoder, trainer) -> Page:
    """The page on the folder of pictures, with a model that rebuilds."""
    index = SearchIndex(encoder, PictureSet.load(pictures[0]), {})
    return Page(index, Rebuilder.from_pretrained(trainer.args.output_dir))


def test_the_emoji_are_searched_where_no_folder_is_named():
    rows = PictureSet.load()
    assert len(rows.pictures) == len(rows.names) == len(rows.texts) == 1906
    assert rows.picture(rows.names.index("red heart")).size == (64, 64)
    assert len(rows.examples()) == 4 and max(rows.examples()) < 1906


def test_a_folder_is_searched_with_its_texts_and_without(pictures, tmp_path):
    rows = PictureSet.load(pictures[0])
    assert rows.names == rows.texts == pictures[1] and set(rows.queries) < set(rows.texts)
    (tmp_path / "bare" / "inner").mkdir(parents=True)
    Image.new("RGB", (1200, 600), "red").save(tmp_path / "bare" / "inner" / "red.png")
    rows = PictureSet.load(tmp_path / "bare")
    assert (rows.names, rows.texts, rows.examples()) == (["inner/red.png"], [], [0])
    assert rows.picture(0).size == (512, 256), "scaled down for the page"
    (tmp_path / "bare" / "metadata.csv").write_text("file_name,text\ninner/red.png,7\n")
    assert PictureSet.load(tmp_path / "bare").texts == ["7"]


def test_a_folder_that_holds_nothing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of pictures .*none; check the path"):
        PictureSet.load(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no pictures"):
        PictureSet.load(tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="holds no pictures"):
        PictureSet.load(tmp_path)


def test_pictures_that_cannot_be_read_are_left_out_counted_and_named(encoder, tmp_path, caplog):
    for number, name in enumerate(("a.png", "c.png", "e.png")):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(tmp_path / name)
    for name in ("b.png", "d.png"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        index = SearchIndex(encoder, PictureSet.load(tmp_path), {})
    assert index.rows.names == ["a.png", "c.png", "e.png"] and len(index.pictures) == 3
    left_out = "2 cannot be read and are left out. Left out, since Pillow does not open them as images: 1 .txt."
    assert index.rows.left_out == left_out
    assert re.search(r"cannot be read: 2\. .*b\.png is corrupt.*d\.png is corrupt", caplog.text)
    for place, name in enumerate(index.rows.names):
        assert index.search({"image": Image.open(tmp_path / name)})[0][0][:2] == (place, name)
    assert index.rows.picture(2).getpixel((0, 0)) == (160, 0, 0)
    for name in ("a.png", "c.png", "e.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"No picture of .* can be read\. .*b\.png is corrupt"):
        SearchIndex(encoder, PictureSet.load(tmp_path), {})


def test_a_picture_and_a_text_of_the_set_find_themselves(page, pictures):
    folder, names = pictures
    found, texts, places = page.search({"text": "", "files": [str(folder / "005.png")]})
    assert found[0][1] == f"{names[5]}\n1.000" and places[0] == 5 and len(found) == len(set(places)) == 12
    assert found[0][0].size == (64, 64)
    assert page.search({"text": names[3], "files": []})[1][0] == [names[3], "1.000"]


def test_scores_are_those_of_the_vectors(page, pictures, encoder):
    folder, names = pictures
    query = {"image": Image.open(folder / "000.png"), "text": "a red cat"}
    found, texts = page.index.search(query)
    (vector,) = encoder.encode([query])
    files = [{"image": str(folder / f"{place:03}.png")} for place in range(PICTURES)]
    for hits, inputs in ((found, files), (texts, names)):
        scores = encoder.encode(inputs) @ vector
        assert [hit.place for hit in hits] == np.argsort(-scores)[: len(hits)].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][: len(hits)], atol=1e-5)


def test_a_long_text_is_cut_under_its_picture_only():
    assert caption(Found(0, "a" * 300, 0.25)) == "a" * 99 + "…\n0.250"


def test_words_that_are_a_path_are_words(page, pictures):
    file = str(pictures[0] / "005.png")
    assert all(not caption.endswith("1.000") for _, caption in page.search({"text": file, "files": []})[0])


def test_a_picture_that_was_found_is_asked_with_its_name(page, pictures):
    event = gr.SelectData(None, {"index": 1, "value": None})
    box = page.choose([7, 4], event)
    assert box["text"] == pictures[1][4] and list(read_box(box)) == ["image", "text"]
    assert np.array_equal(read_box(box)["image"], Image.open(pictures[0] / "004.png"))


def test_the_saved_prompts_are_used(pictures, tmp_path, encoder):
    folder = tmp_path / "model"
    shutil.copytree(asset_path(CHECKPOINT), folder)
    assert read_prompts(folder) == {}
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "Find: ", "document": "Read: ", "other": "No: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert read_prompts(folder) == {"query": "Find: ", "document": "Read: "}
    index = SearchIndex(CocoaTransformer(folder), PictureSet.load(pictures[0]), read_prompts(folder))
    model = SentenceTransformer(str(folder), device="cpu")
    scores = model.encode_document(pictures[1]) @ model.encode_query("a cat")
    best = int(scores.argmax())
    hit = index.search({"text": "a cat"})[1][0]
    assert hit.name == pictures[1][best] and hit.score == pytest.approx(scores[best], abs=1e-5)


def test_kept_vectors_are_those_of_the_content(encoder, tmp_path, monkeypatch):
    """A second start embeds what is new or has changed, another prompt all anew; a corrupt picture loses nothing."""
    folder = tmp_path / "pictures"
    write_pictures(folder, 7)
    (folder / "006.png").write_bytes(b"\x89PNG no picture")
    seen = []
    encode = encoder.encode

    def count(inputs, **options):
        vectors = encode(inputs, **options)
        seen.append(len(inputs))
        return vectors

    monkeypatch.setattr(encoder, "encode", count)

    def start(prompts=None, vectors=tmp_path / "vectors"):
        seen.clear()
        index = SearchIndex(encoder, PictureSet.load(folder), prompts or {}, vectors)
        return index, sum(seen)

    plain, embedded = start(vectors=None)
    first, again = start()
    assert again == embedded > 0
    second, none = start()
    assert none == 0
    for index in (first, second):
        np.testing.assert_array_equal(index.pictures, plain.pictures)
        np.testing.assert_array_equal(index.texts, plain.texts)
        assert index.rows.names == plain.rows.names and "1 cannot be read" in index.rows.left_out
    shutil.copyfile(folder / "000.png", folder / "001.png")
    Image.new("RGB", (64, 64), "teal").save(folder / "002.png")
    changed, new = start()
    assert new == 1, "a copy is known by its content"
    np.testing.assert_array_equal(changed.pictures[1], changed.pictures[0])
    assert start({"document": "Find it."})[1] == embedded - 1


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (None, "there is nothing to look for: type words, or drop a picture."),
        ({"text": "  \n", "files": []}, "there is nothing to look for"),
        ({"text": "\ud800", "files": []}, "not valid Unicode"),
        ({"text": "", "files": ["<b>no<b>.png"]}, "&lt;b&gt;no&lt;b&gt;.png cannot be read as an image"),
        ({"text": "", "files": ["huge.png"]}, "huge.png is 10000x9000 pixels, more than the limit"),
        ({"text": "", "files": ["line.png"]}, "line.png is 900x4 pixels; one side may be at most 200 times the other"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("event", ["search", "rebuild"])
def test_an_input_that_cannot_be_read_is_one_line_of_text(page, tmp_path, box, reason, event):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "huge.png")
    Image.new("RGB", (900, 4)).save(tmp_path / "line.png")
    (tmp_path / "<b>no<b>.png").write_text("no picture")
    files = [str(tmp_path / name) for name in (box or {}).get("files", ())]
    with pytest.raises(gr.Error) as caught:
        getattr(page, event)(None if box is None else {**box, "files": files})
    message = caught.value.message
    assert reason in message and "<" not in message
    assert str(tmp_path) not in message and "\n" not in message and not caught.value.print_exception


def test_each_kind_of_input_is_rebuilt_in_the_directions_that_it_can_serve(page, pictures):
    file = str(pictures[0] / "000.png")
    rebuilt, texts = page.rebuild({"text": "", "files": [file]})
    names = ["as it is", "what is hidden: all of it"]
    assert [caption for _, caption in rebuilt] == [*names, "rebuilt from the picture"] and texts == []
    rebuilt, texts = page.rebuild({"text": "black cat", "files": []})
    assert rebuilt == [] and [row[:2] for row in texts] == [["the words", "black cat"]]
    rebuilt, texts = page.rebuild({"text": "black cat", "files": [file]})
    sources = ["the words", "the picture", "both"]
    assert [caption for _, caption in rebuilt] == [*names, *(f"rebuilt from {source}" for source in sources)]
    assert [row[:2] for row in texts] == [[source, "black cat"] for source in ("the picture", "the words", "both")]


def test_versions_are_the_target_itself_what_is_hidden_and_the_models_own(page, pictures):
    picture = Image.open(pictures[0] / "000.png").convert("RGB")
    words = "a black cat sits in the rain and looks at a red train"
    (versions,) = [found.pictures for found in page.rebuilder.rebuild({"image": picture})]
    original = np.asarray(versions.original, dtype=float)
    assert np.abs(original - np.asarray(picture.resize((128, 128)), dtype=float)).mean() < 12
    assert len(np.unique(np.asarray(versions.hidden))) == 1
    assert not np.array_equal(versions.rebuilt, versions.original)
    (versions,) = [found.texts for found in page.rebuilder.rebuild({"text": words})]
    assert versions.original == words and versions.rebuilt != words
    tokenizer = page.rebuilder.processor.tokenizer
    tokens = len(tokenizer(words, add_special_tokens=False)["input_ids"])
    assert versions.hidden.count("_") == round(0.6 * tokens), "the ratio that the checkpoint was trained with"
    assert page.rebuilder.rebuild({"text": words})[0].texts == versions, "masked alike each time"


def test_a_target_is_rebuilt_from_its_source_and_nothing_else(page, pictures):
    """Another picture beside the same words: what is rebuilt from the words stays as it is, to the last bit."""
    found = []
    for name in ("000.png", "020.png"):
        query = {"image": Image.open(pictures[0] / name).convert("RGB"), "text": "black cat"}
        found.append({rebuilt.direction: rebuilt for rebuilt in page.rebuilder.rebuild(query)})
    one, other = ({name: value.pictures for name, value in rebuilt.items()} for rebuilt in found)
    assert not np.array_equal(one["text_to_image"].original, other["text_to_image"].original)
    for direction, differs in (("text_to_image", False), ("image_to_image", True), ("both_to_both", True)):
        assert np.array_equal(one[direction].rebuilt, other[direction].rebuilt) is not differs
    assert found[0]["text_to_text"].texts == found[1]["text_to_text"].texts


def test_a_checkpoint_is_rebuilt_with_as_it_was_trained(trainer, tmp_path):
    source = Path(trainer.args.output_dir)
    rebuilder = Rebuilder.from_pretrained(source)
    assert not rebuilder.model.normalize_pixels and rebuilder.model.bridge == "layerwise"
    assert (rebuilder.collator.source_mask_ratio, rebuilder.collator.target_mask_ratio) == (0.15, 0.6)
    assert "60% are hidden" in about_rebuilding(source, source, rebuilder)
    assert "brightness" not in about_rebuilding(source, source, rebuilder)

    assert rebuilder.model.eos_sees_target and rebuilder.rebuilds_images

    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    *_, record = read_records(source)
    write_records(folder, [replace(record, settings={"bridge": "layerwise", "eos_sees_target": True})])
    rebuilder = Rebuilder.from_pretrained(folder)
    assert set(rebuilder.directions) == {"image_to_text", "text_to_text"} and not rebuilder.rebuilds_images
    assert rebuilder.collator.source_mask_ratio == 0
    with pytest.raises(CocoaInputError, match="this model was trained to rebuild; give image and text or"):
        rebuilder.rebuild({"image": Image.new("RGB", (64, 64))})
    assert [found.direction for found in rebuilder.rebuild({"text": "black cat"})] == ["text_to_text"]
    about = about_rebuilding(folder, folder, rebuilder)
    assert "hidden completely" not in about and "the words are rebuilt from themselves and from the image" in about

    # A record from before the EOS could see the target.
    settings = {"bridge": "embedding", "normalize_pixels": True}
    write_records(folder, [replace(record, settings=settings)])
    rebuilder = Rebuilder.from_pretrained(folder)
    assert rebuilder.model.normalize_pixels and rebuilder.model.bridge == "embedding"
    assert not rebuilder.model.eos_sees_target and len(rebuilder.directions) == 5
    assert rebuilder.collator.source_mask_ratio == 0.15
    assert "70% are hidden" in about_rebuilding(folder, folder, rebuilder)
    assert "each is drawn around grey, at one contrast" in about_rebuilding(folder, folder, rebuilder)

    write_records(folder, [replace(record, stage="warmup")])
    with pytest.raises(ValueError, match="was last trained in the stage 'warmup', and only the bridge stage"):
        Rebuilder.from_pretrained(folder)
    (folder / "training.json").unlink()
    with pytest.raises(ValueError, match="has no training.json, and only the bridge stage"):
        Rebuilder.from_pretrained(folder)
    (folder / HEADS_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {HEADS_FILE}, which rebuilds: name a checkpoint"):
        Rebuilder.from_pretrained(folder)


def component(app, name: str) -> dict:
    """A component of a page, by its `elem_id`."""
    return next(part for part in app.config["components"] if part["props"].get("elem_id") == name)


def test_without_heads_the_page_says_what_is_missing_and_searches(pictures):
    app = build_app(asset_path(CHECKPOINT), pictures=pictures[0])
    about = component(app, "about-rebuilding")["props"]["value"]
    assert f"`checkpoints/cocoa-tiny` has no file `{HEADS_FILE}`" in about and "--rebuild-model" in about
    assert not [part for part in app.config["components"] if part["props"].get("elem_id") == "rebuild"]
    assert {part["api_name"] for part in app.config["dependencies"]} >= {"search"}
    assert app.analytics_enabled is False


def test_a_model_with_heads_needs_no_second_one(trainer, pictures):
    app = build_app(trainer.args.output_dir, pictures=pictures[0])
    assert component(app, "rebuild")["type"] == "button"
    assert "from that one token alone" in component(app, "about-rebuilding")["props"]["value"]


def test_a_model_of_another_stage_searches_and_the_page_says_why_it_rebuilds_nothing(trainer, pictures, tmp_path):
    folder = shutil.copytree(trainer.args.output_dir, tmp_path / "warmup")
    write_records(folder, [StageRecord("warmup")])
    about = component(build_app(folder, pictures=pictures[0]), "about-rebuilding")["props"]["value"]
    assert "was not trained last in the bridge stage" in about


def test_a_port_that_is_taken_is_said(pictures):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot be served on port {port}; name another"):
            serve(pictures=pictures[0], port=port)


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cocoa-embed\[app\]'"):
        runpy.run_path(str(ROOT / "hub_cards" / "space" / "app.py"))
