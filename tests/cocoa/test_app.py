# SPDX-License-Identifier: Apache-2.0
"""The app's events without a browser: search, reconstruction, and error messages."""

from __future__ import annotations

import io
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

from cocoa.demo.demo import CHECKPOINT
from evaluation.assets import asset_path
from hub_cards.training_record import StageRecord, read_records, write_records
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.reconstruction import HEADS_FILE
from modeling_cocoa.sentence_transformer import CocoaTransformer
from tests.cocoa.app_server import train_bridge, write_images
from tests.trainers.conftest import ROOT

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'cocoa-embed[app]'")

from cocoa.app.app import Page, build_app, choose, describe_reconstruction, read_box, serve, spread  # noqa: E402
from cocoa.app.index import SearchIndex, describe_other_files, load_images  # noqa: E402
from cocoa.app.reconstruction import Reconstructor  # noqa: E402

COUNT = 24


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of emoji, and their names."""
    folder = tmp_path_factory.mktemp("app") / "images"
    return folder, write_images(folder, COUNT)


@pytest.fixture(scope="session")
def encoder() -> CocoaTransformer:
    """The tiny checkpoint."""
    return CocoaTransformer(asset_path(CHECKPOINT))


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """A run of the bridge stage; its model is saved in its `output_dir`."""
    return train_bridge(tmp_path_factory.mktemp("bridge"))


@pytest.fixture(scope="session")
def page(images, encoder, trainer) -> Page:
    """The page on the folder of images, with a model that reconstructs."""
    index = SearchIndex(encoder, load_images(images[0]), {})
    return Page(index, Reconstructor(trainer.args.output_dir))


def test_the_emoji_are_searched_where_no_folder_is_named():
    rows = load_images()
    assert len(rows) == len(set(rows["text"])) == 1906 and rows["name"] == rows["text"]
    heart = rows[list(rows["name"]).index("red heart")]
    assert Image.open(io.BytesIO(heart["image"]["bytes"])).size == (64, 64)


def test_a_folder_is_searched_with_its_texts_and_without(images, tmp_path, encoder):
    rows = load_images(images[0])
    assert list(rows["name"]) == list(rows["text"]) == images[1] and set(spread(images[1])) < set(images[1])
    (tmp_path / "bare" / "inner").mkdir(parents=True)
    Image.new("RGB", (1200, 600), "red").save(tmp_path / "bare" / "inner" / "red.png")
    rows = load_images(tmp_path / "bare")
    assert list(rows["name"]) == ["inner/red.png"] and list(rows["text"]) == [None]
    page = Page(SearchIndex(encoder, rows, {}))
    assert page.image(0).size == (512, 256), "scaled down for the page"
    assert page.search({"text": "red", "files": []})[1] == [] and len(page.examples([])) == 1
    (tmp_path / "bare" / "metadata.csv").write_text("file_name,text\ninner/red.png,7\n")
    assert list(load_images(tmp_path / "bare")["text"]) == ["7"]


def test_a_folder_that_holds_no_images_is_an_error(tmp_path):
    with pytest.raises(NotADirectoryError, match="There is no folder .*none"):
        load_images(tmp_path / "none")
    with pytest.raises(ValueError, match="contains no images"):
        load_images(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="contains no images"):
        load_images(tmp_path)


def test_images_that_cannot_be_read_are_left_out_counted_and_named(encoder, tmp_path, caplog):
    for number, name in enumerate(("a.png", "c.png", "e.png")):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(tmp_path / name)
    for name in ("b.png", "d.png"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no image")
    rows = load_images(tmp_path)
    with caplog.at_level(logging.WARNING):
        index = SearchIndex(encoder, rows, {})
    assert list(index.rows["name"]) == ["a.png", "c.png", "e.png"] and len(index.image_vectors) == 3
    assert describe_other_files(tmp_path, rows) == "Left out, since Pillow does not open them as images: 1 .txt."
    assert re.search(
        r"cannot be read: 2\. .*b\.png cannot be read as an image.*d\.png cannot be read as an image", caplog.text
    )
    for place, name in enumerate(index.rows["name"]):
        assert index.search({"image": Image.open(tmp_path / name)})[0][0]["corpus_id"] == place
    assert Page(index).image(2).getpixel((0, 0)) == (160, 0, 0)
    title = component(build_app(asset_path(CHECKPOINT), images=tmp_path), "title")["props"]["value"]
    assert "It searches 3 images of the folder" in title and "2 cannot be read and are left out. Left out" in title
    for name in ("a.png", "c.png", "e.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"None of the images can be read\. .*b\.png cannot be read as an image"):
        SearchIndex(encoder, load_images(tmp_path), {})


def test_an_image_that_metadata_names_and_is_not_there_is_left_out(encoder, tmp_path, caplog):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\ngone.png,b\n")
    index = SearchIndex(encoder, load_images(tmp_path), {})
    assert list(index.rows["name"]) == ["a"] and re.search(r"cannot be read: 1\. .*gone\.png", caplog.text)


def test_an_image_and_a_text_of_the_set_find_themselves(page, images):
    folder, names = images
    found, texts = page.search({"text": "", "files": [str(folder / "005.png")]})
    assert found[0][1] == f"{names[5]}\n1.000" and len(found) == 12 and len(texts) == 8
    assert found[0][0].size == (64, 64)
    assert page.search({"text": names[3], "files": []})[1][0] == [names[3], "1.000"]


def test_scores_are_those_of_the_vectors(page, images, encoder):
    folder, names = images
    query = {"image": Image.open(folder / "000.png"), "text": "a red cat"}
    found, texts = page.index.search(query)
    (vector,) = encoder.encode([query])
    files = [{"image": str(folder / f"{place:03}.png")} for place in range(COUNT)]
    for hits, inputs in ((found, files), (texts, names)):
        scores = encoder.encode(inputs) @ vector
        assert [hit["corpus_id"] for hit in hits] == np.argsort(-scores)[: len(hits)].tolist()
        np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(scores)[::-1][: len(hits)], atol=1e-5)


def test_words_that_are_a_path_are_words(page, images):
    file = str(images[0] / "005.png")
    assert all(not caption.endswith("1.000") for _, caption in page.search({"text": file, "files": []})[0])


def test_a_found_image_is_the_next_query_with_its_name(images):
    """In the form in which gradio hands over what a gallery shows."""
    gallery = [(str(images[0] / f"{place:03}.png"), f"{images[1][place]}\n0.500") for place in (7, 4)]
    box = choose(gallery, gr.SelectData(None, {"index": 1, "value": None}))
    assert box["text"] == images[1][4] and list(read_box(box)) == ["image", "text"]
    assert np.array_equal(read_box(box)["image"], Image.open(images[0] / "004.png"))


def test_the_saved_prompts_are_used(images, tmp_path, encoder):
    folder = tmp_path / "model"
    shutil.copytree(asset_path(CHECKPOINT), folder)
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "Find: ", "document": "Read: ", "other": "No: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    module = CocoaTransformer(folder)
    index = SearchIndex(module, load_images(images[0]), module.prompts)
    model = SentenceTransformer(str(folder), device="cpu")
    scores = model.encode_document(images[1]) @ model.encode_query("a cat")
    best = int(scores.argmax())
    hit = index.search({"text": "a cat"})[1][0]
    assert hit["corpus_id"] == best and hit["score"] == pytest.approx(scores[best], abs=1e-5)


def test_kept_vectors_are_those_of_the_content(encoder, tmp_path, monkeypatch):
    """A second start embeds what is new or has changed, another prompt all anew; a corrupt image loses nothing."""
    folder = tmp_path / "images"
    write_images(folder, 7)
    (folder / "006.png").write_bytes(b"\x89PNG no image")
    seen = []
    encode = encoder.encode

    def count(inputs, **options):
        vectors = encode(inputs, **options)
        seen.append(len(inputs))
        return vectors

    monkeypatch.setattr(encoder, "encode", count)

    def start(prompts=None, vectors=tmp_path / "vectors"):
        seen.clear()
        index = SearchIndex(encoder, load_images(folder), prompts or {}, vectors)
        return index, sum(seen)

    plain, embedded = start(vectors=None)
    first, again = start()
    assert again == embedded > 0
    second, none = start()
    assert none == 0
    for index in (first, second):
        np.testing.assert_array_equal(index.image_vectors, plain.image_vectors)
        np.testing.assert_array_equal(index.text_vectors, plain.text_vectors)
        assert list(index.rows["name"]) == list(plain.rows["name"]) and len(index.rows) == 6
    shutil.copyfile(folder / "000.png", folder / "001.png")
    Image.new("RGB", (64, 64), "teal").save(folder / "002.png")
    changed, new = start()
    assert new == 1, "a copy is known by its content"
    np.testing.assert_array_equal(changed.image_vectors[1], changed.image_vectors[0])
    assert start({"document": "Find it."})[1] == embedded - 1


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (None, "there is no query: enter a text, or drop an image."),
        ({"text": "  \n", "files": []}, "there is no query"),
        ({"text": "\ud800", "files": []}, "not valid Unicode"),
        ({"text": "", "files": ["<b>no<b>.png"]}, "&lt;b&gt;no&lt;b&gt;.png cannot be read as an image"),
        ({"text": "", "files": ["huge.png"]}, "huge.png is 10000x9000 pixels, more than the limit"),
        ({"text": "", "files": ["line.png"]}, "line.png is 900x4 pixels; one side may be at most 200 times the other"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("event", ["search", "reconstruct"])
def test_an_input_that_cannot_be_read_is_one_line_of_text(page, tmp_path, box, reason, event):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "huge.png")
    Image.new("RGB", (900, 4)).save(tmp_path / "line.png")
    (tmp_path / "<b>no<b>.png").write_text("no image")
    files = [str(tmp_path / name) for name in (box or {}).get("files", ())]
    with pytest.raises(gr.Error) as caught:
        getattr(page, event)(None if box is None else {**box, "files": files})
    message = caught.value.message
    assert reason in message and "<" not in message
    assert str(tmp_path) not in message and "\n" not in message and not caught.value.print_exception


def test_each_kind_of_input_is_reconstructed_in_the_directions_that_it_has_the_parts_for(page, images):
    file = str(images[0] / "000.png")
    found, texts = page.reconstruct({"text": "", "files": [file]})
    names = ["original", "masked: all of it"]
    assert [caption for _, caption in found] == [*names, "reconstructed from image"] and texts == []
    found, texts = page.reconstruct({"text": "black cat", "files": []})
    assert found == [] and [row[:2] for row in texts] == [["text", "black cat"]]
    found, texts = page.reconstruct({"text": "black cat", "files": [file]})
    sources = ["text", "image", "image and text"]
    assert [caption for _, caption in found] == [*names, *(f"reconstructed from {source}" for source in sources)]
    assert [row[:2] for row in texts] == [[source, "black cat"] for source in ("image", "text", "image and text")]


def test_versions_are_the_target_itself_its_mask_and_the_models_own(page, images):
    image = Image.open(images[0] / "000.png").convert("RGB")
    words = "a black cat sits in the rain and looks at a red train"
    (versions,) = [found.images for found in page.reconstructor({"image": image})]
    original = np.asarray(versions.original, dtype=float)
    assert np.abs(original - np.asarray(image.resize((128, 128)), dtype=float)).mean() < 12
    assert len(np.unique(np.asarray(versions.masked))) == 1
    assert not np.array_equal(versions.reconstructed, versions.original)
    (versions,) = [found.texts for found in page.reconstructor({"text": words})]
    assert versions.original == words and versions.reconstructed != words
    tokenizer = page.reconstructor.processor.tokenizer
    tokens = len(tokenizer(words, add_special_tokens=False)["input_ids"])
    assert versions.masked.count("_") == round(0.6 * tokens), "the ratio that the checkpoint was trained with"
    assert page.reconstructor({"text": words})[0].texts == versions, "masked alike each time"


def test_a_target_is_reconstructed_from_its_source_and_nothing_else(page, images):
    """Another image beside the same text: what is reconstructed from the text stays the same to the last bit."""
    found = []
    for name in ("000.png", "020.png"):
        query = {"image": Image.open(images[0] / name).convert("RGB"), "text": "black cat"}
        found.append({result.direction: result for result in page.reconstructor(query)})
    one, other = ({name: value.images for name, value in results.items()} for results in found)
    assert not np.array_equal(one["text_to_image"].original, other["text_to_image"].original)
    for direction, differs in (("text_to_image", False), ("image_to_image", True), ("both_to_both", True)):
        assert np.array_equal(one[direction].reconstructed, other[direction].reconstructed) is not differs
    assert found[0]["text_to_text"].texts == found[1]["text_to_text"].texts


def test_a_checkpoint_reconstructs_with_the_settings_of_its_training(trainer, tmp_path):
    source = Path(trainer.args.output_dir)
    reconstructor = Reconstructor(source)
    assert not reconstructor.model.normalize_pixels and reconstructor.model.bridge == "layerwise"
    assert (reconstructor.collator.source_mask_ratio, reconstructor.collator.target_mask_ratio) == (0.15, 0.6)
    about = describe_reconstruction("model", reconstructor)
    assert "60% of a text's tokens are masked (15% of a source's)" in about and "grey" not in about
    assert reconstructor.model.eos_sees_target and reconstructor.has_images

    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    *_, record = read_records(source)
    write_records(folder, [replace(record, settings={"bridge": "layerwise", "eos_sees_target": True})])
    reconstructor = Reconstructor(folder)
    assert set(reconstructor.directions) == {"image_to_text", "text_to_text"} and not reconstructor.has_images
    assert reconstructor.collator.source_mask_ratio == 0
    with pytest.raises(CocoaInputError, match="was not trained to reconstruct such an input; give image and text or"):
        reconstructor({"image": Image.new("RGB", (64, 64))})
    assert [found.direction for found in reconstructor({"text": "black cat"})] == ["text_to_text"]
    about = describe_reconstruction("model", reconstructor)
    assert "masked completely" not in about and "reconstructs texts, from themselves or from an image" in about

    settings = {"bridge": "embedding", "eos_sees_target": False, "normalize_pixels": True}
    settings |= {"direction_weights": {"image_to_image": 1.0}}
    write_records(folder, [replace(record, settings=settings)])
    reconstructor = Reconstructor(folder)
    assert reconstructor.model.normalize_pixels and reconstructor.model.bridge == "embedding"
    assert not reconstructor.model.eos_sees_target and list(reconstructor.directions) == ["image_to_image"]
    assert "shown with mean grey and constant contrast" in describe_reconstruction("model", reconstructor)

    write_records(folder, [replace(record, stage="warmup")])
    with pytest.raises(ValueError, match="was last trained in the stage 'warmup', and only the bridge"):
        Reconstructor(folder)
    (folder / "training.json").unlink()
    with pytest.raises(ValueError, match="has no training.json, which says how it was trained"):
        Reconstructor(folder)
    (folder / HEADS_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {HEADS_FILE}, which only .* save. Use a checkpoint of the bridge"):
        Reconstructor(folder)


def component(app, name: str) -> dict:
    """A component of a page, by its `elem_id`."""
    return next(part for part in app.config["components"] if part["props"].get("elem_id") == name)


def test_without_heads_the_page_says_what_is_missing_and_searches(images):
    app = build_app(asset_path(CHECKPOINT), images=images[0])
    about = component(app, "about-reconstruction")["props"]["value"]
    assert f"checkpoints/cocoa-tiny has no {HEADS_FILE}" in about and "--rebuild-model" in about
    assert not [part for part in app.config["components"] if part["props"].get("elem_id") == "reconstruct"]
    assert {part["api_name"] for part in app.config["dependencies"]} >= {"search"}
    assert app.analytics_enabled is False


def test_a_model_with_heads_needs_no_second_one(trainer, images):
    app = build_app(trainer.args.output_dir, images=images[0])
    assert component(app, "reconstruct")["type"] == "button"
    assert "from this one token" in component(app, "about-reconstruction")["props"]["value"]


def test_a_model_of_another_stage_searches_and_the_page_says_why_it_does_not_reconstruct(trainer, images, tmp_path):
    folder = shutil.copytree(trainer.args.output_dir, tmp_path / "warmup")
    write_records(folder, [StageRecord("warmup")])
    about = component(build_app(folder, images=images[0]), "about-reconstruction")["props"]["value"]
    assert "was last trained in the stage 'warmup'" in about


def test_a_port_that_is_taken_is_said(images):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"Cannot find empty port in range: {port}-{port}"):
            serve(images=images[0], port=port)


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cocoa-embed\[app\]'"):
        runpy.run_path(str(ROOT / "cocoa" / "app" / "app.py"))
