# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Data and scoring of the task files in this folder.

lm-eval loads this file by its path, so its imports are absolute. It calls the functions for data with the task's
metadata and the model's arguments, which these tasks do not need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_ogpsa.data import load_heldout
from peft_ogpsa.evaluation.exact import correct
from peft_ogpsa.text.refusal import Verdict, classify
from peft_ogpsa.text.thoughts import after_thought


def harmful(**_: Any) -> dict[str, Any]:
    """Load the harmful requests."""
    return _test_split("harmful")


def lookalikes(**_: Any) -> dict[str, Any]:
    """Load the benign look-alikes."""
    return _test_split("lookalikes")


def facts(**_: Any) -> dict[str, Any]:
    """Load the questions with short answers."""
    return _test_split("facts")


def arithmetic(**_: Any) -> dict[str, Any]:
    """Load the word problems."""
    return _test_split("arithmetic")


def refusal(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Judge an answer as the refusal matcher does."""
    verdict = classify(results[0])
    return {"refusal": float(verdict is Verdict.REFUSAL), "unclear": float(verdict is Verdict.UNCLEAR)}


def accuracy(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer as right or wrong. A thought before it does not count."""
    return {"acc": float(correct(doc, after_thought(results[0]) or ""))}


def _test_split(name: str) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(load_heldout(name))}
