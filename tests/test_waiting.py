"""That a step on an accelerator waits for nothing: it reads no value back, and moves no host data to the device.

Tensors without storage stand in for those of an accelerator. Whatever reads one of their values raises an error, and
the code takes the paths that it takes on every device but a CPU. `test_gpu.py` checks the same on a real one.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from loops import LORA, parameters_of
from models import tiny_llama
from peft import get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.core import step
from peft_ogpsa.core.activation_subspace import ActivationSubspace
from peft_ogpsa.core.inputs import Input

ROWS = {"subspace": "gradients", "rows": 8}
SETTINGS = {
    "activations": {},
    "activations in bfloat16": {"rows_dtype": "bfloat16"},
    "cone": ROWS,
    "cone with a weight": {**ROWS, "reference_weight": 1.0},
    "cone on the gradient": {**ROWS, "projection": "gradient"},
    "cone over the model": {**ROWS, "scope": "model"},
    "bfloat16": {**ROWS, "rows_dtype": "bfloat16"},
    "int8": {**ROWS, "rows_dtype": "int8"},
    "orthogonal": {**ROWS, "constraint": "orthogonal"},
    "both": {"subspace": "both", "rows": 8},
    "none": {"subspace": "none"},
}


class Waited(AssertionError):
    pass


class NoHostData(TorchFunctionMode):
    """Refuses tensors made of Python's numbers on the device, also those that index it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == "meta":
            raise Waited("a tensor of Python's numbers")
        if name in ("__getitem__", "__setitem__") and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) or (isinstance(part, torch.Tensor) and not part.is_meta) for part in index):
                raise Waited("an index that is not on the device")
        return function(*args, **kwargs)


class NoBlockingCopies(TorchDispatchMode):
    """Refuses copies between the host and the device that the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = target = None
        if function is torch.ops.aten._to_copy.default:
            source, target, free = args[0].device, kwargs.get("device"), kwargs.get("non_blocking")
        elif function is torch.ops.aten.copy_.default:
            source, target, free = (
                args[1].device,
                args[0].device,
                kwargs.get("non_blocking", len(args) > 2 and args[2]),
            )
        if target is not None and torch.device(target).type != source.type and not free:
            raise Waited(f"a copy from {source} to {target}")
        return function(*args, **kwargs)


@pytest.fixture
def without_storage(monkeypatch):
    """Makes an OGPSA model without storage, with a subspace of each kind that its settings ask for."""
    monkeypatch.setattr(step, "full_precision", lambda device: nullcontext())  # there is no autocast for it

    def make(**settings):
        energies = torch.ones(4, dtype=torch.float64)
        with torch.device("meta"):
            model = get_peft_model(tiny_llama(), OGPSAConfig(**LORA, **settings))
        projector = model.projector
        config = projector.config
        if config.uses_activations:
            matrices = projector.targets.matrices()
            found = [
                Input(
                    (own.layer,), width := own.parameter.shape[1], energies, torch.zeros(width, 4, device="meta"), 8.0
                )
                for own in matrices
            ]
            dtype = torch.bfloat16 if config.rows_dtype == "bfloat16" else torch.float32
            projector._builder.hold(ActivationSubspace(matrices, found, dtype), config)
        if config.refreshes:
            refresher = projector._refresher
            refresher.prepare(config, 8)
            refresher.subspace.rows.sets = ["first"] * 4 + ["second"] * 4
            refresher.subspace._solve()
            refresher.fresh = [0, 1, 4]
            refresher.weights = {"first": 1.0, "second": 0.5}
        return model

    return make


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_waits_for_nothing(settings, without_storage):
    model = without_storage(**settings)
    parameters = parameters_of(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.projector.max_grad_norm = 1.0
    for _ in range(2):  # after a refresh, and between two
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with NoHostData(), NoBlockingCopies():
            optimizer.step()
    assert model.projector.steps == 2
    assert model.projector.diagnostics._steps == (2 if model.projector.config.constrains else 0)


@pytest.mark.parametrize("scope", ["module", "model"])
def test_a_step_in_which_a_parameter_has_no_gradient_waits_for_nothing(scope, without_storage):
    model = without_storage(**ROWS, projection="gradient", scope=scope, reference_weight=0.0)
    parameters = parameters_of(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in parameters[1:]:
        parameter.grad = torch.zeros_like(parameter)
    with NoHostData(), NoBlockingCopies():
        optimizer.step()
    assert parameters[0].grad is None
    assert model.projector.diagnostics._steps == 1


def test_low_precision_parameters_wait_for_nothing(without_storage):
    model = without_storage(**ROWS, reference_weight=1.0)
    parameters = parameters_of(model)
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)
    model.projector._refresher.subspace = None
    model.projector._refresher.prepare(model.projector.config, 8)
    model.projector._refresher.subspace.rows.sets = ["first"] * 8
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with NoHostData(), NoBlockingCopies():
        optimizer.step()
    assert model.projector._step.masters is not None


@pytest.mark.parametrize(
    "read",
    [
        lambda own: own.sum().item(),
        lambda own: float(own.sum()),
        lambda own: bool(own.any()),
        lambda own: own.tolist(),
        lambda own: own.cpu(),
        lambda own: own.nonzero(),
        lambda own: own[own > 0],
        lambda own: own[[0, 1]],
        lambda own: own[torch.tensor([0, 1])],
        lambda own: torch.tensor([1.0], device=own.device),
        lambda own: own + torch.ones(3).to(own.device),
        lambda own: own.copy_(torch.ones(3)),
    ],
)
def test_what_waits_is_found(read):
    own = torch.zeros(3, device="meta")
    with pytest.raises((Waited, RuntimeError, NotImplementedError)), NoHostData(), NoBlockingCopies():
        read(own)
