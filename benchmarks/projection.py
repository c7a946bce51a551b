# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare the time of one projection with a copy of as many bytes as it must move, and measure how it scales.

    python benchmarks/projection.py --output benchmarks/results/projection  # CPU, SmolLM2's shape
    python benchmarks/projection.py --shape llama3.1-8b --rows 8 --output benchmarks/results/projection_8b  # GPU
    python benchmarks/projection.py --subspace activations --rows 256 --output projection_null_space

With `--kernels`, every case is measured with plain torch and then with the Triton kernels
(`peft_ogpsa/core/kernels.py`). With `--subspace activations`, `--rows` is the number of directions per input.

The script makes only the adapter, without weights of the base, and random gradients. A projection must read the rows
twice, for the products and for the correction, since every coefficient depends on all products. It must also copy the
parameters before the step, read both, and write the correction.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from memory import BYTES, SHAPES, now
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.core.activation_subspace import ActivationSubspace
from peft_ogpsa.core.inputs import Input

STEPS, WARM_UP = 12, 3
PARAMETER_PASSES = 6  # float32: the copy reads and writes, the difference reads two, the correction reads and writes


SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Layers that share an input."""


def adapter(
    shape: str, rank: int, layers: int | None, rows: int, rows_dtype: str, device: str, subspace: str = "gradients"
) -> PeftModel:
    """Build an OGPSA adapter with random gradients or directions, on a model that has a shape but no weights."""
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers = layers or config.num_hidden_layers
    lora = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "rows_dtype": rows_dtype}
    if subspace == "activations":
        settings = OGPSAConfig(subspace_rank=rows, reference_weight=0, **lora)
    else:
        settings = OGPSAConfig(subspace="gradients", rows=rows, rows_from="batch", refresh_steps=10**9, **lora)
    with torch.device("meta"):
        model: Any = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                values = 0.01 * torch.randn(parameter.shape, generator=generator, device=device)
                module._parameters[name] = nn.Parameter(values)
    if subspace == "activations":
        hold_directions(model, rows, getattr(torch, rows_dtype), generator)
        return model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = [torch.randn(parameter.shape, generator=generator, device=device) for parameter in trained]

    def loss(_: Any, batch: torch.Tensor) -> torch.Tensor:
        # The rows have a part in common, as reference gradients do.
        parts = zip(trained, common, strict=True)
        return sum((p * (c + 2 * torch.randn(c.shape, generator=generator, device=device))).sum() for p, c in parts)

    model.projector.refresh({"references": [torch.zeros(1)] * rows}, loss)
    return model


def hold_directions(model: PeftModel, count: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give the projector random orthonormal directions for each input, as if it had processed references."""
    matrices = model.projector.targets.matrices()
    layers: dict[tuple[str, str], list[str]] = {}
    widths: dict[tuple[str, str], int] = {}
    for matrix in matrices:
        parent, _, name = matrix.layer.rpartition(".")
        key = parent, SHARED.get(name, name)
        layers.setdefault(key, []).append(matrix.layer)
        widths[key] = matrix.parameter.shape[1]
    found = []
    for key, own in layers.items():
        k = min(count, widths[key] // 2)
        start = torch.randn(widths[key], k, generator=generator, device=generator.device)
        energies = torch.ones(k, dtype=torch.float64)
        found.append(Input(tuple(own), widths[key], energies, torch.linalg.qr(start).Q, 2.0 * k))
    subspace = ActivationSubspace(matrices, found, dtype)
    subspace.enter()
    model.projector._builder.hold(subspace, model.projector.config)


def step_seconds(model: PeftModel, device: str) -> list[float]:
    """Measure the seconds of the projection in each of several steps with random gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    stopwatch = model.projector.diagnostics.stopwatch
    seconds = []
    for _ in range(WARM_UP + STEPS):
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        before = stopwatch.totals().get("projection", 0.0)
        optimizer.step()
        seconds.append(stopwatch.totals()["projection"] - before)
    return seconds[WARM_UP:]


def kernels(model: PeftModel) -> int | None:
    """Count the kernels that the projection launches in one optimizer step. Return `None` on a CPU."""
    if not torch.cuda.is_available():
        return None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, foreach=True)
    counts = []
    for enabled in (True, False):
        model.projector.enabled = enabled
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        counts.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))
    model.projector.enabled = True
    return counts[0] - counts[1]


def bandwidth(device: str) -> float:
    """Measure the bytes per second that a large copy reads and writes together, the best of several."""
    source = torch.empty(2**26, device=device).normal_()
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(8):
        start = now(device)
        target.copy_(source)
        best = max(best, 2 * source.numel() * source.element_size() / (now(device) - start))
    return best


def measured(model: PeftModel, path: str, device: str) -> dict[str, Any]:
    """Measure times and kernels of the projection, with plain torch (`path="torch"`) or Triton (`"triton"`)."""
    model.projector.kernels = path == "triton"
    seconds = step_seconds(model, device)
    if model.projector.kernels and model.projector._step.last_launcher is None:
        raise RuntimeError("The Triton kernels do not apply here: install triton, and ask for at most 64 rows.")
    figures = {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {"path": path, **figures, "kernels": kernels(model)}


def bytes_to_move(model: PeftModel, parameters: int, rows: int, width: int) -> float:
    """Count the bytes that a projection must move: rows or directions twice, and the projected parameters."""
    directions = model.projector.activations
    if directions is None:
        return parameters * (2 * rows * width + 4 * PARAMETER_PASSES)
    own = sum(matrix.parameter.numel() for matrix in directions.matrices)
    return 2 * directions.bytes() + own * 4 * PARAMETER_PASSES


def benchmark(
    shape: str,
    rows: int,
    rows_dtype: str,
    rank: int,
    device: str,
    paths: tuple[str, ...],
    subspace: str = "gradients",
    first_only: bool = False,
) -> list[dict[str, Any]]:
    """Measure the case as asked, and with rows, rank and layers halved and doubled, each with all paths."""
    layers = SHAPES[shape].num_hidden_layers
    cases = [
        ("as asked", rows, rank, layers),
        ("half the rows", rows // 2, rank, layers),
        ("twice the rows", 2 * rows, rank, layers),
        ("half the rank", rows, rank // 2, layers),
        ("twice the rank", rows, 2 * rank, layers),
        ("half the layers", rows, rank, layers // 2),
        ("twice the layers", rows, rank, 2 * layers),
    ]
    results = []
    for name, own_rows, own_rank, own_layers in tqdm(cases[:1] if first_only else cases, "Cases"):
        model = adapter(shape, own_rank, own_layers, own_rows, rows_dtype, device, subspace)
        speed = bandwidth(device)  # measured for each case, because the machine may do other things too
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        must_move = bytes_to_move(model, count, own_rows, BYTES[rows_dtype])
        for path in paths:
            if path == "triton" and own_rows > 64:  # more than the kernels take
                continue
            own = measured(model, path, device)
            results.append(
                {
                    "case": name,
                    "rows": own_rows,
                    "rank": own_rank,
                    "layers": own_layers,
                    "lora_parameters": count,
                    "bytes": must_move,
                    "bandwidth": speed,
                    "of_the_copy": own["seconds"] / (must_move / speed),
                    **own,
                }
            )
        del model
    return results


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table of the cases."""
    lines = [
        "| case | by | rows | rank | layers | milliseconds (least to most) | of the first | of a copy | kernels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for own in results:
        milliseconds = f"{1e3 * own['seconds']:.1f} ({1e3 * own['least']:.1f} to {1e3 * own['most']:.1f})"
        first = next(other for other in results if other["path"] == own["path"])
        share = own["seconds"] / first["seconds"]
        lines.append(
            f"| {own['case']} | {own['path']} | {own['rows']} | {own['rank']} | {own['layers']} | {milliseconds} | "
            f"{share:.2f} | {own['of_the_copy']:.2f} | {own['kernels'] or ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Name of the .json file, without its ending.")
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=OGPSAConfig().rows)
    parser.add_argument("--rows-dtype", default="float32", choices=BYTES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--subspace", default="gradients", choices=("gradients", "activations"))
    parser.add_argument("--first-only", action="store_true", help="Leave out the halved and doubled cases.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", action="store_true", help="Measure the Triton kernels as well; needs CUDA.")
    arguments = parser.parse_args()
    if arguments.kernels and arguments.device != "cuda":
        parser.error(f"--kernels needs --device cuda, not {arguments.device!r}.")
    if arguments.kernels and arguments.subspace == "activations":
        parser.error("--kernels are of the gradient subspace.")
    paths = ("torch", "triton") if arguments.kernels else ("torch",)
    results = benchmark(
        arguments.shape,
        arguments.rows,
        arguments.rows_dtype,
        arguments.rank,
        arguments.device,
        paths,
        arguments.subspace,
        arguments.first_only,
    )
    report = {
        "arguments": {**vars(arguments), "output": arguments.output.name},
        "machine": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "cases": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
