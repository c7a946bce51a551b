# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables of what judges say, and of how far they agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import extras
from .comparison import Difference, difference_text
from .estimates import Estimate
from .grid import text_grid
from .intervals import paired_difference
from .judgments import Judgment
from .report import Measurement, rate_text

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("judge", "prompts", "model", "refusal", "partial", "compliance", "unclear", "difference in refusal")
PAIR_HEADINGS = ("judges", "prompts", "model", "compared", "agreement", "kappa", "unclear to one", "to both")
_LEFT = ("judge", "judges", "prompts", "model")
_HARM_MARK = " †"
_NOTE = "Rates are of all answers, with 95 % intervals. * is larger than chance: the 95 % interval excludes 0."
_PAIR_NOTE = "Answers that are unclear to a judge are counted apart. Kappa is 1 at full agreement and 0 at chance."
_HARM_NOTE = "† This judge is asked whether an answer is harmful. Any answer that is not harmful counts as refusal."


def judge_rows(measurements: Mapping[str, Measurement], reference: str | None = None) -> list[list[str]]:
    """Return one row of texts for each judge, kind of prompts and model, under `HEADINGS`.

    Args:
        measurements: Measurements by the name to print.
        reference: Name of the measurement from which differences are computed. Default: the first one.
    """
    reference = reference or next(iter(measurements), None)
    by_key: dict[tuple[str, str], dict[str, Judgment]] = {}
    for name, measurement in measurements.items():
        for judgment in measurement.judgments:
            by_key.setdefault((judgment.judge, judgment.kind), {})[name] = judgment
    rows = []
    for (judge, kind), judgments in by_key.items():
        for name, judgment in judgments.items():
            difference = None
            if name != reference and reference in judgments and _same_prompts(measurements, reference, name, kind):
                difference = _difference(judgments[reference], judgment)
            rates = [rate_text(judgment.rates[verdict]) for verdict in ("refusal", "partial", "compliance", "unclear")]
            mark = _HARM_MARK if judgment.asks == "harm" else ""
            rows.append([judge + mark, kind, name, *rates, difference_text(difference, rate=True).strip()])
    return rows


def pair_rows(measurements: Mapping[str, Measurement]) -> list[list[str]]:
    """Return one row of texts for each two judges, kind of prompts and model, under `PAIR_HEADINGS`."""
    rows = []
    for name, measurement in measurements.items():
        for pair in measurement.agreements:
            counts = pair.agreement
            share = "-" if counts.share is None else rate_text(Estimate.from_count(counts.same, counts.n))
            kappa = "-" if counts.kappa is None else f"{counts.kappa:.2f}"
            one = f"{counts.unclear_first} / {counts.unclear_second}"
            judges = f"{pair.first}, {pair.second}"
            rows.append([judges, pair.kind, name, f"{counts.n}", share, kappa, one, f"{counts.unclear_both}"])
    return sorted(rows, key=lambda row: row[:2])


def judge_tables(measurements: Mapping[str, Measurement], reference: str | None = None) -> list[Table]:
    """Build the tables of judges for the terminal: rates, and agreement if two judges were named.

    The arguments are those of `judge_rows`. Each further set of prompts has tables of its own. The list is empty if no
    judge but the matcher judged.
    """
    extras.check("eval", "The table of judges")
    reference = reference or next(iter(measurements), None)
    tables = []
    for place, own in {"": measurements, **_by_set(measurements)}.items():
        rows = judge_rows(own, reference)
        if rows:
            harm = any(row[0].endswith(_HARM_MARK) for row in rows)
            note = f"{_NOTE} {_HARM_NOTE}" if harm else _NOTE
            title = f"Judges{place}, and differences from {reference}"
            tables.append(text_grid(title, note, HEADINGS, rows, _LEFT))
        if found := pair_rows(own):
            title = f"Agreement of judges on the same answers{place}"
            tables.append(text_grid(title, _PAIR_NOTE, PAIR_HEADINGS, found, _LEFT))
    return tables


def _by_set(measurements: Mapping[str, Measurement]) -> dict[str, dict[str, Measurement]]:
    """Return the measurements on each further set of prompts, by a phrase that names the set."""
    names = dict.fromkeys(name for measurement in measurements.values() for name in measurement.sets)
    return {
        f" on {name}": {title: own.sets[name] for title, own in measurements.items() if name in own.sets}
        for name in names
    }


def _same_prompts(measurements: Mapping[str, Measurement], first: str, second: str, kind: str) -> bool:
    samples = [getattr(measurements[name], f"{kind}_samples") for name in (first, second)]
    return [sample.prompt for sample in samples[0]] == [sample.prompt for sample in samples[1]]


def _difference(first: Judgment, second: Judgment) -> Difference:
    before, after = ([verdict == "refusal" for verdict in judgment.verdicts] for judgment in (first, second))
    value = second.rates["refusal"].value - first.rates["refusal"].value
    return Difference(value, *paired_difference(before, after))
