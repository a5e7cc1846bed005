# SPDX-License-Identifier: Apache-2.0
"""The data of a recipe: which rows are read from where, and what columns a stage is given of them."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from evaluation.naming import nearest, nearest_path

from ..data.augment import augment_images
from ..data.mmeb import mmeb_pairs
from ..data.rows import PAIR_COLUMNS, ROW_COLUMNS, TEACHER_COLUMN
from .options import check_mapping, check_names

FindFile = Callable[[str], str | os.PathLike]
ENTRY_OPTIONS = ("source", "variants", "augment")
"""Keys of an entry that are not columns."""
PAIR_COLUMN = rf"query|positive|negative_\d+|{TEACHER_COLUMN}"
"""Columns of a source of pairs that an entry takes where it names none."""


def reconstruction_data(
    data: Mapping[str, Any], find_file: FindFile, seed: int = 0, *, evaluation: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """
    The datasets of stages 1 and 2 by name, the variants of an entry one after the other. Without entries of their own
    they train on the pairs of stage 3.

    Args:
        data: The section of the recipe; see [`~recipe.Recipe`].
        find_file (`Callable`): From a data file's name in the recipe to its path.
        seed (`int`, defaults to 0): Of samples of words and of augmentation.
        evaluation (`bool`, defaults to `False`): The rows to evaluate on, without variants; none of a source that has
            no `eval`.

    Raises:
        ValueError: an entry or a source is wrong; names it.
    """
    made: dict[str, Dataset | IterableDataset] = {}
    section = "reconstruction" if "reconstruction" in data else "contrastive"
    for name, variants in read_entries(data, section, find_file, seed, evaluation):
        add_once(made, name, variants[0] if len(variants) == 1 else concatenate_datasets(variants))
    return made


def contrastive_data(
    data: Mapping[str, Any], find_file: FindFile, seed: int = 0, *, evaluation: bool = False
) -> dict[str, Dataset]:
    """
    The datasets of stage 3 by name: one for each entry and variant, numbered (`name_2`, ...) where there are several.

    Args and errors are those of [`reconstruction_data`]; a stream is an error.
    """
    made: dict[str, Dataset] = {}
    for name, variants in read_entries(data, "contrastive", find_file, seed, evaluation):
        for number, variant in enumerate(variants):
            if isinstance(variant, IterableDataset):
                raise ValueError(f"data: contrastive {name} is streamed; the contrastive stage needs all its rows.")
            add_once(made, f"{name}_{number + 1}" if number else name, variant)
    return made


def add_once(made: dict[str, Any], name: str, dataset: Any) -> None:
    """Add a dataset, or raise `ValueError` where another has its name."""
    if name in made:
        raise ValueError(f"data: two datasets would be called {name!r}; call their entries something else.")
    made[name] = dataset


def read_entries(
    data: Mapping[str, Any], section: str, find_file: FindFile, seed: int, evaluation: bool
) -> Iterator[tuple[str, list[Dataset | IterableDataset]]]:
    """Name each entry that has rows, or each subset that its source lists, with the datasets of its variants."""
    read = cache(lambda name, subset: read_source(data["sources"][name], find_file, evaluation, subset=subset))
    if not isinstance(data.get(section), Mapping) or not data[section]:
        raise ValueError(f"data: {section} must give its entries by name; got {data.get(section)!r}.")
    for number, (name, entry) in enumerate(data[section].items()):
        columns = entry_columns(section, name, entry)
        source_name = name_source(data, entry, f"{section} {name}")
        subsets = data["sources"][source_name].get("name")
        if subsets == []:
            raise ValueError(f"data: the source {source_name} lists no subset; name one or more, or leave name out.")
        for subset in subsets if isinstance(subsets, list) else [None]:
            source = read(source_name, subset)
            if source is None:
                continue
            variants = 1 if evaluation else entry.get("variants", 1)
            if isinstance(source, IterableDataset) and variants > 1:
                raise ValueError(f"data: {name} is streamed, pass after pass, and has no variants.")
            # Negatives too, which stages 1 and 2 do not read.
            own = columns or {column: column for column in source.column_names if re.fullmatch(PAIR_COLUMN, column)}
            try:
                made = [
                    make_variant(source, own, (seed, number, variant), augment=bool(entry.get("augment") and variant))
                    for variant in range(variants)
                ]
            except ValueError as error:
                raise ValueError(f"data: {section} {name}: {error}") from error
            yield name if subset is None else f"{name}_{subset}", made


def entry_columns(section: str, name: str, entry: Any) -> dict[str, str]:
    """The columns that an entry maps; raises `ValueError` where it has unknown ones, or wrong options."""
    what = f"data: {section} {name}"
    check_mapping(what, entry)
    variants = entry.get("variants", 1)
    if not isinstance(variants, int) or variants < 1:
        raise ValueError(f"data: variants must be a whole number of 1 or more; {name} has {variants!r}.")
    if entry.get("augment") and variants == 1:
        raise ValueError(f"data: augment leaves the first variant as it is; give {name} 2 variants or more.")
    columns_of_rows = ROW_COLUMNS if section == "reconstruction" else ()
    known = [*PAIR_COLUMNS, "negative_1", TEACHER_COLUMN, *columns_of_rows, *ENTRY_OPTIONS]
    check_names(what, "column", [column for column in entry if not re.fullmatch(PAIR_COLUMN, column)], known)
    columns = {column: value for column, value in entry.items() if column not in ENTRY_OPTIONS}
    for column, value in columns.items():
        if not isinstance(value, str):
            raise ValueError(f"{what}: {column} must be a column of the source or a text; got {value!r}.")
    return columns


def make_variant(
    source: Dataset | IterableDataset, columns: Mapping[str, str], seed: tuple[int, ...], *, augment: bool
) -> Dataset | IterableDataset:
    """One variant of an entry's rows: its samples of words and, with `augment`, its changed images follow the seed."""
    generator = np.random.default_rng(seed)
    rows = assemble(source, columns, generator)
    if not augment:
        return rows
    images = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ValueError(
            f"data: augment changes columns of images, and there is none among {list(rows.features)}: leave it out."
        )
    return augment_images(rows, images, seed=int(generator.integers(2**31)))


def name_source(data: Mapping[str, Any], entry: Mapping[str, Any], what: str) -> str:
    """The source that an entry names, or the only one; raises `ValueError` where it does not exist."""
    sources = data["sources"]
    if not isinstance(sources, Mapping) or not all(isinstance(part, Mapping) for part in sources.values()):
        raise ValueError(f"data: sources must give the options of each by its name; got {sources!r}.")
    names = list(sources)
    name = entry.get("source", names[0] if len(names) == 1 else None)
    if name not in names:
        raise ValueError(f"data: {what} names the source {name!r}{nearest(name, names)}; the sources are {names}.")
    return name


@contextmanager
def uncounted() -> Iterator[None]:
    """Within it, `datasets` does not report to the Hub which kinds of files are read."""
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def read_source(
    options: Mapping[str, Any],
    find_file: FindFile,
    evaluation: bool = False,
    as_pairs: bool = True,
    subset: str | None = None,
) -> Dataset | IterableDataset | None:
    """
    The rows of a source; `None` for evaluation where it has no `eval`.

    Args:
        options: Of the source, as in a recipe.
        find_file (`Callable`): From a data file's name in the recipe to its path.
        evaluation (`bool`, defaults to `False`): The rows to evaluate on.
        as_pairs (`bool`, defaults to `True`): Make pairs of the rows of a published `layout`.
        subset (`str`, *optional*): Which of several that `name` lists.

    Raises:
        FileNotFoundError: there are no such data; names the nearest folder.
        ValueError: `layout` is unknown, `image_dir` or a column of `where` does not exist, or there is no row.
    """
    options = {**options, **({} if subset is None else {"name": subset})}
    changes = options.pop("eval", None)
    if evaluation:
        if changes is None:
            return None
        options.update(changes)
    layout, where, image_dir = (options.pop(name, None) for name in ("layout", "where", "image_dir"))
    if "data_files" in options:
        files = options["data_files"]
        options["data_files"] = [str(find_file(file)) for file in ([files] if isinstance(files, str) else files)]
    try:
        with uncounted():
            rows = datasets.load_dataset(**{"split": "train", **options})
    except (TypeError, ValueError) as error:  # of datasets, which does not know which source it was asked for
        raise ValueError(f"data: the source {options} cannot be read: {error}") from error
    except FileNotFoundError as error:
        meant = nearest_path(folder) if (folder := options.get("data_dir")) and not os.path.isdir(folder) else ""
        raise FileNotFoundError(f"data: the source {options} cannot be read: {error}{meant}") from error
    if where:
        rows = select_rows(rows, where)
    if layout not in (None, "mmeb_train"):
        raise ValueError(f"data: the layout of a source is one of ['mmeb_train'], or left out; got {layout!r}.")
    if layout and image_dir is None:
        raise ValueError("data: a source in MMEB-train's layout needs image_dir, the folder of its images.")
    return mmeb_pairs(rows, image_dir) if layout and as_pairs else rows


def select_rows(source: Dataset | IterableDataset, where: Mapping[str, Any]) -> Dataset | IterableDataset:
    """
    The rows whose columns have the given values (or one of a list of them).

    Raises:
        ValueError: a column does not exist, or no row is left (of a stream: noticed when it is read).
    """
    require_columns(source, list(where))
    wanted = {name: set(values) if isinstance(values, list) else {values} for name, values in where.items()}

    def has_values(*cells: Any) -> bool:
        return all(cell in values for cell, values in zip(cells, wanted.values(), strict=True))

    rows = source.filter(has_values, input_columns=list(wanted))
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError(f"No row of the data has {dict(where)}.")
    return rows


def require_columns(source: Dataset | IterableDataset, names: list[str]) -> None:
    """Raise `ValueError` where a column does not exist, listing those that do."""
    known = source.column_names
    if known is not None and (missing := [name for name in names if name not in known]):
        raise ValueError(f"The data has no column {missing}{nearest(missing[0], known)}; it has {known}.")


class Words(list):
    """
    A cell of several words in a text: `{column}` joins all, `{column:sample}` a random number of them (one to all), in
    random order.
    """

    def __init__(self, words: list[str], generator: np.random.Generator) -> None:
        super().__init__(words)
        self.generator = generator

    def __format__(self, spec: str) -> str:
        if spec not in ("", "sample"):
            raise ValueError(f"A column of lists is written {{column}} or {{column:sample}}; got {{column:{spec}}}.")
        if spec == "sample" and self:
            size = self.generator.integers(1, len(self) + 1)
            return ", ".join(self[index] for index in self.generator.permutation(len(self))[:size])
        return ", ".join(self)


def names_in(template: str) -> list[str]:
    """The columns in the braces of a text."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def fill(template: str, row: Mapping[str, Any], generator: np.random.Generator) -> str | None:
    """A text with the columns of a row in its braces; `None` where the row lacks one of them. See [`Words`]."""
    cells = {name: row[name] for name in names_in(template)}
    if any(cell is None for cell in cells.values()):
        return None
    words = {name: Words(cell, generator) if isinstance(cell, list) else str(cell) for name, cell in cells.items()}
    return template.format(**words)


def column_texts(source: Dataset, value: str, generator: np.random.Generator | None = None) -> list[str | None]:
    """A column as texts, or a text with columns in braces, row by row; see [`fill`]."""
    template = as_template(value)
    names = names_in(template)
    require_columns(source, names)
    generator = generator if generator is not None else np.random.default_rng(0)
    columns = {name: source[name] for name in names}
    return [fill(template, {name: columns[name][row] for name in names}, generator) for row in range(len(source))]


def as_template(value: str) -> str:
    """The text that shows a column, of a column's name; any other text as it is."""
    return value if "{" in value else f"{{{value}}}"


def is_kept(source: Dataset | IterableDataset, name: str, value: str) -> bool:
    """Whether a column is taken as it is, and not made into texts."""
    if "{" in value:
        return False
    kind = (source.features or {}).get(value)
    if isinstance(kind, (datasets.Image, dict)) or name in ("image", "images", "texts", "messages"):
        return True
    return isinstance(getattr(kind, "feature", None), dict)  # a list of dicts: a conversation


def assemble(
    source: Dataset | IterableDataset, columns: Mapping[str, str], generator: np.random.Generator | None = None
) -> Dataset | IterableDataset:
    """
    A dataset of the named columns, each a column of the source or a text with columns in braces. Images, lists of
    them, documents and conversations are taken as they are, anything else as texts.
    """
    if isinstance(source, IterableDataset):
        return assemble_stream(source, columns, generator or np.random.default_rng(0))
    parts = []
    for name, value in columns.items():
        if is_kept(source, name, value):
            require_columns(source, [value])
            parts.append(source.select_columns([value]).rename_columns({value: name}))
        else:
            parts.append(Dataset.from_dict({name: column_texts(source, value, generator)}))
    return concatenate_datasets(parts, axis=1)


def assemble_stream(
    source: IterableDataset, columns: Mapping[str, str], generator: np.random.Generator
) -> IterableDataset:
    """The same of a stream, row by row as it is read."""
    kept = {name: value for name, value in columns.items() if is_kept(source, name, value)}
    templates = {name: as_template(value) for name, value in columns.items() if name not in kept}
    used = sorted({*kept.values(), *(column for template in templates.values() for column in names_in(template))})
    require_columns(source, used)
    source = source.select_columns(used)
    features = source.features
    if features is not None:
        for name, kind in features.items():
            if isinstance(kind, datasets.Image):  # opened once, where the row is used
                source = source.cast_column(name, datasets.Image(decode=False))
        text = datasets.Value("string")
        features = datasets.Features({name: features[kept[name]] if name in kept else text for name in columns})

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[kept[name]] if name in kept else fill(templates[name], row, generator) for name in columns}

    return source.map(convert, remove_columns=used, features=features)
