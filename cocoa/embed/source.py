# SPDX-License-Identifier: Apache-2.0
"""What is embedded: a folder of images, files of rows, or a dataset of the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from evaluation.naming import nearest, nearest_path

from .formats import ENDINGS, FORMATS, Piece, import_lance

BUILDERS = {"imagefolder": "images", "json": "json", "webdataset": "tar"}
"""Formats by the names of builders of `datasets`; others have the same name."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files of a folder of images that name its images in a column `file_name`, as `imagefolder` has them."""
VERSION_KEYS = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated")
"""What file systems tell of a file, of which at least one changes when the file does."""
INPUTS = ("text", "image", "video")


class Item(NamedTuple):
    """
    A row on its way to a vector.

    Args:
        id (`str` or `int`): Its name.
        input (`dict` or `ValueError`): As [`CocoaProcessor`] takes it, or why it cannot be read.
        kept (`dict`): Columns that go to the output as they are.
    """

    id: Any
    input: dict[str, Any] | ValueError
    kept: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """
    A collection, cut into pieces.

    Args:
        name (`str`): As the user gave it: a folder, a file, a glob, or a name on the Hub.
        format (`str`): One of [`FORMATS`].
        files (`tuple[str, ...]`): Files, folders or globs in which the rows are.
        ending (`str`): Of the files among these that count; `""` for images.
        root (`str`): Where names of rows begin.
        schema (`pa.Schema`): Columns and their types, those of the first file.
        id, text, image, video (`str`, *optional*): The columns of an id and of the parts of an input.
        keep (`tuple[str, ...]`): Other columns that go to the output.
    """

    name: str
    format: str
    files: tuple[str, ...]
    ending: str
    root: str
    schema: pa.Schema
    id: str | None = None
    text: str | None = None
    image: str | None = None
    video: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What it is called in the manifest: the same from wherever it is named."""
        return self.name if self.root.startswith("hf://") else " ".join(self.files)

    @property
    def columns(self) -> dict[str, str | None]:
        """Columns of an id and of the parts of an input."""
        return {"id": self.id, "text": self.text, "image": self.image, "video": self.video}

    def list(self) -> Iterator[tuple[str, str]]:
        """All files and their versions, in no order, without keeping them."""
        if self.format == "lance":
            for place in self.files:
                for fragment in import_lance().dataset(place).get_fragments():
                    yield f"{place}#{fragment.fragment_id}", repr(fragment.metadata.to_json())
            return
        for path, info in walk(self.files):
            if self.is_ours(path):
                yield path, " ".join(f"{info[key]}" for key in VERSION_KEYS if info.get(key) is not None)

    def is_ours(self, path: str) -> bool:
        """Whether a file holds rows."""
        return is_image(path) if self.format == "images" else path.endswith(self.ending)

    def cut(self, path: str, version: str, most: int) -> Iterator[Piece]:
        """
        The pieces of a file, of at most `most` rows.

        Raises:
            ValueError: the file cannot be read.
        """
        try:
            for place in FORMATS[self.format].cut(file_system(path), path, most):
                yield Piece(path, version, *place)
        except Exception as error:
            raise unreadable(path, error) from error

    def read(self, piece: Piece) -> Iterator[Item]:
        """
        The rows of a piece, without opening what they name by path.

        Raises:
            ValueError: the file cannot be read, or has other rows than when it was cut.
        """
        fs = file_system(piece.path)
        parts = {kind: getattr(self, kind) for kind in INPUTS if getattr(self, kind)}
        columns = list(dict.fromkeys(filter(None, [self.id, *parts.values(), *self.keep])))
        name = os.path.relpath(piece.path, self.root) if self.root else piece.path
        count = 0
        try:
            for row in FORMATS[self.format].read(fs, piece, columns):
                own = f"{name}:{piece.first + count}"
                count += 1
                if isinstance(row, ValueError):
                    yield Item(own, row, {})
                    continue
                values = {kind: row.get(column) for kind, column in parts.items()}
                try:
                    for kind in values.keys() - {"text"}:
                        values[kind] = resolve(values[kind], fs, piece.path)
                except OSError as error:
                    values = ValueError(f"{type(error).__name__}: {error}")
                if self.id is not None:
                    own = row.get(self.id)
                elif self.format == "images":
                    own = name
                elif self.is_folder_of_images and row.get(self.image):
                    own = os.path.join(os.path.dirname(name), row[self.image])
                yield Item(own, values, {column: row.get(column) for column in self.keep})
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise unreadable(piece.path, error) from error
        if count != piece.rows:
            raise ValueError(f"{piece.path} changed while it was read: it has {count} rows for {piece.rows}.")

    @property
    def is_folder_of_images(self) -> bool:
        """Whether rows are images, by name."""
        return self.format == "images" or self.ending in METADATA

    def check_exists(self) -> None:
        """Raise `FileNotFoundError` where the source has vanished."""
        for place in self.files:
            folder = place if self.format == "lance" or not glob.has_magic(place) else os.path.dirname(place)
            if not glob.has_magic(folder) and not file_system(folder).exists(folder):
                raise FileNotFoundError(f"The source {folder} is not there any more; what is embedded is kept.")


def find_source(
    name: str,
    *,
    split: str | None = None,
    id: str | None = None,
    text: str | None = None,
    image: str | None = None,
    video: str | None = None,
    keep: Iterable[str] | None = None,
) -> Source:
    """
    Find out what a source is.

    Args:
        name (`str`): A folder of images (with or without `metadata.csv`, `.jsonl` or `.parquet`); a folder, file or
            glob of parquet, Arrow, Lance, JSON lines, CSV or tar files, here or where fsspec reaches; a folder that
            `datasets` saved; or the name of a dataset on the Hub.
        split (`str`, defaults to `"train"`): Of a dataset on the Hub.
        id (`str`, *optional*): Column of ids, numbers or texts. By default the column `id`, or else what a row is
            called: the path of an image in its folder, and `file:row` for others.
        text, image, video (`str`, *optional*): Columns of the parts of an input. By default the only one of these
            names that there is.
        keep (`Iterable[str]`, *optional*): Columns that go to the output; by default that of texts, and of a folder of
            images that of captions, `text` or `caption`.

    Raises:
        FileNotFoundError, ValueError: there is nothing, or it is of several kinds; a column does not exist; it is not
            clear which to embed.
    """
    format, files, ending, root = locate(name, split)
    first = next(iter(Source(name, format, files, ending, root, pa.schema([])).list()), None)
    if first is None:
        raise ValueError(f"{name} holds no {'images' if format == 'images' else f'{format} files'}.")
    try:
        schema = FORMATS[format].schema(file_system(first[0]), first[0])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(first[0], error) from error
    chosen = {"text": text, "image": image, "video": video}
    if format == "images" or ending in METADATA:
        chosen["image"] = image or "file_name"
    elif not any(chosen.values()):
        found = [kind for kind in INPUTS if kind in schema.names]
        if len(found) != 1:
            raise ValueError(
                f"Say which columns of {name} to embed, with --text, --image or --video; it has {schema.names}."
            )
        chosen[found[0]] = found[0]
    if id is None and "id" in schema.names:
        id = "id"
    if keep is None:
        keep = filter(None, [text or chosen["text"]])
        if text is None and ending in METADATA:
            from modeling_cocoa.folders import CAPTIONS

            keep = [name for name in CAPTIONS if name in schema.names][:1]
    kept = tuple(keep)
    for option, column in {**chosen, "id": id, **{f"keep {column}": column for column in kept}}.items():
        if column is not None and column not in schema.names:
            raise ValueError(
                f"--{option}: {name} has no column {column!r}{nearest(column, schema.names)}; it has {schema.names}."
            )
    if reserved := [column for column in kept if column in ("id", "embedding", "error") and column != id]:
        raise ValueError(f"The output has a column {reserved[0]!r} of its own; do not keep that of the source.")
    if id is not None and not (pa.types.is_integer(kind := schema.field(id).type) or is_text(kind)):
        raise ValueError(f"--id: the column {id!r} holds {kind}; ids are whole numbers or texts.")
    return Source(name, format, files, ending, root, schema, id=id, keep=kept, **chosen)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def locate(name: str, split: str | None) -> tuple[str, tuple[str, ...], str, str]:
    """Format, files, ending and root of a source; see [`Source`]."""
    is_local = "://" not in name
    place = os.path.abspath(os.path.expanduser(name)) if is_local else name.rstrip("/")
    fs = file_system(place)
    if is_local and not glob.has_magic(name) and not os.path.exists(place):
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not os.path.isdir(name.split("/")[0]):
            return locate_dataset(name, split or "train")
        raise FileNotFoundError(f"There is no file or folder {name}{nearest_path(name) or '; check the path'}.")
    if split is not None:
        raise ValueError(f"--split is for datasets of the Hub; {name} is a path. Give the path of the split instead.")
    if glob.has_magic(name) or not fs.isdir(place):
        ending = next((ending for ending in ENDINGS if place.endswith(ending)), None)
        if ending is None and not place.endswith(".lance"):
            known = ", ".join([*ENDINGS, ".lance"])
            raise ValueError(f"{name} is of an unknown kind: give a folder of images, or files of rows ({known}).")
        places = tuple(sorted(fs.unstrip_protocol(path) if not is_local else path for path in fs.glob(place)))
        if not places:
            raise FileNotFoundError(f"{name} matches no file.")
        if ending is None:
            return "lance", places, ".lance", ""
        root = place if not glob.has_magic(place) else re.split(r"[*?\[]", place)[0]
        return ENDINGS[ending], (place,), ending, os.path.dirname(root)
    if place.endswith(".lance"):
        return "lance", (place,), ".lance", ""
    counts: Counter[str] = Counter()
    for path, _ in walk((place,)):
        counts[
            os.path.basename(path) if os.path.basename(path) in METADATA else os.path.splitext(path)[1].lower()
        ] += 1
    if found := [file for file in METADATA if counts[file]]:
        kinds = {file: ENDINGS[os.path.splitext(file)[1]] for file in found}
    elif counts[".arrow"] and fs.exists(f"{place}/state.json") or fs.exists(f"{place}/dataset_dict.json"):
        kinds = {".arrow": "arrow"}
    else:
        kinds = {ending: format for ending, format in ENDINGS.items() if counts[ending]}
        if any(is_image(f"name{ending}") for ending in counts):
            kinds[""] = "images"
    if len(kinds) != 1:
        there = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in counts.most_common())
        if not kinds:
            known = ", ".join([*ENDINGS, ".lance"])
            raise ValueError(
                f"{name} holds nothing that can be embedded ({there or 'it is empty'}): give a folder of images, or "
                f"files of rows ({known})."
            )
        tables = next(ending for ending in kinds if ending)
        advice = f"give files of one kind, such as '{name}/*{tables}'"
        if "" in kinds:
            advice += ", a folder of the images alone, or call the file that names the images metadata.csv or .jsonl"
        raise ValueError(f"{name} holds files of several kinds ({there}): {advice}.")
    ((ending, format),) = kinds.items()
    return format, (place,), ending, place


def locate_dataset(name: str, split: str) -> tuple[str, tuple[str, ...], str, str]:
    """The files of a dataset, which are read where they are; see [`locate`]."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(name)
    splits = {str(key): files for key, files in (builder.config.data_files or {}).items()}
    if split not in splits:
        raise ValueError(f"--split: {name} has no split {split!r}; it has {list(splits)}.")
    format = BUILDERS.get(builder.name, builder.name)
    files = tuple(map(str, splits[split]))
    if format not in FORMATS or not files:
        raise ValueError(f"{name} is a dataset of the kind {builder.name!r}, which is not read; download its files.")
    if format == "images" and any(os.path.basename(file) in METADATA for file in files):
        files = tuple(file for file in files if os.path.basename(file) in METADATA)
        ending = os.path.basename(files[0])
        return ENDINGS[os.path.splitext(ending)[1]], files, ending, os.path.dirname(files[0])
    return format, files, "", os.path.dirname(os.path.commonprefix(files))


def walk(places: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of folders, files or globs, each with what the file system tells of it; hidden ones are left out."""
    for place in places:
        fs = file_system(place)
        if "file" in fs.protocol and os.path.isdir(place):
            yield from walk_folder(place)
        elif glob.has_magic(place):
            for path, info in fs.glob(place, detail=True).items():
                yield fs.unstrip_protocol(path) if "://" in place else path, info
        elif fs.isfile(place):
            yield place, fs.info(place)
        else:
            for _, _, files in fs.walk(place, detail=True):
                for name, info in files.items():
                    if not name.startswith("."):
                        yield fs.unstrip_protocol(info["name"]), info


def walk_folder(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of a folder of this machine, of which no list is made."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk_folder(entry.path)
            elif entry.is_file():
                status = entry.stat()
                yield entry.path, {"size": status.st_size, "mtime": status.st_mtime_ns}


def file_system(path: str) -> Any:
    """What opens a path."""
    return fsspec.core.url_to_fs(path)[0]


def is_image(path: str) -> bool:
    """Whether a file is an image, by its ending."""
    from modeling_cocoa.media import media_kind

    return media_kind(path) == "image"


def resolve(value: Any, fs: Any, table: str) -> Any:
    """An image or a video of a table, its path as one that opens from anywhere: paths are relative to the table."""
    if isinstance(value, (list, tuple)):
        return [resolve(part, fs, table) for part in value]
    if isinstance(value, dict) and value.get("bytes") is None and set(value) <= {"bytes", "path"}:
        value = value.get("path")
    if not isinstance(value, str) or re.match(r"data:|https?://", value):
        return value
    path = value if "://" in value else os.path.join(os.path.dirname(table), value)
    return path if "file" in fs.protocol else {"bytes": fs.cat_file(path), "path": path}


def unreadable(path: str, error: Exception) -> Exception:
    """The error of a file of rows."""
    return (
        type(error)(f"{path} cannot be read ({error}).")
        if type(error) in (OSError, ValueError)
        else ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); repair or remove it.")
    )
