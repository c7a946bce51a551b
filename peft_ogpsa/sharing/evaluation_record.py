# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""How an adapter was measured, as a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .folder import read_facts, store_facts, weights_digest
from .names import public, public_judge, public_source

EVALUATION_NAME = "ogpsa_eval.json"
MEASURED_WITH = (
    "data",
    "samples",
    "dtype",
    "load_in_4bit",
    "max_new_tokens",
    "batch_size",
    "max_length",
    "seed",
    "chat_template_kwargs",
)
"""The options of `ogpsa eval` on which every figure depends."""
_TASKS_MEASURED_WITH = ("tasks", "limit", "chat_template")
_JUDGED_WITH = ("judges", "judges_in_4bit")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read how an adapter was measured. Return an empty dict if that is not recorded, or is about other weights.

    Raises:
        ValueError: If the file is damaged.
    """
    evaluation = read_facts(folder, EVALUATION_NAME)
    if evaluation:
        _check(evaluation, f"{folder / EVALUATION_NAME}")
    return evaluation


def store_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Check how an adapter was measured, and write what may be shared of it beside the adapter.

    Raises:
        ValueError: If `evaluation` does not have the form that `save_card` takes, or is about other weights.
    """
    if isinstance(evaluation, Mapping) and isinstance(evaluation.get("results"), list):
        raise ValueError(
            "evaluation holds the results of several adapters. Give the one of this adapter, which is an entry of "
            "its list 'results'."
        )
    _check(evaluation, "evaluation")
    measured, own = evaluation.get("weights"), weights_digest(folder)
    if measured is not None and measured != own:
        raise ValueError(
            f"evaluation is about other weights: it has weights={measured!r}, and the checksum of those in {folder} "
            f"is {own!r}. Give the result of this adapter, or run `ogpsa eval` again."
        )
    store_facts(folder, EVALUATION_NAME, _shareable(evaluation))


def _check(evaluation: Mapping[str, Any], where: str) -> None:
    from ..evaluation.report import DAMAGED, Evaluation

    try:
        Evaluation.from_dict(evaluation["evaluation"])
        if not isinstance(evaluation.get("arguments", {}), Mapping):
            raise ValueError("its arguments are not a mapping")
        if not isinstance(evaluation.get("versions", {}), Mapping):
            raise ValueError("its versions are not a mapping")
    except DAMAGED as error:
        raise ValueError(f"{where} is not a result of `ogpsa eval` ({error!r}). Run `ogpsa eval` again.") from error


def _shareable(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    from ..evaluation import Evaluation

    told = dict(evaluation.get("arguments") or {})
    arguments = {name: told[name] for name in MEASURED_WITH if told.get(name) is not None}
    if evaluation.get("lm_eval"):
        arguments |= {name: told[name] for name in _TASKS_MEASURED_WITH if told.get(name) is not None}
        arguments["lm_eval"] = evaluation["lm_eval"]
    if told.get("judges", "matcher") != "matcher":
        arguments |= {name: told[name] for name in _JUDGED_WITH if told.get(name) is not None}
    for name, shown in (("data", public_source), ("judges", public_judge)):
        if arguments.get(name):
            arguments[name] = ",".join(map(shown, arguments[name].split(",")))
    measured = Evaluation.from_dict(evaluation["evaluation"]).to_dict()
    for measurement in filter(None, (measured["model"], measured["base"])):
        for own in (measurement, *measurement.get("sets", {}).values()):
            own["harmful_samples"] = own["benign_samples"] = []
            for judgment in own.get("judgments", []):
                judgment["judge"] = public_judge(judgment["judge"])
            for pair in own.get("agreements", []):
                pair |= {name: public_judge(pair[name]) for name in ("first", "second")}
    return {
        "name": public(str(evaluation.get("name") or "")) or None,
        "base_model": public(evaluation.get("base_model") or "") or None,
        "versions": dict(evaluation.get("versions", {})),
        "arguments": arguments,
        "evaluation": measured,
    }
