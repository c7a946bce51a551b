# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""`ogpsa compare`: several results of `ogpsa eval` in one table and one plot."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.files import check_suffix, json_object
from ..evaluation import Evaluation, Measurement, tradeoff
from ..evaluation.report import DAMAGED, with_base
from ..sharing.evaluation_record import MEASURED_WITH
from . import tables
from .errors import input_errors

# Results are comparable only if they agree in these conditions, and in `MEASURED_WITH`.
_TASK_CONDITIONS = ("limit", "chat_template")
_JUDGE_CONDITIONS = ("judges_in_4bit",)


def read(path: str) -> list[dict[str, Any]]:
    """Read the results in a file of `ogpsa eval`, each with its `evaluation` as an `Evaluation`.

    Raises:
        ValueError: If the file is not a result of `ogpsa eval`.
        OSError: If it cannot be opened.
    """
    try:
        saved = json_object(Path(path).read_text(encoding="utf-8"))
        return [
            {
                **result,
                "name": str(result["name"]),
                "evaluation": Evaluation.from_dict(result["evaluation"]),
                "arguments": dict(result["arguments"]),
                # Results of earlier versions have none of these.
                "data": dict(result.get("data", {})),
                "versions": dict(result.get("versions", {})),
            }
            for result in saved.get("results", [saved])
        ]
    except DAMAGED as error:
        raise ValueError(f"{path} is not a result of `ogpsa eval` ({error!r}). Run `ogpsa eval` again.") from error


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("ogpsa compare", description="Compare results of `ogpsa eval`.")
    parser.add_argument("results", nargs="+", metavar="FILE.json", help="Results that `ogpsa eval` wrote.")
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="Plot general loss against the refusal of harmful prompts, and save the plot here.",
    )
    parsed = parser.parse_args(list(arguments))
    with input_errors("compare"):
        if parsed.plot:
            check_suffix(parsed.plot, ".png", "plot")
        results = _named({path: read(path) for path in parsed.results})
        evaluations: dict[str, Evaluation] = {name: saved["evaluation"] for name, saved in results.items()}
        console = tables.console()
        for difference in _differences(list(results.values())):
            console.print(
                f"The results were measured differently: {difference}", style="yellow", soft_wrap=True, markup=False
            )
        base = next((e.base for e in evaluations.values() if e.base is not None), None)
        before = _stages_before(results)
        measurements, reference = _with_base(evaluations, base)
        tables.print_tables(console, evaluations, measurements, reference, _per_stage(evaluations, before))
        if parsed.plot:
            tradeoff(_curves(evaluations, before), parsed.plot, base=base)
            console.print(f"Saved the plot: {Path(parsed.plot).resolve()}", soft_wrap=True, markup=False)


def _named(files: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the results by name. Two that have the same name, or one that has a base's, have their file paths."""
    everything = [saved for results in files.values() for saved in results]
    names = [saved["name"] for saved in everything]
    names += {saved["evaluation"].base.name for saved in everything if saved["evaluation"].base is not None}
    named = {}
    for path, results in files.items():
        for saved in results:
            place = path if len(results) == 1 else f"{path}: {saved['name']}"
            named[saved["name"] if names.count(saved["name"]) == 1 else place] = saved
    return named


def _with_base(evaluations: Mapping[str, Evaluation], base: Measurement | None) -> tuple[dict[str, Measurement], str]:
    """Return all measurements, and the name of the one from which tables show differences.

    This is the first result, or the base of a single one.
    """
    models = {name: evaluation.model for name, evaluation in evaluations.items()}
    reference = next(iter(models)) if len(models) > 1 or base is None else base.name
    return with_base(models, base), reference


def _stages_before(results: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Map each result whose adapter continues another result's adapter to the name of that other result."""
    names = {saved["weights"]: name for name, saved in results.items() if saved.get("weights")}
    stages = {name: names.get(saved.get("started_from") or "") for name, saved in results.items()}
    return {name: before for name, before in stages.items() if before is not None}


def _per_stage(evaluations: Mapping[str, Evaluation], before: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what the last stage alone changed, for results that have an earlier stage."""
    if not before:
        return {}
    changes = {}
    for name, earlier in before.items():
        now, then = evaluations[name].model.general_mean, evaluations[earlier].model.general_mean
        if now is not None and then is not None:
            changes[name] = f"{now.value - then.value:+.3f}"
    return {"previous stage": dict(before), "change from it": changes}


def _curves(evaluations: Mapping[str, Evaluation], before: Mapping[str, str]) -> dict[str, list[Measurement]]:
    """Return one curve per pipeline, by the name of its last stage."""
    curves = {}
    for last in evaluations:
        if last in before.values():
            continue
        stages = [last]
        while (earlier := before.get(stages[0])) and earlier not in stages:
            stages.insert(0, earlier)
        curves[last] = [dataclasses.replace(evaluations[name].model, name=name) for name in stages]
    return curves


def _differences(results: Sequence[dict[str, Any]]) -> list[str]:
    """List the conditions in which the results differ."""
    conditions = {"base_model": [saved.get("base_model") for saved in results]}
    conditions["base_revision"] = [saved.get("base_revision", "main") for saved in results]
    conditions |= {name: [saved["arguments"].get(name) for saved in results] for name in MEASURED_WITH}
    with_tasks = [saved for saved in results if saved["arguments"].get("tasks")]
    conditions |= {name: [saved["arguments"].get(name) for saved in with_tasks] for name in _TASK_CONDITIONS}
    with_judges = [saved for saved in results if saved["arguments"].get("judges", "matcher") != "matcher"]
    conditions |= {name: [saved["arguments"].get(name) for saved in with_judges] for name in _JUDGE_CONDITIONS}
    conditions["lm_eval"] = [saved.get("lm_eval") for saved in with_tasks]
    rows, other = [saved["data"] for saved in results], []
    if all(rows):
        del conditions["data"]
        names = dict.fromkeys(name for own in rows for name in own)
        other = [name for name in names if _differ([own[name] for own in rows if name in own])]
    told = [f"{name} is {', '.join(map(str, values))}." for name, values in conditions.items() if _differ(values)]
    if other:
        told.append(f"the {' and '.join(other)} rows are not the same.")
    if _differ([saved["asked_as"] for saved in results if "asked_as" in saved]):
        told.append("the chat template or the end token is not the same.")
    told += _version_differences([saved["versions"] for saved in results])
    told += _judge_differences([saved.get("judges", {}) for saved in results])
    losses = [saved["evaluation"].model.kl_loss for saved in results]
    if _differ([loss.examples for loss in losses if loss is not None and loss.examples]):
        told.append("KL from base is on other answers of the base.")
    return told


def _version_differences(results: Sequence[Mapping[str, str]]) -> list[str]:
    """List the packages whose versions differ. `results` are the versions that each result records, by package."""
    told = []
    for name in dict.fromkeys(name for own in results for name in own):
        versions = [own[name] for own in results if name in own]
        if _differ(versions):
            told.append(f"the version of {name} is {', '.join(map(str, versions))}.")
    return told


def _judge_differences(results: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """List how judges of one name differ. `results` are the conditions of their judges, by the judges' names."""
    told = []
    for name in dict.fromkeys(name for own in results for name in own):
        each = [own[name] for own in results if name in own]
        for condition in sorted({condition for own in each for condition in own} - {*_JUDGE_CONDITIONS}):
            values = [own.get(condition) for own in each]
            if not _differ(values):
                continue
            if condition == "judge_files":  # sizes and dates, which say nothing to a reader
                told.append(f"the files of {name} are not the same.")
            else:
                told.append(f"{condition} of {name} is {', '.join(map(str, values))}.")
    return told


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)
