# SPDX-License-Identifier: Apache-2.0
"""The data of small.yaml: nothing of a held-out concept is in it, in any style, language or source."""

import io
import json
import shutil
import subprocess
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluation.emoji import load_emoji
from trainers.recipes import small_data
from trainers.recipes.small_data import FOLDER, HeldOut, as_png, bare_code_point, make_drawings, make_words, words_of

EMOJI = [
    {"codepoint": "1f686", "split": "test", "name": "train", "names": {"de": "Zug", "it": "treno"}},
    {
        "codepoint": "1f1e9-1f1ea",
        "split": "validation",
        "name": "flag: Germany",
        "names": {"de": "Flagge: Deutschland"},
    },
    {"codepoint": "263a-fe0f", "split": "test", "name": "smiling face", "names": {"de": "lächelndes Gesicht"}},
    {"codepoint": "1f682", "split": "train", "name": "locomotive", "names": {"de": "Dampflokomotive"}},
]
SQUARE = '<rect x="2" y="2" width="9" height="9" fill="{}"/>'


@pytest.fixture
def held_out():
    return HeldOut(EMOJI)


@pytest.mark.parametrize(
    "text",
    ["Kiddy Trains", "Treno rosso", "germany_01", "der Zug", "a (smiling) FACE", "Deutschland", "lächelndes  Gesicht"],
)
def test_a_name_is_found_within_a_title_in_any_language(held_out, text):
    assert held_out.is_named_in("something else", text)


@pytest.mark.parametrize("text", ["trainer", "locomotive", "face", "smiling cat face", "Zugspitze", ""])
def test_parts_of_a_name_and_other_words_are_none(held_out, text):
    assert not held_out.is_named_in(text)


@given(st.text(), st.text(), st.sampled_from(["train", "smiling face", "Deutschland"]))
def test_whatever_stands_around_a_name(before, after, name):
    held_out = HeldOut(EMOJI)
    assert held_out.is_named_in(f"{before} {name}, {after}")


def test_an_image_becomes_a_square_on_white_and_one_colour_is_none():
    image = Image.new("RGBA", (40, 10), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (10, 0, 30, 10))
    drawn = Image.open(io.BytesIO(as_png(image)))
    assert drawn.size == (small_data.SIDE,) * 2 and drawn.mode == "RGB"
    assert drawn.getpixel((0, 0)) == (255, 255, 255) and drawn.getpixel((32, 32)) == (200, 0, 0)
    assert as_png(Image.new("RGBA", (5, 5), (0, 0, 0, 0))) is None


def pack(path, files):
    """An npm package."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def build_deb(folder, name, files):
    """A Debian package."""
    root = folder / f"{name}-root"
    for path, content in {"DEBIAN/control": CONTROL.format(name), **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    subprocess.run(["dpkg-deb", "--build", root, folder / f"{name}_1-1_all.deb"], check=True, capture_output=True)
    shutil.rmtree(root)


CONTROL = "Package: {}\nVersion: 1-1\nArchitecture: all\nMaintainer: a <a@example.com>\nDescription: a test\n"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """
    Every package, with little in it: in each set of emoji one of the training split, in its own colour, and one that
    is held out; in each of the others a thing, and one that is called as a held-out concept is.
    """
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    folder = tmp_path_factory.mktemp("packages")
    for number, package in enumerate(small_data.PACKAGES["npm"]):
        name = package.rsplit("@", 1)[0]
        if not name.startswith("@iconify-json/"):
            continue
        is_emoji = name.split("/")[1] in small_data.EMOJI_SETS
        seen, unseen = ("rocket", "alarm-clock-missing") if is_emoji else ("thing", "kiddy-train")
        body = SQUARE.format(f"rgb({20 * number},90,10)")
        icons = {seen: {"body": body}, "train": {"body": body.replace("9", "8")}, unseen: {"body": body}}
        content = json.dumps({"icons": icons, "width": 16, "height": 16}).encode()
        pack(folder / f"{name[1:].replace('/', '-')}-1.0.0.tgz", {"icons.json": content})
    drawing = io.BytesIO()
    square = Image.new("RGB", (20, 20), "white")
    square.paste((1, 2, 3), (4, 4, 9, 9))
    square.save(drawing, "WEBP", lossless=True)
    drawings = {f"assets/{code}.webp": drawing.getvalue() for code in ("1f680", "1f686")}
    pack(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", drawings)
    labels = {"de": ("Rakete", "Zug"), "fr": ("fusée", "train"), "it": ("razzo", "treno"), "es": (), "pt": ()}
    names = {
        f"{language}/data.json": json.dumps(
            [{"hexcode": code, "label": label} for code, label in zip(("1F680", "1F686"), own, strict=False)]
        ).encode()
        for language, own in labels.items()
    }
    pack(folder / "emojibase-data-17.0.0.tgz", names)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{}</svg>'
    titled = "<metadata><dc:title>{}</dc:title><rdf:li>{}</rdf:li></metadata>"
    namespaces = 'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
    clips = {
        "a": ("Garden Gnome 01", "garden"),
        "b": ("Kiddy", "train"),
        "c": ("Steam Train", "toy"),
        "d": ("X", ""),
        "e": ("Treno", "toy"),
    }
    build_deb(
        folder,
        "openclipart-svg",
        {
            f"usr/share/{key}.svg": svg.replace("<svg", f"<svg {namespaces}").format(
                titled.format(*title) + SQUARE.format(f"rgb(9,9,{90 + number})")
            )
            for number, (key, title) in enumerate(clips.items())
        },
    )
    words = {
        f"usr/share/wordnet/{part}.{kind}": "" for part in ("data", "index") for kind in ("noun", "verb", "adj", "adv")
    }
    words["usr/share/wordnet/data.noun"] = (
        "  1 licence\n"
        '00000001 05 n 01 dog 0 000 | a common animal; "the dog barked"\n'
        "00000002 05 n 01 dog 0 000 | a dull man\n"
        "00000003 05 n 01 zarf 0 000 | a holder for a cup\n"
    )
    words["usr/share/wordnet/index.noun"] = (
        "  1 licence\ndog n 2 1 @ 2 1 00000001 00000002\nzarf n 1 1 @ 1 0 00000003\nhot_dog n 1 1 @ 1 0 00000003\n"
    )
    build_deb(folder, "wordnet-base", words)
    return folder


def test_drawings_of_all_sources_without_those_of_held_out_concepts(packages):
    rows = make_drawings(packages)
    others = rows.filter(lambda style: style not in ("noto", "twemoji"), input_columns="style")
    names = {(row["kind"], row["style"], row["name"]) for row in others.remove_columns(["image", "noto", "twemoji"])}
    emoji_styles = ("fluent-emoji-3d", *small_data.EMOJI_SETS)
    assert names == {
        *(("emoji", style, "rocket") for style in emoji_styles),
        *(("icon", style, "thing") for style in small_data.ICON_SETS),
        ("clip art", "openclipart", "Garden Gnome"),
    }
    rocket = next(row for row in others if row["name"] == "rocket")
    assert rocket["german"] == "Rakete" and rocket["french"] == "fusée" and rocket["noto"].size == (64, 64)
    held_out = [row for row in load_emoji().remove_columns(["noto", "twemoji"]) if row["split"] != "train"]
    emoji = rows.filter(lambda kind: kind == "emoji", input_columns="kind")
    assert not {row["name"] for row in held_out} & set(emoji["name"])
    assert not {row["name"].lower() for row in held_out} & {
        word.lower() for words in emoji["keywords"] for word in words
    }


def test_words_have_the_senses_that_texts_use_and_rare_nouns_their_only_one(packages):
    assert make_words(packages).to_list() == [
        {"word": "dog", "gloss": "a common animal"},
        {"word": "zarf", "gloss": "a holder for a cup"},
    ]


def test_what_was_made_holds_nothing_of_a_held_out_concept():
    """The same of the real packages, where they have been fetched."""
    path = FOLDER / "drawings.parquet"
    if not path.exists():
        pytest.skip(f"needs {path}, of python -m trainers.recipes.small_data")
    import pyarrow.parquet as pq

    emoji = small_data.emoji_rows(FOLDER / "packages")
    held_out = HeldOut(emoji)
    code_points = {bare_code_point(row["codepoint"]) for row in emoji if row["split"] != "train"}
    rows = pq.read_table(path, columns=["kind", "codepoint", "name", "keywords", "german", "french"]).to_pylist()
    for row in rows:
        texts = [row["name"], *row["keywords"]]
        if row["kind"] == "emoji":
            assert row["codepoint"] not in code_points
            assert not {words_of(text) for text in texts} & held_out.names, row
        else:
            assert not held_out.is_named_in(*texts), row
