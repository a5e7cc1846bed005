# SPDX-License-Identifier: Apache-2.0
"""Models that are compared: what each is shown is the same, and what one cannot take is said."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from evaluation.assets import asset_path
from evaluation.encoders import Encoder
from evaluation.mmeb.data import Item, load_tasks
from evaluation.mmeb.evaluate import evaluate_model
from evaluation.mmeb.report import THUMBNAIL, render_image
from modeling_cocoa import media
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.sentence_transformer import CocoaTransformer
from tests.evaluation.conftest import ROWS, TASKS, TINY

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folders of a model of texts, and of one of texts and images apart, as CLIP is; with random weights."""
    folder = tmp_path_factory.mktemp("models")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *"abcdefghijklmnopqrstuvwxyz."])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "model_max_length": 32}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    lengths = {"vocab_size": len(words), "max_position_embeddings": 32, **SIZES}
    BertModel(BertConfig(**lengths)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    text, vision = {"bos_token_id": 1, "eos_token_id": 2, **lengths}, {"image_size": 32, "patch_size": 16, **SIZES}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def tiny():
    """The tiny checkpoint, in our way and in the stock one."""
    return [Encoder(str(asset_path(TINY)), is_cocoa=is_cocoa) for is_cocoa in (True, False)]


def text(value):
    return Item(((None, value),))


def image(path, *texts):
    return Item(((str(path), None), *((None, value) for value in texts)))


@pytest.fixture
def clip(others):
    return Encoder(str(others / "clip"), is_cocoa=False)


def test_a_model_without_messages_is_shown_texts_apart_from_images(tmp_path, data, clip, others):
    """In one call, in any order; a text that is the path of an image stays a text."""
    data({})
    path = tmp_path / "images" / "a.png"
    items = [text("a cat"), image(path), text(str(path)), text(""), image(tmp_path / "images" / "b.png")]
    clip.batch_size = 2
    model = SentenceTransformer(str(others / "clip"), device="cpu")
    apart = [model.encode([value], normalize_embeddings=True)[0] for value in ("a cat", str(path))]
    vectors = clip(items)
    np.testing.assert_allclose(vectors[:2], apart, atol=1e-5)
    np.testing.assert_allclose(
        vectors[2], model.encode([{"text": str(path)}], normalize_embeddings=True)[0], atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert abs(vectors[1] - vectors[4]).max() > 1e-3
    assert Encoder(str(others / "bert"), is_cocoa=False)([text(str(path)), text("a")]).shape == (2, 32)


def test_what_a_model_does_not_take_is_said_before_anything_is_embedded(tmp_path, data, clip, others, monkeypatch):
    rows = {
        **ROWS,
        "EDIS": [{"qry_text": "a", "qry_img_path": "", "tgt_text": ["", ""], "tgt_img_path": ["a.png", "b.png"]}],
    }
    source = data(rows)

    def evaluate(encoder, task):
        loaded = load_tasks([TASKS[task]], source, tmp_path / "images")
        return evaluate_model(encoder, loaded, tmp_path / "out", show_progress_bar=False)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", None)
        message = (
            "clip cannot be scored on VOC2007, which has inputs of image then text: the model takes text, image. "
        )
        with pytest.raises(ValueError, match=message):
            evaluate(clip, "VOC2007")
        bert = Encoder(str(others / "bert"), is_cocoa=False)
        with pytest.raises(
            ValueError, match="bert cannot be scored on EDIS, which has inputs of image: .* takes text. "
        ):
            evaluate(bert, "EDIS")
    scores = evaluate(clip, "EDIS")
    assert scores.tasks[0].inputs == 3, "texts and images that stand alone can be scored"


def test_the_order_of_places_is_not_lost(clip, tiny):
    """A model that takes an image and a text together, and no messages, may put them in its own order."""
    module = clip.model[0]
    module.modality_config = {**module.modality_config, ("image", "text"): module.modality_config["text"]}
    clip.check("VOC2007", [image("a.png", "b"), text("c")])
    before = Item(((None, "Like "), ("a.png", None), (None, " this")))
    for item, kinds in ((before, "text then image then text"), (Item(before.places[:2]), "text then image")):
        with pytest.raises(ValueError, match=f"has inputs of {kinds}: the model takes text, image, image.text"):
            clip.check("VOC2007", [item])
    for encoder in tiny:
        encoder.check("VOC2007", [before])


def test_a_picture_of_any_kind_is_the_same_for_every_model(tmp_path, tiny):
    """16-bit grey, palettes, transparency, turned by EXIF: decoded once, by us."""
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[:, :80, 0], pixels[40:, 80:, 2] = 255, 255
    shown = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    shown.save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey.png")
    shown.convert("P").save(tmp_path / "palette.png", transparency=0)
    shown.convert("LA").save(tmp_path / "alpha.png")
    shown.convert("CMYK").save(tmp_path / "print.jpg")
    items = [image(path, "\nhi\n") for path in sorted(tmp_path.iterdir())]
    hidden = np.dstack([np.zeros_like(pixels), np.where(pixels[..., 0] > 0, 255, 0).astype(np.uint8)])
    Image.fromarray(hidden).save(tmp_path / "hidden.png")  # black all over, of which transparency shows a half
    items.append(image(tmp_path / "hidden.png", "\nhi\n"))
    ours, stock = (encoder(items) for encoder in tiny)
    np.testing.assert_allclose(ours, stock, atol=1e-5)
    content = [[{"type": "image", "path": item.image}, {"type": "text", "text": "\nhi\n"}] for item in items]
    encoded = CocoaTransformer(asset_path(TINY)).encode([{"role": "user", "content": parts} for parts in content])
    np.testing.assert_allclose(ours, encoded, atol=1e-5, err_msg="as encode reads the files")


def test_a_page_shows_pictures_of_any_shape(tmp_path):
    for size, shown in {(3, 50): THUMBNAIL, (8000, 30): THUMBNAIL, (200, 400): (72, 144)}.items():
        Image.new("RGB", size, "red").save(tmp_path / "a.png")
        html = render_image(image(tmp_path / "a.png"))
        content = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
        assert Image.open(io.BytesIO(content)).size == shown


def test_a_checkpoint_that_shortens_its_vectors_is_refused(tmp_path):
    folder = shutil.copytree(asset_path(TINY), tmp_path / "model")
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncate_dim": 64}))
    with pytest.raises(ValueError, match="shortens its vectors to 64 numbers: name it with --baseline"):
        Encoder(str(folder))
    vectors = Encoder(str(folder), is_cocoa=False)([Item(((None, "a cat"),))])
    assert vectors.shape == (1, 64) and np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [(3, 50), (2, 300), (27, 6000), (1, 1)])
def test_a_picture_with_a_short_side_is_stretched_whatever_its_shape(tmp_path, tiny, size):
    for name, shown in (("a", size), ("b", (56, 56))):
        Image.new("RGB", shown, "red").save(tmp_path / f"{name}.png")
    for encoder in tiny:
        vectors = encoder([image(tmp_path / "a.png"), image(tmp_path / "b.png")])
        np.testing.assert_allclose(*vectors, atol=1e-6)


def test_a_long_picture_is_stretched_where_a_resolution_is_given(tmp_path, tiny, monkeypatch):
    """And where none is, the model's own limit holds, as in the benchmark's evaluator."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8000, 30), "red").save(path)
    items = [text("a cat"), image(path)]
    for encoder in tiny:
        monkeypatch.setattr(encoder, "image_resolution", "low")
        assert encoder(items).shape == (2, 192)
        monkeypatch.setattr(encoder, "image_resolution", None)
        message = "a.png is 8000x30 pixels; one side may be at most 200 times the other"
        with pytest.raises(CocoaInputError, match=f"Item 1: .*{message}"):
            encoder(items)
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 8000 * 30 - 1)
    for encoder in tiny:
        for resolution in ("low", None):
            monkeypatch.setattr(encoder, "image_resolution", resolution)
            with pytest.raises(CocoaInputError, match="Item 1: .*a.png is 8000x30 pixels, more than the limit"):
                encoder(items)


def test_an_image_is_decoded_once_in_an_evaluation(tmp_path, data, tiny, monkeypatch):
    """And its file is read to the end once more, for its digest."""
    source, decoded, load = data({"VOC2007": ROWS["VOC2007"]}), [], media.load_image
    monkeypatch.setattr(
        "modeling_cocoa.inputs.load_image", lambda value, *size: decoded.append(value) or load(value, *size)
    )
    loaded = load_tasks([TASKS["VOC2007"]], source, tmp_path / "images")
    evaluate_model(tiny[0], loaded, tmp_path / "out", show_progress_bar=False)
    assert sorted(decoded) == [str(tmp_path / "images" / f"{name}.png") for name in "ab"]
    evaluate_model(tiny[0], loaded, tmp_path / "out", show_progress_bar=False)
    assert len(decoded) == 2, "and never again while its vector is kept"


def test_a_model_that_is_not_on_the_hub_either_is_said(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("We couldn't connect.")

    monkeypatch.setattr("evaluation.encoders.SentenceTransformer", refuse)
    with pytest.raises(
        OSError, match="no/such is neither a folder nor a model that can be had from the Hub: We could"
    ):
        Encoder("no/such", is_cocoa=False)
