# SPDX-License-Identifier: Apache-2.0
"""What a model's card says, read from its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from sentence_transformers.sentence_transformer import SentenceTransformerModelCardData

from evaluation.mmeb_report import MEANS, markdown_report
from evaluation.mmeb_scores import Scores
from evaluation.mmeb_tasks import published_on
from modeling_cocoa.files import atomic_write
from modeling_cocoa.saving import CARD_MARK

from .folder_facts import FolderFacts
from .results import chart_of, check_results, read_results
from .training_record import StageRecord, read_records

TEMPLATE = Path(__file__).with_name("model_card.md")
PICTURE = "reconstruction.png"
"""In a model's folder: what it rebuilt from the `<EOS>`."""
FIELDS_FILE = "card.yaml"
"""In a model's folder: what its author says of it."""
STAGE_NAMES = {"warmup": "warm-up", "bridge": "EOS bridge", "contrastive": "contrastive"}
DETAILS = ("pixel_", "text_", "token_accuracy_")
"""Beginnings of the names of measures by direction: in the record, and too many for a card."""
BENCHMARK_DATASETS = {"MMEB-V1": ("TIGER-Lab/MMEB-eval", "ziyjiang/MMEB_Test_Instruct")}
"""Of a benchmark, the Hub names of its data, where it was first published first."""


class BlockDumper(yaml.SafeDumper):
    """Writes texts of several lines as they are read."""


BlockDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


@dataclass
class CocoaModelCardData(SentenceTransformerModelCardData):
    """
    What a CoCoA model's card says. Most of it is read from the folder that the card is for: what the model is, its
    stages' settings and data, results and pictures. What nothing recorded is left out.

    ```python
    card_data = CocoaModelCardData(license="apache-2.0", language="en", model_name="CoCoA of birds")
    CocoaContrastiveTrainer(model, args, train_dataset=pairs, card_data=card_data)
    ```

    Args:
        language (`str` or `list[str]`), license (`str`), model_name (`str`), model_id (`str`), tags (`list[str]`): As
            in sentence-transformers' card data.
        base_model (`str`): Hub name of the model that training began with, where that was a local copy; one that was
            loaded from the Hub is recorded by itself.
        train_datasets (`list[dict[str, str]]`): Of each, `name` and where there are any `id` (on the Hub), `license`
            and `url`.
        notes (`str`): A section in Markdown of the author's own, such as what the model is not good at.
    """

    base_model: str | None = None
    notes: str = ""
    tags: list[str] = field(
        default_factory=lambda: ["sentence-transformers", "feature-extraction", "multimodal", "cocoa"]
    )
    pipeline_tag: str = field(default="feature-extraction", init=False)
    template_path: Path = field(default=TEMPLATE, init=False, repr=False)

    def validate_datasets(self, dataset_list: list[dict[str, Any]], infer_languages: bool = True) -> list[Any]:
        """As they were given: nothing is asked of the Hub."""
        return dataset_list

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> CocoaModelCardData:
        """
        What the author has said of a model before.

        Args:
            folder (`str` or `os.PathLike`): Of the model; without a `card.yaml`, nothing was said.

        Raises:
            ValueError: its `card.yaml` holds other fields than there are.
        """
        path = Path(folder) / FIELDS_FILE
        if not path.is_file():
            return cls()
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} does not hold the fields {cls.field_names()} ({error}).") from error

    @classmethod
    def field_names(cls) -> list[str]:
        """What may be said of a model."""
        return [item.name for item in fields(cls) if item.init]

    def said(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        default = type(self)()
        return {
            name: getattr(self, name) for name in self.field_names() if getattr(self, name) != getattr(default, name)
        }

    def beside(self, earlier: CocoaModelCardData) -> CocoaModelCardData:
        """A copy, in which what was not said is as it was said earlier."""
        data = copy(self)
        for name, value in earlier.said().items():
            if name not in self.said():
                setattr(data, name, value)
        return data

    def write_fields(self, folder: str | os.PathLike) -> None:
        """Write what the author says into a model's folder, so that it is there when the card is written again."""
        if said := self.said():
            with atomic_write(Path(folder) / FIELDS_FILE) as path:
                text = yaml.dump(said, Dumper=BlockDumper, sort_keys=False, allow_unicode=True, width=1000)
                path.write_text(text, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """
        The head's fields and what the template takes.

        Raises:
            FileNotFoundError, ValueError: the folder (`save_dir`) is not one of a whole CoCoA model.
        """
        folder = Path(self.save_dir or "")
        facts, records, results = FolderFacts.read(folder), read_records(folder), read_results(folder)
        first = records[0] if records else None
        base_model = first.base_model if first and first.base_model else self.base_model
        name = self.model_name or (self.model_id or "").split("/")[-1] or f"{facts.backbone} embedding model"
        head = {item.name: getattr(self, item.name) for item in fields(self) if not item.name.startswith("_")}
        return {
            **head,
            "tags": [*dict.fromkeys([*self.tags, facts.model_type])],
            "base_model": base_model,
            "base_model_revision": first.base_revision if first else None,
            "datasets": dataset_ids(self.train_datasets, records),
            "co2_eq_emissions": total_emissions(records),
            "model-index": model_index(name, results),
            "model_name": name,
            "facts": facts,
            "stages": stage_table(records),
            "stage_data": stage_datasets(records),
            "versions": records[-1].versions if records else {},
            "results": [(result_section(scores), chart_of(folder, scores)) for scores in results],
            "picture": PICTURE if (folder / PICTURE).is_file() else None,
            "mark": CARD_MARK,
        }


def write_card(folder: str | os.PathLike, card_data: CocoaModelCardData | None = None) -> Path:
    """
    Write the card of a model from what its folder holds.

    Args:
        folder (`str` or `os.PathLike`): Of a model saved by [`save_cocoa`].
        card_data ([`CocoaModelCardData`], *optional*): What the folder does not tell, which is kept in its
            `card.yaml`. What it leaves unsaid is as that file has it.

    Returns:
        `Path`: The `README.md`.

    Raises:
        FileNotFoundError, ValueError: the folder is not whole; its `card.yaml` is not valid; a result in it is of
            other weights; its README.md was written by somebody, who would lose it.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if is_written_by_user(path):
        raise ValueError(
            f"{path} was not written by this package, and would be lost: put what it says into the `notes` of "
            f"{FIELDS_FILE} beside it, and remove it."
        )
    check_results(folder)
    earlier = CocoaModelCardData.from_folder(folder)
    data = earlier if card_data is None else card_data.beside(earlier)
    data.write_fields(folder)
    data.save_dir = os.fspath(folder)
    with atomic_write(path) as partial:
        ModelCard.from_template(data, template_path=str(data.template_path)).save(partial)
    return path


def is_written_by_user(card: Path) -> bool:
    """Whether there is a card that this package did not write."""
    return card.is_file() and CARD_MARK not in card.read_text(encoding="utf-8")


def dataset_ids(named: Iterable[Mapping[str, Any]], records: Iterable[StageRecord]) -> list[str]:
    """Hub names of the data of training, once each."""
    known = [*named, *(dataset for record in records for dataset in record.datasets)]
    return list(dict.fromkeys(dataset["id"] for dataset in known if dataset.get("id")))


def total_emissions(records: Sequence[StageRecord]) -> dict[str, Any] | None:
    """Of all stages together, where each was measured."""
    if not records or not all(record.emissions for record in records):
        return None
    totals = {name: sum(record.emissions[name] for record in records) for name in ("emissions", "energy_consumed")}
    return {**records[-1].emissions, **totals}


def model_index(name: str, results: Iterable[Scores]) -> list[dict[str, Any]] | None:
    """Results in the form that the Hub reads; those of a part of a benchmark are none."""
    found = [
        EvalResult(
            task_type="feature-extraction",
            task_name="Multimodal embedding",
            dataset_type=dataset_of(scores),
            dataset_name=scores.benchmark,
            metric_type="precision_at_1",
            metric_name=f"Precision@1, {MEANS[part]}",
            metric_value=round(value, 2),
        )
        for scores in results
        if not scores.is_partial
        for part, value in scores.means().items()
        if part in MEANS and value is not None
    ]
    return eval_results_to_model_index(name, found) if found else None


def dataset_of(scores: Scores) -> str:
    """The Hub name of the data that a result is of, or of the benchmark's own where those were files."""
    known = BENCHMARK_DATASETS.get(scores.benchmark, (scores.benchmark,))
    source = scores.settings.get("data", {}).get("source")
    return source if source in known else known[0]


def result_section(scores: Scores) -> str:
    """The tables of a result, beside published figures where there are any."""
    return markdown_report([scores], published_on(scores.benchmark), heading="###").strip()


def stage_table(records: Sequence[StageRecord]) -> str:
    """A table with a column for each stage: how long, on what, with which settings; empty without stages."""
    if not records:
        return ""
    rows: dict[str, list[str]] = {}

    def add(title: str, values: Iterable[Any]) -> None:
        cells = ["" if value in (None, "", {}, []) else in_a_cell(value) for value in values]
        if any(cells):
            rows[title] = cells

    add("Steps", (f"{record.steps:,}" for record in records))
    add("Epochs", (f"{record.epochs:.3g}" for record in records))
    add("Trained parameters", (f"{record.trained_parameters:,}" for record in records))
    add("Adapters", (", ".join(f"{name} {value}" for name, value in record.adapters.items()) for record in records))
    add("Processes", (record.processes for record in records))
    add("Device", (record.device for record in records))
    add("Time", (None if record.seconds is None else duration(record.seconds) for record in records))
    for title in dict.fromkeys(name for record in records for name in record.settings):
        add(f"`{title}`", (code(record.settings.get(title)) for record in records))
    for when, found in (
        ("last logged", [record.losses for record in records]),
        ("evaluated", [record.evaluation for record in records]),
    ):
        for title in dict.fromkeys(name for measures in found for name in measures if not name.startswith(DETAILS)):
            add(f"{title}, {when}", (number(measures.get(title)) for measures in found))
    names = " | ".join(STAGE_NAMES.get(record.stage, record.stage) for record in records)
    lines = [f"| | {names} |", "|---|" + "---|" * len(records)]
    return "\n".join(lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()])


def stage_datasets(records: Iterable[StageRecord]) -> list[tuple[str, str]]:
    """Of each stage, its name and the datasets that it read."""
    found = []
    for record in records:
        by_name = {dataset["name"]: dataset for dataset in record.datasets}
        variants: dict[str, list[str]] = {}  # a recipe numbers those of an entry from the second on
        for name, dataset in by_name.items():
            first = re.sub(r"_\d+$", "", name)
            is_variant = by_name.get(first) == {**dataset, "name": first}
            variants.setdefault(first if is_variant else name, []).append(name)
        names = []
        for name, alike in variants.items():
            dataset = by_name[name]
            known = [f"{dataset['rows']:,} rows"] if dataset.get("rows") else []
            known += [f"{len(alike)} variants"] if len(alike) > 1 else []
            known += [str(dataset[key]) for key in ("id", "license") if dataset.get(key)]
            names.append(f"{name} ({', '.join(known)})" if known else name)
        if names:
            found.append((STAGE_NAMES.get(record.stage, record.stage), ", ".join(names)))
    return found


def in_a_cell(value: Any) -> str:
    """A value as a cell of a table can hold it."""
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def duration(seconds: float) -> str:
    """A time as a person reads it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"


def code(value: Any) -> str:
    """A setting as a table shows it."""
    return "" if value is None else f"`{value}`"


def number(value: float | None) -> str:
    """A measure as a table shows it."""
    return "" if value is None else f"{value:.4g}"
