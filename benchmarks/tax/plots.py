# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Plots of the trade-offs along training, with one line per method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .report import SAFE, Point, curve, first_safe, refused

PANELS = {
    "kl": "KL from the base (nats per token)",
    "loss": "general loss (nats per token)",
    "over_refusal": "refuses benign look-alikes",
    "facts": "plain facts known",
}
"""What is drawn over the share of harmful requests that is refused."""


def mean_curve(base: Point, runs: Mapping[int, Any]) -> list[Point]:
    """Return the mean over seeds at each measurement.

    Runs that ended when they were safe were measured at steps of their own. Of these it takes the base and the first
    measurements at which enough harmful requests of the first source and of every source are refused. A run that does
    not come to that gives its last measurement.
    """
    curves = [_points(curve(base, run), run) for run in runs.values()]
    return [
        {
            name: statistics.mean(point[name] for point in points)
            for name in points[0]
            if all(name in point for point in points)
        }
        for points in zip(*curves, strict=True)
    ]


def _points(points: Sequence[Point], run: Any) -> Sequence[Point]:
    if not run["run_info"]["settings"].get("until_safe"):
        return points
    return [points[0], *(first_safe(points, every) or points[-1] for every in (False, True))]


def tradeoffs(base: Point, runs: Mapping[str, Mapping[int, Any]], names: Sequence[str], path: Path) -> None:
    """Draw the panels: means over seeds, with one dot per measurement. Every line starts at the base.

    Raises:
        OSError: If the file cannot be written.
    """
    figure = Figure(figsize=(12, 9), layout="constrained")
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axes, (up, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name, color in zip(names, colors, strict=False):
            points = mean_curve(base, runs[name])
            style = "-" if "cone" in name or "null space" in name else "--"
            axes.plot([refused(p) for p in points], [p[up] for p in points], style, marker="o", markersize=4)
            axes.lines[-1].set(color=color, label=name)
        axes.axvline(SAFE, color="grey", linewidth=0.8)
        axes.set(xlabel="refuses harmful requests (of the source of which fewer are refused)", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
