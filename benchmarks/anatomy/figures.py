# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of what `watch` measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .ages import MATRICES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
CONSTRAINTS = {"cone": COLOURS[2], "orthogonal": COLOURS[1]}
STYLES = dict(zip(MATRICES, ("-", "--"), strict=True))
STEPS = {"gradient": "minus the gradient", "proposed": "AdamW's step", "made": "that step, projected"}


def shares(report: Mapping[str, Any]) -> Figure:
    """Draw the removed share: by layer, by kind of module, and along training."""
    figure, (depth, kind, along) = _panels(3)
    found = report["shares"]
    for constraint, color in CONSTRAINTS.items():
        by_layer = found["layer"][constraint]
        for matrix, style in STYLES.items():
            own = [share for name, share in by_layer.items() if name.startswith(matrix)]
            depth.plot([int(name[1:]) for name in by_layer if name.startswith(matrix)], own, style, color=color)
            along.plot(found["step"][matrix][constraint], style, color=color, label=f"{constraint}, {matrix}")
    for offset, (constraint, color) in zip((-0.2, 0.2), CONSTRAINTS.items(), strict=True):
        bars = found["kind"][constraint]
        kind.bar([i + offset for i in range(len(bars))], list(bars.values()), 0.4, color=color)
    kind.set_xticks(range(len(bars)), list(bars))
    _legend(figure, along)
    _finish(depth, "removed share, by layer", "layer", "length removed / proposed")
    _finish(kind, "by module", "", "")
    _finish(along, "along training", "step", "")
    for axes in (depth, kind, along):
        axes.set_ylim(bottom=0)
    return figure


def cosines(report: Mapping[str, Any]) -> Figure:
    """Draw the cosine of each step with each set's reference gradient, along training."""
    found = report["cosines"]
    figure, panels = _panels(len(found["sets"]), sharey=True)
    for i, (name, axes) in enumerate(zip(found["sets"], panels, strict=True)):
        for (step, label), color in zip(STEPS.items(), (COLOURS[5], COLOURS[0], COLOURS[2]), strict=True):
            axes.plot([own[i] for own in found[step]], color=color, label=label)
        _finish(axes, name, "step", "" if i else "cosine with reference gradient", zero=True)
    _legend(figure, panels[0])
    return figure


def rules(report: Mapping[str, Any]) -> Figure:
    """Draw the cosine of steps under each rule with reference gradients: the mean over sets, and the range."""
    found = {name: own for name, own in report["rules"].items() if name != "sets"}
    figure, panels = _panels(len(found), sharey=True)
    colors = (COLOURS[5], COLOURS[1], COLOURS[4], COLOURS[3], COLOURS[2])
    for i, ((optimizer, by_rule), axes) in enumerate(zip(found.items(), panels, strict=True)):
        for (rule, own), color in zip(by_rule.items(), colors, strict=True):
            steps = range(len(own["whole"]))
            style = "--" if rule.endswith("gradient") else "-"
            axes.plot(steps, _each(statistics.mean, own["whole"]), style, color=color, label=rule)
            axes.fill_between(
                steps, _each(min, own["whole"]), _each(max, own["whole"]), color=color, alpha=0.12, linewidth=0
            )
        _finish(axes, optimizer, "step", "" if i else "cosine with reference gradients", zero=True)
    _legend(figure, panels[0])
    return figure


def ages(report: Mapping[str, Any]) -> Figure:
    """Draw how much the gradients turn, and how long they are."""
    found = report["ages"]
    figure, panels = _panels(3)
    for matrix, axes in zip(MATRICES, panels, strict=False):
        for (anchor, later), color in zip(found["cosines"][matrix].items(), COLOURS, strict=False):
            known = [(k, own) for k, own in enumerate(later, 1) if None not in own]
            if known:
                steps, values = zip(*known, strict=True)
                axes.plot(steps, _each(statistics.mean, values), color=color, label=f"of step {anchor}")
                axes.fill_between(steps, _each(min, values), _each(max, values), color=color, alpha=0.12, linewidth=0)
        others = [value for value in found["others"][matrix] if value is not None]
        axes.axhline(statistics.mean(others), color="#555555", linestyle=":", label="another example's")
        _finish(axes, f"the same example's gradient of {matrix}", "steps later", "cosine")
        axes.set_ylim(top=1.02)
    _legend(figure, panels[1])  # the panel of B has all lines: at the start A has no gradient
    for matrix, style in STYLES.items():
        panels[2].plot(found["lengths"][matrix], style, color=COLOURS[0], label=matrix)
    panels[2].legend(frameon=False, fontsize=8)
    _finish(panels[2], "length of an example's gradient", "step", "")
    return figure


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "shares": shares,
    "cosines": cosines,
    "rules": rules,
    "ages": ages,
}


def _panels(count: int, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(3.4 * count, 3.2), dpi=150, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def _legend(figure: Figure, axes: Axes) -> None:
    """Draw one legend for all panels, below them, where it hides nothing."""
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def _each(of: Callable[[Any], float], values: Sequence[Any]) -> list[float]:
    return [of(own) for own in values]


def _finish(axes: Axes, title: str, x: str, y: str, zero: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if zero:
        axes.axhline(0, color="#555555", linewidth=0.8)
