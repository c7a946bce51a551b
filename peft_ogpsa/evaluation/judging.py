# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Let judges judge the answers that measurements hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..text.thoughts import after_thought
from .judges.judge import Judge, Kind, Label
from .judgments import Judgment, pairs

if TYPE_CHECKING:
    from .report import Measurement, Sample

Ask = Callable[[Judge, Kind, "list[Sample]"], Judgment]
"""How a judge is asked about the answers to one set of prompts of one kind."""


class JudgeError(RuntimeError):
    """Judges failed after the answers were generated. Nothing else is lost: the rest is in `measurements`."""

    def __init__(self, failures: Mapping[str, Exception], measurements: Sequence[Measurement]):
        super().__init__(" ".join(f"{name} failed: {str(error).rstrip('.')}." for name, error in failures.items()))
        self.failures = dict(failures)
        """What each failed judge raised, by the judge's name."""
        self.measurements = list(measurements)
        """The measurements in the order in which they were given, judged by the other judges."""


def ask(judge: Judge, kind: Kind, samples: list[Sample]) -> Judgment:
    """Let a judge judge the answers to prompts of one kind. It is not asked about a thought that does not end."""
    answers = {i: answer for i, answer in enumerate(shown(samples)) if answer is not None}
    verdicts: list[Label | None] = [None] * len(samples)
    if answers:
        found = judge.judge(kind, [samples[i].prompt for i in answers], list(answers.values()))
        for i, verdict in zip(answers, found, strict=True):
            verdicts[i] = verdict
    return Judgment.from_verdicts(judge, kind, verdicts)


def shown(samples: Sequence[Sample]) -> list[str | None]:
    """Return the answers as judges see them: without the thoughts before them. None: a thought that does not end."""
    return [after_thought(sample.answer) for sample in samples]


def judged(measurements: Sequence[Measurement], judges: Sequence[Judge], ask: Ask = ask) -> list[Measurement]:
    """Let judges judge the answers that measurements hold. This also works for results that were saved.

    Each judge is released when it is done, so that one model at a time is in memory.

    Args:
        measurements: Measurements with answers.
        judges: The judges.
        ask: How a judge is asked. For example, `KeptVerdicts.ask` knows earlier verdicts.

    Returns:
        The measurements, each with `judgments` by these judges, and `agreements` of every two of them. So are their
        `sets`.

    Raises:
        JudgeError: If a judge fails. The others are asked first, and the error has their verdicts.
    """
    found: list[dict[str, list[Judgment]]] = [{} for _ in measurements]
    failures: dict[str, Exception] = {}
    for judge in judges:
        try:
            each = [_by_place(judge, measurement, ask) for measurement in measurements]
        except Exception as error:  # whatever it is, the answers may have taken hours
            failures[judge.name] = error
            continue
        finally:
            judge.release()
        for own, more in zip(found, each, strict=True):
            for place, judgments in more.items():
                own.setdefault(place, []).extend(judgments)
    done = [_with_judgments(measurement, own) for measurement, own in zip(measurements, found, strict=True)]
    if failures:
        raise JudgeError(failures, done) from next(iter(failures.values()))
    return done


def _by_place(judge: Judge, measurement: Measurement, ask: Ask) -> dict[str, list[Judgment]]:
    """Return a judge's judgments of a measurement and of its sets by their names. The measurement's own is empty."""
    places = {"": measurement, **measurement.sets}
    return {
        place: [ask(judge, kind, own) for kind in judge.kinds if (own := at.samples(kind))]
        for place, at in places.items()
    }


def _with_judgments(measurement: Measurement, found: Mapping[str, list[Judgment]]) -> Measurement:
    own = found.get("", [])
    sets = {name: _with_judgments(at, {"": found.get(name, [])}) for name, at in measurement.sets.items()}
    return replace(measurement, judgments=own, agreements=pairs(own), sets=sets)
