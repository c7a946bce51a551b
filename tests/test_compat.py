"""Contracts with the internals of other libraries: each test fails when a library changes what `compat` relies on."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import trl
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from models import randomize, tiny_llama, tiny_tokenizer, tokens
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import is_fsdp_enabled
from trl import DPOConfig, DPOTrainer, ModelConfig, SFTConfig

import peft_ogpsa
from peft_ogpsa import OGPSAConfig, OGPSAModel, compat
from peft_ogpsa.tuner.registration import register


@pytest.fixture
def registration():
    yield
    register(OGPSAConfig, OGPSAModel)


def test_the_type_is_a_member_like_any_other():
    member = PeftType("OGPSA")
    assert member is PeftType.OGPSA is PeftType["OGPSA"] is compat.peft_type("OGPSA")
    assert member in PeftType
    assert member in list(PeftType)
    assert (member.value, member.name, member == "OGPSA") == ("OGPSA", "OGPSA", True)
    assert member != PeftType.LORA


def test_the_type_has_what_lora_has_everywhere(registration):
    register(OGPSAConfig, OGPSAModel)  # a second registration is no error
    member = PeftType("OGPSA")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is OGPSAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is OGPSAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] == "lora_"
    assert CONFIG_KEYS_TO_CHECK[member] == CONFIG_KEYS_TO_CHECK[PeftType.LORA] != []


def test_every_loading_function_reads_configurations_through_us(tmp_path, registration):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    seen = []

    def act(config, name_or_path, subfolder, hub_kwargs):
        seen.append((type(config), name_or_path, subfolder, hub_kwargs))
        return config

    compat.after_reading_configs(act)
    ways = {
        "PeftConfig": lambda: PeftConfig.from_pretrained(str(tmp_path), revision="main", inference_mode=True),
        "LoraConfig": lambda: LoraConfig.from_pretrained(str(tmp_path)),
        "PeftModel": lambda: PeftModel.from_pretrained(tiny_llama(), str(tmp_path)),
        "load_adapter of PEFT": lambda: get_peft_model(tiny_llama(), LoraConfig()).load_adapter(str(tmp_path), "b"),
        "load_adapter of transformers": lambda: tiny_llama().load_adapter(str(tmp_path)),
    }
    for way, read in ways.items():
        before = len(seen)
        read()
        assert seen[before:], way
        assert all(own[:2] == (LoraConfig, str(tmp_path)) for own in seen[before:]), way
    assert seen[0][3] == {"revision": "main"}  # what the download takes, and nothing else


def test_pefts_card_comes_before_the_weights(tmp_path, registration):
    seen = []

    def act(own, folder):
        seen.append((own, str(folder), os.listdir(folder)))

    compat.before_model_cards(lambda *_: pytest.fail("this one is replaced"))
    compat.before_model_cards(act)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert seen == [(model, str(tmp_path), [])]
    assert (tmp_path / "README.md").is_file()


def test_adding_layers_reads_the_type_anew(monkeypatch):
    read = []
    inject = OGPSAModel.inject_adapter

    class Watched(OGPSAConfig):
        def __getattribute__(self, name):
            if name == "peft_type":
                read.append(object.__getattribute__(self, "peft_type"))
            return object.__getattribute__(self, name)

    def marked(self, *arguments, **options):
        read.clear()
        inject(self, *arguments, **options)

    monkeypatch.setattr(OGPSAModel, "inject_adapter", marked)
    get_peft_model(tiny_llama(), Watched(target_modules=["q_proj"]))
    assert PeftType.LORA in read


def test_the_type_is_lora_only_for_a_while():
    config = OGPSAConfig()
    during = []
    with contextlib.suppress(KeyError), compat.treated_as_lora(config):
        during.append(config.peft_type)
        raise KeyError
    assert during == [PeftType.LORA]
    assert config.peft_type == "OGPSA"


def test_state_dicts_pass_through_the_tuner_before_they_are_loaded(monkeypatch):
    model = get_peft_model(tiny_llama(), OGPSAConfig(target_modules=["q_proj"]))
    seen = []

    def converted(own, config, adapter_name, state_dict):
        seen.append((config.peft_type, adapter_name, sorted(state_dict)))
        return state_dict

    monkeypatch.setattr(compat, "converted_for_transformers", converted)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    old = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default").weight
    set_peft_model_state_dict(model, {key: torch.ones_like(old)})
    assert seen == [(PeftType.LORA, "default", [key])]
    assert (old == 1).all()


def test_conversion_keeps_what_needs_none():
    model = tiny_llama()
    state = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}
    converted = compat.converted_for_transformers(model, LoraConfig(target_modules=["q_proj"]), "default", dict(state))
    assert converted.keys() == state.keys()


def test_layers_of_an_adapter():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1])
    model = get_peft_model(tiny_llama(), config)
    found = {name: module for name, module in model.named_modules() if compat.is_adapter_layer(module)}
    kinds = {type(module).__name__ for module in found.values()}
    assert {"Linear", "ModulesToSaveWrapper", "TrainableTokensWrapper"} <= kinds
    assert len([name for name in found if name.endswith("q_proj")]) == model.config.num_hidden_layers
    assert not any(name.endswith(("k_proj", "lora_A", "norm", "base_layer")) for name in found)
    assert not any(module.disable_adapters for module in found.values())
    for module in found.values():  # a wrapper passes it on to the wrappers inside
        module.enable_adapters(False)
        assert module.disable_adapters is True
        assert hasattr(module, "base_layer") or hasattr(module, "original_module")


class _Recorder(TrainerCallback):
    order: ClassVar[list[str]] = []
    found: ClassVar[list[bool]] = []

    def __init__(self, name, moves=False):
        self.name, self.moves = name, moves

    def on_train_begin(self, *arguments, **options):
        if self.moves:
            self.found.append(compat.move_to_front(self))

    def on_log(self, *arguments, **options):
        self.order.append(self.name)


def test_a_callback_can_become_the_first_of_its_trainer(tmp_path):
    class Causal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama()

        def forward(self, input_ids):
            return {"loss": self.model(input_ids=input_ids, labels=input_ids).loss}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": row} for row in tokens(8)]
    callbacks = [_Recorder("first"), _Recorder("second"), _Recorder("moved", moves=True)]
    Trainer(Causal(), arguments, train_dataset=rows, callbacks=callbacks).train()
    assert _Recorder.found == [True]
    assert _Recorder.order[:3] == ["moved", "first", "second"]


def test_a_callback_without_a_trainer_is_not_moved():
    assert compat.move_to_front(_Recorder("alone")) is False


def test_the_fsdp_settings_are_those_of_every_state(monkeypatch):
    state = AcceleratorState(cpu=True)
    assert compat.fsdp_plugin() is None
    monkeypatch.setattr(state, "fsdp_plugin", settings := object(), raising=False)
    assert AcceleratorState().fsdp_plugin is settings
    assert compat.fsdp_plugin() is settings


@pytest.mark.parametrize("kind", DistributedType)
def test_only_several_processes_on_cpus_are_switched_to_fsdp2(tmp_path, kind):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(tiny_llama(), arguments)
    assert trainer.is_fsdp_enabled is False
    assert {"distributed_type"} <= set(vars(trainer.accelerator.state))
    state = SimpleNamespace(distributed_type=kind, fsdp_plugin=None)
    switched = SimpleNamespace(accelerator=SimpleNamespace(state=state), is_fsdp_enabled=False)
    compat.shard_on_cpu(switched)
    if kind == DistributedType.MULTI_CPU:
        assert switched.is_fsdp_enabled
        assert state.distributed_type == DistributedType.FSDP
        assert state.fsdp_plugin.fsdp_version == 2
    else:
        assert (state.distributed_type, state.fsdp_plugin, switched.is_fsdp_enabled) == (kind, None, False)


def test_a_model_is_loaded_with_the_class_of_its_configuration(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = compat.create_model(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_torch_has_the_operations_on_lists_that_we_use():
    package = Path(peft_ogpsa.__file__).parent
    used = {name for file in package.rglob("*.py") for name in re.findall(r"torch\.(_foreach_\w+)", file.read_text())}
    assert "_foreach_add_" in used
    assert [name for name in sorted(used) if not hasattr(torch, name)] == []


def test_checkpointed_layers_call_the_function_that_we_can_replace():
    model = tiny_llama()
    assert not any(compat.checkpointing(module) for module in model.modules())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [module for module in model.modules() if compat.checkpointing(module)]
    assert layers == list(model.model.layers)
    assert all(compat.checkpointing(layer).keywords["use_reentrant"] is False for layer in layers)
    calls = []

    def watched(function, *arguments, **options):
        calls.append(function)
        return function(*arguments, **options)

    for layer in layers:
        compat.set_checkpointing(layer, watched)
    model.eval()(input_ids=tokens())
    assert calls == []
    model.train()(input_ids=tokens()).logits.sum().backward()
    assert len(calls) == len(layers)


def test_gradients_of_four_bit_layers_on_a_cpu_need_training_mode():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    assert compat.evaluation_breaks_gradients(layer)
    assert not compat.evaluation_breaks_gradients(torch.nn.Linear(2, 2))
    assert not compat.evaluation_breaks_gradients(bitsandbytes.nn.Linear4bit(64, 64, bias=False, device="meta"))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaler_leaves_its_marks_on_fused_optimizers_alone(fused, overflows):
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    seen = []
    optimizer.register_step_pre_hook(lambda own, *_: seen.append((compat.skips_step(own), compat.gradient_scale(own))))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = scaler.scale((parameter * (float("inf") if overflows else 1.0)).sum())
    loss.backward()
    before = parameter.detach().clone()
    scaler.step(optimizer)
    if fused:
        ((skipped, scale),) = seen
        assert skipped == overflows
        assert scale == 4.0
    else:
        assert seen == ([] if overflows else [(False, None)])
    assert torch.equal(parameter, before) == overflows
    assert compat.gradient_scale(optimizer) is None
    assert not compat.skips_step(optimizer)


class _Finder(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_init_end(self, *arguments, **options):
        self.found.append(compat.trainer_of(self))


def test_a_callback_finds_its_trainer(tmp_path):
    finder = _Finder()
    trainer = Trainer(
        tiny_llama(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), callbacks=[finder]
    )
    assert finder.found == [trainer]
    assert compat.trainer_of(finder) is None  # outside of its events


def test_weights_that_transformers_keeps_in_float32(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["q_proj"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        kept = compat.kept_in_float32(model, dtype)
        for name, parameter in model.named_parameters():
            assert (parameter.dtype == torch.float32) == (kept(name) or dtype == torch.float32), name


def test_a_trainer_stays_on_one_gpu(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    args._n_gpu = 2
    assert args.n_gpu == 2
    assert compat.use_one_gpu(args).n_gpu == 1
    args._n_gpu = 0
    assert compat.use_one_gpu(args).n_gpu == 0


def test_the_folder_of_a_trainer_and_of_a_trial(tmp_path):
    trainer = SimpleNamespace(state=TrainerState(), _get_output_dir=lambda trial: f"{tmp_path}/run-{trial}")
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert compat.output_directory(None, args) == compat.output_directory(trainer, args) == str(tmp_path)
    trainer._trial = 3
    assert compat.output_directory(trainer, args) == str(tmp_path)  # the search is over
    trainer.state.is_hyper_param_search = True
    assert compat.output_directory(trainer, args) == f"{tmp_path}/run-3"
    assert list(inspect.signature(Trainer._get_output_dir).parameters) == ["self", "trial"]


def test_what_follows_a_checkpoint_is_called_once():
    done = []
    trainer = SimpleNamespace(_save_checkpoint=lambda model, trial: done.append("saved"))
    for name in ("first", "second"):
        compat.after_checkpoints(trainer, lambda name=name: done.append(name))
    trainer._save_checkpoint("model", trial=None)
    assert done == ["saved", "second"]
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]


def test_the_adapter_that_is_the_reference_policy():
    def trainer(*adapters, **names):
        return SimpleNamespace(model=SimpleNamespace(peft_config=dict.fromkeys(adapters)), **names)

    assert compat.reference_adapter(trainer("default", "ref")) == "ref"
    assert compat.reference_adapter(trainer("default", "old", ref_adapter_name="old")) == "old"
    assert compat.reference_adapter(trainer("default", ref_adapter_name=None)) is None
    assert compat.reference_adapter(SimpleNamespace(model=None)) is None
    assert compat.reference_adapter(None) is None


@pytest.mark.parametrize("version", ["4.57.1", "5.22.2", "5.23.0", "5.100.0.dev0", "6.0.0"])
def test_versions_of_transformers_that_forget_an_adapter(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    assert compat.forgets_default_adapter() == version.startswith(("4", "5.22"))


def test_a_resumed_trainer_loads_every_adapter_unless_we_say_that_it_forgets_one(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("ref", LoraConfig(target_modules=["q_proj"]))
    randomize(model).save_pretrained(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoint-1" / "ref" / "adapter_model.safetensors").is_file()
    saved = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "ref")}
    fresh = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    fresh.add_adapter("ref", LoraConfig(target_modules=["q_proj"]))
    trainer = Trainer(fresh, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    for name, state in saved.items():
        loaded = get_peft_model_state_dict(fresh, adapter_name=name)
        same = all(torch.equal(value, state[key]) for key, value in loaded.items())
        assert same == (name == "ref" or not compat.forgets_default_adapter())


def _preference_trainer(folder, adapter):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    return DPOTrainer(
        adapter,
        args=DPOConfig(str(folder), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def test_the_reference_policy_of_preference_training(tmp_path, monkeypatch):
    model = get_peft_model(tiny_llama(vocab_size=259), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = _preference_trainer(tmp_path, randomize(model))
    # TRL copies what it gets, and takes the copy.
    assert trainer.ref_model is None
    copied = {n: p for n, p in trainer.model.named_parameters() if ".ref." in n}
    own = dict(trainer.model.named_parameters())
    assert copied
    assert all(torch.equal(p, own[name.replace(".ref.", ".default.")]) for name, p in copied.items())
    assert not compat.takes_base_as_reference(trainer)
    monkeypatch.setattr(trl, "__version__", "0.28.0")
    assert compat.takes_base_as_reference(trainer)


def test_trainers_that_take_the_base_as_reference_policy(monkeypatch):
    class _UnslothDPOTrainer: ...

    class DPOTrainer: ...

    class CustomDPOTrainer(DPOTrainer): ...  # LLaMA-Factory's

    def takes(cls, **attributes):
        trainer = cls()
        vars(trainer).update({"ref_model": None, "ref_adapter_name": None, "loss_type": ["sigmoid"], **attributes})
        return compat.takes_base_as_reference(trainer)

    for version, old in {"0.12.0": True, "0.28.2": True, "0.29.0": False, "1.0.0": False, "1.16.0": False}.items():
        monkeypatch.setattr(trl, "__version__", version)
        for cls in (DPOTrainer, CustomDPOTrainer, _UnslothDPOTrainer):
            assert takes(cls) == old
            assert not takes(cls, ref_model=object())
            assert not takes(cls, ref_adapter_name="ref")
            assert not takes(cls, reference_free=True)
            assert not takes(cls, loss_type="simpo")
            assert not takes(cls, loss_type="orpo")
        assert not takes(type("OnlineDPOTrainer", (), {}))


def test_all_weights_are_loaded_in_every_process(tmp_path, monkeypatch):
    model = randomize(tiny_llama())
    model.save_pretrained(tmp_path)
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    for name, value in {"ACCELERATE_USE_FSDP": "true", variable: "true", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert is_fsdp_enabled()
        with compat.all_weights_in_every_process():
            assert not is_fsdp_enabled()
            loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert is_fsdp_enabled()
    finally:
        dist.destroy_process_group()
    own = dict(loaded.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in model.named_parameters())
    monkeypatch.delenv(variable)
    with compat.all_weights_in_every_process():
        pass
    assert variable not in os.environ


def test_the_end_of_training_is_told_where_trainers_know_one():
    told = []
    compat.end(SimpleNamespace(end=lambda: told.append(1)))
    assert told == [1]
    compat.end(SimpleNamespace())
    assert callable(Trainer.end)


def test_code_of_a_model_runs_only_if_the_user_allows_it(tmp_path):
    configs = [ModelConfig(), SFTConfig(str(tmp_path), bf16=False, use_cpu=True)]
    assert not compat.trusts_remote_code(*configs)
    known = [own for own in configs if hasattr(own, "trust_remote_code")]
    assert known
    known[0].trust_remote_code = True
    assert compat.trusts_remote_code(*configs)


def test_the_names_of_a_layers_adapters():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"]))
    layers = model.base_model.model.model.layers[0].self_attn
    assert compat.adapter_names(layers.q_proj) == ["default", "other"]
    assert compat.adapter_names(layers.v_proj) == ["other"]


def test_state_dicts_of_dora_are_those_of_lora():
    states = []
    for config_cls, options in ((LoraConfig, {}), (OGPSAConfig, {"subspace": "gradients"})):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), config_cls(target_modules=["q_proj"], use_dora=True, **options))
        states.append(get_peft_model_state_dict(model))
        changed = {name: value + 1 for name, value in states[-1].items()}
        set_peft_model_state_dict(model, changed)
        assert all(torch.equal(get_peft_model_state_dict(model)[name], value) for name, value in changed.items())
        assert model.peft_config["default"].peft_type == ("OGPSA" if options else "LORA")
    assert any("magnitude" in name for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
