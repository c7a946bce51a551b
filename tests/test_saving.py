"""What is saved is a plain LoRA adapter; with the package it comes back as OGPSA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from coverage_page import SAVED, covers
from models import VOCABULARY, randomize, tiny_llama, tokens
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_ogpsa import OGPSAConfig, OGPSAModel
from peft_ogpsa.tuner.config import SIDECAR_NAME
from peft_ogpsa.tuner.model import projector_of

OVERRIDES = {
    "subspace": "both",
    "subspace_rank": 3,
    "subspace_energy": 1.0,  # a rank replaces it; test_activations.py saves one
    "tokens": "answer",
    "constraint": "orthogonal",
    "projection": "gradient",
    "scope": "slice",
    "slices": 5,
    "rows": 7,
    "rows_from": "batch",
    "rows_dtype": "bfloat16",
    "refresh_steps": 2,
    "reference_budget": 0.25,
    "refresh_samples": None,
    "reference_weight": 0.5,
    "missing_reference": "warn",
}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


# Of what an activation subspace does not go with.
GRADIENTS = {**OVERRIDES, "subspace": "gradients", "tokens": "all"}


def adapted(base=None, seed=0, **lora):
    config = OGPSAConfig(**(GRADIENTS if "use_dora" in lora else OVERRIDES), **{**LORA, **lora})
    return randomize(get_peft_model(base or tiny_llama(), config), seed)


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def adapter_config(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved adapter, and what its model says."""
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


@pytest.fixture
def base_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# What is written


@covers("`LORA` in the saved folder", "peft_type")
def test_the_adapter_is_a_plain_lora(saved, tmp_path):
    folder, _ = saved
    lora = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    lora.save_pretrained(tmp_path / "lora")
    ours, theirs = adapter_config(folder), adapter_config(tmp_path / "lora")
    ours["target_modules"].sort()
    theirs["target_modules"].sort()
    assert ours == theirs
    assert ours["peft_type"] == "LORA"
    assert json.loads((folder / SIDECAR_NAME).read_text()) == {"format_version": 1, **OVERRIDES}
    files = {path.name for path in (tmp_path / "lora").iterdir()}
    assert {path.name for path in folder.iterdir()} == files | {SIDECAR_NAME}
    assert list(load_file(folder / "adapter_model.safetensors")) == list(
        load_file(tmp_path / "lora" / "adapter_model.safetensors")
    )


def test_the_config_in_memory_is_untouched_by_saving(tmp_path):
    model = adapted()
    before = model.peft_config["default"].to_dict()
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == before
    assert model.peft_config["default"].peft_type is PeftType.OGPSA


VARIANTS = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 64}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "no-task": {"task_type": None},
}


@pytest.mark.slow
def test_without_the_package_it_is_a_lora_bit_for_bit(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    expected = {}
    for name, lora in VARIANTS.items():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = adapted(base, **lora)
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model)
    script = """
        import sys
        import torch
        from peft import AutoPeftModelForCausalLM, LoraConfig, LoraModel, PeftModel
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        torch.use_deterministic_algorithms(True)
        tokens = torch.tensor(eval(sys.argv[1]))
        logits = {}
        for name in sys.argv[2:]:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), name).eval()
            assert type(model.base_model) is LoraModel and type(model.peft_config["default"]) is LoraConfig
            with torch.no_grad():
                logits[name] = model(tokens).logits
        AutoPeftModelForCausalLM.from_pretrained("plain")
        save_file(logits, "logits.safetensors")
        assert not [name for name in sys.modules if name.partition(".")[0] == "peft_ogpsa"]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tokens().tolist()), *VARIANTS],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Unexpected keyword" not in done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# What is read


def without_base(config: OGPSAConfig) -> OGPSAConfig:
    """Without the name of a tiny model, which is None or, before transformers 5, empty."""
    assert not config.base_model_name_or_path
    config.base_model_name_or_path = None
    return config


@covers("comes back from a saved folder", "inference_mode")
@pytest.mark.parametrize("config_cls", [PeftConfig, LoraConfig, OGPSAConfig])
@pytest.mark.parametrize("kind", [str, Path])
def test_configurations_come_back_whole(saved, config_cls, kind):
    config = config_cls.from_pretrained(kind(saved[0]))
    expected = OGPSAConfig(**OVERRIDES, **LORA, inference_mode=True)
    assert type(config) is OGPSAConfig
    assert without_base(config) == expected


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained(saved, trainable, low_cpu_mem_usage):
    folder, expected = saved
    model = PeftModel.from_pretrained(
        tiny_llama(), folder, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert isinstance(model.base_model, OGPSAModel)
    assert model.peft_config["default"].ogpsa_dict() == OVERRIDES
    assert torch.equal(logits(model), expected)
    assert any(p.requires_grad for p in model.parameters()) is trainable
    assert model.projector is projector_of(model)


@pytest.mark.parametrize(
    "lora", [pytest.param(own, marks=covers(SAVED, *{**LORA, **own}), id=name) for name, own in VARIANTS.items()]
)
def test_every_variant_comes_back(lora, tmp_path):
    model = adapted(**lora)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert isinstance(loaded.base_model, OGPSAModel)
    assert torch.equal(logits(loaded), logits(model))


def test_pickled_weights_file(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_auto_class(base_folder, tmp_path):
    model = adapted(AutoModelForCausalLM.from_pretrained(base_folder))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.base_model, OGPSAModel)
    assert loaded.peft_config["default"].ogpsa_dict() == OVERRIDES
    assert torch.equal(logits(loaded), logits(model))


def test_an_explicit_config_wins(saved):
    folder, expected = saved
    config = LoraConfig(**LORA)
    model = PeftModel.from_pretrained(tiny_llama(), folder, config=config)
    assert type(model.base_model) is LoraModel
    assert torch.equal(logits(model), expected)


def test_without_the_sidecar_it_is_a_lora(saved):
    folder, expected = saved
    (folder / SIDECAR_NAME).unlink()
    for config_cls in (PeftConfig, LoraConfig, OGPSAConfig):
        assert type(config_cls.from_pretrained(folder)) is LoraConfig
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    assert type(model.base_model) is LoraModel
    assert torch.equal(logits(model), expected)


def test_other_types_ignore_the_sidecar(saved):
    folder, _ = saved
    AdaLoraConfig(total_step=10).save_pretrained(folder)
    assert type(PeftConfig.from_pretrained(folder)) is AdaLoraConfig


# Several adapters


def several(names=("default", "second", "third")):
    model = adapted()
    for number, name in enumerate(names[1:], start=8):
        model.add_adapter(name, OGPSAConfig(**{**OVERRIDES, "rows": number}, **LORA))
    return randomize(model)


def test_several_adapters(tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    folders = {"default": tmp_path, "second": tmp_path / "second", "third": tmp_path / "third"}
    rows = {"default": 7, "second": 8, "third": 9}
    for name, folder in folders.items():
        assert adapter_config(folder)["peft_type"] == "LORA"
        assert OGPSAConfig.from_pretrained(folder).rows == rows[name]
    assert PeftConfig.from_pretrained(tmp_path, subfolder="second").rows == 8
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(folders["second"], "second")
    loaded.load_adapter(tmp_path, "third", subfolder="third", is_trainable=True)
    assert {name: config.rows for name, config in loaded.peft_config.items()} == rows
    for name in rows:
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


def test_selected_adapters(tmp_path):
    several().save_pretrained(tmp_path, selected_adapters=["second"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"second"}
    assert not (tmp_path / SIDECAR_NAME).exists()
    assert OGPSAConfig.from_pretrained(tmp_path / "second").rows == 8


def test_not_on_the_main_process(tmp_path):
    adapted().save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_loading_into_a_plain_lora_model(saved, tmp_path):
    folder, expected = saved
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(folder, "second")
    model.add_adapter("second", OGPSAConfig.from_pretrained(folder).lora_config())
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


def test_loading_into_a_mixed_model(saved):
    folder, expected = saved
    with pytest.raises(ValueError, match="not supported for mixed models"):
        PeftMixedModel.from_pretrained(tiny_llama(), folder)
    config = OGPSAConfig.from_pretrained(folder).lora_config()
    model = PeftMixedModel.from_pretrained(tiny_llama(), folder, config=config)
    assert torch.equal(logits(model), expected)


# What goes along


def test_embedding_layers(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conversion_of_a_mutated_base(init, tmp_path):
    model = get_peft_model(tiny_llama(), OGPSAConfig(**GRADIENTS, **LORA, init_lora_weights=init))
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].init_lora_weights == init
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "trained")
    assert isinstance(loaded.base_model, OGPSAModel)
    assert loaded.peft_config["default"].r == 8
    assert loaded.peft_config["default"].init_lora_weights is True
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1e-3
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


def test_experts_of_transformers_4_load_as_loras(tmp_path):
    def factory():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=2,
            )
        ).eval()

    config = OGPSAConfig(**OVERRIDES, r=2, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    sizes = {"w1": (16, 32), "w2": (32, 16), "w3": (16, 32)}
    weights = {}
    for expert in range(2):
        for name, (inputs, outputs) in sizes.items():
            prefix = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(2, inputs)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(outputs, 2)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    ogpsa = PeftModel.from_pretrained(factory(), tmp_path)
    ogpsa = PeftModel.from_pretrained(factory(), tmp_path)
    lora = PeftModel.from_pretrained(factory(), tmp_path, config=config.lora_config())
    assert isinstance(ogpsa.base_model, OGPSAModel)
    assert type(lora.base_model) is LoraModel
    assert torch.equal(logits(ogpsa), logits(lora))
    assert (logits(lora) - logits(factory())).abs().max() > 1e-3


# transformers' own adapters


def test_transformers_saves_and_loads(tmp_path):
    model = tiny_llama()
    model.add_adapter(OGPSAConfig(**OVERRIDES, **LORA))
    randomize(model)
    model.save_pretrained(tmp_path)
    assert adapter_config(tmp_path)["peft_type"] == "LORA"
    assert json.loads((tmp_path / SIDECAR_NAME).read_text()) == {"format_version": 1, **OVERRIDES}
    for trainable in (False, True):
        loaded = tiny_llama()
        loaded.load_adapter(str(tmp_path), is_trainable=trainable)
        assert loaded.peft_config["default"].ogpsa_dict() == OVERRIDES
        assert torch.equal(logits(loaded), logits(model))
        assert projector_of(loaded) is not projector_of(model)
        assert any(p.requires_grad for p in loaded.parameters()) is trainable
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_transformers_loads_by_the_adapters_folder(base_folder, tmp_path):
    model = adapted(AutoModelForCausalLM.from_pretrained(base_folder))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.peft_config["default"].ogpsa_dict() == OVERRIDES
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_hotswap_is_for_plain_lora_alone(saved):
    folder, _ = saved
    model = tiny_llama()
    model.load_adapter(str(folder))
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(str(folder), adapter_name="default", hotswap=True)


# The hub


@pytest.fixture
def hub(saved, tmp_path):
    """A hub cache that holds the adapter as someone/adapter, whole and in a subfolder."""
    folder, expected = saved
    snapshot = tmp_path / "cache" / "models--someone--adapter" / "snapshots" / "abc"
    for target in (snapshot, snapshot / "inside"):
        target.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    return {"cache_dir": str(tmp_path / "cache")}, snapshot, expected


def test_from_the_hub(hub):
    cache, _, expected = hub
    for subfolder in (None, "inside"):
        config = PeftConfig.from_pretrained("someone/adapter", subfolder=subfolder, **cache)
        assert config.ogpsa_dict() == OVERRIDES
    model = PeftModel.from_pretrained(tiny_llama(), "someone/adapter", **cache)
    assert isinstance(model.base_model, OGPSAModel)
    assert torch.equal(logits(model), expected)


def test_from_the_hub_without_a_sidecar(hub, caplog):
    cache, snapshot, _ = hub
    (snapshot / SIDECAR_NAME).unlink()
    assert type(PeftConfig.from_pretrained("someone/adapter", **cache)) is LoraConfig
    assert "someone/adapter is loaded as plain LoRA. If it was trained with OGPSA" in caplog.text
    caplog.clear()
    missing = snapshot.parent.parent / ".no_exist" / "abc"  # the hub has said that there is none
    missing.mkdir(parents=True)
    (missing / SIDECAR_NAME).touch()
    assert type(PeftConfig.from_pretrained("someone/adapter", **cache)) is LoraConfig
    assert not caplog.records
    assert type(PeftConfig.from_pretrained("someone/adapter", subfolder="inside", **cache)) is OGPSAConfig


# Damage


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("\ufffd\x00", "is damaged"),
        ("[]", "is damaged (it is not a JSON object)"),
        ("{}", "no format_version"),
        ('{"format_version": 2, "rows": 3}', "format_version=2"),
        ('{"format_version": "1"}', "format_version='1'"),
        ('{"format_version": 1, "columns": 3}', "unknown settings: columns"),
        ('{"format_version": 1, "r": 64}', "unknown settings: r"),
        ('{"format_version": 1, "rows": 0}', "rows=0"),
        ('{"format_version": 1, "constraint": "sphere"}', "constraint='sphere'"),
    ],
)
def test_a_bad_sidecar(saved, content, reason):
    folder, _ = saved
    sidecar = folder / SIDECAR_NAME
    sidecar.write_text(content)
    for load in (lambda: PeftConfig.from_pretrained(folder), lambda: PeftModel.from_pretrained(tiny_llama(), folder)):
        with pytest.raises(ValueError) as caught:
            load()
        assert reason in str(caught.value)
        assert str(sidecar) in str(caught.value)
        assert "delete it to load the adapter as plain LoRA" in str(caught.value)


def test_a_sidecar_that_is_no_text(saved):
    folder, _ = saved
    (folder / SIDECAR_NAME).write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(ValueError, match="is damaged"):
        PeftConfig.from_pretrained(folder)


def test_settings_that_the_sidecar_lacks_are_defaults(saved):
    folder, _ = saved
    (folder / SIDECAR_NAME).write_text('{"format_version": 1, "rows": 3}')
    config = without_base(OGPSAConfig.from_pretrained(folder))
    assert config == OGPSAConfig(subspace="gradients", rows=3, **LORA, inference_mode=True)
