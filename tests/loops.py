"""A hand-written training loop over a tiny model, and what its steps did to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from models import VOCABULARY, tiny_llama
from peft import PeftModel, get_peft_model

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.core.projector import Projector

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def batch(seed: int, rows: int = 4, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def loss_of(model, inputs) -> torch.Tensor:
    return model(**inputs).loss


def ogpsa_model(**overrides) -> PeftModel:
    settings = {"subspace": "gradients", "rows": 8, "refresh_steps": 2, "reference_weight": 0.0, **LORA, **overrides}
    return get_peft_model(tiny_llama(), OGPSAConfig(**settings))


def references(step: int) -> dict[str, list]:
    return {"first": [batch(1000 + step)], "second": [batch(2000 + step)]}


def parameters_of(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def whole_of(model) -> PeftModel | None:
    """What `refresh` is to be told of a model: the `PeftModel` of an activated LoRA, which acts in no other way."""
    config = getattr(model, "peft_config", {}).get("default")
    return model if getattr(config, "alora_invocation_tokens", None) else None


def step_violations(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    steps: int = 4,
    step: Callable | None = None,
    stored: Callable[[Projector], list[torch.Tensor]] | None = None,
    projector: Projector | None = None,
) -> Iterator[float]:
    """Trains and yields, for each step, how far the true parameter change breaks the constraint, in the worst block.

    Cone: the largest `R D / (|R| |D|)`; orthogonal: the largest `|Q D| / |D|`; both in float64, `D` being the
    difference of the parameters (or of what `stored` gives) after and before.
    """
    projector = projector or model.projector
    stored = stored or (lambda projector: projector.subspace.blocks.stack())
    for number in range(steps):
        if projector.due:
            projector.refresh(references(number), loss_of, whole_of(model))
        loss_of(model, batch(number)).backward()
        before = [part.clone() for part in stored(projector)]
        (step or optimizer.step)()
        optimizer.zero_grad()
        subspace = projector.subspace
        blocks = subspace.blocks
        change = [(now - then).double() for now, then in zip(stored(projector), before, strict=True)]
        products = [
            torch.einsum("bmd,bd->bm", rows.double(), d) for rows, d in zip(subspace.directions, change, strict=True)
        ]
        if subspace.constraint == "cone":
            products = [p * scales.double() for p, scales in zip(products, subspace.rows.scales, strict=True)]
        products = blocks.reduce(products)
        length = blocks.reduce([d.square().sum(-1) for d in change]).sqrt()
        assert length.max() > 0, "the optimizer did not move the parameters"
        worst = products.amax(1) if subspace.constraint == "cone" else products.norm(dim=1)
        yield float((worst / length.clamp(min=1e-30)).max())


def leak(projector: Projector) -> float:
    """The largest `|A U| / |A|` over the layers of an activation subspace, in float64."""
    activations = projector.activations
    directions, rest = activations.state_dict()
    own = {layer: directions[f"directions.{e['place']}"].double() for e in rest for layer in e["layers"]}
    matrices = [(matrix.parameter.detach().double(), own[matrix.layer]) for matrix in activations.matrices]
    return max(float((a @ u).norm() / a.norm()) for a, u in matrices)
