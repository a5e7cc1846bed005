# SPDX-License-Identifier: Apache-2.0
"""The card of a model, written from what its folder holds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from sentence_transformers.base.model_card import format_duration
from sentence_transformers.sentence_transformer import SentenceTransformerModelCardData

from evaluation.folder_report import folder_tables, is_of_folder
from evaluation.mmeb.report import MEANS, markdown_report
from evaluation.mmeb.scores import Scores
from evaluation.mmeb.tasks import published_on
from modeling_cocoa.files import atomic_write
from modeling_cocoa.saving import CARD_MARK

from .folder_facts import FolderFacts
from .results import chart_of, check_results, read_results
from .training_record import StageRecord, read_records

TEMPLATE = Path(__file__).with_name("model_card.md")
PICTURE = "reconstruction.png"
"""In a model's folder: the reconstructions of its pre-training."""
FIELDS_FILE = "card.yaml"
"""In a model's folder: the fields that its author has set."""
STAGE_NAMES = {"warmup": "warm-up", "bridge": "EOS bridge", "contrastive": "contrastive"}
DETAILS = ("pixel_", "text_", "token_accuracy_")
"""Prefixes of measures by direction, which are in the record, and too many for a card."""
RETRIEVAL = "cosine_"
"""In the names of sentence-transformers' measures of retrieval, of which a card has those that chose a checkpoint."""
BENCHMARK_DATASETS = {"MMEB-V1": ("TIGER-Lab/MMEB-eval", "ziyjiang/MMEB_Test_Instruct")}
"""Hub names of a benchmark's data, the original one first."""


class BlockDumper(yaml.SafeDumper):
    """Writes a text of several lines as a block, line by line."""


BlockDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


@dataclass
class CocoaModelCardData(SentenceTransformerModelCardData):
    """
    The data of a CoCoA model's card. Most of it is read from the model's folder: facts about the model, settings and
    data of its stages, results, reconstructions. What was not recorded is left out of the card.

    ```python
    card_data = CocoaModelCardData(license="apache-2.0", language="en", model_name="CoCoA of birds")
    CocoaContrastiveTrainer(model, args, train_dataset=pairs, card_data=card_data)
    ```

    Args:
        base_model (`str`): Hub name of the base model, if training began with a local copy of it. A base model that
            was loaded from the Hub is recorded automatically.
        notes (`str`): A section of your own in Markdown, such as what the model is not good at; under the heading
            "Notes" where it does not begin with one.
        tags (`list[str]`): As in sentence-transformers' card data, as are `language`, `license`, `model_name` and
            `model_id`. `train_datasets` is a list of dicts: for each dataset its `name`, and optionally `id` (on the
            Hub), `license` and `url`.
    """

    base_model: str | None = None
    notes: str = ""
    tags: list[str] = field(
        default_factory=lambda: ["sentence-transformers", "feature-extraction", "multimodal", "cocoa"]
    )
    pipeline_tag: str = field(default="feature-extraction", init=False)
    template_path: Path = field(default=TEMPLATE, init=False, repr=False)

    def validate_datasets(self, dataset_list: list[dict[str, Any]], infer_languages: bool = True) -> list[Any]:
        """The datasets as they were given, without a request to the Hub."""
        return dataset_list

    @classmethod
    def field_names(cls) -> list[str]:
        """The fields that an author can set."""
        return [item.name for item in fields(cls) if item.init]

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> CocoaModelCardData:
        """
        The fields in a model's `card.yaml`; the defaults if there is none.

        Raises:
            ValueError: the file holds unknown fields, or is not valid YAML.
        """
        path = Path(folder) / FIELDS_FILE
        if not path.is_file():
            return cls()
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} does not hold the fields {cls.field_names()} ({error}).") from error

    def changed_fields(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        values, default = {name: getattr(self, name) for name in self.field_names()}, type(self)()
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    def to_dict(self) -> dict[str, Any]:
        """
        The card's metadata, and the variables of its template.

        Raises:
            FileNotFoundError, ValueError: the folder (`save_dir`) does not hold a complete CoCoA model.
        """
        folder = Path(self.save_dir or "")
        facts, records, results = FolderFacts.read(folder), read_records(folder), read_results(folder)
        first = records[0] if records else None
        name = self.model_name or (self.model_id or "").split("/")[-1] or f"{facts.backbone} embedding model"
        return {
            **{item.name: getattr(self, item.name) for item in fields(self) if not item.name.startswith("_")},
            "tags": [*dict.fromkeys([*self.tags, facts.model_type])],
            "base_model": (first and first.base_model) or self.base_model,
            "base_model_revision": first and first.base_revision,
            "datasets": dataset_ids(self.train_datasets, records),
            "co2_eq_emissions": total_emissions(records),
            "model-index": model_index(name, results),
            "model_name": name,
            "facts": facts,
            "stages": stage_table(records),
            "stage_data": stage_datasets(records),
            "versions": records[-1].versions if records else {},
            "results": [(result_tables(scores), chart_of(folder, scores)) for scores in results],
            "picture": PICTURE if (folder / PICTURE).is_file() else None,
            "mark": CARD_MARK,
        }


def write_card(folder: str | os.PathLike, card_data: CocoaModelCardData | None = None) -> Path:
    """
    Write the card of a model from what its folder holds.

    Args:
        folder (`str` or `os.PathLike`): Of a model saved by [`save_cocoa`].
        card_data ([`CocoaModelCardData`], *optional*): Fields to set; they are kept in the folder's `card.yaml`, whose
            other fields stay.

    Returns:
        `Path`: The `README.md`.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete; its `card.yaml` is not valid; a result in it is of
            other weights; its README.md was written by a user and would be lost.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if is_written_by_user(path):
        raise ValueError(
            f"{path} was not written by this package, and would be lost: move its text into the `notes` of "
            f"{FIELDS_FILE} beside it, and remove it."
        )
    check_results(folder)
    data = CocoaModelCardData.from_folder(folder)
    if card_data is not None:
        data = replace(card_data, **{**data.changed_fields(), **card_data.changed_fields()})
        if changed := data.changed_fields():
            with atomic_write(folder / FIELDS_FILE) as partial:
                text = yaml.dump(changed, Dumper=BlockDumper, sort_keys=False, allow_unicode=True, width=1000)
                partial.write_text(text, encoding="utf-8")
    data.save_dir = os.fspath(folder)
    with atomic_write(path) as partial:
        ModelCard.from_template(data, template_path=str(data.template_path)).save(partial)
    return path


def is_written_by_user(card: Path) -> bool:
    """Whether there is a card that this package did not write."""
    return card.is_file() and CARD_MARK not in card.read_text(encoding="utf-8")


def dataset_ids(named: Iterable[Mapping[str, Any]], records: Iterable[StageRecord]) -> list[str]:
    """Hub names of the training data, without duplicates."""
    known = [*named, *(dataset for record in records for dataset in record.datasets)]
    return list(dict.fromkeys(dataset["id"] for dataset in known if dataset.get("id")))


def total_emissions(records: Sequence[StageRecord]) -> dict[str, Any] | None:
    """Emissions of all stages together, if each was measured."""
    if not records or not all(record.emissions for record in records):
        return None
    totals = {name: sum(record.emissions[name] for record in records) for name in ("emissions", "energy_consumed")}
    return {**records[-1].emissions, **totals}


def result_tables(scores: Scores) -> str:
    """A result as tables in Markdown: a benchmark's beside published figures, a folder's with intervals."""
    if not is_of_folder(scores):
        return markdown_report([scores], published_on(scores.benchmark), heading="###").strip()
    return folder_tables([scores], heading="###") + (
        "\nA folder of the author's own, whose images the model may have been trained on: this is not checked."
    )


def model_index(name: str, results: Iterable[Scores]) -> list[dict[str, Any]] | None:
    """
    Results as the Hub's metadata, without those of parts of a benchmark, and of folders of images, which nobody else
    can measure: the metadata has no place for their intervals.
    """
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
        if not scores.is_partial and not is_of_folder(scores)
        for part, value in scores.means().items()
        if part in MEANS and value is not None
    ]
    return eval_results_to_model_index(name, found) if found else None


def dataset_of(scores: Scores) -> str:
    """Hub name of the data of a result; the benchmark's own if it was read from a folder."""
    known = BENCHMARK_DATASETS.get(scores.benchmark, (scores.benchmark,))
    source = scores.settings.get("data", {}).get("source")
    return source if source in known else known[0]


def stage_table(records: Sequence[StageRecord]) -> str:
    """A Markdown table with a column for each stage: sizes, settings, measures; empty without stages."""
    if not records:
        return ""
    rows: dict[str, list[Any]] = {
        "Steps": [f"{record.steps:,}" for record in records],
        "Epochs": [f"{record.epochs:.3g}" for record in records],
        "Trained parameters": [f"{record.trained_parameters:,}" for record in records],
        "Adapters": [", ".join(f"{name} {value}" for name, value in record.adapters.items()) for record in records],
        "Processes": [record.processes for record in records],
        "Device": [record.device for record in records],
        "Time": [None if record.seconds is None else format_duration(record.seconds) for record in records],
    }
    for name in dict.fromkeys(name for record in records for name in record.settings):
        values = [record.settings.get(name) for record in records]
        rows[f"`{name}`"] = [None if value is None else f"`{value}`" for value in values]
    chosen = {record.settings.get("metric_for_best_model", "").removeprefix("eval_") for record in records}
    for when, measures in (
        ("last logged", [record.losses for record in records]),
        ("evaluated", [record.evaluation for record in records]),
    ):
        names = dict.fromkeys(name for measured in measures for name in measured if not name.startswith(DETAILS))
        for name in (name for name in names if RETRIEVAL not in name or name in chosen):
            rows[f"{name}, {when}"] = [f"{measured[name]:.4g}" if name in measured else None for measured in measures]
    lines = [["", *stage_titles(records)], ["---"] * (len(records) + 1)]
    lines += [[title, *cells] for title, cells in rows.items() if any(cells)]
    return "\n".join(f"| {' | '.join(map(table_cell, line))} |" for line in lines)


def stage_titles(records: Sequence[StageRecord]) -> list[str]:
    """
    What each stage is called. Where a stage does not come after the one before it in the order of a model's stages,
    training began anew with a finished model: what is before is the base model's.
    """
    order = {stage: place for place, stage in enumerate(STAGE_NAMES)}
    places = [order.get(record.stage, len(order)) for record in records]
    own = max((index for index in range(1, len(places)) if places[index] <= places[index - 1]), default=0)
    names = [STAGE_NAMES.get(record.stage, record.stage) for record in records]
    return [f"base model's {name}" if index < own else name for index, name in enumerate(names)]


def table_cell(value: Any) -> str:
    """A value as a cell of a Markdown table."""
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "\\n")


def stage_datasets(records: Sequence[StageRecord]) -> list[tuple[str, str]]:
    """The name of each stage, and its datasets in a line."""
    found = []
    for title, record in zip(stage_titles(records), records, strict=True):
        variants: dict[str, list[dict[str, Any]]] = {}  # a recipe numbers the variants of an entry from the second on
        for dataset in record.datasets:
            first = re.sub(r"_\d+$", "", dataset["name"])
            is_variant = {**dataset, "name": first} in record.datasets
            variants.setdefault(first if is_variant else dataset["name"], []).append(dataset)
        names = []
        for name, (dataset, *others) in variants.items():
            known = [f"{dataset['rows']:,} rows"] if dataset.get("rows") else []
            known += [f"{len(others) + 1} variants"] if others else []
            known += [str(dataset[key]) for key in ("id", "license") if dataset.get(key)]
            names.append(f"{name} ({', '.join(known)})" if known else name)
        if names:
            found.append((title, ", ".join(names)))
    return found
