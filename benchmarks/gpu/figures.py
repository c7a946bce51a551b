# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The results of stages as table rows, and as one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIB = 2**30
SMALL = 16 * GIB
"""The memory of a T4."""

Result = Mapping[str, Any]
Rows = list[list[str]]


def own_figures(result: Result) -> Any:
    """Return the figures that a stage wrote under its own name, or `None`."""
    return result["figures"].get(f"{result['stage']}.json")


def training(result: Result) -> list[str]:
    """Return a row of the table `TRAINING`."""
    own = own_figures(result)
    losses, peak = own["losses"], own["peak_memory"]
    return [
        own["arguments"]["stage"].upper(),
        own["arguments"]["precision"],
        f"{own['steps']} ({own['skipped']} skipped)",
        f"{losses[0]:.3f} to {losses[-1]:.3f}",
        "" if peak is None else f"{peak / GIB:.2f}",
        f"{own['largest_leak']:.1e}",
        f"{own['resumed_difference']:.1e}",
    ]


TRAINING = (
    "stage",
    "precision",
    "steps",
    "loss",
    "peak, GiB",
    "largest leak",
    "resumed differs by",
)


def projection(result: Result) -> Rows:
    """Return the rows of the table `PROJECTION`."""
    own = own_figures(result)
    settings = own["arguments"]
    return [
        [
            settings["shape"],
            settings["subspace"],
            str(case["rows"]),
            case["path"],
            f"{1000 * case['seconds']:.2f} ({1000 * case['least']:.2f} to {1000 * case['most']:.2f})",
            f"{case['of_the_copy']:.2f}",
            str(case["kernels"] or ""),
        ]
        for case in own["cases"]
    ]


PROJECTION = ("shape", "subspace", "rows or directions", "by", "ms a step", "of a copy", "launches")


def ratios(result: Result) -> Rows:
    """Return the rows of the table `RATIOS`."""
    own = own_figures(result)
    settings = own["settings"]
    shape = f"{settings['shape']}, {'QLoRA' if settings['quantized'] else 'LoRA'}"
    return [
        [
            shape,
            name,
            f"{times['total']['median']:.3f}",
            f"{times['total']['least']:.3f} to {times['total']['most']:.3f}",
            f"{times['refresh']['median']:.3f}",
            f"{times['projection']['median']:.3f}",
            f"{times['build_steps']:.0f}",
        ]
        for name, times in own["methods"].items()
    ]


RATIOS = ("shape", "method", "time", "spread", "of that, references", "projection", "once, in plain steps")


def memory(result: Result) -> Rows:
    """Return the rows of the table `MEMORY`."""
    rows = []
    for run in own_figures(result)["measured"]:
        peaks = {phase: size for phase, size in run["peaks"].items() if phase != "build"}
        most, reserved = max(peaks.values()), run.get("reserved")
        method = "plain QLoRA"
        if run["rows"] or run["directions"]:
            method = f"{run['rows']} rows" if run["rows"] else f"{run['directions']} directions"
        computed = max(run["computed_peaks"].values(), default=None)
        rows.append(
            [
                method,
                *(f"{peaks[phase] / GIB:.2f}" if phase in peaks else "" for phase in ("refresh", "step", "optimizer")),
                "" if computed is None else f"{computed / GIB:.2f}",
                "" if reserved is None else f"{reserved / GIB:.2f}",
                "yes" if max(most, reserved or 0) < SMALL else "no",
            ]
        )
    return rows


MEMORY = ("method", "refresh, GiB", "step", "optimizer step", "computed peak", "reserved", "below 16 GiB")


def building(result: Result) -> list[str]:
    """Return a row of the table `BUILDING`."""
    own = own_figures(result)
    peak = own["peak_memory"]
    return [
        own["arguments"]["shape"],
        f"{own['tokens']:,}",
        f"{own['seconds']:.1f}",
        "" if peak is None else f"{(peak - own['memory_before']) / GIB:.2f}",
        f"{own['held'] / GIB:.2f}",
        f"{1000 * own['step_with_projection']:.1f}",
        f"{1000 * own['step_without']:.1f}",
    ]


BUILDING = ("shape", "tokens", "seconds", "peak above the model, GiB", "held, GiB", "ms a step, projected", "plain")


def summary(result: Result) -> str:
    """Summarize a result in one line, with the device."""
    if result["status"] != "done":
        return f"{result['status']} on {result['machine']['device']}"
    name, text = result["stage"], f"{result['seconds']:.0f} s"
    if own_figures(result) is None:
        pass
    elif name.startswith("train-"):
        text = ", ".join(f"{label} {cell}" for label, cell in zip(TRAINING, training(result), strict=True) if cell)
    elif name.startswith("projection-"):
        text = "; ".join(f"{row[3]} {row[4]} ms, {row[6] or '?'} launches" for row in projection(result))
    elif name.startswith("ratios-"):
        text = "; ".join(f"{row[1]} {row[2]}" for row in ratios(result))
    elif name.startswith("memory-"):
        text = "; ".join(f"{row[0]}: optimizer step {row[3]} GiB, below 16 GiB: {row[6]}" for row in memory(result))
    elif name.startswith("building-"):
        text = ", ".join(f"{label} {cell}" for label, cell in zip(BUILDING, building(result), strict=True) if cell)
    return f"{text} (on {result['machine']['device']})"
