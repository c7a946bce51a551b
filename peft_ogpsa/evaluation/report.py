# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure in one call everything that safety training may have changed, for a model and its base."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .. import extras
from ..core.forms import check_form
from ..text.generation import generate
from ..text.refusal import Verdict, classify
from ..text.thoughts import after_thought
from ..text.tokenization import Prompt, Row, prompt_text
from ..tuner.adapters import base_of, without_adapter
from .divergence import BaseAnswers, kl_from_base, own_answers
from .estimates import Estimate
from .judges.judge import Judge, Kind
from .judging import judged
from .judgments import JudgePair, Judgment, answer_length, only_matcher
from .losses import LossResult, nats_per_token
from .scores import TaskScore

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What `from_dict` raises for content that `to_dict` did not make."""


@dataclass(frozen=True)
class Sample:
    """A prompt, its answer, and the matcher's verdict on the answer."""

    prompt: str
    answer: str
    verdict: Verdict


@dataclass(frozen=True)
class Measurement:
    """Estimates for one state of a model. An estimate is None if no data was given for it."""

    name: str
    step: int | None = None
    general: dict[str, Estimate] = field(default_factory=dict)
    """Loss on the answers of each general set, in nats per token."""
    general_mean: Estimate | None = None
    """The mean over the sets, with equal weights."""
    kl: Estimate | None = None
    """KL(base || model) on the base's own answers, in nats per token."""
    refusal: Estimate | None = None
    """Refusal rate on harmful prompts."""
    harmful_unclear: Estimate | None = None
    """Rate of harmful prompts that are answered with noise. Such answers are neither safe nor unsafe, but broken."""
    over_refusal: Estimate | None = None
    """Refusal rate on benign prompts."""
    benign_unclear: Estimate | None = None
    harmful_samples: list[Sample] = field(default_factory=list)
    benign_samples: list[Sample] = field(default_factory=list)
    losses: dict[str, LossResult] = field(default_factory=dict)
    """Each general set's loss by example, to compare two models on the same rows."""
    kl_loss: LossResult | None = None
    """KL from base by example."""
    tasks: list[TaskScore] = field(default_factory=list)
    """Scores of tasks: of the held-out sets, and of lm-eval."""
    sets: dict[str, "Measurement"] = field(default_factory=dict)
    """Refusal and over-refusal on further sets of prompts, such as public ones, by the set's name."""
    judgments: list[Judgment] = field(default_factory=list)
    """Verdicts of the judges. Empty if the matcher is the only judge: its verdicts are in the samples."""
    agreements: list[JudgePair] = field(default_factory=list)
    """Agreement of every two judges."""
    seconds: float = 0.0

    @property
    def has_own_data(self) -> bool:
        """Whether there are estimates other than those of sets and tasks."""
        return any((self.general_mean, self.kl, self.refusal, self.over_refusal))

    def samples(self, kind: Kind) -> list[Sample]:
        """Return the prompts of one kind, with their answers."""
        return self.harmful_samples if kind == "harmful" else self.benign_samples

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, ready for JSON. Numbers that JSON does not have (infinite, NaN) become None."""
        plain = asdict(replace(self, sets={}))
        for sample in plain["harmful_samples"] + plain["benign_samples"]:
            sample["verdict"] = sample["verdict"].value
        plain["agreements"] = [pair.to_dict() for pair in self.agreements]
        plain["sets"] = {name: own.to_dict() for name, own in self.sets.items()}
        for key in ("sets", "judgments", "agreements"):
            if not plain[key]:  # as in results of the matcher alone, without sets
                del plain[key]
        return cast(dict[str, Any], _finite(plain))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Measurement":
        """Rebuild a measurement from the result of `to_dict`."""
        fields = dict(plain)
        fields["general"] = {name: _loss_estimate(estimate, name) for name, estimate in plain["general"].items()}
        for key in ("general_mean", "kl"):
            fields[key] = None if plain[key] is None else _loss_estimate(plain[key], key)
        for key in ("refusal", "harmful_unclear", "over_refusal", "benign_unclear"):
            fields[key] = None if plain[key] is None else _estimate(plain[key], key)
        for key in ("harmful_samples", "benign_samples"):
            fields[key] = [Sample(s["prompt"], s["answer"], Verdict(s["verdict"])) for s in plain[key]]
        # Results of earlier versions do not have them.
        fields["losses"] = {name: LossResult.from_dict(loss) for name, loss in plain.get("losses", {}).items()}
        fields["kl_loss"] = None if plain.get("kl_loss") is None else LossResult.from_dict(plain["kl_loss"])
        fields["tasks"] = [TaskScore(**score) for score in plain.get("tasks", [])]
        fields["sets"] = {name: cls.from_dict(own) for name, own in plain.get("sets", {}).items()}
        fields["judgments"] = [Judgment.from_dict(judgment) for judgment in plain.get("judgments", [])]
        fields["agreements"] = [JudgePair.from_dict(pair) for pair in plain.get("agreements", [])]
        return cls(**fields)


def _estimate(plain: Any, name: str) -> Estimate:
    check_form(plain, {"value": float, "low": float, "high": float, "n": int}, name)
    return Estimate(**plain)


def _loss_estimate(plain: Any, name: str) -> Estimate:
    """Rebuild the estimate of a loss, in which None stands for an infinite bound or a value that is NaN."""
    lost = {"value": math.nan, "low": -math.inf, "high": math.inf}
    if isinstance(plain, Mapping):
        plain = {entry: lost.get(entry) if own is None else own for entry, own in plain.items()}
    return _estimate(plain, name)


def _finite(plain: Any) -> Any:
    """Replace infinite numbers and NaN by None."""
    if isinstance(plain, dict):
        return {name: _finite(own) for name, own in plain.items()}
    if isinstance(plain, list):
        return [_finite(own) for own in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a model and its base, and the settings of both measurements."""

    model: Measurement
    base: Measurement | None
    settings: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, ready for JSON."""
        base = None if self.base is None else self.base.to_dict()
        return {"model": self.model.to_dict(), "base": base, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Evaluation":
        """Rebuild an evaluation from the result of `to_dict`."""
        base = None if plain["base"] is None else Measurement.from_dict(plain["base"])
        return cls(Measurement.from_dict(plain["model"]), base, dict(plain["settings"]))


class Evaluator:
    """Measure states of one model on fixed data. The base is measured once, and the result is kept.

    Each quantity is measured only if its data is given.

    Args:
        processing_class: The model's tokenizer.
        harmful: Prompts that should be refused.
        benign: Prompts that should not be refused, above all prompts that look harmful.
        general: Held-out rows by the name of their set, as in `nats_per_token`.
        divergence_prompts: Prompts for KL from base, which are in no training or reference set.
        max_new_tokens: Maximum number of tokens of an answer. A refusal shows in its first words.
        batch_size: Rows or prompts per batch.
        max_length: Maximum number of tokens per row. Longer rows are cut on the right.
        seed: Seed of the base's sampled answers.
        base_answers: Answers from an earlier `own_answers`, to use instead of sampling new ones.
        progress: Show progress bars.

    Raises:
        ValueError: If a set is given but empty.
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase,
        *,
        harmful: Iterable[Prompt] | None = None,
        benign: Iterable[Prompt] | None = None,
        general: Mapping[str, Iterable[Row]] | None = None,
        divergence_prompts: Iterable[Prompt] | None = None,
        max_new_tokens: int = 32,
        batch_size: int = 16,
        max_length: int = 1024,
        seed: int = 0,
        base_answers: BaseAnswers | None = None,
        progress: bool = False,
    ):
        self.processing_class = processing_class
        self.harmful = _listed("harmful", harmful)
        self.benign = _listed("benign", benign)
        self.general = {name: _listed(f"general[{name!r}]", rows) or [] for name, rows in (general or {}).items()}
        self.divergence_prompts = _listed("divergence_prompts", divergence_prompts)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.base_answers = base_answers
        self.progress = progress
        self._base: Measurement | None = None

    @property
    def settings(self) -> dict[str, int]:
        """The settings that a reader needs to repeat the measurement on the same data."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "seed": self.seed,
        }

    def measure(self, model: torch.nn.Module, name: str = "model", step: int | None = None) -> Measurement:
        """Measure the model in its current state. Training can continue afterwards as if nothing had happened.

        Raises:
            ValueError: If KL from base is requested, the model has no adapter, and `base` was not called before.
        """
        start = time.perf_counter()
        if self.divergence_prompts is not None and self.base_answers is None:
            with without_adapter(model):
                self._draw_base_answers(model)
        if self.base_answers is None:
            return self._measure(model, name, step, None, start)
        kl = kl_from_base(model, self.base_answers)
        return replace(self._measure(model, name, step, Estimate.from_loss(kl), start), kl_loss=kl)

    def base(self, model: torch.nn.Module, name: str = "base") -> Measurement:
        """Measure the base on the first call, and return the same result on later calls.

        A model with an adapter is measured without it, another model as it is.
        """
        if self._base is None:
            start = time.perf_counter()
            with base_of(model):
                self._base = self._measure_base(model, name, start)
        return self._base

    def _measure_base(self, model: torch.nn.Module, name: str, start: float) -> Measurement:
        if self.divergence_prompts is not None and self.base_answers is None:
            self._draw_base_answers(model)
        # The base does not diverge from itself.
        kl = None if self.base_answers is None else Estimate(0.0, 0.0, 0.0, len(self.base_answers.examples))
        return self._measure(model, name, None, kl, start)

    def _draw_base_answers(self, model: torch.nn.Module) -> None:
        self.base_answers = own_answers(
            model,
            self.processing_class,
            self.divergence_prompts or [],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def _measure(
        self, model: torch.nn.Module, name: str, step: int | None, kl: Estimate | None, start: float
    ) -> Measurement:
        losses = {
            set_name: nats_per_token(
                model, self.processing_class, rows, batch_size=self.batch_size, max_length=self.max_length
            )
            for set_name, rows in self.general.items()
        }
        general = {set_name: Estimate.from_loss(loss) for set_name, loss in losses.items()}
        # Answer both kinds of prompts in one call, for fuller batches.
        harmful, benign = self.harmful or [], self.benign or []
        prompts = [*harmful, *benign]
        answers = generate(
            model,
            self.processing_class,
            prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        samples = [
            Sample(prompt_text(prompt), answer, classify(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        self._warn_of_thoughts(answers)
        harmful_samples, benign_samples = samples[: len(harmful)], samples[len(harmful) :]
        return Measurement(
            name=name,
            step=step,
            general=general,
            general_mean=_mean_estimate(list(general.values())),
            kl=kl,
            refusal=_rate(harmful_samples, Verdict.REFUSAL),
            harmful_unclear=_rate(harmful_samples, Verdict.UNCLEAR),
            over_refusal=_rate(benign_samples, Verdict.REFUSAL),
            benign_unclear=_rate(benign_samples, Verdict.UNCLEAR),
            harmful_samples=harmful_samples,
            benign_samples=benign_samples,
            losses=losses,
            seconds=time.perf_counter() - start,
        )

    def _warn_of_thoughts(self, answers: Sequence[str]) -> None:
        """Warn if most answers are thoughts that were cut, of which nobody can tell whether they will refuse."""
        cut = sum(after_thought(answer) is None for answer in answers)
        if 2 * cut > len(answers):
            logger.warning(
                "%d of %d answers are thoughts that max_new_tokens=%d cuts off, so whether they refuse is unclear. "
                "Turn thinking off, with chat_template_kwargs={'enable_thinking': False} in the rows (ogpsa eval: "
                "--chat_template_kwargs), or raise max_new_tokens.",
                cut,
                len(answers),
                self.max_new_tokens,
            )


def evaluate(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase,
    *,
    harmful: Iterable[Prompt] | None = None,
    benign: Iterable[Prompt] | None = None,
    general: Mapping[str, Iterable[Row]] | None = None,
    divergence_prompts: Iterable[Prompt] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    max_length: int = 1024,
    seed: int = 0,
    base: bool = True,
    base_answers: BaseAnswers | None = None,
    judges: Sequence[Judge] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a model and, if it is a `PeftModel` and `base` is set, the same model with its adapter disabled.

    `judges` are the judges of the answers, for example `load_judges("matcher,model:wildguard")`. The answers are
    generated once, and the matcher's verdicts are always part of the result. The default of `max_new_tokens` is what
    the judges recommend: 32 for the matcher alone, 256 for most others.

    The other arguments are those of `Evaluator`. To measure many states of one model, use `Evaluator`.

    Raises:
        ValueError: If a judge cannot be used.
        JudgeError: If a judge fails after the answers were generated. Its `measurements` are that of the model and, if
            it was measured, that of the base.
    """
    for judge in judges or ():
        judge.prepare()
    evaluator = Evaluator(
        processing_class,
        harmful=harmful,
        benign=benign,
        general=general,
        divergence_prompts=divergence_prompts,
        max_new_tokens=answer_length(max_new_tokens, judges),
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        base_answers=base_answers,
        progress=progress,
    )
    base_measurement = evaluator.base(model) if base and isinstance(model, PeftModel) else None
    measurement = evaluator.measure(model)
    if judges and not only_matcher(judges):
        both = [measurement] if base_measurement is None else [measurement, base_measurement]
        measurement, *rest = judged(both, judges)
        base_measurement = rest[0] if rest else None
    return Evaluation(measurement, base_measurement, evaluator.settings)


def table(
    results: Mapping[str, Evaluation | Measurement], extra: Mapping[str, Mapping[str, str]] | None = None
) -> "Table":
    """Build a table for the terminal: one line per result, and above them the first base found.

    The change of a result is from its own base. If it has none, the change is from the base of the first line.

    Args:
        results: Results by the name to print. A measurement named "base" counts as the base.
        extra: Further columns: heading -> result name -> text.

    Returns:
        A `rich` table; print it with `rich.print`.

    Raises:
        ValueError: If a model has the name of the base.
    """
    extras.check("eval", "The table of an evaluation")
    from rich.table import Table
    from rich.text import Text

    measurements = {
        name: result.model if isinstance(result, Evaluation) else result for name, result in results.items()
    }
    bases = {name: own.base for name, own in results.items() if isinstance(own, Evaluation) and own.base is not None}
    first = next(iter(bases.values()), None)
    measurements = with_base(measurements, first)
    first = first or measurements.get("base")
    grid = Table(caption="Values have 95 % intervals. Losses and KL are in nats per token.")
    grid.add_column("model")
    for heading in (
        "general loss",
        "change",
        "KL from base",
        "refuses harmful",
        "refuses benign",
        "unclear",
        *(extra or {}),
    ):
        grid.add_column(heading, justify="right")
    for name, measurement in measurements.items():
        change, base = "-", bases.get(name, first)
        if base is not None and base.general_mean is not None and measurement.general_mean is not None:
            change = f"{measurement.general_mean.value - base.general_mean.value:+.3f}"
        grid.add_row(
            Text(name),
            loss_text(measurement.general_mean),
            change,
            loss_text(measurement.kl),
            rate_text(measurement.refusal),
            rate_text(measurement.over_refusal),
            unclear_text(measurement),
            *(Text(column.get(name, "-")) for column in (extra or {}).values()),
        )
    return grid


def with_base(models: Mapping[str, Measurement], base: Measurement | None) -> dict[str, Measurement]:
    """Put the base, if there is one, before the models.

    Raises:
        ValueError: If a model has the name of the base.
    """
    if base is None:
        return dict(models)
    if models.get(base.name, base) != base:
        raise ValueError(f"A model has the name {base.name!r}, which is the name of the base. Give it another name.")
    return {base.name: base, **models}


def _listed(name: str, data: Iterable[Any] | None) -> list[Any] | None:
    if data is None:
        return None
    listed = list(data)
    if not listed:
        raise ValueError(f"{name} is empty. Give at least one entry, or None to leave it out.")
    return listed


def _rate(samples: list[Sample], verdict: Verdict) -> Estimate | None:
    return Estimate.from_count(sum(s.verdict is verdict for s in samples), len(samples)) if samples else None


def _mean_estimate(estimates: list[Estimate]) -> Estimate | None:
    """Return the mean of independent estimates. Their half-widths add like standard errors."""
    if not estimates:
        return None
    mean = sum(estimate.value for estimate in estimates) / len(estimates)
    half = math.sqrt(sum(((estimate.high - estimate.low) / 2) ** 2 for estimate in estimates)) / len(estimates)
    return Estimate(mean, mean - half, mean + half, sum(estimate.n for estimate in estimates))


def loss_text(estimate: Estimate | None) -> str:
    """Format a loss for a table, with its interval. One row has none."""
    if estimate is None:
        return "-"
    half = (estimate.high - estimate.low) / 2
    if math.isfinite(half):
        return f"{estimate.value:.3f} ±{half:.3f}"
    return f"{estimate.value:.3f} ({'1 row: ' if estimate.n == 1 else ''}no interval)"


def rate_text(estimate: Estimate | None) -> str:
    """Format a rate for a table, with its interval."""
    return "-" if estimate is None else f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"


def unclear_text(measurement: Measurement) -> str:
    """Format the shares of unclear answers for a table: to harmful prompts, and to benign ones."""
    shares = (measurement.harmful_unclear, measurement.benign_unclear)
    return " / ".join("-" if share is None else f"{share.value:.0%}" for share in shares)


def on_set(name: str, measurements: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """Return the measurements on a further set of prompts, without models that were not measured on it."""
    return {model: own.sets[name] for model, own in measurements.items() if name in own.sets}
