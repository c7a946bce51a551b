"""OGPSAConfig: its defaults, its checks, its plain LoRA view, and its PEFT type."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import pickle
import re
import sys

import pytest
from coverage_page import covers
from peft import LoraConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_ogpsa import FullParameterConfig, OGPSAConfig, OGPSAModel
from peft_ogpsa.tuner import config as config_module
from peft_ogpsa.tuner.registration import register

DEFAULTS = {
    "subspace": "activations",
    "subspace_rank": None,
    "subspace_energy": 1.0,
    "tokens": "all",
    "constraint": "cone",
    "projection": "update",
    "scope": "tensor",
    "slices": 16,
    "rows": 8,
    "rows_from": "example",
    "rows_dtype": "float32",
    "refresh_steps": 5,
    "reference_budget": 0.075,
    "refresh_samples": None,
    "reference_weight": None,
    "missing_reference": "error",
}


def test_defaults():
    config = OGPSAConfig()
    assert config.ogpsa_dict() == DEFAULTS
    assert config.peft_type is PeftType.OGPSA
    assert isinstance(config, LoraConfig)


def test_lora_defaults_are_loras():
    lora = LoraConfig()
    config = OGPSAConfig()
    for field in dataclasses.fields(LoraConfig):
        if field.name != "peft_type":
            assert getattr(config, field.name) == getattr(lora, field.name), field.name


def test_every_own_field_has_help():
    helps = {f.name: f.metadata.get("help") for f in dataclasses.fields(OGPSAConfig) if f.name in DEFAULTS}
    assert helps.keys() == DEFAULTS.keys()
    assert all(helps.values())
    for name in DEFAULTS:
        assert f"{name} (" in OGPSAConfig.__doc__


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("subspace", ["activations", "gradients", "both", "none"]),
        ("tokens", ["all", "answer"]),
        ("constraint", ["cone", "orthogonal"]),
        ("projection", ["update", "gradient"]),
        ("scope", ["slice", "tensor", "module", "model"]),
        ("rows_from", ["example", "batch", "set"]),
        ("rows_dtype", ["float32", "bfloat16", "int8"]),
        ("missing_reference", ["error", "warn", "ignore"]),
    ],
)
def test_choices(name, allowed):
    for value in allowed:
        overrides = {"subspace": "gradients" if value == "int8" else "both", name: value}
        assert getattr(OGPSAConfig(**overrides), name) == value
    for value in ("Cone!", None, 3, True, ["cone"]):
        with pytest.raises(ValueError) as caught:
            OGPSAConfig(**{name: value})
        assert f"{name}={value!r}" in str(caught.value)
        assert all(repr(choice) in str(caught.value) for choice in allowed)


@pytest.mark.parametrize("name", ["rows", "refresh_steps", "refresh_samples", "subspace_rank"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "3", True, False, math.nan, [1]])
def test_counts(name, value):
    with pytest.raises(ValueError) as caught:
        OGPSAConfig(subspace="gradients", constraint="orthogonal", **{name: value})
    assert f"{name}={value!r}" in str(caught.value)
    assert "at least 1" in str(caught.value)


@pytest.mark.parametrize("name", ["rows", "refresh_steps"])
def test_required_counts_are_not_none(name):
    with pytest.raises(ValueError, match=f"{name}=None"):
        OGPSAConfig(**{name: None})


def test_optional_counts_may_be_none():
    config = OGPSAConfig(refresh_samples=None, subspace_rank=None)
    assert config.refresh_samples is None
    assert config.subspace_rank is None


@pytest.mark.parametrize("value", [-0.1, math.inf, -math.inf, math.nan, True, "1"])
def test_reference_weight_must_be_finite_and_not_negative(value):
    with pytest.raises(ValueError) as caught:
        OGPSAConfig(reference_weight=value)
    assert f"reference_weight={value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, None])
def test_reference_weight(value):
    assert OGPSAConfig(reference_weight=value).reference_weight == value


@pytest.mark.parametrize("value", [0, -0.1, math.inf, math.nan, True, "1"])
def test_reference_budget_must_be_finite_and_above_zero(value):
    with pytest.raises(ValueError) as caught:
        OGPSAConfig(reference_budget=value)
    assert f"reference_budget={value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [None, 0.01, 1, 2.5])
def test_reference_budget(value):
    assert OGPSAConfig(subspace="both", reference_budget=value).reference_budget == value


def test_subspace_rank_needs_orthogonal():
    with pytest.raises(ValueError, match=r"subspace_rank=4 .*constraint='cone'"):
        OGPSAConfig(subspace="gradients", subspace_rank=4)
    assert OGPSAConfig(subspace="gradients", subspace_rank=4, constraint="orthogonal").subspace_rank == 4
    assert OGPSAConfig(subspace_rank=4).subspace_rank == 4


OF_GRADIENTS = {
    "constraint": "orthogonal",
    "projection": "gradient",
    "scope": "module",
    "slices": 4,
    "rows": 4,
    "rows_from": "set",
}
OF_REFRESHES = {"refresh_steps": 3, "reference_budget": None, "refresh_samples": 5}
OF_ACTIVATIONS = {"subspace_energy": 0.9, "tokens": "answer"}


@pytest.mark.parametrize("name", [*OF_GRADIENTS, *OF_REFRESHES, *OF_ACTIVATIONS])
@pytest.mark.parametrize("cls", [OGPSAConfig, FullParameterConfig])
def test_settings_without_effect_are_refused(cls, name):
    value = (OF_GRADIENTS | OF_REFRESHES | OF_ACTIVATIONS)[name]
    if cls is FullParameterConfig and name == "rows":
        value = 5
    chosen = {"subspace": "gradients" if name in OF_ACTIVATIONS else "activations"}
    if name in OF_REFRESHES:  # of the gradients that are added
        chosen["reference_weight"] = 0.0
    with pytest.raises(ValueError) as caught:
        cls(**chosen, **{name: value})
    given = " and ".join(f"{field}={own!r}" for field, own in chosen.items())
    assert f"{name}={value!r} has no effect with {given}. Leave it out, or set subspace=" in str(caught.value)
    beside = {"scope": "slice"} if name == "slices" else {}
    assert getattr(cls(subspace="both", **beside, **{name: value}), name) == value
    if name in OF_REFRESHES:
        for weight in (1.0, None):
            assert getattr(cls(subspace="activations", reference_weight=weight, **{name: value}), name) == value
    # A default does no harm, wherever it comes from.
    default = getattr(cls(), name)
    assert getattr(cls(**chosen, **{name: default}), name) == default


@pytest.mark.parametrize(
    ("chosen", "name", "value", "remedy"),
    [
        ({"subspace": "activations", "subspace_rank": 8}, "subspace_energy", 0.9, "subspace_rank=None"),
        ({"subspace": "gradients", "scope": "module"}, "slices", 8, "scope='slice'"),
        ({"subspace": "gradients", "refresh_samples": 4}, "reference_budget", 0.2, "refresh_samples=None"),
    ],
)
@pytest.mark.parametrize("cls", [OGPSAConfig, FullParameterConfig])
def test_settings_that_another_setting_replaces_are_refused(cls, chosen, name, value, remedy):
    other = list(chosen)[-1]
    message = f"{name}={value!r} has no effect with {other}={chosen[other]!r}. Leave it out, or set {remedy}."
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(**chosen, **{name: value})
    assert getattr(cls(**chosen, **{name: getattr(cls(), name)}), name) == getattr(cls(), name)


def test_subspace_rank_is_at_most_rows():
    overrides = {"subspace": "gradients", "rows": 4, "constraint": "orthogonal"}
    assert OGPSAConfig(subspace_rank=4, **overrides).subspace_rank == 4
    with pytest.raises(ValueError, match="subspace_rank=5 is more than rows=4"):
        OGPSAConfig(subspace_rank=5, **overrides)


def test_loras_own_checks_remain():
    with pytest.raises(ValueError, match="layers_to_transform"):
        OGPSAConfig(target_modules=".*q_proj", layers_to_transform=[0])
    with pytest.raises(TypeError, match="unexpected keyword"):
        OGPSAConfig(rowz=3)


@pytest.mark.parametrize(("stage", "refresh_steps"), [("sft", 30), ("dpo", 5)])
def test_paper(stage, refresh_steps):
    config = OGPSAConfig.paper(stage, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert config.ogpsa_dict() == {
        **DEFAULTS,
        "subspace": "gradients",
        "constraint": "orthogonal",
        "projection": "gradient",
        "scope": "tensor",
        "slices": 16,
        "rows": 2,
        "rows_from": "set",
        "refresh_steps": refresh_steps,
        "reference_budget": None,
        "refresh_samples": None,
        "reference_weight": 0.0,
    }
    assert config.r == 4
    assert config.target_modules == {"q_proj"}


def test_paper_gives_way_to_the_caller():
    config = OGPSAConfig.paper("sft", rows=3, refresh_steps=7, missing_reference="warn")
    assert (config.rows, config.refresh_steps, config.missing_reference) == (3, 7, "warn")
    assert config.constraint == "orthogonal"


@pytest.mark.parametrize("stage", ["SFT", "rlhf", None, 1])
def test_paper_has_two_stages(stage):
    with pytest.raises(ValueError) as caught:
        OGPSAConfig.paper(stage)
    assert repr(stage) in str(caught.value)
    assert "'sft' or 'dpo'" in str(caught.value)


def test_lora_view():
    overrides = {"r": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 5}, "use_rslora": True}
    config = OGPSAConfig(subspace_rank=7, **overrides)
    view = config.lora_config()
    assert type(view) is LoraConfig
    assert view == LoraConfig(**overrides)
    assert view.to_dict() == LoraConfig(**overrides).to_dict()
    assert not vars(view).keys() & DEFAULTS.keys()
    assert config.peft_type is PeftType.OGPSA
    view.rank_pattern["q_proj"] = 99
    view.target_modules.add("k_proj")
    assert config.rank_pattern == {"q_proj": 5}
    assert config.target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, dataclasses.replace, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["deepcopy", "copy", "replace", "pickle"],
)
def test_copies(copied):
    config = OGPSAConfig(subspace="both", r=4, rows=9, constraint="orthogonal", target_modules=["q_proj"])
    twin = copied(config)
    assert type(twin) is OGPSAConfig
    assert twin == config
    assert twin.peft_type is PeftType.OGPSA


def test_dictionary_round_trip():
    config = OGPSAConfig(r=4, subspace_rank=9, target_modules="all-linear")
    twin = get_peft_config(json.loads(json.dumps(config.to_dict())))
    assert type(twin) is OGPSAConfig
    assert twin == config


def test_init_weights_is_init_lora_weights():
    config = OGPSAConfig(init_lora_weights="gaussian")
    assert config.init_weights == "gaussian"
    config.init_weights = True
    assert config.init_lora_weights is True
    assert "init_weights" not in config.to_dict()


@covers("`OGPSA`, a type that PEFT knows", "peft_type")
def test_peft_type():
    member = PeftType.OGPSA
    assert member == "OGPSA"
    assert (member.name, member.value) == ("OGPSA", "OGPSA")
    assert member is PeftType("OGPSA") is PeftType["OGPSA"]
    assert member in list(PeftType)
    assert list(PeftType).count(member) == 1
    assert "OGPSA" in PeftType.__members__
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"OGPSA"'
    assert PEFT_TYPE_TO_CONFIG_MAPPING["OGPSA"] is OGPSAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["OGPSA"] is OGPSAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["OGPSA"] == "lora_"


def test_registering_again_changes_nothing(tmp_path):
    members = list(PeftType)
    try:
        register(OGPSAConfig, OGPSAModel)
        assert list(PeftType) == members
        OGPSAConfig(subspace_rank=9).save_pretrained(tmp_path)
        assert OGPSAConfig.from_pretrained(tmp_path).subspace_rank == 9
    finally:
        register(OGPSAConfig, OGPSAModel)


def test_importing_again_registers_the_new_classes(tmp_path):
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "peft_ogpsa"}
    members = list(PeftType)
    OGPSAConfig(subspace_rank=9).save_pretrained(tmp_path)
    try:
        for name in before:
            del sys.modules[name]
        again = importlib.import_module("peft_ogpsa")
        assert again.OGPSAConfig is not OGPSAConfig
        assert list(PeftType) == members
        assert PEFT_TYPE_TO_CONFIG_MAPPING["OGPSA"] is again.OGPSAConfig
        assert type(LoraConfig.from_pretrained(tmp_path)) is again.OGPSAConfig
    finally:
        sys.modules.update(before)
        register(OGPSAConfig, OGPSAModel)
    assert type(LoraConfig.from_pretrained(tmp_path)) is OGPSAConfig


def test_the_sidecar_holds_every_own_field(tmp_path):
    OGPSAConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / config_module.SIDECAR_NAME).read_text())
    assert saved == {"format_version": 1, **DEFAULTS}
