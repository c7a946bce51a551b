"""What can only be seen on a GPU. Each test runs on the CPU, too, so that its own code is known to work."""

from __future__ import annotations

import contextlib
import gc

import loops
import pytest
import torch
from loops import LORA, batch, loss_of, parameters_of
from models import tiny_llama
from peft import get_peft_model

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.core.layout import Blocks
from peft_ogpsa.core.rows import Rows

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
each_device = pytest.mark.parametrize("device", DEVICES)

ROWS = {"subspace": "gradients", "rows": 8, "refresh_steps": 2, "reference_weight": 0.0}
SETTINGS = {
    "activations": {"subspace_rank": 8},
    "activations in bfloat16": {"subspace_rank": 8, "rows_dtype": "bfloat16"},
    "cone": ROWS,
    "cone with a weight": {**ROWS, "reference_weight": 1.0},
    "cone on the gradient": {**ROWS, "projection": "gradient"},
    "int8": {**ROWS, "rows_dtype": "int8"},
    "orthogonal": {**ROWS, "constraint": "orthogonal"},
    "both": {"subspace": "both", "subspace_rank": 8, "rows": 8, "refresh_steps": 2, "reference_weight": 0.0},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def on(device: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: own.to(device) for name, own in inputs.items()}


def model_on(device: str, **settings):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), OGPSAConfig(**LORA, **settings)).to(device)


def refresh(model, device: str, number: int = 0) -> None:
    sets = loops.references(number)
    while model.projector.due:
        model.projector.refresh({name: [on(device, own) for own in sets[name]] for name in sets}, loss_of)


def train(model, device: str, steps: int = 4, optimizer=None) -> None:
    optimizer = optimizer or torch.optim.AdamW(parameters_of(model), lr=1e-2, foreach=True)
    for number in range(steps):
        refresh(model, device, number)
        loss_of(model, on(device, batch(number))).backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().cpu() for parameter in parameters_of(model)])


def largest_leak(projector) -> float:
    """The largest `|A U| / |A|` of any input."""
    leaks = []
    for stack in projector.activations._stacks:
        matrices = stack.copies(stack.parameters())
        leaks.append((stack.along(matrices).flatten(1).norm(dim=1) / matrices.flatten(1).norm(dim=1)).max())
    return float(torch.stack(leaks).max())


def tensors_of(value, seen: set[int]):
    """All tensors that an object of this package holds, at any depth."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for own in value.values():
            yield from tensors_of(own, seen)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from tensors_of(own, seen)
    elif type(value).__module__.startswith("peft_ogpsa.core"):
        yield from tensors_of(vars(value) if hasattr(value, "__dict__") else None, seen)


# Placement


@each_device
@each_setting
def test_what_a_step_uses_is_on_the_device(settings, device):
    model = model_on(device, **settings)
    train(model, device, steps=2)
    projector = model.projector
    found = []
    if projector.subspace is not None:
        rows = projector.subspace.rows
        found += [*rows.stack, *rows.scales, rows.gram, rows.norms, *projector.subspace.directions]
        found += [projector.subspace.start, projector.subspace.active_gram, *projector.subspace._slots.values()]
        assert projector.subspace.blocks.device.type == device
    if projector.activations is not None:
        found += list(tensors_of([projector.activations._stacks, projector.activations._squares], set()))
        assert projector.activations.device.type == device
    assert len(found) > 5
    assert {own.device.type for own in found} == {device}


@each_device
@each_setting
def test_a_saved_state_goes_back_to_the_device(settings, device):
    first = model_on(device, **settings)
    train(first, device, steps=2)
    state = first.projector.state_dict()
    state["tensors"] = {name: own.cpu().clone() for name, own in state["tensors"].items()}
    second = model_on(device, **settings)
    second.load_state_dict(first.state_dict())
    second.projector.load_state_dict(state)
    for model in (first, second):
        train(model, device, steps=2)
    assert torch.equal(flat(first), flat(second))


@each_device
def test_rows_in_host_memory_are_emptied_after_the_copies_of_the_step(device):
    parameter = torch.zeros(2000, 1000, device=device)
    rows = Rows(Blocks({"a": parameter}, {"a": "a"}, "tensor"), 2, on_host=True)
    for part in rows.stack:
        part.fill_(1)
    assert rows.stack[0].is_pinned() == (device == "cuda")
    copies = [own + 0 for own in rows.near()]
    if device == "cuda":
        del copies  # the memory for those that follow
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)  # about half a second, in which the copies wait
        copies = [own + 0 for own in rows.near()]
    rows.open([0])
    assert all(bool(own.all()) for own in copies)
    assert [bool(row.any()) for row in rows.stack[0][0]] == [False, True]


@each_device
@pytest.mark.parametrize("scope", ["module", "model"])
def test_sums_over_pieces_are_the_same_to_the_bit(scope, device):
    """Processes under DDP compute the coefficients of their steps from them, each for itself."""
    parameters = {str(i): torch.zeros(2 + i % 3, device=device) for i in range(3000)}
    layout = Blocks(parameters, {name: str(int(name) % 5) for name in parameters}, scope)
    pieces = [torch.randn(own.pieces, 4, device=device) for own in layout.groups]
    first = layout.reduce(pieces)
    assert len(first) == layout.count == {"module": 5, "model": 1}[scope]
    assert all(torch.equal(layout.reduce(pieces), first) for _ in range(100))


# The constraint


@each_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_stays_in_the_null_space(dtype, device):
    model = model_on(device, subspace_rank=8, rows_dtype=dtype)
    train(model, device)
    assert largest_leak(model.projector) < 1e-6


@each_device
@pytest.mark.parametrize("constraint", ["cone", "orthogonal"])
def test_no_step_leaves_the_constraint(constraint, device, monkeypatch):
    model = model_on(device, **{**ROWS, "constraint": constraint})
    monkeypatch.setattr(loops, "batch", lambda *a, own=loops.batch, **k: on(device, own(*a, **k)))
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    assert max(loops.step_violations(model, optimizer)) <= 1e-5


@each_device
@each_setting
def test_a_training_is_that_of_the_cpu(settings, device):
    here, there = model_on("cpu", **settings), model_on(device, **settings)
    start = flat(here)
    optimizers = [torch.optim.SGD(parameters_of(model), lr=0.5) for model in (here, there)]
    train(here, "cpu", optimizer=optimizers[0])
    train(there, device, optimizer=optimizers[1])
    # float32 products round otherwise; int8 may round a stored value to a neighbor.
    moved = (flat(here) - start).norm()
    assert moved > 0
    assert (flat(here) - flat(there)).norm() <= (1e-2 if settings.get("rows_dtype") else 1e-3) * moved


# Waiting


@contextlib.contextmanager
def no_waiting(device: str):
    """Whatever waits for the device raises an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_device
@each_setting
@pytest.mark.parametrize("kernels", [False, True])
def test_a_step_waits_for_nothing(kernels, settings, device):
    if kernels and device == "cuda":
        pytest.importorskip("triton")
    model = model_on(device, **settings)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2, foreach=True)
    model.projector.kernels = kernels and device == "cuda"
    model.projector.max_grad_norm = 1.0
    train(model, device, steps=2, optimizer=optimizer)  # makes what is made once, the moments too
    for number in range(2, 6):
        refresh(model, device, number)
        loss_of(model, on(device, batch(number))).backward()
        with no_waiting(device):
            optimizer.step()
        optimizer.zero_grad()
    assert model.projector.steps == 6
    assert model.projector.diagnostics.collect()


@each_device
def test_figures_are_there_when_they_are_asked_for(device):
    model = model_on(device, **SETTINGS["both"])
    train(model, device)
    figures = model.projector.diagnostics.collect()
    assert {"ogpsa/removed", "ogpsa/seconds_projection", "ogpsa/seconds_build", "ogpsa/cosine/first"} <= figures.keys()
    assert figures["ogpsa/seconds_projection"] > 0


# CUDA graphs


def replayed(device: str, work, start) -> None:
    """Records some work as a CUDA graph and replays it once from the start; on a CPU it just does it."""
    if device == "cpu":
        start()
        work()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            start()
            work()
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    start()
    with torch.cuda.graph(graph):
        work()
    start()
    graph.replay()
    torch.cuda.synchronize()


@each_device
def test_the_null_space_step_can_be_a_graph(device):
    model = model_on(device, subspace_rank=8)
    refresh(model, device)
    subspace, parameters = model.projector.activations, parameters_of(model)
    before = [parameter.detach().clone() for parameter in parameters]
    moves = [torch.randn_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def start():
        torch._foreach_copy_(parameters, before)

    @torch.no_grad()
    def work():
        subspace.remember()
        torch._foreach_add_(parameters, moves)
        subspace.project_step()

    start()
    work()
    expected = flat(model)
    replayed(device, work, start)
    assert torch.equal(flat(model), expected)
    assert largest_leak(model.projector) < 1e-6
    assert not torch.equal(expected, torch.cat([own.flatten().cpu() for own in before]))


@each_device
@pytest.mark.parametrize("constraint", ["cone", "orthogonal"])
def test_the_gradients_step_can_be_a_graph(constraint, device):
    model = model_on(device, **{**ROWS, "constraint": constraint})
    train(model, device, steps=2)
    refresh(model, device)
    subspace = model.projector.subspace
    vectors = [torch.randn_like(part) for part in subspace.blocks.stack()]
    first = subspace.start.clone()
    found: list[torch.Tensor] = []

    def start():
        subspace.start = first

    @torch.no_grad()
    def work():
        found[:] = [
            own
            for group in subspace.corrections(subspace.coefficients(subspace.directed(vectors))[0])
            for own in group
        ]

    start()
    work()
    expected = [own.clone() for own in found]
    replayed(device, work, start)
    assert any(own.any() for own in expected)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


# The Triton kernels, of which `test_kernels.py` tests each


@each_device
@pytest.mark.parametrize("rows_dtype", ["float32", "bfloat16"])
def test_kernels_train_as_torch_does(rows_dtype, device):
    trained = []
    for kernels in (False, True):
        model = model_on(device, **{**ROWS, "rows_dtype": rows_dtype})
        model.projector.kernels = kernels
        train(model, device, optimizer=torch.optim.SGD(parameters_of(model), lr=0.5))
        trained.append(flat(model))
    used = model.projector._step.last_launcher is not None
    assert used == (device == "cuda")
    start = flat(model_on(device, **ROWS))
    assert (trained[0] - trained[1]).norm() <= 1e-4 * (trained[0] - start).norm()
