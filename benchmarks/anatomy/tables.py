# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of what `watch` measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import chain
from typing import Any

from .ages import MATRICES


def shares(report: Mapping[str, Any]) -> str:
    """Tabulate the removed shares over all steps, by matrix and kind of module."""
    found = report["shares"]
    columns = [(group, name) for group in ("all", "matrix", "kind") for name in found[group]["cone"]]
    lines = [f"| constraint | {' | '.join(name for _, name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for constraint in found["all"]:
        cells = (f"{found[group][constraint][name]:.0%}" for group, name in columns)
        lines.append(f"| {constraint} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cosines(report: Mapping[str, Any]) -> str:
    """Tabulate the cosines of steps with each set's gradient: the mean, and how many steps raise the loss."""
    found = report["cosines"]
    lines = [f"| step | {' | '.join(found['sets'])} |", "|---" * (len(found["sets"]) + 1) + "|"]
    for step in ("gradient", "proposed", "made"):
        cells = []
        for values in zip(*found[step], strict=True):
            cells.append(f"{statistics.mean(values):+.3f}, rises in {sum(v > 0 for v in values)} of {len(values)}")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rules(report: Mapping[str, Any]) -> str:
    """Tabulate the mean, least and largest cosine with a reference gradient, by optimizer and rule."""
    lines = ["| optimizer | rule | mean | least | largest | largest of one tensor |", "|---" * 6 + "|"]
    for optimizer, by_rule in report["rules"].items():
        if optimizer == "sets":
            continue
        for rule, own in by_rule.items():
            every = list(chain.from_iterable(own["whole"]))
            figures = (statistics.mean(every), min(every), max(every), max(own["worst"]))
            lines.append(f"| {optimizer} | {rule} | {' | '.join(map(_signed, figures))} |")
    return "\n".join(lines) + "\n"


def ages(report: Mapping[str, Any]) -> str:
    """Tabulate the mean cosines of gradients with those of the same examples some steps later."""
    after = (1, 2, 5, 10, 15)
    lines = [f"| matrix, from step | {' | '.join(f'{k} later' for k in after)} |", "|---" * (len(after) + 1) + "|"]
    for matrix in MATRICES:
        for anchor, later in report["ages"]["cosines"][matrix].items():
            known = [later[k - 1] if k <= len(later) else [None] for k in after]
            cells = ("" if None in own else f"{statistics.mean(own):.2f}" for own in known)
            lines.append(f"| {matrix}, {anchor} | {' | '.join(cells)} |")
        others = [value for value in report["ages"]["others"][matrix] if value is not None]
        lines.append(f"| {matrix}, another example's: {statistics.mean(others):.2f} |{' |' * len(after)}")
    return "\n".join(lines) + "\n"


def _signed(value: float) -> str:
    """Format a number with three decimals, or in scientific notation if these would be zeros."""
    return f"{value:+.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.0e}"


TABLES = (shares, cosines, rules, ages)
