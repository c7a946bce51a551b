# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the memory and time of OGPSA and of plain QLoRA, on models of any shape with random 4-bit weights.

    python benchmarks/memory.py --shape llama3.1-8b --output benchmarks/results/memory_llama3.1-8b  # a GPU
    python benchmarks/memory.py --length 256 --reference-length 128 --output benchmarks/results/memory_small  # a CPU
    python benchmarks/memory.py --estimate --output benchmarks/results/memory_estimate  # computed, anywhere

The script prints Markdown tables and writes the figures as JSON. Every run builds a new model, one layer's weight at a
time, so that no 16-bit copy of the model exists anywhere. On a GPU, peaks are those of torch's allocator. They leave
out the pages of a paged optimizer, which belong to the driver. On a CPU, torch's profiler sees every allocation and
every release, and the report also says which functions of this package hold the memory at each peak.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.core import linalg
from peft_ogpsa.references.losses import answer_loss

SHAPES: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(  # for a rehearsal
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    ),
    "small": LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "llama3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),  # the Trainer's default
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
TILE = 2**24  # linalg's own value on an accelerator
REFRESH_STEPS = 5
REFRESH_SAMPLES = 8

Phase = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Settings:
    """One training run. `rows=0` is plain QLoRA."""

    rows: int = 8
    rows_dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    optimizer: str = "adamw"
    rank: int = 16
    directions: int = 0
    """Directions of an activation subspace, with `rows=0`. 0 is no such subspace."""
    length: int = 1024
    reference_length: int = 512
    reference_batch: int = 1


def build(config: PretrainedConfig, device: str) -> nn.Module:
    """Build a model with random weights: linear layers in nf4 with nested statistics, the rest in bfloat16."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, _quantized(module, device))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.empty_like(parameter, device=device).normal_(std=0.02)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
    # Buffers (rotary frequencies) are computed, not stored.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_4bit = True  # PEFT checks this
    model.tie_weights()
    # The method has the second name before transformers 5.23, which warns about that name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def _quantized(linear: nn.Linear, device: str) -> nn.Module:
    inputs, outputs, bias = linear.in_features, linear.out_features, linear.bias is not None
    layer = bnb.nn.Linear4bit(
        inputs, outputs, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4", device=torch.device("meta")
    )
    if bias:
        layer.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.bfloat16, device=device), requires_grad=False)
    values = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    weight: Any = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight.to(device)  # quantizes
    return layer


def adapt(model: nn.Module, settings: Settings) -> PeftModel:
    """Add the adapter of the settings to all linear layers of the model."""
    lora: dict[str, Any] = {
        "r": settings.rank,
        "lora_alpha": 2 * settings.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    own: dict[str, Any] = {
        "subspace": "gradients",
        "rows": settings.rows,
        "rows_dtype": settings.rows_dtype,
        "refresh_steps": REFRESH_STEPS,
    }
    config = OGPSAConfig(**own, **lora) if settings.rows else LoraConfig(**lora)
    if settings.directions:
        alone = {"subspace_rank": settings.directions, "reference_weight": 0}
        config = OGPSAConfig(**alone, rows_dtype=settings.rows_dtype, **lora)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, settings.adapter_dtype))
    return model


def autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Return the same autocast as the Trainer's `bf16=True`."""
    return torch.autocast(device, torch.bfloat16)


def train(model: PeftModel, settings: Settings, device: str, steps: int, phase: Phase) -> None:
    """Take optimizer steps on random tokens. Each part runs in its phase: `refresh`, `step` or `optimizer`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[settings.optimizer](trained, lr=1e-4)
    projector = model.projector if settings.rows or settings.directions else None
    generator = torch.Generator().manual_seed(0)

    def batch(examples: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(model.config.vocab_size, (examples, length), generator=generator).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def reference_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with autocast(device):
            return answer_loss(model, inputs)

    # PEFT only checks for CUDA's autocast. On a CPU it would cast every input to the dtype of the adapter.
    with disable_input_dtype_casting(model, active=device == "cpu"):
        for _ in range(steps):
            if projector is not None and projector.due:
                samples = min(REFRESH_SAMPLES, settings.rows or REFRESH_SAMPLES)
                references = [
                    batch(min(settings.reference_batch, samples - i), settings.reference_length)
                    for i in range(0, samples, settings.reference_batch)
                ]
                with phase("refresh"):
                    projector.refresh({"references": references}, reference_loss)
            inputs = batch(1, settings.length)
            with phase("step"):
                with autocast(device):
                    loss = model(**inputs, use_cache=False).loss
                loss.backward()
                del loss
            with phase("optimizer"):
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()


# Memory


class DeviceMeter:
    """Peaks of torch's CUDA allocator in every phase, in bytes."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is allocated inside, with what was allocated before, towards the peak of the phase."""
        torch.cuda.reset_peak_memory_stats()
        yield
        self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())


class MainMemoryMeter:
    """Peaks of torch's main memory in every phase, in bytes, from the profiler's record of each (de)allocation.

    Allocate everything to measure inside the `with` block: the profiler does not know earlier allocations.

    Attributes:
        peaks: The most bytes held at once, by phase.
        holders: The bytes at that moment, by phase and by the innermost function of this package that allocated them.
            Bytes that no function of this package allocated are under `""`.
    """

    _OURS = re.compile(r".*peft_ogpsa/(?:\w+/)*(\w+)\.py\(\d+\): (\w+)")

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.holders: dict[str, Counter[str]] = {}
        # The profiler records stacks only together with operators.
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_stack=True)

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Count what is allocated inside, with what was allocated before, towards the peak of the phase."""
        return record_function(f"phase {name}")

    def __enter__(self) -> MainMemoryMeter:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        profiler: Any = self._profile.profiler
        held: dict[int, tuple[int, str]] = {}
        holders: Counter[str] = Counter()
        phase = ""
        changes = self._changes(profiler.kineto_results.experimental_event_tree(), "")
        for _, pointer, size, name in sorted(changes, key=lambda change: change[0]):
            if not pointer:
                phase = name
            elif size > 0:
                held[pointer] = size, name
                holders[name] += size
            elif pointer in held:
                released, owner = held.pop(pointer)
                holders[owner] -= released
            if phase and holders.total() > self.peaks.get(phase, 0):
                self.peaks[phase] = holders.total()
                self.holders[phase] = holders.copy()

    def _changes(self, events: Iterable[Any], owner: str) -> Iterator[tuple[int, int, int, str]]:
        """Yield time, address, signed size and owner of every change. At address 0, a phase starts or ends."""
        for event in events:
            name = _name(event)
            if name == "[memory]":
                yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, owner
            if name.startswith("phase "):
                # The event of a phase has no children, because the phase starts and ends inside calls of its own.
                yield event.start_time_ns, 0, 0, name.removeprefix("phase ")
                yield event.end_time_ns, 0, 0, ""
            ours = self._OURS.match(name)
            yield from self._changes(event.children, f"{ours[1]}.{ours[2]}" if ours else owner)


def _name(event: Any) -> str:
    try:
        return event.name
    except UnicodeDecodeError:  # the profiler cuts long names, even in the middle of a letter
        return ""


def measure(config: PretrainedConfig, settings: Settings, device: str, steps: int = 3) -> dict[str, Any]:
    """Measure the peak bytes of each phase in a few steps of a new model. On a CPU, also say what holds them."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    meter = DeviceMeter() if device == "cuda" else MainMemoryMeter()
    with meter if isinstance(meter, MainMemoryMeter) else contextlib.nullcontext():
        with meter.phase("build"):
            model = adapt(build(config, device), settings)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        with patch.object(linalg, "TILE", tile(count)):
            train(model, settings, device, steps, meter.phase)
    result: dict[str, Any] = {"lora_parameters": count, "peaks": meter.peaks}
    if device == "cuda":
        result["reserved"] = torch.cuda.memory_reserved()  # what the allocator took from the device and keeps
    if isinstance(meter, MainMemoryMeter):
        result["holders"] = {
            phase: {owner: size for owner, size in holders.most_common() if owner and size > 0.01 * count}
            for phase, holders in meter.holders.items()
        }
    return result


def tile(count: int) -> int:
    """Return how many elements to convert at a time, for a number of LoRA parameters.

    The usual tile is larger than all rows of a small model. So it is scaled down with the adapter, starting from 8 B
    at rank 16. The figures of a small model are then like those of a large one.
    """
    return min(TILE, TILE * count // 41_943_040)


class Clock:
    """Seconds of every phase, in order. A phase ends when the device is done with it."""

    def __init__(self, device: str) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._device = device

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        start = now(self._device)
        yield
        self.seconds.append((name, now(self._device) - start))


def now(device: str) -> float:
    """Seconds on a clock, when the device has done all its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(config: PretrainedConfig, settings: Settings, device: str) -> dict[str, float]:
    """Measure the seconds of a training step with its optimizer step, of a refresh, and tokens per second of both.

    The first two steps are a warm-up. Each has a refresh. The next five steps have one refresh, as in a long run.
    """
    watch = Clock(device)
    train(adapt(build(config, device), settings), settings, device, 2 + REFRESH_STEPS, watch.phase)
    warm = [i for i, (name, _) in enumerate(watch.seconds) if name == "optimizer"][1] + 1
    timed = watch.seconds[warm:]
    refresh = sum(seconds for name, seconds in timed if name == "refresh")
    total = sum(seconds for _, seconds in timed)
    return {
        "seconds_step": (total - refresh) / REFRESH_STEPS,
        "seconds_refresh": refresh,
        "tokens_per_second": REFRESH_STEPS * settings.length / total,
    }


# Accounting


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on."""

    layers: int
    vocabulary: int
    hidden: int
    keys: int
    inner: int
    linears: tuple[tuple[int, int], ...]
    rest: int

    def lora_parameters(self, rank: int) -> int:
        """Count the parameters of adapters on all linear layers except the head."""
        return sum(rank * (out + inputs) for out, inputs in self.linears)

    def largest_group(self, rank: int) -> int:
        """Count the LoRA parameters of the largest group. Matrices of equal size are one group, projected together."""
        sizes: Counter[int] = Counter()
        for features in itertools.chain.from_iterable(self.linears):
            sizes[rank * features] += rank * features
        return max(sizes.values())


def inspect_shape(config: Any) -> Shape:
    """Read the sizes of a model without allocating it."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return Shape(
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        keys=config.num_key_value_heads * config.hidden_size // config.num_attention_heads,
        inner=config.intermediate_size,
        linears=tuple((weight.shape[0], weight.shape[1]) for weight in linears),
        rest=sum(p.numel() for p in model.parameters()) - sum(weight.numel() for weight in linears),
    )


def estimate(shape: Shape, settings: Settings) -> dict[str, dict[str, float]]:
    """Compute the bytes of what stays, of the parts of each phase, of what each phase adds, and of the peaks.

    The factors of activations were counted from the operations of transformers' Llama layers under bfloat16 autocast.
    `benchmarks/results/memory.md` compares them with measurements. The optimizer is `adamw` or `paged_adamw_8bit`. The
    pages of the latter are included.
    """
    n = shape.lora_parameters(settings.rank)
    own = BYTES[settings.adapter_dtype]
    blocks = 2 * len(shape.linears)
    stay: dict[str, float] = {
        "4-bit weights": sum(out * inputs for out, inputs in shape.linears) / 2,
        # One byte per 64 weights, one float32 per 256 of these bytes, and per layer code books of 16 and 256 float32.
        "their statistics": sum(out * inputs / 64 * (1 + 4 / 256) + 4 * (16 + 256) for out, inputs in shape.linears),
        "embeddings, head, norms, biases": 2 * shape.rest,
        "adapter": own * n,
        "optimizer state": 2 * own * n if settings.optimizer == "adamw" else 2 * n * (1 + 4 / 256),
    }
    if settings.rows:
        stay["rows"] = BYTES[settings.rows_dtype] * settings.rows * n
        stay["Gram matrices, norms, coefficients"] = 8 * blocks * (settings.rows**2 + 2 * settings.rows)
        if own < 4:
            stay["float32 copy of the adapter"] = 4 * n
    dequantised = 2 * max(out * inputs for out, inputs in shape.linears)
    saved = 20 * shape.hidden + 4 * shape.keys + 8 * shape.inner + 14 * settings.rank  # bytes per token and layer

    def head(tokens: int) -> float:
        return 12 * tokens * shape.vocabulary  # log-probabilities and two gradients, in float32

    def checkpoints(tokens: int) -> float:
        return 2 * tokens * shape.layers * shape.hidden

    def last_layer(tokens: int) -> float:
        return dequantised + tokens * (saved + 7 * shape.hidden)

    def checkpointed(tokens: int) -> float:
        # The peak is at the loss, or at the first layer, which is recomputed last, when all gradients exist.
        return max(checkpoints(tokens) + head(tokens), own * n + last_layer(tokens))

    gradients, length = own * n, settings.length
    parts = {
        "step: gradients": gradients,
        "step: checkpoints": checkpoints(length),
        "step: logits": head(length),
        "step: recomputing a layer": last_layer(length),
    }
    add = {"step": checkpointed(length), "optimizer": gradients}
    if settings.rows:
        group, tokens = shape.largest_group(settings.rank), settings.reference_batch * settings.reference_length
        # First the snapshot, which becomes the step. Then the correction of a group, and a tile of its rows if these
        # are not in float32. The new float32 copy of a bfloat16 adapter, its rounding and the old copy exist together.
        converted = 4 * tile(n) * (1 + 1 / settings.rows) if settings.rows_dtype != "float32" else 0
        parts["optimizer: snapshot"] = 4 * n
        parts["optimizer: correction"] = 4 * group + converted
        parts["optimizer: new float32 copy"] = 4 * n + 2 * group if own < 4 else 0
        parts["refresh: gradients"] = gradients
        parts["refresh: checkpoints"] = checkpoints(tokens)
        parts["refresh: logits"] = head(tokens)
        parts["refresh: recomputing a layer"] = last_layer(tokens)
        # One row of a group in float32, and two copies of a tile of it in float64.
        parts["refresh: normalising"] = 4 * group + 16 * tile(n)
        add["optimizer"] += parts["optimizer: snapshot"]
        add["optimizer"] += max(parts["optimizer: correction"], parts["optimizer: new float32 copy"])
        add["refresh"] = max(checkpointed(tokens), parts["refresh: normalising"])
    total = sum(stay.values())
    return {"stay": stay, "parts": parts, "add": add, "peaks": {phase: total + more for phase, more in add.items()}}


# Reports


def benchmark(
    config: PretrainedConfig, runs: list[Settings], device: str, repeats: int, steps: int = 3
) -> list[dict[str, Any]]:
    """Measure the memory of every run, then the times. Runs alternate, so that a slow minute affects all alike."""
    shape = inspect_shape(config)
    results = []
    for settings in runs:
        computed = {} if settings.directions else estimate(shape, settings)["peaks"]
        results.append({**asdict(settings), **measure(config, settings, device, steps), "computed_peaks": computed})
        _say(f"memory: {settings}")
    times: dict[Settings, list[dict[str, float]]] = {settings: [] for settings in runs}
    for settings in itertools.chain.from_iterable(itertools.repeat(runs, repeats)):
        times[settings].append(clock(config, settings, device))
        _say(f"time: {settings}")
    for settings, result in zip(runs, results, strict=True):
        result["times"] = times[settings]
    return results


def _say(text: str) -> None:
    print(text, flush=True)


def bytes_of_rows(result: dict[str, Any]) -> int:
    """Return the bytes of the rows: rows times LoRA parameters times bytes per element."""
    return result["rows"] * result["lora_parameters"] * BYTES[result["rows_dtype"]]


def label(settings: dict[str, Any]) -> str:
    """Return the name of a run's method, for tables."""
    if settings.get("directions"):
        return f"OGPSA, null space, {settings['directions']} directions {settings['rows_dtype']}"
    return f"OGPSA, {settings['rows']} rows {settings['rows_dtype']}" if settings["rows"] else "plain QLoRA"


def plain_of(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Find the plain run with the same adapter dtype and optimizer."""
    same = ("adapter_dtype", "optimizer")
    plain = (r for r in results if not r["rows"] and not r.get("directions"))
    return next((r for r in plain if all(r[key] == result[key] for key in same)), None)


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the table of all runs."""
    lines = [
        "| method | adapter | optimizer | peak, MiB: refresh | step | optimizer step | more than plain, MiB "
        "| of the rows' bytes | the step alone | tokens/s | ms a step | ms a refresh |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        peaks, plain, rows = result["peaks"], plain_of(result, results), bytes_of_rows(result)
        cells = [label(result), result["adapter_dtype"], result["optimizer"]]
        cells += [_mebibytes(peaks[phase]) if phase in peaks else "" for phase in ("refresh", "step", "optimizer")]
        if rows and plain is not None:
            more = _highest(peaks) - _highest(plain["peaks"])
            cells += [_mebibytes(more), f"{more / rows:.2f}", f"{(peaks['step'] - plain['peaks']['step']) / rows:.3f}"]
        else:
            cells += ["", "", ""]
        cells += [
            _spread([run["tokens_per_second"] for run in result["times"]]),
            _spread([1000 * run["seconds_step"] for run in result["times"]]),
            _spread([1000 * run["seconds_refresh"] for run in result["times"]]) if "refresh" in peaks else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def holders_markdown(results: list[dict[str, Any]]) -> str:
    """Return a table of what each function of this package holds at the peak of each phase."""
    lines = ["| method | adapter | optimizer | peak of | bytes for each LoRA parameter |", "|---|---|---|---|---|"]
    for result in results:
        for phase, holders in result.get("holders", {}).items():
            if phase != "build" and holders:
                count = result["lora_parameters"]
                held = ", ".join(f"`{owner}` {size / count:.2f}" for owner, size in holders.items())
                lines.append(
                    f"| {label(result)} | {result['adapter_dtype']} | {result['optimizer']} | {phase} | {held} |"
                )
    return "\n".join(lines)


def accuracy_markdown(results: list[dict[str, Any]]) -> str:
    """Return a table of computed peaks divided by measured ones."""
    lines = ["| method | adapter | optimizer | computed / measured: refresh | step | optimizer step |"]
    lines.append("|---|---|---|---|---|---|")
    for result in results:
        ratios = [
            f"{result['computed_peaks'][phase] / result['peaks'][phase]:.3f}"
            if phase in result["peaks"] and phase in result["computed_peaks"]
            else ""
            for phase in ("refresh", "step", "optimizer")
        ]
        lines.append(f"| {label(result)} | {result['adapter_dtype']} | {result['optimizer']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def estimate_markdown(estimates: dict[str, list[tuple[Settings, dict[str, Any]]]]) -> str:
    """Return a table of components, phases and peaks in MiB, with one column per shape and method."""
    columns = [(name, settings, parts) for name, own in estimates.items() for settings, parts in own]
    header = [f"{name}, {label(asdict(settings))}" for name, settings, _ in columns]
    lines = [f"| computed, not measured; MiB | {' | '.join(header)} |", f"|---|{'---|' * len(columns)}"]
    for kind, text in (("stay", "{}"), ("parts", "{}"), ("add", "{} adds at most"), ("peaks", "peak of {}")):
        for name in dict.fromkeys(itertools.chain.from_iterable(parts[kind] for _, _, parts in columns)):
            cells = [_mebibytes(parts[kind][name]) if name in parts[kind] else "" for _, _, parts in columns]
            lines.append(f"| {text.format(name)} | {' | '.join(cells)} |")
    highest = {id(parts): _highest(parts["peaks"]) for _, _, parts in columns}
    lines.append(f"| **peak** | {' | '.join(f'**{_mebibytes(highest[id(parts)])}**' for _, _, parts in columns)} |")
    cells = []
    for name, settings, parts in columns:
        plain = plain_of(asdict(settings), [{**asdict(other), **own} for other, own in estimates[name]])
        more = 0 if plain is None or not settings.rows else highest[id(parts)] - _highest(plain["peaks"])
        cells.append(f"{more / parts['stay']['rows']:.3f}" if more else "")
    lines.append(f"| more than plain, of the rows' bytes | {' | '.join(cells)} |")
    return "\n".join(lines)


def _highest(peaks: dict[str, float]) -> float:
    return max(size for phase, size in peaks.items() if phase != "build")


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("memory"), help="path without suffix")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 8], help="0 is plain QLoRA")
    parser.add_argument(
        "--directions", type=int, nargs="*", default=[], help="also measure activation subspaces of these sizes"
    )
    parser.add_argument("--rows-dtype", choices=BYTES, default="bfloat16")
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--length", type=int, default=1024, help="tokens of a training example (one per step)")
    parser.add_argument("--reference-length", type=int, default=512, help="tokens of a reference example")
    parser.add_argument("--reference-batch", type=int, default=1, help="examples in one reference pass")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per method (0: only memory)")
    parser.add_argument("--steps", type=int, default=3, help="steps while memory is measured")
    parser.add_argument("--estimate", action="store_true", help="compute the peaks of 7 B and 8 B instead")
    arguments = parser.parse_args()
    if arguments.estimate and arguments.directions:
        parser.error("--estimate computes no --directions: see python -m benchmarks.subspaces --sizes.")
    runs = [
        Settings(
            rows=rows,
            directions=directions,
            rows_dtype=arguments.rows_dtype,
            adapter_dtype=dtype,
            optimizer=optimizer,
            length=arguments.length,
            reference_length=arguments.reference_length,
            reference_batch=arguments.reference_batch,
        )
        for dtype, optimizer in itertools.product(arguments.adapter_dtype, arguments.optimizer)
        for rows, directions in [(rows, 0) for rows in arguments.rows] + [(0, own) for own in arguments.directions]
    ]
    report: dict[str, Any] = {"torch": torch.__version__, "bitsandbytes": bnb.__version__}
    if arguments.estimate:
        computed = {
            name: [(settings, estimate(inspect_shape(SHAPES[name]), settings)) for settings in runs]
            for name in ("qwen2.5-7b", "llama3.1-8b")
        }
        report["computed"] = {
            name: [{**asdict(settings), **parts} for settings, parts in own] for name, own in computed.items()
        }
        text = estimate_markdown(computed)
    else:
        machine = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
        results = benchmark(SHAPES[arguments.shape], runs, arguments.device, arguments.repeats, arguments.steps)
        report |= {"device": f"{arguments.device} {machine}", "shape": arguments.shape, "measured": results}
        text = "\n\n".join([markdown(results), holders_markdown(results), accuracy_markdown(results)])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _say(text)


if __name__ == "__main__":
    main()
