"""OGPSA attached to plain LoRA adapters that another tool made."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass

import pytest
import torch
from loops import batch, loss_of, references, step_violations
from models import randomize, tiny_llama
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from test_activations_callback import LORA, base, dpo, leak
from test_callback import sets, sft, weights
from torch import nn

import peft_ogpsa
from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, attach, projector_of
from peft_ogpsa.core import hooks
from peft_ogpsa.core.attachment import projectors_in
from peft_ogpsa.core.config import ProjectionConfig
from peft_ogpsa.core.diagnostics import Diagnostics

ACTIVATIONS = {"subspace": "activations", "subspace_rank": 8}
GRADIENTS = {"subspace": "gradients", "rows": 8, "refresh_steps": 2, "refresh_samples": 4}
BOTH = {"subspace": "both", "subspace_rank": 8, "rows": 8, "refresh_steps": 2, "refresh_samples": 4}
SUBSPACES = pytest.mark.parametrize(
    "settings", [ACTIVATIONS, GRADIENTS, BOTH], ids=["activations", "gradients", "both"]
)


def plain(**overrides):
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(**{**LORA, **overrides}))


def ogpsa(settings, **overrides):
    torch.manual_seed(0)
    return get_peft_model(base(), OGPSAConfig(**{**LORA, **settings, **overrides}))


@SUBSPACES
@pytest.mark.parametrize(
    "overrides", [{}, {"use_rslora": True, "r": 3}, {"lora_dropout": 0.1}], ids=["", "rs", "drop"]
)
def test_a_plain_adapter_is_trained_as_an_ogpsa_adapter_is(tmp_path, settings, overrides):
    own = ogpsa(settings, **overrides)
    sft(tmp_path / "own", own, [OGPSACallback(sets())]).train()
    attached = plain(**overrides)
    trainer = sft(tmp_path / "attached", attached, [OGPSACallback(sets(), config=OGPSAConfig(**settings))])
    trainer.train()
    expected = weights(own)
    assert weights(attached).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights(attached).items())
    assert type(attached.peft_config["default"]) is LoraConfig
    figures = {name for entry in trainer.state.log_history for name in entry if name.startswith("ogpsa/")}
    assert any(name.startswith("ogpsa/removed") for name in figures)


def test_trl_makes_the_adapter_itself(tmp_path):
    torch.manual_seed(0)
    callback = OGPSACallback(sets(), config=OGPSAConfig(**ACTIVATIONS))
    trainer = sft(tmp_path, base(), [callback], peft_config=LoraConfig(**LORA))
    trainer.train()
    assert leak(trainer.model) < 1e-6
    assert projector_of(trainer.model).steps == 6
    assert any(value.abs().sum() > 0 for name, value in weights(trainer.model).items() if "lora_B" in name)


def two_adapters():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["k_proj"], r=2))
    model.set_adapter("second")
    return model


MADE = {
    "wrapped": lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"])),
    "injected": lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"]), tiny_llama()),
    "transformers": lambda: _added(tiny_llama()),
    "DoRA": lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True)),
    "two": two_adapters,
    "compiled": lambda: torch.compile(
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), backend="eager"
    ),
}


def _added(model):
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]))
    return model


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("constraint", ["cone", "orthogonal"])
def test_the_constraint_holds_for_every_way_to_make_an_adapter(made, constraint):
    model = randomize(MADE[made]())
    config = OGPSAConfig(subspace="gradients", constraint=constraint, rows=8, refresh_steps=2)
    projector = attach(model, config)
    assert projector_of(model) is projector
    assert isinstance(projector.diagnostics, Diagnostics)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    violations = list(step_violations(model, optimizer, projector=projector))
    assert max(violations) < 1e-5
    assert projector.steps == len(violations)


def test_the_projection_part_of_a_configuration_is_enough():
    model = MADE["wrapped"]()
    projector = attach(model, ProjectionConfig(subspace="gradients", rows=3))
    assert projector.config.rows == 3
    assert projector.config.r == model.peft_config["default"].r


@SUBSPACES
def test_resumed_run_equals_one_that_never_stopped(tmp_path, settings):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}

    def run(folder, resume=None, **more):
        model = plain(lora_dropout=0.1)
        trainer = sft(folder, model, [OGPSACallback(sets(), config=OGPSAConfig(**settings))], **options | more)
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(tmp_path / "straight")
    run(tmp_path / "stopped", max_steps=3)
    resumed = run(tmp_path / "stopped", resume=True)
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_saving_stays_that_of_peft(tmp_path):
    model = plain()
    trainer = sft(tmp_path, model, [OGPSACallback(sets(), config=OGPSAConfig(**ACTIVATIONS))])
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "ogpsa_config.json" not in files
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is LoraConfig
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_second_stage_goes_on_in_the_subspace_of_the_first(tmp_path, caplog):
    model = plain()
    config = OGPSAConfig(**ACTIVATIONS)
    sft(tmp_path, model, [OGPSACallback(sets(), config=config)]).train()
    first = projector_of(model).activations
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        dpo(tmp_path, model, OGPSACallback(sets(), config=copy.deepcopy(config))).train()
    assert projector_of(model).activations is first
    assert leak(model) < 1e-6
    assert "earlier stage" not in caplog.text


def test_other_settings_replace_the_projector():
    model = plain()
    first = attach(model, OGPSAConfig(**ACTIVATIONS))
    second = attach(model, OGPSAConfig(**GRADIENTS))
    assert projector_of(model) is second is not first
    assert second.config.rows == 8


def test_settings_that_are_changed_in_place_take_effect():
    model, config = plain(), OGPSAConfig(**GRADIENTS)
    projector = attach(model, config)
    assert projector.config.refresh_steps == 2
    config.refresh_steps = 7
    assert projector.config.refresh_steps == 7
    config.rows = "many"
    with pytest.raises(ValueError, match="rows='many' is not allowed"):
        projector.refresh(references(0), loss_of)


def test_a_class_that_a_tool_derives_from_loraconfig(tmp_path):
    @dataclass
    class ToolConfig(LoraConfig):  # like that of ms-swift
        lora_dtype: str | None = None

    torch.manual_seed(0)
    model = get_peft_model(base(), ToolConfig(**LORA, lora_dtype="float32"))
    sft(tmp_path / "tool", model, [OGPSACallback(sets(), config=OGPSAConfig(**ACTIVATIONS))]).train()
    expected = plain()
    sft(tmp_path / "peft", expected, [OGPSACallback(sets(), config=OGPSAConfig(**ACTIVATIONS))]).train()
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(model).items())


def test_a_trained_adapter_is_refused_with_the_remedy(tmp_path):
    model = randomize(plain())
    before = weights(model)
    with pytest.raises(ValueError, match=r"not trained in the null space .*merge_adapter"):
        sft(tmp_path, model, [OGPSACallback(sets(), config=OGPSAConfig(**ACTIVATIONS))]).train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_adapters_that_peft_adds_after_unloading_are_not_projected():
    model = MADE["wrapped"]()
    projector = attach(model, OGPSAConfig(subspace="gradients", rows=8))
    base_model = model.unload()
    again = get_peft_model(base_model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.1)
    again(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()  # an attached adapter without reference gradients would be an error
    assert projector.steps == 0
    own = get_peft_model(again.unload(), OGPSAConfig(target_modules=["q_proj"]))
    assert projector_of(own) is own.projector is not projector


@SUBSPACES
def test_a_second_adapter_on_the_same_base_is_projected_too(tmp_path, settings):
    """The projector of the first adapter, which PEFT has unloaded, must not stand in for it."""
    config = OGPSAConfig(**settings)
    model = plain()
    sft(tmp_path / "first", model, [OGPSACallback(sets(), config=config)]).train()
    first = projector_of(model)
    base_model = model.unload()
    torch.manual_seed(0)
    base()  # draws what `plain` draws before the adapter
    again = get_peft_model(base_model, LoraConfig(**LORA))
    sft(tmp_path / "second", again, [OGPSACallback(sets(), config=config)]).train()
    assert projector_of(again) is not first
    assert projector_of(again).steps == 6
    expected = weights(model_trained_alone(tmp_path, settings))
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def model_trained_alone(tmp_path, settings):
    model = plain()
    sft(tmp_path / "alone", model, [OGPSACallback(sets(), config=OGPSAConfig(**settings))]).train()
    return model


def test_an_attached_model_can_be_copied():
    model = MADE["wrapped"]()
    projector = attach(model, OGPSAConfig(subspace="gradients", rows=8))
    other = copy.deepcopy(model)
    assert projector_of(model) is projector
    with pytest.raises(ValueError, match="no OGPSA adapter"):
        projector_of(other)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (tiny_llama, OGPSAConfig(), "LlamaForCausalLM has no LoRA adapter, which an OGPSAConfig is for"),
        (lambda: nn.Linear(2, 2), OGPSAConfig(), "Linear has no LoRA adapter"),
        (
            lambda: ogpsa(GRADIENTS),
            OGPSAConfig(),
            "has an OGPSA adapter, which has its own settings. Leave out config",
        ),
        (
            lambda: get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
            OGPSAConfig(),
            "'default' is of the type IA3. OGPSA can be attached to plain LoRA adapters only",
        ),
        (
            lambda: get_peft_model(tiny_llama(), AdaLoraConfig(target_modules=["k_proj"], total_step=10)),
            OGPSAConfig(),
            "is of the type ADALORA",
        ),
        (
            lambda: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            OGPSAConfig(),
            "has no LoRA adapter",
        ),
        (MADE["wrapped"], OGPSAConfig(r=4), "r=4 contradicts the adapter 'default', which has r=8. Leave out"),
        (MADE["wrapped"], OGPSAConfig(lora_dropout=0.5), "lora_dropout=0.5 contradicts"),
        (
            MADE["DoRA"],
            OGPSAConfig(),
            "'default' does not fit: use_dora=True is not allowed with subspace='activations'",
        ),
        (MADE["wrapped"], LoraConfig(), r"attach: config=LoraConfig\(.* must be an OGPSAConfig"),
        (MADE["wrapped"], None, "attach: config=None must be an OGPSAConfig"),
        (lambda: ogpsa(GRADIENTS), FullParameterConfig(), "has an OGPSA adapter, .*are projected already"),
        (lambda: ogpsa(GRADIENTS).get_base_model().model, FullParameterConfig(), "has an OGPSA adapter"),
    ],
)
def test_what_does_not_fit_is_an_error(model, config, message):
    with pytest.raises(ValueError, match=message):
        attach(model(), config)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (base, OGPSAConfig(), "has no LoRA adapter"),
        (lambda: plain(r=2), OGPSAConfig(r=16), "r=16 contradicts"),
        (lambda: ogpsa(GRADIENTS), OGPSAConfig(), "Leave out config"),
        (lambda: ogpsa(GRADIENTS), FullParameterConfig(), "Leave out config, or train the base model"),
    ],
)
def test_the_callback_says_what_does_not_fit(tmp_path, model, config, message):
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, model(), [OGPSACallback(sets(), config=config)]).train()


def test_settings_of_the_adapter_may_be_repeated():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    config = OGPSAConfig(
        r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", rows=8, subspace="gradients"
    )
    assert attach(model, config).config.target_modules == model.peft_config["default"].target_modules


def test_adapters_of_low_precision_are_trained_in_float32(tmp_path):
    model = plain()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    sft(tmp_path, model, [OGPSACallback(sets(), config=OGPSAConfig(**ACTIVATIONS))]).train()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert leak(model) < 1e-6


FROZEN = [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "mica"}, {"target_modules": ["embed_tokens"]}]


@pytest.mark.parametrize("overrides", FROZEN)
@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_a_frozen_inactive_adapter_may_have_any_settings(overrides, later):
    model = plain()

    def add():
        model.add_adapter("style", LoraConfig(**{**LORA, **overrides}))
        model.set_adapter("default")

    if not later:
        add()
    projector = attach(model, OGPSAConfig(**ACTIVATIONS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for number in range(2):
        while projector.due:
            projector.refresh(references(0), loss_of)
        loss_of(model, batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if later and number == 0:
            add()
    assert projector.steps == 2
    assert projector.config.r == LORA["r"]
    assert leak(model) < 1e-6


def test_an_adapter_that_does_not_fit_stops_no_other_model():
    model = plain()
    projector = attach(model, OGPSAConfig(**ACTIVATIONS))
    model.add_adapter("style", LoraConfig(**LORA, use_dora=True))
    model.set_adapter("style")
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match=r"The adapter 'style' does not fit: use_dora=True"):
        projector.refresh(references(0), loss_of)


@pytest.mark.parametrize("settings", [ACTIVATIONS, GRADIENTS], ids=["activations", "gradients"])
def test_a_refresh_after_unloading_asks_to_attach_again(settings):
    model = plain()
    projector = attach(model, OGPSAConfig(**settings))
    projector.refresh(references(0), loss_of)
    get_peft_model(model.unload(), LoraConfig(**LORA))
    assert projector.due
    with pytest.raises(ValueError, match=r"no adapter of this projector any more.*attach again"):
        projector.refresh(references(0), loss_of)


@pytest.mark.parametrize("settings", [ACTIVATIONS, GRADIENTS], ids=["activations", "gradients"])
def test_a_refresh_while_the_adapter_is_off_is_refused(settings):
    model = ogpsa(settings)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"switched off .*outside of that context"):
        model.projector.refresh(references(0), loss_of)
    model.projector.refresh(references(0), loss_of)


def test_attach_is_public():
    assert peft_ogpsa.attach is attach


def test_two_models_in_one_are_refused():
    both = nn.ModuleList([plain(), plain()])
    with pytest.raises(ValueError, match=r"contains 2 models with adapters. Attach to each of them separately"):
        attach(both, OGPSAConfig(**ACTIVATIONS))


@pytest.mark.parametrize("first", ["adapter", "weights"])
def test_a_second_call_replaces_the_first_whatever_it_is_for(first):
    model = plain()
    calls = [OGPSAConfig(**ACTIVATIONS), FullParameterConfig()]
    one, other = (attach(model, config) for config in (calls if first == "adapter" else calls[::-1]))
    assert list(projectors_in(model)) == [other]
    assert one not in hooks._watchers


@pytest.mark.parametrize("first", ["outer", "inner"])
def test_a_second_call_replaces_the_first_on_a_module_around_or_inside(first, caplog):
    model = tiny_llama()
    both = [model, model.model] if first == "outer" else [model.model, model]
    one, other = (attach(module, FullParameterConfig()) for module in both)
    assert list(projectors_in(model)) == [other]
    assert one not in hooks._watchers
    lost = "1 parameters of the latter are no longer projected, such as lm_head.weight"
    assert (lost in caplog.text) == (first == "outer")


def test_projectors_of_other_parameters_stay():
    models = [tiny_llama(), plain(), ogpsa(GRADIENTS)]
    attach(models[0], FullParameterConfig())
    attach(models[1], OGPSAConfig(**ACTIVATIONS))
    assert all(projector_of(model) in hooks._watchers for model in models)


def test_a_second_call_replaces_one_for_the_weights_around_an_adapter():
    model = nn.ModuleList([base()])
    one = attach(model, FullParameterConfig())
    adapted = get_peft_model(model[0], LoraConfig(**LORA))
    other = attach(adapted, OGPSAConfig(**ACTIVATIONS))
    assert list(projectors_in(model)) == [other]
    assert one not in hooks._watchers
