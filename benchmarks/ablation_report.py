# SPDX-License-Identifier: Apache-2.0
"""The ablation's runs as a table and a plot: means, intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.ranking import Estimate
from modeling_cocoa.files import atomic_write

RESAMPLES = 4000


@dataclass
class Measure:
    """
    What a run is judged by: the share of items whose right answer comes early enough.

    Args:
        title (`str`).
        ranks (`str`): Name of the ranks, among those of a run.
        top (`int`): The rank up to which an answer counts.
    """

    title: str
    ranks: str
    top: int

    def hits(self, ranks: Mapping[str, list[list[int]]]) -> np.ndarray:
        """Of each item, the share of the ways of asking that found it, `(items,)`."""
        return (np.array(ranks[self.ranks]) <= self.top).mean(axis=0)


@dataclass
class Summary:
    """
    One arm by one measure, in percent.

    Args:
        mean ([`Estimate`]): Over seeds and items.
        difference ([`Estimate`], *optional*): To the reference arm, the same seeds and items compared; `None` for the
            reference itself.
        seeds (`int`): Runs.
    """

    mean: Estimate
    difference: Estimate | None
    seeds: int


def bootstrap(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """
    The mean of scores by run and item, with its 95 % interval: runs and items are both drawn anew.

    Args:
        values (`np.ndarray` of shape `(seeds, items)`): Scores, or differences of scores.
        seed (`int`, defaults to 0): Of the draws.
        resamples (`int`, defaults to 4,000).
    """
    generator = np.random.default_rng(seed)
    runs, items = values.shape
    means = np.empty(resamples)
    for number in range(resamples):
        of_runs = values[generator.integers(0, runs, runs)].mean(axis=0)
        means[number] = of_runs[generator.integers(0, items, items)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def summarise(
    runs: Mapping[str, Mapping[int, dict[str, Any]]], reference: str, measures: Mapping[str, Measure]
) -> dict[str, dict[str, Summary]]:
    """
    Every arm that has runs, by measure.

    Args:
        runs: Results by arm and seed; those of an arm are compared with the reference's of the same seeds.
        reference (`str`): The arm that the others are compared with.
        measures (`Mapping[str, Measure]`): By name.

    Returns:
        `dict`: By arm and measure.
    """
    summaries: dict[str, dict[str, Summary]] = {}
    for arm, of_seeds in runs.items():
        for name, measure in measures.items():
            scores = {seed: 100 * measure.hits(run["ranks"]) for seed, run in of_seeds.items()}
            difference = None
            shared = sorted(set(of_seeds) & set(runs.get(reference, {})))
            if arm != reference and shared:
                others = [100 * measure.hits(runs[reference][seed]["ranks"]) for seed in shared]
                difference = bootstrap(np.stack([scores[seed] for seed in shared]) - np.stack(others))
            mean = bootstrap(np.stack(list(scores.values())))
            summaries.setdefault(arm, {})[name] = Summary(mean, difference, len(scores))
    return summaries


def markdown(
    summaries: Mapping[str, Mapping[str, Summary]], titles: Mapping[str, str], measures: Mapping[str, Measure]
) -> str:
    """A table: a line an arm, with means and intervals, below them the differences to the reference."""
    lines = [
        "| arm | seeds | " + " | ".join(measure.title for measure in measures.values()) + " |",
        "|---|---|" + "---|" * len(measures),
    ]
    for arm, of_measures in summaries.items():
        cells = [cell(summary) for summary in (of_measures[measure] for measure in measures)]
        seeds = next(iter(of_measures.values())).seeds
        lines.append(f"| {titles[arm]} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(summary: Summary) -> str:
    """`45.2 (42.8 to 47.6)`, and the difference below, in bold where its interval excludes zero."""
    mean = summary.mean
    text = f"{mean.value:.1f} ({mean.low:.1f} to {mean.high:.1f})"
    if (difference := summary.difference) is None:
        return text
    change = f"{difference.value:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})"
    return f"{text}<br>{f'**{change}**' if excludes_zero(difference) else change}"


def excludes_zero(estimate: Estimate) -> bool:
    """Whether the interval lies on one side of zero."""
    return estimate.low > 0 or estimate.high < 0


def plot(
    summaries: Mapping[str, Mapping[str, Summary]],
    titles: Mapping[str, str],
    reference: str,
    measures: Mapping[str, Measure],
    path: Path,
) -> None:
    """Draw the differences to the reference with their intervals, a panel a measure."""
    from matplotlib.figure import Figure

    arms = [arm for arm in summaries if arm != reference and all(s.difference for s in summaries[arm].values())]
    figure = Figure(figsize=(3.1 * len(measures), 0.9 + 0.42 * len(arms)), layout="constrained")
    for axes, (name, measure) in zip(
        figure.subplots(1, len(measures), sharey=True, squeeze=False)[0], measures.items(), strict=True
    ):
        for place, arm in enumerate(arms):
            difference = summaries[arm][name].difference
            colour = "#1b6ca8" if excludes_zero(difference) else "#9aa5ad"
            axes.plot([difference.low, difference.high], [place, place], color=colour, linewidth=2)
            axes.plot([difference.value], [place], "o", color=colour, markersize=6)
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.set_title(measure.title, fontsize=9)
        axes.set_xlabel("points", fontsize=8)
        axes.set_yticks(range(len(arms)), [titles[arm] for arm in arms], fontsize=9)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(f"Difference to “{titles[reference]}”, with 95 % intervals", fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150)
