# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Take thousands of steps and make hundreds of models in one process, and find what grows or stays behind."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import optimizer as torch_optimizer

from peft_ogpsa import FullParameterConfig, OGPSAConfig, attach
from peft_ogpsa.core.attachment import projector_of

from .runs import model

WARM_UP = 500
GROWTH = 0.01
"""How much more memory than after the warm-up is allowed, as a share of it."""
_SETTINGS: dict[str, Any] = {"rows": 8, "refresh_steps": 5, "reference_weight": 1.0}
_LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def soak(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Take `count` steps with both subspaces, then make and drop a model for every 25 steps.

    Args:
        folder: Not used.
        count: How many steps.
        seed: Seed of the batches.
    """
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    steps = train(count, seed)
    models = drop(max(4, count // 25))
    return {"failures": len(steps["failures"]) + len(models["failures"]), "training": steps, "models": models}


def train(count: int, seed: int = 0) -> dict[str, Any]:
    """Train one model, and compare what the process holds after the warm-up and at the end."""
    net = get_peft_model(model(), OGPSAConfig(subspace="both", **_SETTINGS, **_LORA))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    held: list[dict[str, int]] = []
    warm_up = min(WARM_UP, count // 5)
    every = max(1, (count - warm_up) // 9)
    refreshes = 0
    for step in range(count):
        while net.projector.due:
            refreshes += 1
            net.projector.refresh({"a": [_batch(generator)], "b": [_batch(generator)]}, _loss)
        _loss(net, _batch(generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= warm_up and (step - warm_up) % every == 0:
            held.append(holdings(net))
    held.append(holdings(net))
    return {"steps": count, "refreshes": refreshes, "failures": grown(held), "held": held}


def drop(count: int) -> dict[str, Any]:
    """Make models of four kinds, train each for two steps, and drop it. Nothing of it may stay behind."""
    kinds = [_adapter, _plain, _whole, _closed]
    for make in kinds:  # makes what is made once and kept, such as torch's own registries
        _trained(make)
    before, left = holdings(), 0
    for number in range(count):
        references = _trained(kinds[number % len(kinds)])
        gc.collect()
        left += sum(reference() is not None for reference in references)
    after = holdings()
    failures = [name for name in ("optimizer hooks", "threads", "files") if after[name] > before[name]]
    failures += ["models"] if left else []
    failures += ["objects"] if after["objects"] > before["objects"] * (1 + GROWTH) else []
    failures += ["memory"] if after["memory"] > before["memory"] * (1 + 3 * GROWTH) else []
    return {"models": count, "left": left, "failures": failures, "before": before, "after": after}


def holdings(net: torch.nn.Module | None = None) -> dict[str, int]:
    """Count what the process holds: memory in KiB, objects, hooks, threads and open files."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    held = {
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024,
        "objects": len(gc.get_objects()),
        "optimizer hooks": len(torch_optimizer._global_optimizer_pre_hooks)
        + len(torch_optimizer._global_optimizer_post_hooks),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
    }
    if net is not None:
        held["module hooks"] = sum(
            len(own._forward_hooks) + len(own._forward_pre_hooks) + len(own._backward_hooks) for own in net.modules()
        )
    return held


def grown(held: list[dict[str, int]]) -> list[str]:
    """Name what is larger at the end than at the first count. Memory and objects may vary by `GROWTH`."""
    first, last = held[0], held[-1]
    return [name for name in first if last[name] > first[name] * (1 + GROWTH * (name in ("memory", "objects")))]


def _batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    length = int(torch.randint(6, 20, (1,), generator=generator))
    ids = torch.randint(3, 259, (4, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def _loss(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return net(**batch).loss


def _trained(make: Any) -> list[weakref.ref]:
    """Build a model, train it for two steps, and return weak references to what is then dropped."""
    net = make()
    projector = projector_of(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        while projector.due:
            projector.refresh({"a": [_batch(generator)]}, _loss)
        _loss(net, _batch(generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = [net, projector, optimizer, next(net.parameters())]
    if make is _closed:
        net.unload()
    return [weakref.ref(item) for item in own]


def _adapter() -> PeftModel:
    return get_peft_model(model(), OGPSAConfig(subspace="both", **_SETTINGS, **_LORA))


def _closed() -> PeftModel:
    """Return the same model as `_adapter`. `_trained` also unloads this one."""
    return _adapter()


def _plain() -> PeftModel:
    net = get_peft_model(model(), LoraConfig(**_LORA))
    attach(net, OGPSAConfig(**_LORA))
    return net


def _whole() -> torch.nn.Module:
    net = model()
    attach(net, FullParameterConfig(rows=2))
    return net
