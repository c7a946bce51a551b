"""The random states of Python, NumPy and whatever accelerator there is; this machine's own are tested with the
reference passes.
"""

from __future__ import annotations

import random
import sys
import types
from contextlib import nullcontext

import numpy
import pytest
import torch
from loops import batch, loss_of, ogpsa_model, references

from peft_ogpsa.core.isolation import isolated_eval


class Device:
    """An accelerator's module with random states that count how often they were drawn from."""

    def __init__(self, count, initialized=True):
        self.states = [0] * count
        self._initialized = initialized

    def is_available(self):
        return True

    def is_initialized(self):
        return self._initialized

    def device_count(self):
        return len(self.states)

    def get_rng_state(self, device=0):
        return self.states[device]

    def set_rng_state(self, state, device=0):
        self.states[device] = state


def use(monkeypatch, kind, module):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: types.SimpleNamespace(type=kind))
    monkeypatch.setattr(torch, "get_device_module", lambda *_: module)
    monkeypatch.setattr(torch, kind, module, raising=False)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "npu", "mps"])
def test_random_states_are_put_back(monkeypatch, kind):
    module = Device(1 if kind == "mps" else 3)
    use(monkeypatch, kind, module)
    model = torch.nn.Linear(2, 2)
    before = torch.random.get_rng_state()
    with isolated_eval(model, gradients=True):
        torch.rand(3)
        module.states = [state + 7 for state in module.states]
    assert module.states == [0] * len(module.states)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("fails", [False, True])
def test_the_random_states_of_python_and_numpy_are_restored(fails):
    model = ogpsa_model()
    before, arrays = random.getstate(), numpy.random.get_state()[1:3]

    def loss(model, batch):
        random.random()
        numpy.random.rand()
        if fails:
            raise RuntimeError("no loss")
        return loss_of(model, batch)

    with pytest.raises(RuntimeError, match="no loss") if fails else nullcontext():
        model.projector.refresh(references(0), loss)
    assert random.getstate() == before
    after = numpy.random.get_state()[1:3]
    assert after[0].tolist() == arrays[0].tolist()
    assert after[1] == arrays[1]


def test_numpy_is_not_needed(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    with isolated_eval(torch.nn.Linear(2, 2)):
        pass
    assert "numpy" not in sys.modules


def test_an_accelerator_that_is_not_in_use_is_not_woken(monkeypatch):
    module = Device(2, initialized=False)
    module.get_rng_state = None  # which would initialize it
    use(monkeypatch, "cuda", module)
    with isolated_eval(torch.nn.Linear(2, 2)):
        pass


def test_compiled_code_does_not_run_in_a_reference_pass():
    runs = []
    torch._dynamo.reset()  # of the compilations of other tests, which count against a limit

    def backend(graph, inputs):
        return lambda *given: (runs.append(1), graph(*given))[1]

    model = ogpsa_model()
    compiled = torch.compile(model, backend=backend)
    loss_of(compiled, batch(0))
    before = len(runs)
    assert before > 0
    model.projector.refresh(references(0), lambda _, inputs: loss_of(compiled, inputs))
    assert len(runs) == before
    loss_of(compiled, batch(1))
    assert len(runs) == 2 * before


def test_4_bit_layers_on_a_cpu_are_never_in_evaluation_mode():
    # bitsandbytes repacks them for good then, on processors that have the instructions; the name is what tells them.
    class Linear4bit(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(Linear4bit(2, 2), torch.nn.Dropout()).train()
    with isolated_eval(model, gradients=True):
        assert [module.training for module in model] == [True, False]
    assert [module.training for module in model] == [True, True]
