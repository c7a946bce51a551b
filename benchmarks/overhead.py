# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the training time that OGPSA adds, and that of the published rule and of replay.

    python benchmarks/overhead.py --output benchmarks/results/overhead  # CPU, SmolLM2-135M
    python benchmarks/overhead.py --shape qwen2.5-1.5b --length 512 --output benchmarks/results/overhead_1.5b  # a GPU
    python benchmarks/overhead.py --shape llama3.1-8b --quantized --length 512 --output benchmarks/results/overhead_8b

All methods take the same training steps in turn, cycle by cycle, in one process. A figure is the median over cycles of
the ratio to plain LoRA in the same round, so that other work of the machine affects all methods alike. A turn begins
with a step that is not counted, because the caches still hold the data of another method.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from memory import SHAPES, build, now
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.cli.models import load_model
from peft_ogpsa.core.gradients import LossFn
from peft_ogpsa.references.losses import answer_loss
from peft_ogpsa.references.losses.kl import KLLoss

PAPER_EXAMPLES = 400  # reference examples of the published rule's refresh, from two sets
BUILD_EXAMPLES = 192  # reference examples that an activation subspace is built from, once


@dataclass(frozen=True)
class Settings:
    """The training run that is timed."""

    shape: str = "smollm2-135m"
    quantized: bool = False
    batch: int = 8
    length: int = 64
    reference_length: int = 64
    rank: int = 16
    steps: int = 5
    """Steps of a cycle, and from one refresh to the next."""
    repeats: int = 7
    device: str = "cpu"


class Method:
    """One way of training, with a model of its own.

    Args:
        settings: The run.
        config: Configuration of the adapter.
        samples: Reference examples per cycle, for a refresh or, with `replay`, as extra training examples.
        replay: Whether to train on the reference examples.
        loss: Loss of the references.
        kernels: Whether to project with the Triton kernels.
    """

    def __init__(
        self,
        settings: Settings,
        config: LoraConfig,
        samples: float = 0,
        replay: bool = False,
        loss: LossFn = answer_loss,
        kernels: bool = False,
    ) -> None:
        self.settings, self.samples, self.replay, self.loss = settings, samples, replay, loss
        self.model: Any = get_peft_model(_base(settings), config).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.projector = self.model.projector if isinstance(config, OGPSAConfig) else None
        if kernels:
            self.projector.kernels = True
        self._generator = torch.Generator().manual_seed(0)
        self.build = 0.0
        if isinstance(config, OGPSAConfig):
            if config.uses_activations:
                self._refresh(BUILD_EXAMPLES)
                self.build = self.projector.diagnostics.stopwatch.totals()["build"]
            if config.refreshes:
                self._refresh(config.rows if config.rows_from == "example" else 2 * settings.batch)

    def cycle(self) -> dict[str, float]:
        """Take the steps of one cycle. Return the seconds of the whole, of the refresh and of the projection."""
        settings = self.settings
        self._step(settings.batch)
        before = self._totals()
        start = now(settings.device)
        if self.samples and self.projector is not None:
            # The published rule's refresh is too large for every cycle. Run one batch, and scale its time.
            self._refresh(min(int(self.samples), settings.batch) or 1)
        refreshed = now(settings.device)
        extra = round(self.samples) if self.replay else 0
        for step in range(settings.steps):
            self._step(settings.batch + (extra if step == 0 else 0))
        end = now(settings.device)
        passed = min(int(self.samples), settings.batch) or 1
        refresh = (refreshed - start) * (self.samples / passed)
        projection = self._totals() - before
        return {"seconds": end - refreshed + refresh, "refresh": refresh, "projection": projection}

    def _step(self, examples: int) -> None:
        answer_loss(self.model, self._batch(examples, self.settings.length)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _refresh(self, count: int) -> None:
        size, length = self.settings.batch, self.settings.reference_length
        batches = [self._batch(min(size, count - i), length) for i in range(0, count, size)]
        self.projector.refresh({"references": batches}, self.loss)

    def _batch(self, examples: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(self.model.config.vocab_size, (examples, length), generator=self._generator)
        ids = ids.to(self.settings.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def _totals(self) -> float:
        return 0.0 if self.projector is None else self.projector.diagnostics.stopwatch.totals().get("projection", 0.0)


def _base(settings: Settings) -> nn.Module:
    """Return a new model around frozen weights that all methods share."""
    base = _weights(settings)
    return copy.deepcopy(base, {id(tensor): tensor for tensor in itertools.chain(base.parameters(), base.buffers())})


@functools.cache
def _weights(settings: Settings) -> nn.Module:
    if settings.shape == "smollm2-135m" and not settings.quantized:
        return load_model(device=settings.device)[0]
    config = SHAPES[settings.shape]
    if settings.quantized:
        return build(config, settings.device)
    with torch.device(settings.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def methods(settings: Settings, kernels: bool = False) -> dict[str, Callable[[], Method]]:
    """Return the ways of training by name. Each is made when it is called."""
    lora: dict[str, Any] = {
        "r": settings.rank,
        "lora_alpha": 2 * settings.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    cone, paper = OGPSAConfig(subspace="gradients", **lora), OGPSAConfig.paper("sft", **lora)
    samples = (cone.reference_budget or 0) * settings.batch * settings.steps
    kl: dict[str, Any] = {"samples": round(samples / KLLoss.cost), "loss": KLLoss().loss}
    triton = {"OGPSA, cone, Triton kernels": functools.partial(Method, settings, cone, samples, kernels=True)}
    return {
        "plain LoRA": functools.partial(Method, settings, LoraConfig(**lora)),
        "OGPSA, null space": functools.partial(Method, settings, OGPSAConfig(reference_weight=0, **lora)),
        "OGPSA, null space, KL penalty (default)": functools.partial(Method, settings, OGPSAConfig(**lora), **kl),
        "OGPSA, cone, given answers": functools.partial(Method, settings, cone, samples),
        **(triton if kernels else {}),
        "OGPSA, cone, KL penalty": functools.partial(Method, settings, cone, **kl),
        "replay of the same examples": functools.partial(Method, settings, LoraConfig(**lora), samples, replay=True),
        "OGPSA, published rule": functools.partial(
            Method, settings, paper, PAPER_EXAMPLES * settings.steps / paper.refresh_steps
        ),
    }


def benchmark(settings: Settings, kernels: bool = False, names: Sequence[str] = ()) -> dict[str, Any]:
    """Time methods in turn: plain LoRA and those named, or all. With `kernels`, also time the cone with Triton.

    Returns:
        By method: `seconds` of a cycle, and the shares `total`, `refresh` and `projection` of plain LoRA's time, each
        with median, least and most over the repeats. `build_steps` is the time of what is built once before training,
        as a number of plain steps.
    """
    every = methods(settings, kernels)
    made = {name: make() for name, make in every.items() if not names or name in ("plain LoRA", *names)}
    for method in made.values():
        method.cycle()
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in tqdm(range(settings.repeats), "Rounds"):
        gc.collect()
        rounds.append({name: method.cycle() for name, method in made.items()})
    plain = [each["plain LoRA"]["seconds"] for each in rounds]
    result: dict[str, Any] = {}
    for name in made:
        own = [each[name] for each in rounds]
        result[name] = {
            "seconds": _spread([cycle["seconds"] for cycle in own]),
            "total": _spread([cycle["seconds"] / base for cycle, base in zip(own, plain, strict=True)]),
            "refresh": _spread([cycle["refresh"] / base for cycle, base in zip(own, plain, strict=True)]),
            "projection": _spread([cycle["projection"] / base for cycle, base in zip(own, plain, strict=True)]),
            "build_steps": made[name].build / (statistics.median(plain) / settings.steps),
        }
    return result


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def markdown(result: dict[str, Any]) -> str:
    """Return a table of the ratios."""
    lines = [
        "| method | time, of plain LoRA's | spread | of that, references | projection | once, in plain steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in result.items():
        total = own["total"]
        lines.append(
            f"| {name} | {total['median']:.3f} | {total['least']:.3f} to {total['most']:.3f} | "
            f"{own['refresh']['median']:.3f} | {own['projection']['median']:.3f} | {own['build_steps']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Name of the .json file, without its ending.")
    default = Settings(device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default=default.shape, choices=list(SHAPES))
    parser.add_argument("--quantized", action="store_true")
    for name in ("batch", "length", "reference_length", "rank", "steps", "repeats"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--kernels", action="store_true", help="Measure the Triton kernels as well; needs CUDA.")
    parser.add_argument("--methods", nargs="+", default=[], help="Names of methods, besides plain LoRA. Default: all.")
    arguments = vars(parser.parse_args())
    output, kernels, names = (arguments.pop(name) for name in ("output", "kernels", "methods"))
    settings = Settings(**arguments)
    unknown = [name for name in names if name not in (known := methods(settings, kernels))]
    if unknown:
        parser.error(f"--methods {unknown[0]!r} is unknown. Choose from: {'; '.join(known)}.")
    if kernels and settings.device != "cuda":
        parser.error(f"--kernels needs --device cuda, not {settings.device!r}.")
    result = benchmark(settings, kernels, names)
    report = {
        "settings": asdict(settings),
        "machine": torch.cuda.get_device_name()
        if settings.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "methods": result,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
