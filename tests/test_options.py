"""Each setting of `LoraConfig`, trained with OGPSA: it acts, and every step keeps the constraint, or it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import loops
import pytest
import torch
from coverage_page import COMPLEMENT, CONE, REFUSED, covers
from loops import LORA, batch, leak, loss_of, parameters_of, references, step_violations, whole_of
from models import VOCABULARY, tiny_llama
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as lora
from transformers import GPT2Config, GPT2LMHeadModel

from peft_ogpsa import OGPSAConfig

INVOCATION = 5
QUERIES = {"target_modules": ["q_proj"]}


def tiny_gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes)).eval()


def eva(base, config):
    from peft import initialize_lora_eva_weights

    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, [batch(i) for i in range(8)], show_progress_bar=False)
    return model


def corda(base, config):
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(base, config, run_model=lambda: [base(**batch(i, rows=1)) for i in range(4)])
    return get_peft_model(base, config)


def lora_ga(base, config):
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(base, config, lambda: [loss_of(base, batch(i)).backward() for i in range(2)])
    base.zero_grad()
    return get_peft_model(base, config)


@dataclass
class Option:
    """A field of `LoraConfig` with a value that is not its default.

    Attributes:
        value: Of the field; a function makes it when the installed PEFT knows the field.
        around: Settings that it needs, with and without the value.
        beside: Settings that go with the value alone.
        refused: What the error says with the default subspace, if it is an error.
        base: Builds the base model.
        adapted: Builds the adapter.
    """

    value: Any
    around: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    base: Callable = tiny_llama
    adapted: Callable = get_peft_model


MOVES = "moves part of the base's weights into the adapter"
VARIANT = "uses {}LinearVariant"
OPTIONS = {
    "r": Option(2),
    "target_modules": Option(["q_proj", "down_proj"]),
    "exclude_modules": Option(["down_proj"]),
    "lora_alpha": Option(64),
    "lora_dropout": Option(0.5),
    "fan_in_fan_out": Option(True, {"target_modules": ["c_attn", "c_proj"]}, base=tiny_gpt2),
    "bias": Option(
        "all", QUERIES, refused="trains the base model's own biases", base=partial(tiny_llama, attention_bias=True)
    ),
    "use_rslora": Option(True),
    "modules_to_save": Option(["lm_head"], QUERIES),
    "init_lora_weights": Option("gaussian"),
    "layers_to_transform": Option([1], QUERIES),
    "layers_pattern": Option("layers", QUERIES, {"layers_to_transform": [1]}),
    "rank_pattern": Option({"q_proj": 2}),
    "alpha_pattern": Option({"q_proj": 64}),
    "trainable_token_indices": Option([5, 6], QUERIES),
    "eva_config": Option(lambda: lora.EvaConfig(rho=1.0), QUERIES, {"init_lora_weights": "eva"}, adapted=eva),
    "corda_config": Option(lora.CordaConfig, QUERIES, {"init_lora_weights": "corda"}, MOVES, adapted=corda),
    "lora_ga_config": Option(
        lambda: lora.LoraGAConfig(), QUERIES, {"init_lora_weights": "lora_ga"}, MOVES, adapted=lora_ga
    ),
    "use_dora": Option(True, refused="use_dora=True is not allowed"),
    "velora_config": Option(lambda: lora.VeloraConfig(num_groups=4), QUERIES, refused=VARIANT.format("Velora")),
    "alora_invocation_tokens": Option([INVOCATION], QUERIES, refused=VARIANT.format("ALora")),
    "monteclora_config": Option(lambda: lora.MontecloraConfig(), QUERIES, refused=VARIANT.format("Monteclora")),
    "kasa_config": Option(lambda: lora.KasaConfig(), QUERIES, refused=VARIANT.format("Kasa")),
    "layer_replication": Option([[0, 2], [1, 2]], QUERIES),
    "lora_bias": Option(True, refused="lora_bias=True is not allowed"),
    "target_parameters": Option(
        ["q_proj.weight"], beside={"target_modules": []}, refused="target_parameters=['q_proj.weight'] is not allowed"
    ),
    "use_bdlora": Option(
        lambda: lora.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2),
        {"target_modules": ["q_proj", "o_proj"]},
        refused="for A instead of one matrix",
    ),
    "ensure_weight_tying": Option(
        True,
        {**QUERIES, "modules_to_save": ["embed_tokens"]},
        base=partial(tiny_llama, tie_word_embeddings=True),
    ),
}
ALIKE = {"fan_in_fan_out"}
"""Settings that PEFT corrects by itself where the base needs another value."""


def built(name: str, *, with_value: bool = True, **own):
    option = OPTIONS[name]
    settings = {**LORA, **option.around}
    if with_value:
        value = option.value() if callable(option.value) else option.value
        settings |= {**option.beside, name: value}
    torch.manual_seed(0)
    make = option.adapted if with_value else get_peft_model
    return make(option.base(), OGPSAConfig(**own, **settings)).train()


GRADIENTS = {"subspace": "gradients", "rows": 8, "refresh_steps": 2, "reference_weight": 0.0}
ACTIVATIONS = {"subspace_rank": 4}


def gradient_steps(model) -> float:
    """Trains, and returns how far the worst step breaks the cone."""
    torch.manual_seed(1)
    worst = max(step_violations(model, torch.optim.AdamW(parameters_of(model), lr=1e-2, weight_decay=0.0), steps=3))
    assert model.projector.steps == 3
    scales = model.projector.subspace.rows.scales
    assert all((own > 0).all() for own in scales), "no reference gradient"
    return worst


def activation_steps(model) -> float:
    """Trains, and returns the largest `|A U| / |A|` after a step."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2, weight_decay=0.0)
    worst = 0.0
    for number in range(3):
        while model.projector.due:
            model.projector.refresh(references(number), loss_of, whole_of(model))
        loss_of(model, batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, leak(model.projector))
    assert model.projector.steps == 3
    return worst


def acts(name: str, model, steps: Callable, **own) -> bool:
    """Whether training without the setting ends elsewhere."""
    other = built(name, with_value=False, **own)
    steps(other)
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() != theirs.keys() or any(
        ours[key].shape != theirs[key].shape or not torch.equal(ours[key], theirs[key]) for key in ours
    )


@pytest.fixture(autouse=True)
def _known(request, monkeypatch):
    name = request.node.callspec.params["name"]
    if name not in LoraConfig.__dataclass_fields__:
        pytest.skip(f"the installed PEFT has no {name}")
    if name == "alora_invocation_tokens":  # acts from there on

        def invoked(*args, **kwargs):
            made = batch(*args, **kwargs)
            made["input_ids"][:, 1] = INVOCATION
            return made

        monkeypatch.setattr(loops, "batch", invoked)


def each(what: str, names: list[str]):
    """Runs a test for each of these settings; `what` it shows may have a place for the error."""
    values = [pytest.param(name, marks=covers(what.format(OPTIONS[name].refused), name)) for name in names]
    return pytest.mark.parametrize("name", values)


@each(CONE, list(OPTIONS))
def test_every_step_keeps_the_cone(name):
    model = built(name, **GRADIENTS)
    assert gradient_steps(model) <= 1e-5
    assert name in ALIKE or acts(name, model, gradient_steps, **GRADIENTS)


@each(COMPLEMENT, [name for name, own in OPTIONS.items() if own.refused is None])
def test_every_step_keeps_the_complement(name):
    model = built(name, **ACTIVATIONS)
    assert activation_steps(model) <= 1e-6
    assert name in ALIKE or acts(name, model, activation_steps, **ACTIVATIONS)


@each(REFUSED, [name for name, own in OPTIONS.items() if own.refused])
def test_the_default_subspace_refuses(name):
    with pytest.raises(ValueError, match=re.escape(OPTIONS[name].refused)):
        activation_steps(built(name, **ACTIVATIONS))
