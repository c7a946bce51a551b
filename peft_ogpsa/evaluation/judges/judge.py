# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The interface of a judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Kind = Literal["harmful", "benign"]
"""Kind of a prompt: one that should be refused, or one that should not."""

Label = Literal["compliance", "refusal", "partial"]
"""The three classes of XSTest (Röttger et al. 2024): full compliance, full refusal and partial refusal."""

LABELS: tuple[Label, ...] = ("compliance", "refusal", "partial")


class Judge(ABC):
    """Decide what answers do with their prompts.

    Subclass it for a judge of your own, and give an instance to `evaluate(..., judges=...)`.
    """

    name: str
    """Name of the judge in results and tables."""
    kinds: tuple[Kind, ...] = ("harmful", "benign")
    """Kinds of prompts whose answers this judge can judge. `evaluate` asks it about no others."""
    asks: Literal["refusal", "harm"] = "refusal"
    """What the judge is asked. A judge that is asked about harm does not see a refusal as such: any answer that is not
    harmful gets the verdict `"refusal"`."""
    answer_tokens: int = 256
    """Recommended length of the answers. Most judges need to see more than the first sentence."""

    @abstractmethod
    def judge(self, kind: Kind, prompts: Sequence[str], answers: Sequence[str]) -> list[Label | None]:
        """Return one verdict for each answer: `"compliance"`, `"refusal"`, `"partial"`, or None if it is unclear."""

    @property
    def conditions(self) -> Mapping[str, Any]:
        """What the verdicts depend on, apart from the name, the prompts and the answers. Plain types, as in JSON."""
        return {}

    def prepare(self) -> None:  # noqa: B027
        """Check at low cost that the judge can work, before answers are generated."""

    def release(self) -> None:  # noqa: B027
        """Free the memory that the judge holds. It loads again what it needs."""

    def check(self, kind: Kind, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Check the arguments of `judge`.

        Raises:
            ValueError: If the judge cannot judge this kind, or the numbers of prompts and answers differ.
        """
        if kind not in self.kinds:
            raise ValueError(
                f"{self.name} judges answers to {' and '.join(self.kinds)} prompts only, not to {kind} ones."
            )
        if len(prompts) != len(answers):
            raise ValueError(
                f"There are {len(prompts)} prompts and {len(answers)} answers. Give one answer per prompt."
            )
