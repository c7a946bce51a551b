# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Verdicts of judges on a model's answers, their rates, and how far two judges agree."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .estimates import Estimate
from .judges.agreement import Agreement, agreement
from .judges.judge import LABELS, Judge, Kind, Label
from .judges.matcher import MatcherJudge

_SHORT = 128
"""Tokens. In shorter answers, most judges do not see what they are asked about."""


@dataclass(frozen=True)
class Judgment:
    """One judge's verdicts on a model's answers to one kind of prompts."""

    judge: str
    kind: Kind
    asks: Literal["refusal", "harm"]
    """What the judge is asked. For `"harm"`, the verdict "refusal" stands for any answer that is not harmful."""
    verdicts: list[Label | None]
    """One verdict for each sample. None: unclear."""
    rates: dict[str, Estimate]
    """The share of each verdict among all answers: `compliance`, `refusal`, `partial` and `unclear`."""

    @classmethod
    def from_verdicts(cls, judge: Judge, kind: Kind, verdicts: Sequence[Label | None]) -> Judgment:
        """Build a judgment of one answer or more."""
        n = len(verdicts)
        counts: dict[str, int] = {label: sum(verdict == label for verdict in verdicts) for label in LABELS}
        counts["unclear"] = sum(verdict is None for verdict in verdicts)
        rates = {name: Estimate.from_count(count, n) for name, count in counts.items()}
        return cls(judge.name, kind, judge.asks, list(verdicts), rates)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Judgment:
        """Rebuild a judgment from plain types."""
        rates = {name: Estimate(**rate) for name, rate in plain["rates"].items()}
        return cls(**{**plain, "rates": rates})


@dataclass(frozen=True)
class JudgePair:
    """Agreement of two judges on a model's answers to one kind of prompts."""

    first: str
    second: str
    kind: Kind
    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types. The share and its interval are for the reader; `from_dict` computes them again."""
        counts = self.agreement
        return {**asdict(self), "share": counts.share, "interval": counts.interval}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> JudgePair:
        """Rebuild a pair from the result of `to_dict`."""
        return cls(plain["first"], plain["second"], plain["kind"], Agreement(**plain["agreement"]))


def pairs(judgments: Sequence[Judgment]) -> list[JudgePair]:
    """Compare every two judges that judged the same kind of prompts."""
    return [
        JudgePair(first.judge, second.judge, first.kind, agreement(first.verdicts, second.verdicts))
        for first, second in itertools.combinations(judgments, 2)
        if first.kind == second.kind
    ]


def only_matcher(judges: Sequence[Judge] | None) -> bool:
    """Return whether the matcher, which every measurement has, is the only judge."""
    return all(isinstance(judge, MatcherJudge) for judge in judges or ())


def answer_length(requested: int | None, judges: Sequence[Judge] | None) -> int:
    """Return the maximum length of answers that suits judges, in tokens.

    Args:
        requested: The length that the user requested. None: the longest length that one of the judges recommends.
        judges: The judges. None: the matcher.

    Warns:
        UserWarning: If the requested length is too short for a judge.
    """
    if requested is None:
        return max(judge.answer_tokens for judge in judges or [MatcherJudge()])
    others = [judge.name for judge in judges or () if not isinstance(judge, MatcherJudge)]
    if others and requested < _SHORT:
        warnings.warn(
            f"max_new_tokens={requested} cuts answers before {', '.join(others)} can see whether they help. Leave out "
            f"max_new_tokens, or give at least {_SHORT}.",
            stacklevel=3,
        )
    return requested
