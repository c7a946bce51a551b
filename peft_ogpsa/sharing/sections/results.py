# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The section of the card on what the training changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .markdown import code, markdown_table

if TYPE_CHECKING:
    from ...evaluation import Comparison, Measurement


def results_section(saved: Mapping[str, Any]) -> str:
    """Show what was measured, as `read_evaluation` returns it."""
    heading = "## What the training changed: safety and the alignment tax\n\n"
    if not saved:
        return (
            f"{heading}These weights have not been measured. To measure them and add the table here, run `ogpsa eval "
            "--adapter DIR --output FILE.json --card`."
        )
    from ...evaluation import Evaluation

    evaluation = Evaluation.from_dict(saved["evaluation"])
    model, base = evaluation.model, evaluation.base
    conditions = {**evaluation.settings, **saved.get("arguments", {})}
    on = f"{saved['base_model']}, " if saved.get("base_model") else ""
    used = ", ".join(_used(model))
    return (
        f"{heading}{_own_data(model, base)}{_compared(model, base)}"
        f"Measured{f' on {used}' if used else ''}: {code(on + ', '.join(f'{k}={v}' for k, v in conditions.items()))}"
    )


def _own_data(model: Measurement, base: Measurement | None) -> str:
    """Return the table of losses and refusal, and what it means. Nothing if only sets or tasks were measured."""
    from ...evaluation.report import loss_text, rate_text, unclear_text

    if not model.has_own_data:
        return ""
    lines = [
        "| | general loss | change | KL from base | refuses harmful | refuses benign | unclear |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measured in (("base", base), ("this adapter", model)):
        if measured is None:
            continue
        change = ""
        if measured is model and base and base.general_mean and model.general_mean:
            change = f"{model.general_mean.value - base.general_mean.value:+.3f}"
        cells = [
            loss_text(measured.general_mean),
            change,
            loss_text(measured.kl),
            rate_text(measured.refusal),
            rate_text(measured.over_refusal),
            unclear_text(measured),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return (
        "\n".join(lines)
        + "\n\nGeneral loss is in nats per token on held-out rows. Its change is the tax. A change above zero means "
        "that something was lost. A change below zero does not prove that everything was preserved, because the model "
        "can learn the style of the rows. KL from base is in nats per token on the base's own answers. It shows how "
        "far the adapter has moved the model from its base. Refusals are found by matching phrases. For harmful "
        "prompts, more refusals are safer. For benign prompts that look harmful, more refusals are worse. Unclear "
        "(harmful / benign) is the share of answers that are noise. The 95 % intervals are over examples.\n\n"
    )


def _used(model: Measurement) -> Iterator[str]:
    """Yield what was measured on, with counts."""
    counts = {
        "general rows": model.general_mean,
        "rows for KL": model.kl,
        "harmful prompts": model.refusal,
        "benign prompts": model.over_refusal,
    }
    yield from (f"{estimate.n} {name}" for name, estimate in counts.items() if estimate is not None)
    for name, own in model.sets.items():
        prompts = sum(rate.n for rate in (own.refusal, own.over_refusal) if rate is not None)
        yield f"{prompts} prompts of {name}"


def _compared(model: Measurement, base: Measurement | None) -> str:
    """Return the tables of public sets, tasks and judges, and what a star means. Nothing if none was measured."""
    from ...evaluation import Comparison

    comparison = Comparison({"this adapter": model} if base is None else {"base": base, "this adapter": model})
    tables = _sets(comparison) + _tasks(comparison) + _judges(comparison)
    return f"{tables}{comparison.note}\n\n" if tables and comparison.note else tables


def _sets(comparison: Comparison) -> str:
    """Return the table of public sets, or nothing if none was measured."""
    from ...evaluation.set_table import HEADINGS, NOTE, set_rows

    rows = set_rows(comparison)
    if not rows:
        return ""
    return (
        "Refusal on public sets of prompts. Refusals are found by matching phrases. "
        f"{NOTE}\n\n{markdown_table(HEADINGS, rows)}\n\n"
    )


def _tasks(comparison: Comparison) -> str:
    """Return the table of tasks, or nothing if none were run."""
    from ...evaluation.task_table import HEADINGS, NOTE, task_rows

    rows = task_rows(comparison)
    if not rows:
        return ""
    return (
        "Scores of tasks, with 95 % intervals. `facts` and `arithmetic` are built-in sets of peft_ogpsa. The others "
        "are tasks of [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness). "
        f"{NOTE}\n\n{markdown_table(HEADINGS, rows)}\n\n"
    )


def _judges(comparison: Comparison) -> str:
    """Return the tables of what judges say, one for each set of prompts. Nothing if the matcher is the only judge."""
    from ...evaluation.judge_table import HEADINGS, judge_note, judge_rows

    tables = ""
    for place in ("", *comparison.sets):
        rows = judge_rows(comparison, place)
        if rows:
            on = f" on {place}" if place else ""
            tables += f"Refusals{on} as judges see them. {judge_note(rows)}\n\n{markdown_table(HEADINGS, rows)}\n\n"
    return tables
