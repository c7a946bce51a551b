# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""One run: a method and a seed, measured along its training."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, OSFConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet
from peft_ogpsa.cli.models import load_model
from peft_ogpsa.compat import use_one_gpu
from peft_ogpsa.core import inputs
from peft_ogpsa.core.config import ProjectionConfig
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.lookalikes import with_lookalikes
from peft_ogpsa.references.losses import reference_loss
from peft_ogpsa.references.refusals import refusals_from_prompts
from peft_ogpsa.references.sets import AnsweredSet
from peft_ogpsa.text.tokenization import encode_row
from peft_ogpsa.tuner.model import projector_of

from ..commit import commit
from .baselines import corda, lora_null, mica
from .baselines.asft import AnchoredTrainer
from .baselines.ewc import EWC
from .baselines.fisher import SAMPLES, fisher
from .baselines.placement import linear_layers, lora_knobs
from .baselines.scaling import along_scales
from .crossing import UntilSafe
from .data import TaxData, in_order
from .held_b import HeldB
from .measurement import MAX_LENGTH, Along, Evenly, Meter
from .methods import Method
from .tasks import Tasks, scores

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of a grid share.

    Attributes:
        model: A name on the hub, or a folder.
        device: `cpu` or `cuda`.
        steps: Optimizer steps.
        batch: Training examples per step.
        learning_rate: Learning rate of SFT. With a schedule, the highest one.
        schedule: A value of transformers' `lr_scheduler_type`, for the steps of each stage.
        measurements: Number of measurements along a run, evenly spaced.
        until_safe: Instead, measure when the run is first safe enough, and end it then. See `crossing.UntilSafe`.
        answer_tokens: Largest length of the base's own answers, in tokens.
        stages: `"sft"`, `"dpo"`, or both. Both stages share the steps.
        dpo_learning_rate: Learning rate of DPO. It is lower: at that of SFT, plain LoRA becomes unusable.
    """

    model: str
    device: str
    steps: int = 20
    batch: int = 8
    learning_rate: float = 5e-4
    schedule: str = "constant"
    measurements: int = 4
    answer_tokens: int = 64
    stages: tuple[str, ...] = ("sft",)
    dpo_learning_rate: float = 1e-4
    until_safe: bool = False


class Workbench:
    """A base model with everything that the runs of a grid share."""

    def __init__(self, settings: Settings, data: TaxData, tasks: Tasks | None = None) -> None:
        self.settings, self.data = settings, data
        self.runner = tasks.runner() if tasks else None
        self.base, self.tokenizer, self.source = load_model(settings.model, device=settings.device)
        self.meter = Meter(self.base, self.tokenizer, data)

    def references(self, answers: str, loss: str = "answer", more_lookalikes: bool = False) -> list[ReferenceSet]:
        """Return the reference sets. The base answers the prompts without given answers, once."""
        sets = []
        for name, rows in self.data.references.items():
            if answers == "given" and "completion" in rows[0]:
                sets.append(ReferenceSet(name, rows, None, MAX_LENGTH, loss))
                continue
            prompts = [row["prompt"] for row in rows]
            if more_lookalikes and name == "lookalikes":
                prompts = self.data.more_lookalikes
            sets.append(self._answered(name, prompts, loss))
        return sets

    def scores(self, model: Any) -> dict[str, Any]:
        """Score lm-eval's tasks, as an entry `tasks` of a result file. Without tasks, there is no entry."""
        return {"tasks": scores(self.runner, model, self.tokenizer)} if self.runner else {}

    def _answered(self, name: str, prompts: list[Any], loss: str = "answer") -> AnsweredSet:
        return ReferenceSet.from_prompts(
            name,
            prompts,
            self.base,
            self.tokenizer,
            max_new_tokens=self.settings.answer_tokens,
            batch_size=32,
            max_length=MAX_LENGTH,
            loss=loss,
            progress=False,
        )

    def rows(self, method: Method, seed: int) -> list[dict[str, Any]]:
        """Return the training rows, in their order."""
        wanted = self.settings.steps * self.settings.batch
        rows = in_order(self.data.safety, wanted, seed)
        if method.refusals == "own":
            rows = self._own_refusals(rows)
        if not method.lookalikes:
            return rows
        answered = self._answered("lookalikes", self.data.lookalikes)
        return with_lookalikes(rows, answered, method.lookalikes)[:wanted]

    def _own_refusals(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return as many rows with the base's own refusals. Rows of the prompts that it refuses repeat."""
        own = refusals_from_prompts(
            [row["prompt"] for row in rows],
            self.base,
            self.tokenizer,
            max_new_tokens=self.settings.answer_tokens,
            batch_size=32,
            progress=False,
        ).rows
        return [own[i % len(own)] for i in range(len(rows))]

    def pairs(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Convert rows with answers to preference pairs.

        For harmful prompts, refusals are chosen and the base's own answers are rejected. For look-alikes, the base's
        own answers are chosen and refusals are rejected.
        """
        harmful = {json.dumps(row["prompt"]): row["completion"] for row in self.data.safety}
        refused = [row for row in rows if json.dumps(row["prompt"]) in harmful]
        own = self._answered("rejected", [row["prompt"] for row in refused])
        answers = {json.dumps(row["prompt"]): row["completion"] for row in own.dataset}
        refusals = itertools.cycle([row["completion"] for row in refused])
        pairs = []
        for row in rows:
            name = json.dumps(row["prompt"])
            rejected = answers.get(name) if name in harmful else next(refusals)
            if rejected is not None:
                pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
        return pairs


def run(bench: Workbench, name: str, method: Method, seed: int, safety_loss: float | None = None) -> dict[str, Any]:
    """Train and measure once. Afterwards, the base is as it was before. After an error, it may hold an adapter.

    Args:
        bench: What all runs share.
        name: The method's name.
        method: How it trains.
        seed: Seed of the order of the rows, and of the adapter.
        safety_loss: With `until_safe`, a held-out safety loss at which to measure, too.

    Returns:
        `run_info`, `train_info` (with the curve as `metrics`) and `meta_info`, as in PEFT's method comparison.
    """
    settings = bench.settings
    if method.moves_base and bench.meter.answers.log_probs is None:
        raise ValueError(f"{name} changes its base, so the meter must hold the log-probabilities of the real one.")
    start = time.perf_counter()
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    parts = _parts(bench, method, seed)  # before the base gets an adapter, because it answers prompts here
    set_seed(seed)
    config, model, callbacks = _prepare(bench, method, seed)
    measure: Along
    if settings.until_safe:
        measure = UntilSafe(bench.meter, safety_loss)
    else:
        measure = Evenly(bench.meter, settings.measurements // len(settings.stages), settings.measurements)
    for stage, part in zip(settings.stages, parts, strict=True):
        with tempfile.TemporaryDirectory() as folder, _most_gain(inputs.MOST_GAIN if method.gain else 1.0):
            along = [] if method.scaled else [measure]
            trainer = _trainer(bench, stage, model, method, part, folder, seed, [*along, *callbacks])
            trainer.train()
        steps = measure.first = measure.first + trainer.state.global_step
    if method.scaled:
        for scale in along_scales(model, measure.scales):
            if measure.at_scale(model, measure.first, scale):
                break
    seconds = time.perf_counter() - start
    scored = bench.scores(model)
    training = seconds - measure.seconds
    rows = steps * settings.batch
    drawn = sum(getattr(callback, "examples", 0) for callback in callbacks)
    info: dict[str, Any] = {
        "seconds": training,
        "references": drawn / rows,
        "removed": None,
        "peak_memory_mb": _peak_mb(settings.device),
        "metrics": measure.curve,
        "probes": measure.probes,
        "outcomes": measure.outcomes,
        **scored,
    }
    if isinstance(config, ProjectionConfig):
        diagnostics = projector_of(model).diagnostics
        info["references"] += diagnostics.reference_examples / rows
        info["removed"] = trainer.state.log_history[0].get("ogpsa/removed")
        info["seconds_by_part"] = diagnostics.stopwatch.totals()
    if not method.moves_base:
        bench.base = model.unload()
        bench.base.__dict__.pop("forward", None)  # set by TRL for DPO. A copy would share it with the original.
    return {
        "run_info": {
            "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "total_time": seconds,
            "experiment_name": name,
            "seed": seed,
            "method": method.recorded(),
            "settings": asdict(settings),
        },
        "train_info": info,
        "meta_info": {
            "model": bench.source,
            "data": bench.data.source,
            "commit": commit(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "peft-ogpsa")},
            "device": torch.cuda.get_device_name() if settings.device == "cuda" else f"CPU, {platform.machine()}",
            "threads": torch.get_num_threads(),
        },
    }


@contextmanager
def _most_gain(most: float) -> Iterator[None]:
    """Limit the factor of A's start and steps."""
    before, inputs.MOST_GAIN = inputs.MOST_GAIN, most
    try:
        yield
    finally:
        inputs.MOST_GAIN = before


def _parts(bench: Workbench, method: Method, seed: int) -> list[list[dict[str, Any]]]:
    """Return the training rows of each stage: an equal share of all rows, for DPO as pairs."""
    rows, stages = bench.rows(method, seed), bench.settings.stages
    share = len(rows) // len(stages)
    shares = [rows[i * share : (i + 1) * share] for i in range(len(stages))]
    return [bench.pairs(own) if stage == "dpo" else own for stage, own in zip(stages, shares, strict=True)]


def _trainer(
    bench: Workbench,
    stage: str,
    model: Any,
    method: Method,
    rows: list[dict[str, Any]],
    folder: str,
    seed: int,
    callbacks: list[TrainerCallback],
) -> Trainer:
    settings = bench.settings
    steps = settings.steps // len(settings.stages)
    rate = settings.dpo_learning_rate if stage == "dpo" else settings.learning_rate
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": rate * method.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "optim": method.optimizer,
        "logging_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": settings.device == "cpu",
        # For float32 weights. Adapters have a base in bfloat16, and on a CPU everything is computed in float32.
        "bf16": method.moves_base and settings.device != "cpu",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    if stage == "dpo":
        if method.anchor:
            raise ValueError("The divergence on training tokens is a part of the SFT loss. Leave out the DPO stage.")
        arguments = use_one_gpu(DPOConfig(max_length=MAX_LENGTH, gradient_checkpointing=False, **common))
        pairs = Dataset.from_list(rows)
        return DPOTrainer(
            model, args=arguments, train_dataset=pairs, processing_class=bench.tokenizer, callbacks=callbacks
        )
    examples = [encode_row(bench.tokenizer, row, f"row {i}") for i, row in enumerate(rows)]
    if method.first_tokens is not None:
        examples = [replace(e, ids=e.ids[: e.answer_start + method.first_tokens]) for e in examples]
    kept = [example for example in (example.cut(MAX_LENGTH) for example in examples) if example is not None]
    anchored = partial(AnchoredTrainer, weight=method.anchor, reweighted=method.reweighted)
    return (anchored if method.anchor else Trainer)(
        model,
        args=use_one_gpu(TrainingArguments(**common)),
        train_dataset=Dataset.from_list([{"input_ids": e.ids, "labels": e.labels} for e in kept]),
        data_collator=DataCollatorForSeq2Seq(bench.tokenizer),
        processing_class=bench.tokenizer,
        callbacks=callbacks,
    )


def _prepare(bench: Workbench, method: Method, seed: int) -> tuple[Any, Any, list[TrainerCallback]]:
    """Return the configuration (`None` if nothing reads it later), the model, and the method's callbacks."""
    settings = bench.settings
    sets = bench.references(method.answers, method.loss, method.more_lookalikes) if method.references else []
    if method.merged:
        rows = [row for own in sets for row in own.dataset]
        sets = [ReferenceSet("all", rows, None, MAX_LENGTH, method.loss)]
    if method.whole:
        whole = copy.deepcopy(bench.base).float()
        if method.linear:
            _freeze_all_but_linear(whole)
        if method.overrides is None:
            return None, whole, []
        build = partial(FullParameterConfig.paper, "sft") if method.paper else FullParameterConfig
        rule = build(**method.overrides)
        return rule, whole, [OGPSACallback(sets, config=rule, seed=seed)]
    if method.osf:
        return None, get_peft_model(copy.deepcopy(bench.base).float(), OSFConfig(target_modules="all-linear")), []
    if method.overrides is None and (method.start or method.ewc):
        return _baseline(bench, method, sets, seed)
    config: LoraConfig
    if method.replay:
        penalty: dict[str, Any] = {"reference_weight": method.replay, "refresh_steps": method.every}
        penalty["refresh_samples"] = round(method.budget * method.every * settings.batch)
        config = OGPSAConfig(subspace="none", **penalty, **LORA)
    elif method.overrides is None:
        config = LoraConfig(**LORA | lora_knobs(method.layers, bench.base.config.num_hidden_layers))
    elif method.paper:
        config = OGPSAConfig.paper("sft", **LORA, **method.overrides)
    else:
        config = OGPSAConfig(**LORA, **method.overrides)
    model = get_peft_model(bench.base, config)
    if method.start:
        return _started(bench, model, sets, frozen=method.start == "frozen")
    if isinstance(config, OGPSAConfig):
        held = [HeldB(sets)] if method.held_b else []
        return config, model, [OGPSACallback(sets, seed=seed), *held]
    return config, model, []


def _baseline(
    bench: Workbench, method: Method, sets: list[ReferenceSet], seed: int
) -> tuple[Any, Any, list[TrainerCallback]]:
    """Return LoRA with another start or with EWC's penalty. Both may use all references before training."""
    examples = {own.name: own.tokenize(bench.tokenizer) for own in sets}
    if method.ewc:
        weights = [layer.weight for layer in linear_layers(bench.base).values()]
        few = {name: own[:SAMPLES] for name, own in examples.items()}
        penalty = EWC(fisher(bench.base, weights, few, seed), method.ewc)
        return None, get_peft_model(bench.base, LoraConfig(**LORA)), [penalty]
    start = {"corda": corda, "lora_null": lora_null, "lora_null_frozen": lora_null, "mica": mica}[method.start]
    base = copy.deepcopy(bench.base).float() if method.moves_base else bench.base
    sequences = [torch.tensor([e.ids], device=bench.settings.device) for own in examples.values() for e in own]
    model = start.adapted(base, LORA, sequences)
    if method.start == "lora_null_frozen":
        _freeze_a(model)
    return None, model, []


def _freeze_all_but_linear(model: Any) -> None:
    """Train only the weights of linear layers. Freeze the output layer, too: it is often the embedding."""
    output = model.get_output_embeddings()
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not output:
            module.weight.requires_grad_(True)


def _started(
    bench: Workbench, model: Any, sets: list[ReferenceSet], *, frozen: bool
) -> tuple[LoraConfig, Any, list[TrainerCallback]]:
    """Return plain LoRA that starts with the adapter of an OGPSA model."""
    batch = bench.settings.batch
    loader = ReferenceLoader.from_sets(sets, bench.tokenizer, model.peft_config["default"], batch, batch)
    model.projector.refresh(loader.batches(bench.settings.device, everything=True), reference_loss)
    adapter = get_peft_model_state_dict(model)
    bench.base = model.unload()
    config = LoraConfig(**LORA)
    plain = get_peft_model(bench.base, config)
    set_peft_model_state_dict(plain, adapter)
    if frozen:
        _freeze_a(plain)
    return config, plain, []


def _freeze_a(model: Any) -> None:
    """Train only B of an adapter."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)


def _peak_mb(device: str) -> float | None:
    """Peak memory since the run began, in MB. A process on a CPU knows only that of all its runs."""
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else None
