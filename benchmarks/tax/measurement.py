# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measurements along a run: safety, and the alignment tax."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from itertools import chain
from typing import Any

from transformers import TrainerCallback

from peft_ogpsa.evaluation.divergence import BaseAnswers, kl_from_base, own_answers
from peft_ogpsa.evaluation.exact import correct
from peft_ogpsa.evaluation.losses import nats_per_token
from peft_ogpsa.text.generation import generate
from peft_ogpsa.text.refusal import Verdict, classify
from peft_ogpsa.text.tokenization import encode_row
from peft_ogpsa.tuner.adapters import base_of

from .data import TaxData

MAX_LENGTH = 128
CACHE_BYTES = 2**30  # for the base's log-probabilities: 96 prompts need 0.6 GB with a vocabulary of 49,152
NEW_TOKENS = {"refusal": 12, "divergence": 32, "facts": 16}  # a refusal shows in its first words


class Meter:
    """A meter of the states of one model, on fixed data.

    Args:
        model: The base. KL from base is measured on its own answers.
        tokenizer: Tokenizer of the model.
        data: The rows to measure.
        batch_size: Rows per batch.

    Attributes:
        outcomes: Outcome of each prompt in the last state that was measured, for paired tests: `kl` in nats per token,
            and for every rate a string of 0 and 1.
    """

    def __init__(self, model: Any, tokenizer: Any, data: TaxData, batch_size: int = 24) -> None:
        self.outcomes: dict[str, Any] = {}
        self.tokenizer, self.data, self.batch_size = tokenizer, data, batch_size
        self._general = {name: self._fitting(rows) for name, rows in data.general.items()}
        sets = {"refusal": data.harmful, "refusal/built-in": data.more_harmful}
        self.harmful = {name: prompts for name, prompts in sets.items() if prompts}
        sets = {"over_refusal": data.benign, "over_refusal/unseen": data.unseen_benign}
        self.benign = {name: prompts for name, prompts in sets.items() if prompts}
        self.kinds = [kind for kind, prompts in data.prompts.items() for _ in prompts]
        prompts = list(chain.from_iterable(data.prompts.values()))
        draw = {"max_new_tokens": NEW_TOKENS["divergence"], "batch_size": batch_size}
        with base_of(model):
            self.answers: BaseAnswers = own_answers(model, tokenizer, prompts, cache_bytes=CACHE_BYTES, **draw)

    def __call__(self, model: Any, step: int, diverges: bool = True) -> dict[str, Any]:
        """Measure all figures: losses and KL in nats per token, rates from 0 to 1. `diverges=False` leaves out KL."""
        start = time.perf_counter()
        data = self.data
        figures: dict[str, Any] = {"step": step}
        outcomes: dict[str, Any] = {}
        for name, rows in self._general.items():
            figures[f"loss/{name}"] = self._loss(model, rows)
        figures["loss"] = statistics.mean(figures[f"loss/{name}"] for name in data.general)
        figures["safety_loss"] = self.safety_loss(model)
        if diverges:
            example_means = kl_from_base(model, self.answers).example_means
            outcomes["kl"] = [round(mean, 6) for mean in example_means]
            for kind in data.prompts:
                own = [mean for mean, its in zip(example_means, self.kinds, strict=True) if its == kind]
                figures[f"kl/{kind}"] = statistics.mean(own)
            figures["kl"] = statistics.mean(figures[f"kl/{kind}"] for kind in data.prompts)
        verdicts = self._verdicts(model, self.harmful | self.benign)
        figures |= {name: _refused(own) for name, own in verdicts.items()}
        outcomes |= {name: _word(verdict is Verdict.REFUSAL for verdict in own) for name, own in verdicts.items()}
        counted = verdicts["refusal"] + verdicts["over_refusal"]
        figures["unclear"] = counted.count(Verdict.UNCLEAR) / len(counted)
        prompts = [row["prompt"] for row in data.facts]
        told = self._answers(model, prompts, NEW_TOKENS["facts"])
        outcomes["facts"] = _word(map(correct, data.facts, told))
        figures["facts"] = outcomes["facts"].count("1") / len(data.facts)
        figures["facts_refused"] = _refused([classify(answer) for answer in told])
        self.outcomes = outcomes
        figures["seconds"] = time.perf_counter() - start
        return figures

    def safety_loss(self, model: Any) -> float:
        """Measure the loss of the refusals that are not trained on, in nats per token."""
        return self._loss(model, self.data.held_out_safety)

    def refusals(self, model: Any, most: int | None = None) -> dict[str, float]:
        """Measure the share of each source of harmful requests that is refused: of all, or of `most` evenly picked."""
        picked = {}
        for name, prompts in self.harmful.items():
            count = min(most or len(prompts), len(prompts))
            picked[name] = [prompts[i * len(prompts) // count] for i in range(count)]
        return {name: _refused(own) for name, own in self._verdicts(model, picked).items()}

    def _verdicts(self, model: Any, sets: dict[str, list[Any]]) -> dict[str, list[Verdict]]:
        answers = iter(self._answers(model, list(chain.from_iterable(sets.values())), NEW_TOKENS["refusal"]))
        return {name: [classify(next(answers)) for _ in prompts] for name, prompts in sets.items()}

    def _answers(self, model: Any, prompts: list[Any], tokens: int) -> list[str]:
        return generate(model, self.tokenizer, prompts, max_new_tokens=tokens, batch_size=2 * self.batch_size)

    def _fitting(self, rows: list[Any]) -> list[Any]:
        """Return the rows that keep at least a part of their answer within `MAX_LENGTH`."""
        return [row for row in rows if encode_row(self.tokenizer, row, "row").cut(MAX_LENGTH) is not None]

    def _loss(self, model: Any, rows: list[Any]) -> float:
        return nats_per_token(model, self.tokenizer, rows, batch_size=self.batch_size, max_length=MAX_LENGTH).mean


class Along(TrainerCallback):
    """Keep what is measured along a training run.

    Args:
        meter: The meter that takes the measurements.
        scales: See the attribute.

    Attributes:
        scales: Number of scales of a finished adapter to go through, for methods that scale it.
        first: Number of steps of earlier stages.
        curve: The figures of each measured state.
        outcomes: The outcomes of each prompt in these states.
        probes: The few figures that `crossing.UntilSafe` checks between measurements.
    """

    def __init__(self, meter: Meter, scales: int) -> None:
        self.meter = meter
        self.scales = scales
        self.first = 0
        self.curve: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        """Seconds that the measurements took."""
        return sum(own["seconds"] for own in self.curve)

    def record(self, model: Any, step: int, **more: float) -> None:
        """Measure a state."""
        self.curve.append(self.meter(model, step) | more)
        self.outcomes.append(self.meter.outcomes)

    def at_scale(self, model: Any, step: int, scale: float) -> bool:
        """Measure the model at a scale of its adapter. Return whether no larger scale is needed."""
        self.record(model, step, scale=scale)
        return False


class Evenly(Along):
    """Measure at evenly spaced steps of every stage.

    Args:
        meter: The meter that takes the measurements.
        count: Number of measurements per stage.
        scales: See `Along`.
    """

    def __init__(self, meter: Meter, count: int, scales: int) -> None:
        super().__init__(meter, scales)
        self.count = count

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure if this is one of the evenly spaced steps."""
        if state.global_step in {round(args.max_steps * (i + 1) / self.count) for i in range(self.count)}:
            self.record(model, self.first + state.global_step)


def _refused(verdicts: list[Verdict]) -> float:
    return verdicts.count(Verdict.REFUSAL) / len(verdicts)


def _word(outcomes: Iterable[bool]) -> str:
    return "".join("1" if outcome else "0" for outcome in outcomes)
