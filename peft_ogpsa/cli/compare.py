# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""`ogpsa compare`: several results of `ogpsa eval` in one table and one plot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..evaluation import Evaluation, table, tradeoff
from .errors import input_errors

# Results are comparable only where these agree.
_CONDITIONS = ("data", "samples", "dtype", "load_in_4bit", "max_new_tokens", "max_length", "seed")


def read(path: str) -> dict[str, Any]:
    """One result of `ogpsa eval`, with its `evaluation` as an `Evaluation`.

    Raises:
        ValueError: If the file is not one.
        OSError: If it cannot be opened.
    """
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        return {
            **saved,
            "evaluation": Evaluation.from_dict(saved["evaluation"]),
            "arguments": dict(saved["arguments"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of `ogpsa eval` ({error!r}). Run `ogpsa eval` again.") from error


def run(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser("ogpsa compare", description="Compares results of `ogpsa eval`.")
    parser.add_argument("results", nargs="+", metavar="FILE.json", help="Results of `ogpsa eval`.")
    parser.add_argument("--plot", metavar="FILE.png", help="Draw general loss against refusal of harmful prompts.")
    parsed = parser.parse_args(list(arguments))
    with input_errors("compare"):
        results = {path: read(path) for path in parsed.results}
        names = [saved["name"] for saved in results.values()]
        # Where two runs have one name, the files tell them apart.
        evaluations: dict[str, Evaluation] = {
            saved["name"] if names.count(saved["name"]) == 1 else path: saved["evaluation"]
            for path, saved in results.items()
        }
        console = Console(width=None if sys.stdout.isatty() else 150)
        for difference in _differences(list(results.values())):
            console.print(f"Not measured alike: {difference}", style="yellow", soft_wrap=True, markup=False)
        console.print(table(evaluations))
        if parsed.plot:
            base = next((e.base for e in evaluations.values() if e.base is not None), None)
            tradeoff({name: [e.model] for name, e in evaluations.items()}, parsed.plot, base=base)
            console.print(f"Plot: {Path(parsed.plot).resolve()}", soft_wrap=True)


def _differences(results: Sequence[dict[str, Any]]) -> list[str]:
    """The conditions in which results differ."""
    conditions = {"base_model": [saved.get("base_model") for saved in results]}
    conditions |= {name: [saved["arguments"].get(name) for saved in results] for name in _CONDITIONS}
    return [
        f"{name} is {', '.join(map(str, values))}."
        for name, values in conditions.items()
        if any(value != values[0] for value in values)
    ]
