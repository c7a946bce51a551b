# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder of results as Markdown, with the same tables as the documentation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..tax import report as tax_report
from ..tax.results import results as tax_tables
from . import figures
from .figures import Result

SECTIONS = (
    ("train-", "Training in 4 bits", figures.TRAINING, lambda result: [figures.training(result)]),
    ("projection-", "One projection", figures.PROJECTION, figures.projection),
    ("ratios-", "Time, relative to plain training", figures.RATIOS, figures.ratios),
    ("memory-", "Memory of 8 B in 4 bits, 1024 tokens", figures.MEMORY, figures.memory),
    ("building-", "Building the activation subspace", figures.BUILDING, lambda result: [figures.building(result)]),
)
"""For each table: the prefix of its stages' names, a heading, the columns, and the function that makes rows."""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the results by stage, in the order in which they were made.

    Raises:
        FileNotFoundError: If the folder holds no results.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    if not found:
        raise FileNotFoundError(f"There are no results in {folder}.")
    return {result["stage"]: result for result in sorted(found, key=lambda result: result["started"])}


def markdown(results: Mapping[str, Result], folder: Path) -> str:
    """Return all tables, with the device and the versions."""
    lines = ["# Results of a rehearsal" if any(own["toy"] for own in results.values()) else "# Results", ""]
    for machine, commits in _machines(results.values()):
        versions = ", ".join(f"{name} {own}" for name, own in machine["versions"].items())
        memory = f", {machine['memory'] / figures.GIB:.0f} GiB" if machine["memory"] else ""
        lines += [f"{machine['device']}{memory}; {versions}; at {', '.join(commits)}.", ""]
    lines += ["## Stages", "", *_table(("stage", "result", "seconds", "what it settles"), _stages(results.values()))]
    for prefix, heading, columns, rows_of in SECTIONS:
        own = [result for name, result in results.items() if name.startswith(prefix) and figures.own_figures(result)]
        if own:
            rows = [row for result in own for row in rows_of(result)]
            lines += [f"## {heading}", "", *_table(columns, rows)]
    lines += _tests(folder)
    for runs in sorted((folder / "files").glob("tax-*/runs")):
        lines += [f"## The tax: {runs.parent.name}", "", _tax(runs), ""]
    for result in results.values():
        if result["status"] != "done":
            lines += [f"## {result['stage']}: {result['status']}", "", "```", *result["log_end"], "```", ""]
    return "\n".join(lines)


def _machines(results: Iterable[Result]) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Return each machine with the commits that ran on it."""
    found: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for result in results:
        own = found.setdefault(json.dumps(result["machine"]), (result["machine"], []))
        if result["commit"] not in own[1]:
            own[1].append(result["commit"])
    return list(found.values())


def _stages(results: Iterable[Result]) -> list[list[str]]:
    return [[own["stage"], own["status"], f"{own['seconds']:.0f}", own["settles"]] for own in results]


def _tests(folder: Path) -> list[str]:
    rows, failures = [], []
    for path in sorted((folder / "files").glob("*/tests.xml")):
        suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        failed = counts["failures"] + counts["errors"]
        passed = counts["tests"] - failed - counts["skipped"]
        rows.append([path.parent.name, str(passed), str(failed), str(counts["skipped"])])
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failures.append(f"- `{case.get('classname')}::{case.get('name')}`")
    return ["## Tests", "", *_table(("run", "passed", "failed", "skipped"), rows), *failures, ""] if rows else []


def _tax(folder: Path) -> str:
    """Return the tables of the tax, also of a stage that was stopped."""
    if not (folder / "base.json").is_file() or not list(folder.glob("plain-seed*.json")):
        return "Plain LoRA has not been run, which all are compared with."
    base, runs = tax_report.load(folder)
    return tax_tables(base, runs, "the commands of its stages").replace("\n#", "\n##")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(own) + " |" for own in rows), ""]
