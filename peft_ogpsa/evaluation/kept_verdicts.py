# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Verdicts that are kept, so that a judge is not asked about the same answers again."""

from __future__ import annotations

from collections.abc import Callable

from . import fingerprint
from .judges.judge import Judge
from .judging import ByPlace, ask, samples
from .report import Measurement
from .store import Conditions, PieceStore


class KeptVerdicts:
    """Ask judges, and keep what they say in a store.

    Args:
        store: Where the verdicts are kept.
        conditions: What verdicts depend on, apart from the judge and the answers.
        tell: Called with sentences on what is reused, and what is asked again and why.
    """

    def __init__(self, store: PieceStore, conditions: Conditions, tell: Callable[[str], None]):
        self.store = store
        self.conditions = conditions
        self.tell = tell

    def ask(self, judge: Judge, measurement: Measurement) -> ByPlace:
        """Return a judge's judgments of a measurement and of its sets. Ask the judge only if they are not kept."""
        conditions = {**self.conditions, **judge.conditions}
        key, answers = f"judge {judge.name}", _fingerprint(judge, measurement)
        kept = self.store.get(key, answers)
        changed = kept.changes(conditions) if kept else []
        if kept and not changed:
            self.tell(f"{judge.name}: the verdicts on the same answers are those of an earlier run.")
            return {"": kept.measurement.judgments} | {
                name: own.judgments for name, own in kept.measurement.sets.items()
            }
        if changed:
            self.tell(f"{judge.name} is asked again: {', '.join(changed)}.")
        found = ask(judge, measurement)
        sets = {place: Measurement(place, judgments=own) for place, own in found.items() if place}
        self.store.add(key, answers, conditions, Measurement(judge.name, judgments=found[""], sets=sets))
        return found


def _fingerprint(judge: Judge, measurement: Measurement) -> str:
    """Return a checksum of the prompts and answers that a judge is asked about."""
    return fingerprint.of_data(
        [
            [place, kind, [[sample.prompt, sample.answer] for sample in samples(own, kind)]]
            for place, own in {"": measurement, **measurement.sets}.items()
            for kind in judge.kinds
        ]
    )
