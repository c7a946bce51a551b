# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The methods to compare, chosen before their runs, and tests of their differences prompt by prompt."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from peft_ogpsa.evaluation.chance import holm
from peft_ogpsa.evaluation.means import Mean

from .methods import GRADIENTS
from .report import Point, curve, first_safe

PENALTY = "KL 8, 2 of 40"
"""The KL penalty of the main table. Its weight was searched on seed 100: see `results/heldout.md`."""

MAIN = (
    "plain",
    "paper",
    "replay 1, 2 of 40",
    PENALTY,
    GRADIENTS,
    "null space",
    "null space, KL 8",
    "null space, KL 2",
)
"""The methods of the main table. The last one was added when it became the default, after runs of other tables."""

COMPARED = (
    ("null space", PENALTY),
    ("null space, KL 8", PENALTY),
    ("null space, KL 2", PENALTY),
    ("null space, KL 8", "null space"),
    (GRADIENTS, PENALTY),
    ("null space", "base"),
    ("null space, KL 8", "base"),
    ("null space, KL 2", "base"),
    (PENALTY, "base"),
)
"""The pairs of methods that are compared."""

FIGURES = {
    "kl": "KL from base",
    "facts": "facts known",
    "over_refusal": "refuses benign",
    "over_refusal/unseen": "benign of unseen kinds",
}
"""The figures that are compared. Each has one outcome per prompt."""


def comparisons(
    base: Mapping[str, Any], runs: Mapping[str, Mapping[int, Any]], over: Literal["prompts", "seeds"] = "prompts"
) -> str:
    """Tabulate the first method's figures minus the second one's, where each is first safe by every source.

    The differences give Student's interval and test. A star means larger than chance, by Holm's test of the whole
    table. Only seeds in which both methods became safe count.

    Args:
        base: The base's figures.
        runs: The runs by method and seed.
        over: Of what the differences are a sample. `"prompts"`: the outcomes of each prompt are averaged over the
            seeds, so that the interval holds for these seeds. `"seeds"`: the outcomes of each seed are averaged over
            the prompts, so that it holds for these prompts. One seed has no interval, and is left out.
    """
    if not any(run["train_info"].get("outcomes") for own in runs.values() for run in own.values()):
        return "These runs did not keep what came of each prompt.\n"
    rows: list[tuple[str, str, dict[str, Mean]]] = []
    for first, second in COMPARED:
        if first not in runs or (second not in runs and second != "base"):
            continue
        ours = {seed: _outcomes(base, run) for seed, run in runs[first].items()}
        if second == "base":
            theirs = dict.fromkeys(ours, base.get("outcomes"))
        else:
            theirs = {seed: _outcomes(base, run) for seed, run in runs[second].items()}
        seeds = [seed for seed in ours if ours[seed] and theirs.get(seed)]
        means = {}
        for figure in FIGURES:
            paired = [seed for seed in seeds if figure in ours[seed] and figure in theirs[seed]]
            outcomes = [[own[seed][figure] for seed in paired] for own in (ours, theirs)]
            if over == "seeds":
                averages = [[statistics.mean(map(float, seed)) for seed in own] for own in outcomes]
            else:
                averages = [_average(own) for own in outcomes]
            if len(paired) > (over == "seeds"):
                means[figure] = _mean_difference(*averages)
        rows.append((f"{first} - {second}", f"{len(seeds)} of {len(ours)}", means))
    marks = iter(holm([mean.p for _, _, means in rows for mean in means.values()]))
    lines = ["| methods | seeds | " + " | ".join(FIGURES.values()) + " |", "|" + "---|" * (2 + len(FIGURES))]
    for methods, seeds_in, means in rows:
        cells = [_cell(means[figure], figure, next(marks)) if figure in means else "" for figure in FIGURES]
        lines.append("| " + " | ".join([methods, seeds_in, *cells]) + " |")
    return "\n".join(lines) + "\n"


def task_changes(base: Mapping[str, Any], runs: Mapping[str, Mapping[int, Any]]) -> str:
    """Tabulate the last scores of lm-eval's tasks minus the base's, in points of 100.

    The scores of an example are averaged over the seeds. The differences of all examples give Student's interval and
    test. A star means larger than chance, by Holm's test of the whole table.
    """
    known = base.get("tasks", {})
    rows: list[tuple[str, int, list[Mean]]] = []
    for name, own in runs.items():
        scores = [run["train_info"]["tasks"] for run in own.values() if "tasks" in run["train_info"]]
        if scores:
            pairs = [(_average([theirs[task] for theirs in scores]), _average([known[task]])) for task in known]
            rows.append((name, len(scores), [_mean_difference(*pair) for pair in pairs]))
    if not rows:
        return "These runs scored no task.\n"
    marks = iter(holm([mean.p for _, _, means in rows for mean in means]))
    lines = ["| method | seeds | " + " | ".join(known) + " |", "|" + "---|" * (2 + len(known))]
    rates = (f"{100 * word.count('1') / len(word):.1f} %" for word in known.values())
    lines.append("| base | | " + " | ".join(rates) + " |")
    for name, seeds, means in rows:
        cells = [_cell(mean, "task", next(marks)) for mean in means]
        lines.append("| " + " | ".join([name, str(seeds), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _outcomes(base: Point, run: Any) -> Mapping[str, Any] | None:
    """Return each prompt's outcomes where a run first was safe. `None`: it never was, or did not keep outcomes."""
    points, kept = curve(base, run), run["train_info"].get("outcomes")
    safe = first_safe(points)
    return None if safe is None or not kept else kept[points.index(safe) - 1]


def _average(outcomes: Sequence[Sequence[Any]]) -> list[float]:
    """Return the mean over seeds, by prompt. Outcomes are numbers, or strings of 0 and 1."""
    return [statistics.mean(map(float, own)) for own in zip(*outcomes, strict=True)]


def _mean_difference(first: Sequence[float], second: Sequence[float]) -> Mean:
    return Mean.of([a - b for a, b in zip(first, second, strict=True)])


def _cell(mean: Mean, figure: str, marked: bool) -> str:
    scale, form = (1, "+.4f") if figure == "kl" else (100, "+.1f")
    value, low, high = (format(scale * number, form) for number in (mean.value, *mean.interval()))
    return f"{value} ({low} to {high}){' *' if marked else ''}"
