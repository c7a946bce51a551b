"""The published rule: per tensor, unit mean gradients, Gram-Schmidt, `g - U U^T g` (arXiv 2602.07892)."""

from __future__ import annotations

import pytest
import torch
from loops import LORA, parameters_of
from models import tiny_llama
from peft import get_peft_model

from peft_ogpsa import OGPSAConfig


def published_rule(gradient: torch.Tensor, references: list[torch.Tensor]) -> torch.Tensor:
    """In float64: a second direction is dropped if its Gram-Schmidt remainder is under 1e-6."""
    g = gradient.double().flatten()
    basis: list[torch.Tensor] = []
    for reference in references:
        r = reference.double().flatten()
        r = r / r.norm()
        for u in basis:
            r = r - (u @ r) * u
        if r.norm() >= 1e-6:
            basis.append(r / r.norm())
    for u in basis:
        g = g - (u @ g) * u
    return g.view_as(gradient)


def random_like(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) * 10.0 ** (seed % 5 - 2) for p in parameters]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("case", ["one set", "two sets", "correlated sets", "parallel sets", "opposite sets"])
@pytest.mark.parametrize("seed", range(3))
def test_parity_with_the_published_rule(case, stage, seed):
    model = get_peft_model(tiny_llama(), OGPSAConfig.paper(stage, **LORA))
    parameters = parameters_of(model)
    first, second = random_like(parameters, 10 * seed + 1), random_like(parameters, 10 * seed + 2)
    if case == "correlated sets":
        second = [a / a.norm() + 0.1 * b / b.norm() for a, b in zip(first, second, strict=True)]
    elif case == "parallel sets":
        second = [4 * a for a in first]
    elif case == "opposite sets":
        second = [-2 * a for a in first]
    sets = {"first": first} if case == "one set" else {"first": first, "second": second}

    def linear(_, batch):
        # Its gradient is the given tensors, exactly.
        return sum((p * g).sum() for p, g in zip(parameters, sets[batch["name"]], strict=True))

    model.projector.refresh({name: [{"name": name, "one": torch.ones(1)}] for name in sets}, linear)
    gradients = random_like(parameters, 10 * seed + 3)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.optim.SGD(parameters, lr=0.0).step()
    for i, parameter in enumerate(parameters):
        expected = published_rule(gradients[i], [own[i] for own in sets.values()])
        assert (parameter.grad - expected).norm() <= 1e-6 * gradients[i].norm()
        assert (expected - gradients[i]).norm() > 1e-3 * gradients[i].norm()


def test_schedule():
    assert OGPSAConfig.paper("sft", **LORA).refresh_steps == 30
    assert OGPSAConfig.paper("dpo", **LORA).refresh_steps == 5
    with pytest.raises(ValueError, match="stage='ppo'"):
        OGPSAConfig.paper("ppo")
