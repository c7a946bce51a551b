# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure a model piece by piece: its own data, each set of prompts, each task. A finished piece is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from . import fingerprint
from .report import Evaluator, Measurement
from .scores import accuracy
from .store import Conditions, PieceStore
from .tasks import TaskRunner

BASE = "base"
"""The name of the base. It is measured without an adapter, and its KL from base is 0."""


@dataclass(frozen=True)
class Piece:
    """A part of a measurement that is run, and kept, as a whole."""

    name: str
    conditions: Conditions
    """What its result depends on, apart from the model."""
    measure: Callable[[torch.nn.Module, str], Measurement]
    """Measure a model under a name. The result holds only this part."""

    @classmethod
    def of_data(cls, name: str, evaluator: Evaluator) -> Piece:
        """Measure everything that an evaluator has data for."""
        return cls(name, _conditions(evaluator), lambda model, own: _measure(evaluator, model, own))

    @classmethod
    def of_set(cls, name: str, evaluator: Evaluator) -> Piece:
        """Measure refusal and over-refusal on one further set of prompts."""

        def measure(model: torch.nn.Module, own: str) -> Measurement:
            measured = _measure(evaluator, model, own)
            return Measurement(own, sets={name: measured}, seconds=measured.seconds)

        return cls(name, _conditions(evaluator), measure)

    @classmethod
    def of_answers(
        cls, name: str, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], **options: Any
    ) -> Piece:
        """Measure the accuracy on rows whose answers are right or wrong. The options are those of `accuracy`."""
        settings = {key: value for key, value in options.items() if key != "progress"}
        return cls(
            name,
            {**settings, "data": fingerprint.of_data(list(map(dict, rows)))},
            lambda model, own: Measurement(own, tasks=[accuracy(model, tokenizer, name, rows, **options)]),
        )

    @classmethod
    def of_task(cls, name: str, tokenizer: PreTrainedTokenizerBase, runner: TaskRunner) -> Piece:
        """Measure one of the runner's lm-eval tasks."""
        settings: dict[str, Any] = {"lm_eval": runner.version, "limit": runner.limit}
        settings["chat_template"] = runner.chat_template
        if runner.chat_template_kwargs:
            settings["chat_template_kwargs"] = runner.chat_template_kwargs
        return cls(
            name,
            {**settings, "batch_size": runner.batch_size, "data": runner.digest(name)},
            lambda model, own: Measurement(own, tasks=runner.run(model, tokenizer, [name])),
        )


def run_pieces(
    pieces: Sequence[Piece],
    model: torch.nn.Module,
    name: str,
    *,
    store: PieceStore,
    key: str,
    conditions: Conditions,
    tell: Callable[[str], None],
    stage: Callable[[str], AbstractContextManager[None]],
) -> Measurement:
    """Measure a model, without the pieces that the store has from an earlier run under the same conditions.

    Args:
        pieces: What is measured.
        model: The model, in the state in which it is measured.
        name: The measurement's name.
        store: Where finished pieces are kept.
        key: The model's name in the store.
        conditions: What all results depend on, apart from the model's weights.
        tell: Called with sentences on what is reused, and what is measured again and why.
        stage: A context for each piece, to show progress. It is called with a text for the model and the piece.

    Raises:
        ValueError: If two pieces have the same name, because one would take the other's result.
    """
    names = [piece.name for piece in pieces]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two things to measure have the same name: {', '.join(twice)}. Leave out one of them.")
    conditions = {**conditions, "weights": fingerprint.of_weights(model)}
    wanted = {piece.name: {**conditions, **piece.conditions} for piece in pieces}
    finished = {own: done for own in wanted if (done := store.get(key, own)) is not None}
    changes = {own: done.changes(wanted[own]) for own, done in finished.items()}
    reused = [own for own, changed in changes.items() if not changed]
    if reused:
        tell(f"{key}: already measured in an earlier run: {', '.join(reused)}.")
    for own, changed in changes.items():
        if changed:
            tell(f"{key}: {own} is measured again: {', '.join(changed)}.")
    measured = []
    for piece in pieces:
        with stage(f"{key}: {piece.name}"):
            if piece.name in reused:
                measured.append(finished[piece.name].measurement)
                continue
            measured.append(piece.measure(model, name))
            try:
                store.add(key, piece.name, wanted[piece.name], measured[-1])
            except OSError as error:
                tell(f"{key}: {piece.name} is used, but cannot be stored for the next run: {error}")
    return _together(measured)


def _measure(evaluator: Evaluator, model: torch.nn.Module, name: str) -> Measurement:
    return evaluator.base(model, name) if name == BASE else evaluator.measure(model, name)


def _conditions(evaluator: Evaluator) -> Conditions:
    data = (evaluator.harmful, evaluator.benign, evaluator.general, evaluator.divergence_prompts)
    return {**evaluator.settings, "data": fingerprint.of_data(*data)}


def _together(measured: Sequence[Measurement]) -> Measurement:
    """Join the parts of one model's measurement. Only the first part has estimates other than of sets and tasks."""
    return replace(
        measured[0],
        sets={name: own for part in measured for name, own in part.sets.items()},
        tasks=[score for part in measured for score in part.tasks],
        seconds=sum(part.seconds for part in measured),
    )
