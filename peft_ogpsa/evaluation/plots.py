# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Plot what safety costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import extras
from .report import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe and Ito's colors without yellow, which is hard to see on white. Markers distinguish the methods in gray too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#555555"


def tradeoff(
    curves: Mapping[str, Sequence[Measurement]], path: str | Path, *, base: Measurement | None = None
) -> Path:
    """Draw general loss against refusal of harmful prompts, with one line per method along its training.

    Args:
        curves: Measurements in the order of training, by the method's name. On a line with several points, each point
            is labeled with its step, or with its name if it has no step, as stages do.
        path: The PNG file to write.
        base: The base model. It is drawn as a star, and every line starts from it.

    Returns:
        The path of the file.

    Raises:
        ValueError: If a measurement lacks the general loss or the refusal rate.
    """
    extras.check("eval", "The plot of refusal and general loss")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    start = [] if base is None else [_point(base)]
    named = []
    for index, (name, measurements) in enumerate(curves.items()):
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        points = [_point(measurement) for measurement in measurements]
        axes.plot(*zip(*start, *points, strict=True), color=color, linewidth=1.8, alpha=0.55, zorder=2)
        named += axes.plot(
            *zip(*points, strict=True),
            color=color,
            linestyle="none",
            marker=marker,
            markersize=7,
            markeredgecolor="white",
            label=name,
            zorder=3,
        )
        # Separate the labels of neighboring lines: the first methods' above their points, the others' below.
        _label(axes, measurements, points, color, 7 if index < len(curves) / 2 else -15)
    if base is not None:
        named += axes.plot(
            *start[0],
            marker="*",
            markersize=18,
            color=_GREY,
            markeredgecolor="white",
            linestyle="none",
            label=base.name,
            zorder=4,
        )
        axes.axhline(start[0][1], color=_GREY, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    _describe(axes, named, any(measurement.step is not None for curve in curves.values() for measurement in curve))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _label(
    axes: Axes, measurements: Sequence[Measurement], points: Sequence[tuple[float, float]], color: str, offset: int
) -> None:
    """Write a step, or a name, beside each point of a line."""
    from matplotlib.patheffects import withStroke

    for measurement, point in zip(measurements, points, strict=True):
        text = measurement.name if measurement.step is None else str(measurement.step)
        if len(points) > 1 or measurement.step is not None:
            axes.annotate(
                text,
                point,
                (0, offset),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=color,
                path_effects=[withStroke(linewidth=3, foreground="white")],
                zorder=2.5,
            )


def _describe(axes: Axes, named: Sequence[Line2D], steps: bool) -> None:
    """Set the axes' labels and style. `named` are the lines of the legend. `steps`: points are labeled with steps."""
    from matplotlib.ticker import PercentFormatter

    axes.set_xlabel("harmful prompts refused", fontsize=12)
    axes.set_ylabel("general loss (nats per token)", fontsize=12)
    title = "Points further right and lower are better." + (" Numbers are training steps." if steps else "")
    axes.set_title(title, loc="left", fontsize=11, color=_GREY)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(labelsize=11)
    axes.margins(x=0.06, y=0.12)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Name the lines, because matplotlib leaves out names that begin with an underscore.
    axes.legend(named, [str(line.get_label()) for line in named], frameon=False, fontsize=11)


def _point(measurement: Measurement) -> tuple[float, float]:
    if measurement.refusal is None or measurement.general_mean is None:
        raise ValueError(
            f"Measurement {measurement.name!r} (step {measurement.step}) has no refusal rate or no general loss."
            " Give the Evaluator both harmful prompts and general rows."
        )
    return measurement.refusal.value, measurement.general_mean.value
