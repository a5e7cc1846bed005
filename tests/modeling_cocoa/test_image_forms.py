# SPDX-License-Identifier: Apache-2.0
"""One image is one result: whatever its mode, its file, and the form in which it is given."""

from __future__ import annotations

import base64
import io
import logging
import os
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from modeling_cocoa import processing_cocoa
from modeling_cocoa.inputs import input_messages
from modeling_cocoa.media import ResizedImage, load_image, media_kind
from modeling_cocoa.processing_cocoa import CocoaInputError, CocoaProcessor
from trainers.data.augment import augment_row
from trainers.data.rows import open_images, without_image_decoding

WIDTH, HEIGHT = 24, 16
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
RGBA, RGB, GREY = Image.fromarray(NOISE), Image.fromarray(NOISE[..., :3]), Image.fromarray(NOISE[..., 0])
DEEP = np.random.default_rng(1).integers(0, 2**16, (HEIGHT, WIDTH), dtype=np.uint16)
ORIENTATIONS = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.rotate(180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.rotate(-90, expand=True),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.rotate(90, expand=True),
}


def on_white(rgba: np.ndarray) -> np.ndarray:
    """What transparent pixels look like on white paper."""
    alpha = rgba[..., 3:].astype(float) / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def as_rgba(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGBA"))


def palette_image(count: int = 5) -> Image.Image:
    image = Image.fromarray(NOISE[..., 0] % count, "L").convert("P")
    image.putdata((NOISE[..., 0] % count).flatten().tolist())
    image.putpalette(NOISE[0, :count, :3].flatten().tolist())
    return image


def lab_image() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(RGB, *profiles, outputMode="LAB")


def grey_on_white(keep: np.ndarray, grey: np.ndarray) -> np.ndarray:
    return np.where(keep, grey, 255)[..., None].repeat(3, axis=-1)


PALETTE = palette_image()
INDICES, COLOURS = np.asarray(PALETTE), np.array(PALETTE.getpalette()[:15], np.uint8).reshape(5, 3)
BITS = GREY.point(lambda value: 255 * (value > 127)).convert("1")
CASES: dict[str, tuple[Image.Image, str, dict[str, Any], np.ndarray | None]] = {
    # name -> image, file format, options of saving, and what is seen where it does not follow from PIL alone
    "RGB": (RGB, "PNG", {}, np.asarray(RGB)),
    "RGB with a transparent colour": (
        RGB,
        "PNG",
        {"transparency": tuple(int(value) for value in NOISE[3, 4, :3])},
        np.where((NOISE[..., :3] == NOISE[3, 4, :3]).all(-1)[..., None], 255, NOISE[..., :3]).astype(np.uint8),
    ),
    "RGBA": (RGBA, "PNG", {}, on_white(NOISE)),
    "RGBA, WebP": (RGBA, "WEBP", {"lossless": True, "exact": True}, on_white(NOISE)),
    "RGBA, TIFF": (RGBA, "TIFF", {}, on_white(NOISE)),
    "RGBA, ICO": (RGBA.resize((32, 32)), "ICO", {"sizes": [(32, 32)]}, on_white(np.asarray(RGBA.resize((32, 32))))),
    "all transparent": (
        Image.fromarray(np.where([True, True, True, False], NOISE, 0).astype(np.uint8)),
        "PNG",
        {},
        np.full((HEIGHT, WIDTH, 3), 255, np.uint8),
    ),
    "LA": (
        Image.fromarray(NOISE[..., [0, 3]]),
        "PNG",
        {},
        on_white(NOISE[..., [0, 0, 0, 3]]),
    ),
    "L": (GREY, "PNG", {}, NOISE[..., [0, 0, 0]]),
    "L, JPEG 2000": (GREY, "JPEG2000", {}, NOISE[..., [0, 0, 0]]),
    "L with a transparent grey": (
        GREY,
        "PNG",
        {"transparency": int(NOISE[2, 2, 0])},
        grey_on_white(NOISE[..., 0] != NOISE[2, 2, 0], NOISE[..., 0]),
    ),
    "1": (BITS, "PNG", {}, np.where(np.asarray(BITS), 255, 0)[..., None].repeat(3, axis=-1)),
    "1, TIFF": (BITS, "TIFF", {"compression": "group4"}, None),
    "P": (PALETTE, "PNG", {}, COLOURS[INDICES]),
    "P, BMP": (PALETTE, "BMP", {}, COLOURS[INDICES]),
    "P with a transparent index": (
        PALETTE,
        "PNG",
        {"transparency": 2},
        np.where((INDICES == 2)[..., None], 255, COLOURS[INDICES]),
    ),
    "P with an alpha for each index": (
        PALETTE,
        "PNG",
        {"transparency": bytes([0, 60, 255, 128, 200])},
        on_white(np.concatenate([COLOURS, np.array([[0], [60], [255], [128], [200]], np.uint8)], axis=1)[INDICES]),
    ),
    "P, GIF": (PALETTE, "GIF", {"transparency": 1}, np.where((INDICES == 1)[..., None], 255, COLOURS[INDICES])),
    "16-bit grey": (Image.fromarray(DEEP), "PNG", {}, (DEEP >> 8).astype(np.uint8)[..., None].repeat(3, axis=-1)),
    "16-bit grey with a transparent one": (
        Image.fromarray(DEEP),
        "PNG",
        {"transparency": int(DEEP[0, 0])},
        grey_on_white(DEEP != DEEP[0, 0], DEEP >> 8),
    ),
    "16-bit grey, TIFF": (
        Image.fromarray(DEEP),
        "TIFF",
        {},
        (DEEP >> 8).astype(np.uint8)[..., None].repeat(3, axis=-1),
    ),
    "CMYK": (RGB.convert("CMYK"), "TIFF", {}, None),
    "CMYK, JPEG": (RGB.convert("CMYK"), "JPEG", {"quality": 95}, None),
    "YCbCr": (RGB.convert("YCbCr"), "TIFF", {"compression": "jpeg"}, None),
    "LAB": (lab_image(), "TIFF", {}, None),
}


@pytest.fixture
def content(case) -> bytes:
    """The case as a file."""
    image, kind, options, _ = CASES[case]
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def path(content, case, tmp_path) -> Path:
    path = tmp_path / f"picture.{CASES[case][1].lower().replace('jpeg2000', 'jp2')}"
    path.write_bytes(content)
    return path


def forms_of(content: bytes, path: Path) -> dict[str, Any]:
    """The same file in every form that an image may have."""
    loaded = Image.open(path)
    loaded.load()
    row = {"bytes": content, "path": None}
    decoded = Dataset.from_dict({"image": [row]}).cast_column("image", ImageFeature())
    left = decoded.cast(without_image_decoding(decoded.features))
    forms = {
        "str": str(path),
        "pathlib": path,
        "bytes": content,
        "bytearray": bytearray(content),
        "{bytes}": {"bytes": content},
        "{path}": {"path": str(path)},
        "cell": {"bytes": content, "path": path.name},
        "lazy PIL": Image.open(path),
        "PIL of bytes": Image.open(io.BytesIO(content)),
        "loaded PIL": loaded,
        "copied PIL": Image.open(path).copy(),
        "data string": f"data:image/{path.suffix[1:]};base64,{base64.b64encode(content).decode()}",
        "column": decoded[0]["image"],
        "without_image_decoding column": left[0]["image"],
    }
    if loaded.mode in ("L", "LA", "RGB", "RGBA", "1", "I;16") and "transparency" not in loaded.info:
        forms["array"] = np.asarray(loaded)
        forms["tensor"] = torch.from_numpy(np.array(loaded))
        if forms["array"].ndim == 3:
            forms["channels first"] = forms["array"].transpose(2, 0, 1)
    return forms


@pytest.mark.parametrize("case", CASES)
def test_every_form_gives_the_same_pixels(content, path, case):
    expected = np.asarray(load_image(path))
    seen = CASES[case][3]
    if seen is not None:
        np.testing.assert_allclose(expected.astype(int), seen.astype(int), atol=1, rtol=0)
    assert expected.std() > 10 or case == "all transparent"
    for name, form in forms_of(content, path).items():
        image = load_image(form)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected), name


@pytest.mark.parametrize("case", ["RGBA", "P with a transparent index", "16-bit grey", "LA", "CMYK, JPEG", "1"])
def test_every_form_in_every_place_gives_the_same_row(processor, content, path, case):
    """As an item, in a dict, in messages, as a frame of a video; and as a training row of these forms."""
    (expected,) = processor.preprocess([Image.fromarray(np.asarray(load_image(path)))])
    (video,) = processor.preprocess([{"video": [expected_frame := load_image(path), expected_frame]}])
    for name, form in forms_of(content, path).items():
        items = [form, {"image": form}, {"images": [form]}, [message(form)]]
        for row in processor.preprocess([*items, *map(open_images, items)]):
            assert torch.equal(row["pixel_values"], expected["pixel_values"]), name
            assert torch.equal(row["input_ids"], expected["input_ids"]), name
        (shown,) = processor.preprocess([{"video": [form, form]}])
        assert torch.equal(shown["pixel_values_videos"], video["pixel_values_videos"]), name


def message(image: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": image}]}


@pytest.mark.parametrize("case", CASES)
def test_an_image_is_stretched_after_it_is_made_rgb(processor, content, path, case):
    expected = np.asarray(load_image(path).resize((20, 12)))
    assert np.array_equal(np.asarray(load_image(path, (20, 12))), expected)
    (row,) = processor.preprocess([Image.fromarray(expected)])
    for name, form in forms_of(content, path).items():
        assert np.array_equal(np.asarray(load_image(ResizedImage(form, (20, 12)))), expected), name
        (stretched,) = processor.preprocess([open_images({"image": form}, (20, 12))])
        assert torch.equal(stretched["pixel_values"], row["pixel_values"]), name


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGBA", "WEBP")])
def test_an_image_is_turned_upright_in_every_form(tmp_path, orientation, mode, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = PALETTE if mode == "P" else RGBA.convert(mode)
    path = tmp_path / f"picture.{kind.lower()}"
    image.save(path, exif=exif, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    plain = Image.open(path)
    plain.load()
    plain.info = {name: value for name, value in plain.info.items() if name != "exif"}
    plain = plain.copy()  # without its EXIF
    expected = np.asarray(ORIENTATIONS[orientation](load_image(plain)))
    for name, form in forms_of(path.read_bytes(), path).items():
        if name not in ("array", "tensor", "channels first"):  # which have lost the EXIF
            assert np.array_equal(np.asarray(load_image(form)), expected), name


@given(
    rgba=st.binary(min_size=6 * 5 * 4, max_size=6 * 5 * 4),
    mode=st.sampled_from(["L", "LA", "RGB", "RGBA", "La", "RGBa", "P", "PA", "1"]),
    orientation=st.sampled_from(sorted(ORIENTATIONS)),
)
def test_any_pixels_of_any_mode_are_on_white(rgba, mode, orientation):
    image = Image.frombytes("RGBA", (6, 5), rgba)
    if mode in ("P", "PA"):
        image = image.convert("RGB").quantize(16)
        image = image if mode == "P" else image.convert("PA")
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode)
    seen = image.convert(image.mode.upper()) if mode in ("La", "RGBa") else image
    expected = ORIENTATIONS[orientation](Image.fromarray(on_white(as_rgba(seen))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    np.testing.assert_allclose(
        np.asarray(load_image(image), dtype=int), np.asarray(expected, dtype=int), atol=1, rtol=0
    )


def test_a_16_bit_colour_file_is_scaled_down_with_its_transparent_colour(tmp_path):
    """Pillow keeps the upper byte of the pixels, and all 16 bits of the transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    colours = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=-1)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colours)
    head = WIDTH.to_bytes(4, "big") + HEIGHT.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    clear = colours[5, 7].astype(">u2").tobytes()
    data = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), chunk(b"tRNS", clear), chunk(b"IDAT", zlib.compress(lines))]
    content = b"".join([*data, chunk(b"IEND", b"")])
    expected = (colours >> 8).astype(np.uint8)
    expected[5, 7] = 255
    for form in (content, Image.open(io.BytesIO(content))):
        assert np.array_equal(np.asarray(load_image(form)), expected)
    assert np.array_equal(np.asarray(load_image(colours)), (colours >> 8).astype(np.uint8)), "as an array"


def test_a_16_bit_pnm_file_is_scaled_down(tmp_path):
    (tmp_path / "deep.pgm").write_bytes(b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP.astype(">u2").tobytes())
    expected = (DEEP >> 8).astype(np.uint8)
    for form in (tmp_path / "deep.pgm", Image.open(tmp_path / "deep.pgm")):
        assert np.array_equal(np.asarray(load_image(form))[..., 0], expected)


def test_two_icons_that_differ_in_alpha_alone_are_two_inputs(processor, tmp_path):
    """Black all over, with another shape each: by path they were the same."""
    for number, box in enumerate([(2, 2, 8, 8), (10, 4, 20, 12)]):
        icon = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
        icon.paste((0, 0, 0, 255), box)
        icon.save(tmp_path / f"{number}.png")
    first, second = processor.preprocess([str(tmp_path / "0.png"), str(tmp_path / "1.png")])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_augmenting_sees_transparent_pixels_on_white():
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert np.asarray(augment_row({"image": clear}, 0, ["image"], 0)["image"]).min() == 255


ENDINGS = {
    "image": ["png", "JPG", "jpeg", "jfif", "jpe", "gif", "bmp", "dib", "webp", "tif", "TIFF", "ico", "jp2"]
    + ["tga", "ppm", "pgm", "mpo", "apng", "qoi"],
    "video": ["mp4", "MOV", "avi", "mkv", "webm", "wmv", "flv", "mpg", "m4v"],
    None: ["txt", "pdf", "svg", "h5", "csv", "npy", "html", ""],
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_what_a_file_is_follows_from_its_ending(kind):
    for ending in ENDINGS[kind]:
        assert media_kind(f"picture.{ending}") == media_kind(Path("a.b") / f"c.{ending}") == kind, ending


@pytest.mark.parametrize("ending", ["tif", "TIFF", "jfif", "webp", "ico", "jp2", "bmp", "ppm", "tga", "png"])
def test_an_existing_image_of_any_ending_is_an_image(processor, tmp_path, ending):
    path = tmp_path / f"a picture.{ending}"
    RGB.save(path, **({"sizes": [(16, 16)]} if ending == "ico" else {}))
    (row,) = processor.preprocess([str(path)])
    assert "pixel_values" in row and torch.equal(row["pixel_values"], processor.preprocess([path])[0]["pixel_values"])


def test_a_plugin_that_is_registered_later_counts(monkeypatch):
    assert media_kind("a.heic") is None
    assert media_kind("gif") is media_kind("PS") is None, "a word, and no file"
    monkeypatch.setitem(Image.registered_extensions(), ".heic", "HEIF")
    monkeypatch.setitem(Image.OPEN, "HEIF", (Image.Image, None))
    assert media_kind("a.heic") == "image"


MISSING = ["cat.png", "~/cat.png", "file:///tmp/cat.PNG", "a/b.tif", "www.a.org/cat.jpg", "film.mp4", "FILM.webm"]


@pytest.fixture
def folder_named_as_an_image(tmp_path) -> str:
    (tmp_path / "x.png").mkdir()
    return str(tmp_path / "x.png")


@pytest.mark.parametrize("item", [*MISSING, None])
def test_a_str_that_ends_like_a_file_and_is_none_is_embedded_with_a_warning(
    processor, folder_named_as_an_image, caplog, item
):
    item = item or folder_named_as_an_image
    with caplog.at_level(logging.WARNING):
        rows = processor.preprocess(["hi", item, item, "other.png"])
    assert [record.name for record in caplog.records] == ["modeling_cocoa.processing_cocoa"], "once a call"
    message = caplog.records[0].getMessage()
    assert message.startswith("Item 1 is embedded as the words of its path: ") and item in message
    assert torch.equal(rows[1]["input_ids"], processor.preprocess([{"text": item}])[0]["input_ids"])
    with pytest.raises(CocoaInputError, match="If it is meant as text, pass"):
        input_messages(item)
    with pytest.raises(CocoaInputError, match="If it is meant as text, pass"):
        open_images(item)


@pytest.mark.parametrize("item", [*MISSING, None])
def test_a_text_given_as_one_is_never_a_path(processor, folder_named_as_an_image, caplog, item):
    item = item or folder_named_as_an_image
    forms = [{"text": item}, [{"role": "user", "content": item}], {"role": "user", "content": item}]
    with caplog.at_level(logging.WARNING):
        processor.preprocess(forms)
        assert [open_images(form) for form in forms] == forms
    assert not caplog.records


@pytest.mark.parametrize("text", ["a red cat.png", "cat", "cat.", "see:\ncat.png", "cat.pdf", "https://a.org/page"])
def test_other_words_are_silent(processor, caplog, text):
    with caplog.at_level(logging.WARNING):
        processor.preprocess([text])
    assert not caplog.records and open_images(text) == text


def test_a_path_of_a_directory_is_an_error(processor, folder_named_as_an_image):
    for item in (Path(folder_named_as_an_image), {"image": folder_named_as_an_image}):
        with pytest.raises(CocoaInputError, match="Item 0: .*x.png is a folder; give the path"):
            processor.preprocess([item])


def test_images_are_let_go_of_as_they_become_patches(processor_folder, monkeypatch):
    """However many, no more than [`PIXELS_AT_ONCE`] are held decoded."""
    processor = CocoaProcessor.from_pretrained(processor_folder)
    expected = processor.preprocess([NOISE + np.uint8(number) for number in range(9)])
    monkeypatch.setattr(processing_cocoa, "PIXELS_AT_ONCE", 2 * WIDTH * HEIGHT)
    held: list[weakref.ref] = []
    most = []
    load = processing_cocoa.read_input

    def count(item, *arguments):
        conversation = load(item, *arguments)
        held.extend(map(weakref.ref, conversation.images))
        most.append(sum(image() is not None for image in held))
        return conversation

    monkeypatch.setattr(processing_cocoa, "read_input", count)
    rows = processor.preprocess(NOISE + np.uint8(number) for number in range(9))
    assert max(most) <= 3 and len(most) == 9
    for row, other in zip(rows, expected, strict=True):
        assert all(torch.equal(row[key], other[key]) for key in other)


def test_the_working_directory_counts(processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RGB.save("here.tif")
    assert "pixel_values" in processor.preprocess(["here.tif"])[0]
    os.remove("here.tif")
    assert "pixel_values" not in processor.preprocess(["here.tif"])[0]
