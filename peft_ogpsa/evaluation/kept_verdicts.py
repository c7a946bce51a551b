# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Verdicts that are kept, so that a judge is not asked about the same answers again."""

from __future__ import annotations

from collections.abc import Callable

from . import fingerprint
from .judges.judge import Judge, Kind
from .judging import ask, shown
from .judgments import Judgment
from .report import Measurement, Sample
from .store import Conditions, PieceStore


class KeptVerdicts:
    """Ask judges, and keep what they say in a store: each kind of prompts of each set by itself.

    Args:
        store: Where the verdicts are kept.
        conditions: What verdicts depend on, apart from the judge and the answers.
        tell: Called with sentences on what is reused, and what is asked again and why. Each is told once.
    """

    def __init__(self, store: PieceStore, conditions: Conditions, tell: Callable[[str], None]):
        self.store = store
        self.conditions = conditions
        self.tell = tell
        self._told: set[str] = set()

    def ask(self, judge: Judge, kind: Kind, samples: list[Sample]) -> Judgment:
        """Return a judge's judgment of these answers. Ask the judge only if it is not kept."""
        conditions = {**self.conditions, **judge.conditions}
        key = f"judge {judge.name}"
        seen = [[sample.prompt, answer] for sample, answer in zip(samples, shown(samples), strict=True)]
        answers = fingerprint.of_data([kind, seen])
        kept = self.store.get(key, answers)
        changed = kept.changes(conditions) if kept else []
        if kept and not changed:
            self._tell_once(f"{judge.name}: the verdicts on the same answers are those of an earlier run.")
            return kept.measurement.judgments[0]
        if changed:
            self._tell_once(f"{judge.name} is asked again: {', '.join(changed)}.")
        found = ask(judge, kind, samples)
        try:
            self.store.add(key, answers, conditions, Measurement(judge.name, judgments=[found]))
        except OSError as error:
            self._tell_once(f"{judge.name}: the verdicts are used, but cannot be stored for the next run: {error}")
        return found

    def _tell_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self.tell(sentence)
