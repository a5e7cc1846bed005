# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.tables FILE`: the numbers of the published shapes as tables of Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .shape_encode import MODEL, OURS, PROCESSOR, READING
from .shape_train import OURS as PACKED


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def encode_tables(numbers: dict[str, Any]) -> str:
    """Inputs a second of each loader; of ours and the fastest stock one more; and where the time of ours goes."""
    ways = list(dict.fromkeys(way for group in numbers.values() for way in group))

    def cell(group: dict[str, Any], way: str) -> str:
        found = group.get(way, {})
        speed = f"{found['items a second']:,.3g}" if found else ""
        return f"{speed} ({found['against stock']:.2f}x)" if "against stock" in found else speed

    def detail(group: dict[str, Any], column: str, form: str) -> str:
        stock = max((found for way, found in group.items() if way != OURS), key=lambda f: f.get("against stock", 0))
        return f"{group[OURS][column]:{form}} ({stock[column]:{form}})"

    speeds = [[way, *(cell(group, way) for group in numbers.values())] for way in ways]
    details = [
        [name, *(detail(group, column, form) for group in numbers.values())]
        for name, column, form in (
            ("tokens a second", "tokens a second", ",.0f"),
            ("share of the rate of matrix multiplication", "share of matmul rate", ".0%"),
            ("peak MiB above the weights", "peak MiB", ",.0f"),
        )
    ]
    least = ["least cosine to stock", *(f"{group[OURS]['least cosine']:.5f}" for group in numbers.values())]
    parts = (MODEL, READING, PROCESSOR)
    return "\n".join(
        [
            table(["inputs a second", *numbers], [row for row in speeds if row[0] not in parts]),
            table([f"{OURS} (stock)", *numbers], [*details, least]),
            table(["inputs a second", *numbers], [row for row in speeds if row[0] in (OURS, *parts)]),
        ]
    )


def step_tables(numbers: dict[str, Any]) -> str:
    """A table of steps, the straightforward way in brackets, and one of how far gradients agree."""
    steps, agreements = [], []
    for title, group in numbers.items():
        if PACKED not in group:
            agreements += [
                [
                    title.partition(",")[0],
                    dtype,
                    *(f"{found[name]:.1g}" if name in found else "" for name in ("loss", "gradients", "worst matrix")),
                ]
                for dtype, found in group.items()
            ]
            continue
        ours, other = group[PACKED], next(iter(group.values()))
        columns = (("tokens a second", ",.0f"), ("share of matmul rate", ".0%"), ("peak GiB", ".1f"))
        cells = [f"{ours[column]:{form}} ({other[column]:{form}})" for column, form in columns]
        worked_out = f"{ours['worked out GiB']:.1f} GiB, {ours['measured / worked out']:.2f}x"
        steps.append([title, f"{ours['tokens']:,}", f"{ours['against the other']:.2f}x", *cells, worked_out])
    header = ["step", "tokens", "speed", "tokens a second", "share of matmul rate", "peak GiB", "worked out, measured"]
    return "\n".join(
        [
            table(header, steps),
            table(["relative difference", "precision", "loss", "gradients", "worst matrix"], agreements),
        ]
    )


def markdown(report: dict[str, Any]) -> str:
    """What the documentation shows of a report: of each part its tables, and what stopped it."""
    pieces = []
    for name, part in report.items():
        make = {"encode": encode_tables, "steps": step_tables}.get(name.partition("-")[0])
        if make is None or not part["numbers"]:
            continue
        pieces.append(f"{part['title']}, {part['machine']['device']}, torch {part['machine']['torch']}:\n")
        pieces.append(make(part["numbers"]))
        pieces += [f"{work}: {problem}\n" for work, problem in part.get("stopped", {}).items()]
    return "\n".join(pieces)


def main(file: Annotated[Path, typer.Argument(help="JSON file that `python -m benchmarks` wrote.")]) -> None:
    """Print the tables of a file."""
    typer.echo(markdown(json.loads(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    typer.run(main)
