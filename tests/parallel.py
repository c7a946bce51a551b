"""One training loop on any number of processes: alone, under DDP, and under FSDP2."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from filelock import FileLock
from loops import batch, loss_of
from models import tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from peft_ogpsa import FullParameterConfig, OGPSAConfig, attach, projector_of
from peft_ogpsa.core import distributed
from peft_ogpsa.trainer import checkpoint

# What does not divide by four: shards of several sizes, and for the smallest rank of LoRA an empty one.
SHAPE = {"intermediate_size": 66}
LORA = {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def build(kind: str, layers: int = 2, **overrides: Any) -> torch.nn.Module:
    model = tiny_llama(num_hidden_layers=layers, **SHAPE)
    settings = {"subspace": "gradients", "reference_weight": 0.0, **overrides}
    if settings["subspace"] in ("gradients", "both"):
        settings = {"rows": 8, **settings}
    if settings["subspace"] != "activations" or settings["reference_weight"]:
        settings = {"refresh_steps": 2, **settings}
    if kind == "lora":
        return get_peft_model(model, OGPSAConfig(**{**LORA, **settings}))
    attach(model, FullParameterConfig(**settings))
    return model


def wrap(model: torch.nn.Module, how: str) -> torch.nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in list(model.modules()):
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def references(step: int) -> dict[str, list]:
    """Five examples and one: neither divides by the number of processes."""
    return {"first": [batch(1000 + step, 3), batch(1500 + step, 2)], "second": [batch(2000 + step, 1)]}


def mine(inputs: dict) -> dict:
    """This process's contiguous part of a batch."""
    size = len(inputs["input_ids"]) // distributed.count()
    return {name: value[distributed.rank() * size :][:size] for name, value in inputs.items()}


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters in training, assembled."""
    return {
        name: (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()).clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def sgd(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3)


def adamw(parameters: list) -> torch.optim.Optimizer:
    # With the usual eps Adam makes steps of full size of what is rounding.
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def train(
    model: torch.nn.Module,
    how: str,
    steps: range = range(4),
    optimizer_of: Callable = adamw,
    accumulation: int = 1,
    refresh: bool = True,
    resume: Path | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """Trains and tells of the last refresh's losses, every step's collectives, and the worst broken constraint.

    The constraint is measured on assembled parameters and rows, in float64, as the largest `R D / (|R| |D|)` of any
    block, or `|R D|` where it is orthogonal.
    """
    projector = projector_of(model)
    if resume is not None:
        model.load_state_dict(load_file(resume / "parameters.safetensors"), strict=False)
    wrapped = wrap(model, how)
    if resume is not None:
        projector.load_state_dict(checkpoint.load(resume))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = optimizer_of(trained)
    told: dict[str, Any] = {"collectives": [], "worst": 0.0}
    for step in steps:
        if refresh and projector.due:
            told["losses"] = projector.refresh(references(step), loss_of, model)
            assert all(p.grad is None for p in trained), "reference gradients were left behind"
        for micro in range(accumulation):
            last = micro == accumulation - 1
            if how == "fsdp2":
                model.set_requires_gradient_sync(last)
            with nullcontext() if last or how != "ddp" else wrapped.no_sync():
                (loss_of(wrapped, mine(batch(10 * step + micro, 8))) / accumulation).backward()
        was = whole(model)
        with CommDebugMode() as debug:
            optimizer.step()
        told["collectives"].append(debug.get_total_counts())
        optimizer.zero_grad()
        if projector.subspace is not None and projector.enabled and bound(projector.config):
            told["worst"] = max(told["worst"], violation(projector, was, whole(model)))
    told["parameters"] = whole(model)
    told["figures"] = projector.diagnostics.collect()
    if projector.subspace is not None:
        subspace = projector.subspace
        told["small"] = {"norms": subspace.rows.norms, "gram": subspace.rows.gram, "coefficients": subspace.start}
    if save is not None:
        saved = projector.state_dict()
        if distributed.rank() == 0:
            checkpoint.save(save, saved)
            save_file(told["parameters"], save / "parameters.safetensors")
        if dist.is_initialized():
            dist.barrier()  # nobody reads the files before they are complete
    return told


def bound(config: Any) -> bool:
    return config.constrains and config.projection == "update"


def violation(projector: Any, was: dict, now: dict) -> float:
    saved = projector.state_dict()["tensors"]  # gathered, in the first process
    scope = projector.config.scope
    products: dict[str, Any] = {}
    squares: dict[str, Any] = {}
    for key, rows in saved.items():
        name = key.removeprefix("rows.")
        if name == key:
            continue
        block = {"tensor": name, "module": name.rpartition(".")[0], "model": ""}[scope]
        (own,) = [full for full in now if full.endswith(name)]
        change = (now[own] - was[own]).flatten().double()
        products[block] = products.get(block, 0) + rows.flatten(1).double() @ change
        squares[block] = squares.get(block, 0) + change.square().sum()
    worst = 0.0
    for block, own in products.items():
        relative = own / squares[block].sqrt().clamp(min=1e-30)
        worst = max(worst, float((relative if projector.config.constraint == "cone" else relative.abs()).max()))
    return worst


def common_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of this session of tests, the same for all workers of pytest-xdist."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def spawn(work: Callable, count: int, folder: Path) -> list[Any]:
    """Runs `work(folder)` in so many processes and returns what each of them returned.

    In a folder that workers of pytest-xdist share, the first one runs it, and the others wait for the results.
    """
    results = [folder / f"{work.__name__}.{rank}.pt" for rank in range(count)]
    # More threads than cores make tiny models wait for one another.
    with FileLock(folder / f"{work.__name__}.lock"), patch.dict(os.environ, OMP_NUM_THREADS="1"):
        if not all(path.is_file() for path in results):
            torch.multiprocessing.spawn(_start, (work, results, folder), nprocs=1)
    return [torch.load(path, weights_only=True) for path in results]


def _start(_: int, work: Callable, results: list[Path], folder: Path) -> None:
    """Runs in one new process, which imports everything, and then forks, so that this is done once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gc.freeze()  # what is imported stays
    how = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(_process, (work, results, folder, port), len(results), start_method=how)


def _process(rank: int, work: Callable, results: list[Path], folder: Path, port: int) -> None:
    count = len(results)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        torch.save(work(folder), results[rank])
    finally:
        dist.destroy_process_group()
