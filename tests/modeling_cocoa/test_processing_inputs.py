# SPDX-License-Identifier: Apache-2.0
"""Every kind of input, and every kind of bad input, named by its position."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import Qwen2_5_VLProcessor

from modeling_cocoa import media
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.processing_cocoa import CocoaProcessor
from tests.modeling_cocoa.conftest import make_image

TEXT = {"type": "text", "text": "hi"}


@pytest.fixture
def picture(image, tmp_path) -> Path:
    """The image as a PNG file."""
    path = tmp_path / "picture.png"
    image.save(path)
    return path


@pytest.fixture
def encode(processor):
    """Encode one item."""
    return lambda item: processor.preprocess([item])[0]


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def test_every_form_of_one_image_gives_the_same_row(encode, image, picture):
    array = np.array(image)
    data = picture.read_bytes()
    expected = encode(image)
    forms = [
        str(picture),
        picture,
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        {"image": image},
        {"images": [picture]},
        {"image": [image], "text": None},
        {"image": {"bytes": data, "path": None}},
        {"image": {"bytes": None, "path": str(picture)}},
        {"role": "user", "content": [{"type": "image", "image": image}]},
        *(user({"type": "image", key: str(picture)}) for key in ("image", "path", "url")),
    ]
    for form in forms:
        assert same(encode(form), expected), form


def test_a_grey_image_is_read_as_three_equal_channels(encode, tmp_path):
    grey = make_image(48, 32, channels=1)
    deep = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    expected = encode(grey.convert("RGB"))
    for form in (grey, np.array(grey), np.array(grey)[..., None], np.array(grey)[None], deep, tmp_path / "deep.png"):
        assert same(encode(form), expected)


def test_a_str_is_an_image_only_where_the_file_exists_and_ends_so(encode, processor, picture):
    other = picture.rename(picture.with_suffix(".data"))
    missing = str(picture)
    texts = [missing, str(other), "cat.png", "see https://a.org/cat.png", "https://a.org/page"]
    for text in texts:
        assert "pixel_values" not in encode(text), text
    assert same(encode(other), encode(str(other.rename(picture))))
    assert same(
        encode({"text": "https://a.org/cat.png"}), encode(user({"type": "text", "text": "https://a.org/cat.png"}))
    )
    assert "pixel_values" not in encode({"text": str(picture)})


def test_every_form_of_a_text_gives_the_same_row(encode):
    forms = ["hi", {"text": "hi"}, {"text": "hi", "image": None, "video": None}, {"role": "user", "content": "hi"}]
    forms += [
        user(TEXT),
        [{"role": "user", "content": "hi"}],
        user({"type": "text", "text": "h"}, {**TEXT, "text": "i"}),
    ]
    for form in forms:
        assert same(encode(form), encode("hi")), form


def test_rows_of_an_arrow_table_give_the_same_tokens(processor, image):
    rows = [{"text": "hi", "image": image}, {"text": "hi"}, {"image": image}]
    chats = [
        user({"type": "image", "image": image}, TEXT),
        [{"role": "system", "content": [TEXT]}, *user({"type": "image", "image": image})],
    ]
    flat = Dataset.from_list([{"item": {"text": row.get("text"), "image": row.get("image")}} for row in rows])
    columns = Dataset.from_list([{"text": row.get("text"), "image": row.get("image")} for row in rows])
    without_image_decoding = columns.cast_column("image", ImageFeature(decode=False))
    assert columns[1]["image"] is None and set(without_image_decoding[0]["image"]) == {"bytes", "path"}
    expected = processor.preprocess(rows)
    for table in (columns, without_image_decoding):
        for row, reference in zip(table, expected, strict=True):
            assert same(processor.preprocess([row])[0], reference)
    for row, reference in zip(flat["item"], expected, strict=True):
        assert same(processor.preprocess([row])[0], reference)

    table = Dataset.from_list([{"messages": chat} for chat in chats])
    parts = [part for chat in table["messages"] for message in chat for part in message["content"]]
    assert any(set(part) == {"type", "text", "image"} and None in part.values() for part in parts)
    for chat, reference in zip(table["messages"], processor.preprocess(chats), strict=True):
        assert same(processor.preprocess([chat])[0], reference)


def test_every_form_of_one_video_gives_the_same_row(encode, tmp_path):
    frames = [make_image(48, 32, seed=seed) for seed in range(3)]
    array = np.stack([np.array(frame) for frame in frames])
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for frame, path in zip(frames, paths, strict=True):
        frame.save(path)
    expected = encode({"video": frames})
    assert expected["video_grid_thw"].tolist() == [[2, 4, 6]]
    forms = [
        array,
        torch.from_numpy(array).permute(0, 3, 1, 2),
        {"video": array},
        {"video": paths},
        {"video": list(array), "image": None},
        user({"type": "video", "video": frames}),
    ]
    for form in forms:
        assert same(encode(form), expected), type(form)
    grey = array[..., :1]
    assert same(encode({"video": grey}), encode({"video": np.repeat(grey, 3, axis=-1)}))


@pytest.fixture
def film(tmp_path):
    """Writes a film of 10 frames a second, getting lighter frame by frame."""
    av = pytest.importorskip("av")

    def write(count: int) -> Path:
        path = tmp_path / f"{count}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for index in range(count):
                frame = av.VideoFrame.from_ndarray(
                    np.full((32, 48, 3), 200 * index // count, np.uint8), format="rgb24"
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


def test_a_film_is_sampled_twice_a_second(encode, processor, film):
    for count, expected in ((40, [0, 5, 10, 15, 20, 25, 30, 35]), (2, [0, 1]), (1, [0])):
        frames, metadata = media.read_video(film(count), processor.video_processor)
        assert list(metadata.frames_indices) == expected
        assert np.allclose(frames.mean((1, 2, 3)), [200 * index // count for index in expected], atol=6)
        for form in (str(film(count)), film(count), {"video": film(count)}):
            assert same(encode(form), encode({"video": frames}))


def test_qwen2_5_is_told_the_pace_of_a_film(processor, film):
    newer = CocoaProcessor(
        Qwen2_5_VLProcessor(processor.image_processor, processor.tokenizer, processor.video_processor)
    )
    batch = newer([film(40), {"video": [make_image(48, 32)] * 2}])
    # Two sampled frames a temporal patch, at 2 a second; at transformers' 24 a second where the pace is unknown.
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([1.0, 2 / 24])


def bad_inputs(image, folder) -> dict[str, tuple]:
    """Name -> (item, what the error says)."""
    (folder / "corrupt.png").write_bytes(b"nothing of the kind")
    buffer = io.BytesIO()
    make_image(64, 64).save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:3000])
    (folder / "corrupt.mp4").write_bytes(b"nothing of the kind")
    Image.new("RGB", (3, 64)).save(folder / "thin.png")
    missing = str(folder / "missing.png")
    return {
        "None": (None, "it is None"),
        "empty text": ("", "the text is empty"),
        "blank text": (" \n\t", "the text is empty"),
        "blank text beside an image": ({"text": " ", "image": image}, "the text is empty"),
        "surrogate": ("a\ud800b", "not valid Unicode"),
        "number": (5, "it is of type int"),
        "bytes of a text": (b"hi", "the image cannot be read as an image"),
        "bytes of a text, as an image": ({"image": b"hi"}, "the image cannot be read as an image"),
        "corrupt bytes of a known file": ({"bytes": b"no", "path": "cat.png"}, "cat.png cannot be read as an image"),
        "film as a data string": ("data:video/mp4;base64,aGk=", "a video cannot be given as a data string"),
        "folder": (folder, "is a folder; give the path of a file in it"),
        "home": ({"image": "~/cat.png"}, r"no image file ~/cat.png; check the path \(~ and file:// are not expanded"),
        "file address": ({"image": "file:///cat.png"}, "there is no image file file:///cat.png; check the path"),
        "text as a number": ({"text": 5}, "a text cannot be of type int"),
        "text as a list": ({"text": ["hi"]}, "a text cannot be of type list"),
        "unknown key": ({"texts": "hi"}, r"unknown keys \['texts'\]"),
        "empty dict": ({}, "the dict holds nothing"),
        "dict of None": ({"text": None, "image": None}, "the dict holds nothing"),
        "no images": ({"images": []}, "images is an empty list"),
        "missing path": (Path(missing), f"there is no image file {missing}"),
        "missing image": ({"image": missing}, f"there is no image file {missing}"),
        "missing in a part": (user({"type": "image", "path": missing}), f"there is no image file {missing}"),
        "corrupt file": (folder / "corrupt.png", "corrupt.png cannot be read as an image"),
        "cut file": (str(folder / "cut.png"), "cut.png cannot be read as an image"),
        "cut file, opened": (Image.open(folder / "cut.png"), "cut.png cannot be read as an image"),
        "corrupt bytes": ({"image": {"bytes": b"no", "path": None}}, "the image cannot be read as an image"),
        "image dict of nothing": ({"image": {"bytes": None, "path": None}}, 'needs "bytes" or "path"'),
        "image dict of more": ({"image": {"bytes": b"no", "size": 3}}, r"unknown keys \['size'\]"),
        "bad data string": ("data:image/png;base64,?", "not base64"),
        "image as a number": ({"image": 5}, "an image cannot be of type int"),
        "one None among images": ({"images": [image, None]}, "an image cannot be of type NoneType"),
        "thin image": (folder / "thin.png", "thin.png is 3x64 pixels"),
        "long image": (Image.new("RGB", (4, 804)), "4x804 pixels; one side may be at most 200"),
        "float image": (np.zeros((8, 8, 3)), "dtype float64"),
        "five channels": (np.zeros((8, 8, 5), np.uint8), r"has shape \(8, 8, 5\)"),
        "bfloat16 tensor": (torch.zeros(8, 8, dtype=torch.bfloat16), "dtype bfloat16"),
        "line": (np.zeros(8, np.uint8), r"shape \(8,\) is neither"),
        "32 bits": (Image.new("F", (8, 8)), "32 bits a pixel"),
        "link": ("https://a.org/cat.PNG?size=3", r"https://a.org/cat.PNG\?size=3 is a link.*download the image"),
        "link in a dict": ({"image": "http://a.org/cat"}, "http://a.org/cat is a link.*download the image"),
        "link to a film": ("https://a.org/cat.mp4", "is a link.*download the video"),
        "empty list": ([], "it is an empty list"),
        "list of texts": (["hi", "ho"], "a list is read as a conversation, but holds a str"),
        "list of dicts": ([{"text": "hi"}], "a list is read as a conversation, but holds a dict"),
        "unknown role": ([{"role": "robot", "content": "hi"}], "unknown role 'robot'"),
        "no role": ([{"role": None, "content": "hi"}], "unknown role None"),
        "message with more": ([{"role": "user", "content": "hi", "name": "x"}], r"unknown keys \['name'\]"),
        "no content": ([{"role": "user", "content": None}], "content of the user message is NoneType"),
        "empty content": (user(), "the user message has no content"),
        "content of None": (user({"type": "text", "text": None}), "the user message has no content"),
        "empty text in a message": ([{"role": "user", "content": ""}], "the text is empty"),
        "part without a dict": (user("hi"), "a content part is of type str"),
        "unknown part": (user({"type": "audio", "audio": "x"}), "unknown type 'audio'"),
        "part with more": (user({**TEXT, "bold": True}), r"unknown keys \['bold'\]"),
        "image twice": (user({"type": "image", "image": image, "path": "x"}), "names its image 2 times"),
        "missing film": ({"video": str(folder / "no.mp4")}, "there is no video file"),
        "corrupt film": (str(folder / "corrupt.mp4"), "corrupt.mp4 cannot be read as a video"),
        "no frames": ({"video": []}, "the video has no frames"),
        "no frames in an array": (np.zeros((0, 8, 8, 3), np.uint8), "the video has no frames"),
        "film as one image": ({"video": image}, "a video cannot be of type Image"),
        "film of odd frames": ({"video": [image, make_image(32, 32)]}, r"differ in size \(32x32, 48x32\)"),
        "film of thin frames": (np.zeros((2, 3, 8, 3), np.uint8), "8x3 pixels"),
        "film of floats": (np.zeros((2, 8, 8, 3), np.float32), "dtype float32"),
    }


def test_bad_input_is_named_by_its_position(processor, image, tmp_path):
    for name, (item, message) in bad_inputs(image, tmp_path).items():
        with pytest.raises(CocoaInputError, match=message) as caught:
            processor(["hi", image, item, "ho"])
        assert caught.value.position == 2, name
        assert str(caught.value).startswith("Item 2: "), name


def test_a_huge_image_is_refused_before_it_is_decoded(processor, picture, monkeypatch):
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(CocoaInputError, match="Item 0: .*48x32 pixels, more than the limit of 1535; resize"):
        processor.preprocess([str(picture)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 // 2 - 1)  # Pillow's own limit, of which it takes twice
    with pytest.raises(CocoaInputError, match=f"Item 0: .*{picture.name} is too large .*resize it beforehand"):
        processor.preprocess([str(picture)])


def test_a_film_without_a_decoder_is_one_clear_error(processor, tmp_path, monkeypatch):
    def without_decoder(*args, **kwargs):
        raise ImportError("no decoder")

    (tmp_path / "film.mp4").write_bytes(b"")
    monkeypatch.setattr(media, "load_video", without_decoder)
    with pytest.raises(CocoaInputError, match="Item 0: .*film.mp4 needs a video decoder.*pip install av"):
        processor.preprocess([tmp_path / "film.mp4"])


def test_one_input_instead_of_a_list_is_a_type_error(processor, image):
    for item in ("hi", b"hi", {"text": "hi"}, image, Path("x.png"), np.zeros((8, 8, 3), np.uint8), None, 5):
        with pytest.raises(TypeError, match="inputs must be a list of inputs; got one"):
            processor(item)
