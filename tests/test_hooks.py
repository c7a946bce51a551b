"""Optimizer steps within optimizer steps, and the order of hooks: the constraint holds for the outermost change."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from loops import LORA, batch, loss_of, ogpsa_model, parameters_of, references, step_violations
from models import tiny_llama
from peft import get_peft_model

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.core import hooks

TOLERANCE = 1e-5


def random_adapter(**overrides):
    """With B at random, so that steps of A are large enough for float32 to hold exactly."""
    model = ogpsa_model(**overrides)
    for parameter in parameters_of(model):
        torch.nn.init.normal_(parameter.data, std=0.1)
    return model


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer and every second time goes half of the way back to the slow weights."""

    def __init__(self, inner):
        self.inner, self.count = inner, 0
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Pulled(torch.optim.AdamW):
    """A subclass that changes the parameters after `super().step()`."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)
        return loss


class Perturbed(torch.optim.Optimizer):
    """The shape of SAM: the closure's gradient is that of a perturbed place."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    @torch.no_grad()
    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=0.01)
        with torch.enable_grad():
            closure()
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        self.inner.step()


def test_a_wrapper_around_an_optimizer():
    model = random_adapter(refresh_steps=2)
    optimizer = Lookahead(torch.optim.AdamW(parameters_of(model), lr=1e-2))
    assert max(step_violations(model, optimizer, steps=6)) <= TOLERANCE
    assert model.projector.steps == 6
    assert model.projector.diagnostics.refreshes == 4  # before the steps 1, 2, 4 and 6


def test_a_subclass_that_calls_the_step_of_its_parent():
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # from now on torch has hooks around both classes' steps
    model = random_adapter(refresh_steps=2)
    assert max(step_violations(model, Pulled(parameters_of(model), lr=1e-2), steps=6)) <= TOLERANCE
    assert model.projector.steps == 6


def test_which_optimizers_the_process_has_made_does_not_matter():
    """torch has hooks around the steps of a class only after its first optimizer."""

    class Parent(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 1e-2})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad.sign(), alpha=1e-2)

    class Child(Parent):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)

    ends, removed = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), OGPSAConfig(subspace_rank=15, reference_weight=0.0, **LORA))
        optimizer = Child(parameters_of(model))
        model.projector.refresh(references(0), loss_of)
        assert max(entry.gain for entry in model.projector.activations.inputs) > 2
        for number in range(4):
            loss_of(model, batch(number)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in parameters_of(model)])
        removed.append({k: v for k, v in model.projector.diagnostics.collect().items() if "removed" in k})
        Parent([torch.nn.Parameter(torch.zeros(1))])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert removed[0] == removed[1]
    assert min(removed[0].values()) > 0.1


def test_a_first_argument_that_is_no_closure():
    class Scaled(torch.optim.SGD):
        @torch.no_grad()
        def step(self, norm=1.0):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] / norm)

    moved = []
    for arguments in ((), (1.0,)):
        model = random_adapter(subspace="none", refresh_steps=5, reference_weight=1.0)
        model.projector.refresh(references(0), loss_of)
        before = [p.detach().clone() for p in parameters_of(model)]
        for p in parameters_of(model):
            p.grad = torch.zeros_like(p)
        Scaled(parameters_of(model), lr=0.1).step(*arguments)
        moved.append([p.detach() - old for p, old in zip(parameters_of(model), before, strict=True)])
    assert all(change.any() for change in moved[0])
    torch.testing.assert_close(moved[0], moved[1])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_step_that_passes_twice(weight):
    model = random_adapter(reference_weight=weight)
    optimizer = Perturbed(torch.optim.AdamW(parameters_of(model), lr=1e-2))

    def step():
        def closure():
            optimizer.zero_grad()
            loss_of(model, batch(3)).backward()

        optimizer.step(closure)

    assert max(step_violations(model, optimizer, step=step)) <= TOLERANCE
    assert model.projector.steps == 4


def test_an_outer_optimizer_of_two_inner_ones():
    # Each of the inner ones holds a part of the adapter, which by itself would be refused.
    class Both(torch.optim.Optimizer):
        def __init__(self, parts):
            self.parts = parts
            super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})

        def step(self, closure=None):
            for part in self.parts:
                part.step()

    model = random_adapter()
    own = parameters_of(model)
    optimizer = Both([torch.optim.AdamW(own[::2], lr=1e-2), torch.optim.SGD(own[1::2], lr=1.0)])
    assert max(step_violations(model, optimizer)) <= TOLERANCE


class Failing(torch.optim.AdamW):
    fail = False

    def step(self, closure=None):
        if self.fail:
            self.fail = False
            raise KeyboardInterrupt
        return super().step(closure)


@pytest.mark.parametrize("outer", [lambda optimizer: optimizer, Lookahead], ids=["alone", "wrapped"])
def test_a_step_that_raises_does_not_end_the_projection(outer):
    model = random_adapter()
    inner = Failing(parameters_of(model), lr=1e-2)
    optimizer = outer(inner)
    model.projector.refresh(references(0), loss_of)
    loss_of(model, batch(0)).backward()
    inner.fail = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert model.projector.steps == 0
    assert max(step_violations(model, optimizer)) <= TOLERANCE
    assert model.projector.steps == 4


def test_an_inner_step_that_raises_and_is_caught():
    class Patient(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__([p for group in inner.param_groups for p in group["params"]], {})

        def step(self, closure=None):
            self.inner.fail = True
            try:
                self.inner.step()
            except KeyboardInterrupt:
                self.inner.step()

    model = random_adapter()
    optimizer = Patient(Failing(parameters_of(model), lr=1e-2))
    assert max(step_violations(model, optimizer)) <= TOLERANCE
    assert model.projector.steps == 4


@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_the_optimizers_own_post_hooks_see_the_projected_weights(when):
    model = random_adapter()
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    average = []

    def look(*_):
        average[:] = [p.detach().clone() for p in parameters_of(model)]

    if when == "before the first step":
        optimizer.register_step_post_hook(look)
    for number in range(3):
        if model.projector.due:
            model.projector.refresh(references(number), loss_of)
        loss_of(model, batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 0 and when == "after it":
            optimizer.register_step_post_hook(look)
    assert model.projector.diagnostics.collect()["ogpsa/removed"] > 0.01
    assert all(torch.equal(seen, p) for seen, p in zip(average, parameters_of(model), strict=True))


def test_the_optimizers_own_pre_hooks_see_the_training_gradient_alone():
    lengths = []

    def look(optimizer, *_):
        lengths.append(torch.nn.utils.get_total_norm([p.grad for p in optimizer.param_groups[0]["params"]]))

    model = random_adapter(reference_weight=5.0)
    optimizer = torch.optim.SGD(parameters_of(model), lr=1e-3)
    for number in range(2):
        while model.projector.due:
            model.projector.refresh(references(number), loss_of)
        loss_of(model, batch(number)).backward()
        alone = torch.nn.utils.get_total_norm([p.grad for p in parameters_of(model)])
        handle = optimizer.register_step_pre_hook(look)
        optimizer.step()
        handle.remove()
        assert lengths.pop() == alone
        after = torch.nn.utils.get_total_norm([p.grad for p in parameters_of(model)])
        assert after > 1.1 * alone  # the reference gradient came later
        optimizer.zero_grad()


def test_every_closure_of_a_step_gets_the_reference_gradient():
    model = random_adapter(reference_weight=2.0, rows_from="batch").double()
    optimizer = torch.optim.LBFGS(parameters_of(model), lr=0.1, max_iter=3)
    seen = []

    def closure():
        seen.append([p.grad.clone() for p in parameters_of(model) if p.grad is not None])
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        plain.append([p.grad.clone() for p in parameters_of(model)])
        return loss

    plain = []
    model.projector.refresh({"set": [batch(1)]}, loss_of)
    start = parameters_of(model)
    added = torch.autograd.grad(loss_of(model, batch(1)), start)
    optimizer.step(closure)
    got = seen[1:]  # what the optimizer was given for the first passes
    assert len(got) >= 2
    for gradients, own in zip(got, plain, strict=False):
        for g, p, r in zip(gradients, own, added, strict=True):
            torch.testing.assert_close(g, p + 2.0 * r, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("closure", [None, lambda: None])
def test_a_step_with_a_rate_of_0_gets_the_reference_gradient_as_others_do(closure):
    model = random_adapter(subspace="none", refresh_steps=5, reference_weight=1.0)
    model.projector.refresh(references(0), loss_of)
    optimizer = torch.optim.SGD(parameters_of(model), lr=0.0)
    got = []
    for _ in range(2):
        for p in parameters_of(model):
            p.grad = torch.zeros_like(p)
        optimizer.step(closure)
        got.append(any(p.grad.any() for p in parameters_of(model)))
    assert got == [True, False]


def test_nothing_is_kept_alive():
    model = random_adapter()
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    list(step_violations(model, optimizer, steps=2))
    gone = [weakref.ref(thing) for thing in (model, model.projector, optimizer)]
    del model, optimizer
    gc.collect()
    assert all(thing() is None for thing in gone)
    assert not hooks._running


def test_a_step_that_raises_leaves_nothing_to_the_next_one():
    ends = []
    for raises in (True, False):
        torch.manual_seed(0)
        model = random_adapter()
        optimizer = Failing(parameters_of(model), lr=1e-2)
        model.projector.refresh(references(0), loss_of)
        loss_of(model, batch(0)).backward()
        if raises:
            optimizer.fail = True
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        model.projector.enabled = False
        optimizer.step()
        ends.append([p.detach().clone() for p in parameters_of(model)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_the_watchers_are_walked_through_and_added_to_under_a_lock(monkeypatch):
    # Without it, a projector that another thread makes meanwhile ends the walk with an error.
    class Locked(weakref.WeakSet):
        def __iter__(self):
            assert hooks._lock.locked()
            return super().__iter__()

        def add(self, item):
            assert hooks._lock.locked()
            super().add(item)

        def discard(self, item):
            assert hooks._lock.locked()
            super().discard(item)

    monkeypatch.setattr(hooks, "_watchers", Locked())
    model = random_adapter()
    assert max(step_violations(model, torch.optim.AdamW(parameters_of(model), lr=1e-2))) <= TOLERANCE
    model.unload()
