# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""`ogpsa eval`: measure what a model refuses and what it has lost, and do the same for its base."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from trl import ModelConfig

from ..core.files import check_writable, replace_json
from ..evaluation import (
    Evaluation,
    Judge,
    JudgeError,
    Measurement,
    answer_length,
    fingerprint,
    judged,
    load_judges,
    tradeoff,
    wilson,
)
from ..evaluation.judgments import only_matcher
from ..evaluation.kept_verdicts import KeptVerdicts
from ..evaluation.pieces import BASE, Piece, run_pieces
from ..evaluation.report import with_base
from ..evaluation.store import Conditions, PieceStore
from ..sharing.card import check_card, save_card
from ..text.tokenization import tokenizer_of
from . import tables
from .errors import input_errors
from .eval_arguments import EvalArguments, parse
from .eval_data import check_rows, load_eval_data
from .eval_models import (
    Adapter,
    Base,
    asked_as,
    base_name,
    base_revision,
    common_tokenizer,
    read_adapters,
    refuse_moved_base,
)
from .eval_plan import common_conditions, evaluator, plan, task_runner, versions
from .loading import load_base

_MODEL = "model"
"""The name of a measurement that is not of the base."""


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    with input_errors("eval"):
        parsed = parse(arguments)
        output = Path(parsed.output)
        check_writable(output.parent, "output")
        runner = task_runner(parsed)
        judges = load_judges(parsed.judges, load_in_4bit=parsed.judges_in_4bit, progress=sys.stderr.isatty())
        for judge in judges:
            judge.prepare()
        judges_state = {judge.name: dict(judge.conditions) for judge in judges if judge.conditions}
        parsed.max_new_tokens = answer_length(parsed.max_new_tokens, judges)
        data = load_eval_data(parsed.data, parsed.samples).with_template_arguments(parsed.template_arguments())
        if parsed.plot and not {"harmful", "general"} <= data.rows.keys():
            raise ValueError(
                f"plot={parsed.plot!r} needs harmful and general rows, but data={parsed.data!r} lacks them. Give "
                "builtin, heldout or a folder with both, or leave out plot."
            )
        adapters = read_adapters(parsed.adapter or [], parsed.name)
        for adapter in adapters if parsed.card else ():
            check_writable(adapter.path, "adapter")
            check_card(adapter.path)
        name = parsed.model or base_name(adapters)
        if "general" in data.rows:
            refuse_moved_base(adapters)
        options = ModelConfig(
            model_name_or_path=name,
            model_revision=base_revision(adapters, name),
            dtype=parsed.dtype,
            load_in_4bit=parsed.load_in_4bit,
        )
        loaded, processing_class = load_base(options, option="model")
        base = Base(loaded, lambda: load_base(options, option="model")[0])
        del loaded  # so that the memory holds the base once when it is loaded again
        tokenizer, owner = common_tokenizer(adapters, tokenizer_of(processing_class))
        conditions = common_conditions(parsed, base.model, tokenizer)
        base.check_fit(adapters)
        check_rows(data, tokenizer, parsed.max_length, kl=bool(adapters))
        output.parent.mkdir(parents=True, exist_ok=True)
        store = PieceStore(output.with_name(f"{output.name}.pieces"))
    base_model = str(base.model.name_or_path)
    console = tables.console()
    if owner is not None:
        console.print(
            f"The tokenizer in {owner} has another chat template or end token than the base's. It is used for the "
            "base and for every adapter.",
            soft_wrap=True,
            markup=False,
        )
    settings = evaluator(parsed, tokenizer).settings
    pieces = plan(parsed, data, runner, tokenizer, divergence=bool(adapters))
    of_base, of_models = _measure(base, adapters, pieces, store, conditions, console)
    del base, pieces  # a judge may need their memory
    verdicts = KeptVerdicts(store, versions(), lambda text: console.print(text, soft_wrap=True, markup=False))
    of_base, of_models, failure = _judged(of_base, of_models, judges, verdicts)
    titles = [adapter.title for adapter in adapters] or [parsed.name[0] if parsed.name else Path(str(name)).name]
    evaluations = {
        title: Evaluation(measured, of_base, settings) for title, measured in zip(titles, of_models, strict=True)
    }
    rows = {kind: fingerprint.of_data(own) for kind, own in {**data.rows, **data.sets}.items()}
    shared: dict[str, Any] = {
        "base_model": base_model,
        "base_revision": options.model_revision,
        "asked_as": asked_as(tokenizer),
        "versions": versions(),
    }
    if runner is not None:
        shared["lm_eval"] = runner.version
    if judges_state:
        shared["judges"] = judges_state
    results = _results(parsed, shared, adapters, evaluations, rows)
    _write(output, results)
    models = {title: evaluation.model for title, evaluation in evaluations.items()}
    tables.print_tables(console, evaluations, with_base(models, of_base))
    if parsed.fast:
        console.print(_precision(next(iter(evaluations.values())).model), soft_wrap=True, markup=False)
    console.print(f"Saved the result: {output.resolve()}", soft_wrap=True, markup=False)
    if parsed.plot:
        curves = {title: [replace(own.model, name=title)] for title, own in evaluations.items()}
        tradeoff(curves, parsed.plot, base=of_base)
        console.print(f"Saved the plot: {Path(parsed.plot).resolve()}", soft_wrap=True, markup=False)
    if parsed.card:
        with input_errors("eval"):
            for adapter, result in zip(adapters, results, strict=True):
                save_card(adapter.path, evaluation=result)
    if failure is not None:
        raise SystemExit(
            f"ogpsa eval: {failure} All other results are in {output}. The answers and the verdicts so far are kept "
            f"in {store.path}: run the same command again to ask only for those that are missing."
        ) from failure


def _measure(
    base: Base,
    adapters: Sequence[Adapter],
    pieces: Sequence[Piece],
    store: PieceStore,
    conditions: Conditions,
    console: Console,
) -> tuple[Measurement | None, list[Measurement]]:
    """Measure the base and each adapter, or a model by itself. A bar shows the stages."""
    bar = tqdm(total=len(pieces) * (len(adapters) + 1), unit="piece", disable=not sys.stderr.isatty())

    @contextlib.contextmanager
    def stage(text: str) -> Iterator[None]:
        bar.set_description(text)
        yield
        bar.update()

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    def measure(model: torch.nn.Module, name: str, key: str) -> Measurement:
        return run_pieces(pieces, model, name, store=store, key=key, conditions=conditions, tell=tell, stage=stage)

    with bar:
        if not adapters:
            return None, [measure(base.model, _MODEL, str(base.model.name_or_path))]
        of_base = measure(base.model, BASE, BASE)
        return of_base, base.on_each(adapters, lambda adapter, model: measure(model, _MODEL, adapter.path))


def _judged(
    of_base: Measurement | None, of_models: list[Measurement], judges: Sequence[Judge], verdicts: KeptVerdicts
) -> tuple[Measurement | None, list[Measurement], JudgeError | None]:
    """Let each judge judge the answers of all models. The matcher alone has judged them already.

    Returns:
        The measurements, and the error if a judge failed.
    """
    if only_matcher(judges):
        return of_base, of_models, None
    failure = None
    try:
        own = judged(of_models if of_base is None else [of_base, *of_models], judges, verdicts.ask)
    except JudgeError as error:
        own, failure = error.measurements, error
    return (None, own, failure) if of_base is None else (own[0], own[1:], failure)


def _results(
    parsed: EvalArguments,
    shared: Mapping[str, Any],
    adapters: Sequence[Adapter],
    evaluations: Mapping[str, Evaluation],
    rows: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return one result per adapter, or that of a model by itself, in plain types.

    `shared` are the facts that all results have, and `rows` are checksums of the measured rows by kind or set.
    """
    results = []
    subjects: Sequence[Adapter | None] = adapters or [None]
    for adapter, (title, evaluation) in zip(subjects, evaluations.items(), strict=True):
        arguments = asdict(parsed) | {
            "adapter": adapter.path if adapter else None,
            "name": title if parsed.name else None,
        }
        result: dict[str, Any] = {
            "name": title,
            **shared,
            "arguments": arguments,
            "data": {**rows, **{score.task: score.examples for score in evaluation.model.tasks}},
            "evaluation": evaluation.to_dict(),
        }
        if adapter is not None:  # `compare` uses them to find the adapter that a stage continued
            result["weights"] = adapter.weights
            result["started_from"] = adapter.started_from
        results.append(result)
    return results


def _write(output: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write one result as it is, and several as a list."""
    saved = results[0] if len(results) == 1 else {"results": list(results)}
    replace_json(output, saved)


def _precision(measured: Measurement) -> str:
    """Say in words what numbers of prompts as small as those of a fast look can show."""
    parts = {"harmful prompts": measured.refusal, "benign prompts": measured.over_refusal}
    for name, own in measured.sets.items():
        parts |= {f"harmful prompts of {name}": own.refusal, f"benign prompts of {name}": own.over_refusal}
    counts = {name: rate.n for name, rate in parts.items() if rate is not None}
    counts |= {f"examples of {score.task}": score.n for score in measured.tasks if score.is_rate}
    told = []
    for name, n in counts.items():
        low, high = wilson(n // 2, n)
        told.append(f"With {n} {name}, a rate of {n // 2 / n:.0%} has the 95 % interval {low:.0%} to {high:.0%}.")
    return " ".join(["This was a fast look (--fast): only large differences show.", *told])
