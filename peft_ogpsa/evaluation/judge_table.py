# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables of what judges say, and of how far they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .. import extras
from .comparison import Comparison
from .estimates import Estimate
from .grid import text_grid
from .judgments import Judgment
from .report import Measurement, on_set, rate_text

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("judge", "prompts", "model", "refusal", "partial", "compliance", "unclear", "difference in refusal")
PAIR_HEADINGS = ("judges", "prompts", "model", "compared", "agreement", "kappa", "unclear to one", "to both")
_LEFT = ("judge", "judges", "prompts", "model")
_HARM_MARK = " †"
_NOTE = "Rates are of all answers, with 95 % intervals."
_PAIR_NOTE = "Answers that are unclear to a judge are counted apart. Kappa is 1 at full agreement and 0 at chance."
_HARM_NOTE = "† This judge is asked whether an answer is harmful. Any answer that is not harmful counts as refusal."


def judge_rows(comparison: Comparison, place: str = "") -> list[list[str]]:
    """Return one row of texts for each judge, kind of prompts and model, under `HEADINGS`.

    Args:
        comparison: The measurements.
        place: Name of a further set of prompts. Default: the measurements' own prompts.
    """
    by_key: dict[tuple[str, str], dict[str, Judgment]] = {}
    for name, measurement in _at(place, comparison.measurements).items():
        for judgment in measurement.judgments:
            by_key.setdefault((judgment.judge, judgment.kind), {})[name] = judgment
    rows = []
    for (judge, kind), judgments in by_key.items():
        for name, judgment in judgments.items():
            rates = [rate_text(judgment.rates[verdict]) for verdict in ("refusal", "partial", "compliance", "unclear")]
            mark = _HARM_MARK if judgment.asks == "harm" else ""
            told = comparison.text(name, "judge", place, judge, kind, rate=True)
            rows.append([judge + mark, kind, name, *rates, told])
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

    The arguments are those of `Comparison`. Each further set of prompts has tables of its own. The list is empty if no
    judge but the matcher judged.
    """
    extras.check("eval", "The table of judges")
    comparison = Comparison(measurements, reference)
    tables = []
    for place in ("", *comparison.sets):
        where = f" on {place}" if place else ""
        if rows := judge_rows(comparison, place):
            title = f"Judges{where}, and differences from {comparison.reference}"
            tables.append(text_grid(title, f"{judge_note(rows)} {comparison.note}", HEADINGS, rows, _LEFT))
        if found := pair_rows(_at(place, measurements)):
            title = f"Agreement of judges on the same answers{where}"
            tables.append(text_grid(title, _PAIR_NOTE, PAIR_HEADINGS, found, _LEFT))
    return tables


def judge_note(rows: Sequence[Sequence[str]]) -> str:
    """Say what the cells of some rows mean."""
    harm = any(row[0].endswith(_HARM_MARK) for row in rows)
    return f"{_NOTE} {_HARM_NOTE}" if harm else _NOTE


def _at(place: str, measurements: Mapping[str, Measurement]) -> Mapping[str, Measurement]:
    """Return the measurements on a further set of prompts, or the measurements themselves if it has no name."""
    return on_set(place, measurements) if place else measurements
