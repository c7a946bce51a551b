"""OGPSA in training tools: their options, their contracts, and kernels that do not call the adapted layers."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from loops import step_violations
from models import randomize, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_activations_callback import LORA, base, leak
from test_callback import sets, sft, weights
from test_guides import one_sentence
from torch.nn import functional

from peft_ogpsa import OGPSACallback, OGPSAConfig, attach, projector_of
from peft_ogpsa.cli.datasets import PromptSet
from peft_ogpsa.integrations import llamafactory, swift
from peft_ogpsa.integrations.callback import ToolCallback
from peft_ogpsa.integrations.settings import DATA, PROJECTION, RUN, Settings
from peft_ogpsa.references import self_answers
from peft_ogpsa.references.sets import ReferenceSet

EXAMPLES = Path(__file__).parents[1] / "examples"
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "training_tools.md"
ROWS = {"general": "builtin:general"}
PROMPTS = {"general": "prompts:general"}


def plain(**overrides):
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(**{**LORA, **overrides}))


def adapters_off(model) -> list[bool]:
    return [layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


# Settings


def test_every_option_arrives():
    settings = Settings.read(
        {
            "subspace": "both",
            "subspace_rank": 8,
            "rows": 4,
            "references": {"general": "builtin:general", "sums:kl": "prompts:arithmetic"},
            "reference_samples": 5,
            "reference_max_length": 64,
            "batch_size": 2,
            "rebuild_subspace": True,
        },
        beta=0.3,
    )
    assert settings.config.ogpsa_dict() == OGPSAConfig(subspace="both", subspace_rank=8, rows=4).ogpsa_dict()
    rows, prompts = settings.sets
    assert (rows.name, rows.samples, rows.max_length, rows.beta) == ("general", 5, 64, 0.3)
    assert isinstance(prompts, PromptSet)
    assert (prompts.name, prompts.samples, prompts.max_length, prompts.loss) == ("sums", 5, 64, "kl")
    callback = settings.callback(seed=7)
    assert (callback.seed, callback.batch_size, callback.rebuild_subspace) == (7, 2, True)
    assert callback.config is settings.config


def test_defaults_are_those_of_the_library():
    settings = Settings.read({"references": ROWS})
    assert settings.config.ogpsa_dict() == OGPSAConfig().ogpsa_dict()
    assert settings.sets[0].samples == ReferenceSet.samples
    assert settings.sets[0].max_length == ReferenceSet.max_length
    assert vars(settings.callback()).keys() == {*vars(OGPSACallback(sets())), "_given"}


@pytest.mark.parametrize("references", [ROWS, ["general=builtin:general"], "general=builtin:general"])
def test_references_may_be_written_as_a_mapping_or_as_a_list(references):
    assert [own.name for own in Settings.read({"references": references}).sets] == ["general"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "ogpsa=None must be a mapping with at least references, for example"),
        ("general=builtin:general", "must be a mapping"),
        ({}, "ogpsa: references is missing"),
        ({"references": []}, "ogpsa: references is missing"),
        ({"references": 3}, "references=3 must be a mapping NAME: SPEC or a list of NAME=SPEC"),
        ({"references": [{"general": "builtin:general"}]}, "must be a mapping NAME: SPEC or a list"),
        ({"references": {"general": None}}, "general='None' cannot be loaded"),
        ({"references": {"general": "builtin:generel"}}, "ogpsa: references: general='builtin:generel' cannot be"),
        ({"references": ROWS, "subspace_rnk": 3}, r"ogpsa: subspace_rnk is not an option. Did you mean subspace_rank"),
        ({"references": ROWS, "refrence_samples": 3}, r"Did you mean reference_samples or "),
        ({"references": ROWS, "lora_alpha": 3}, "lora_alpha is not an option. LoRA's settings are those of the tool"),
        ({"references": ROWS, "xyz": 3}, "xyz is not an option. The options are: subspace, "),
        ({"references": ROWS, 3: 3}, "3 is not an option. The options are"),
        ({"references": ROWS, "reference_samples": 0}, "reference_samples=0 must be an integer of at least 1"),
        ({"references": ROWS, "reference_max_length": "9"}, "reference_max_length='9' must be an integer"),
        ({"references": ROWS, "subspace": "activation"}, "ogpsa: subspace='activation' is not allowed. Use one of"),
        ({"references": ROWS, "slices": 3}, "ogpsa: slices=3 has no effect with subspace='activations'"),
    ],
)
def test_a_mistake_names_its_option(options, message):
    with pytest.raises(ValueError, match=message):
        Settings.read(options)


def test_a_mistake_in_an_option_of_the_callback_is_reported():
    with pytest.raises(ValueError, match="batch_size=0 must be"):
        Settings.read({"references": ROWS, "batch_size": 0}).callback()


# The callback


def test_rows_train_as_with_the_library(tmp_path):
    expected = plain()
    options = {"subspace": "activations", "subspace_rank": 8}
    sft(tmp_path / "library", expected, [OGPSACallback(sets(), config=OGPSAConfig(**options))]).train()
    model = plain()
    callback = ToolCallback(sets(), config=OGPSAConfig(**options))
    sft(tmp_path / "tool", model, [callback]).train()
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(model).items())
    assert leak(model) < 1e-6


def test_the_base_answers_the_prompts_when_training_starts(tmp_path, monkeypatch):
    seen = []

    def answer(model, tokenizer, prompts, **settings):
        seen.extend(adapters_off(model))
        return one_sentence(model, tokenizer, prompts)

    monkeypatch.setattr(self_answers, "generate_ids", answer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = Settings.read({"references": PROMPTS, "reference_samples": 3, "subspace_rank": 4})
    model = plain()
    callback = settings.callback()
    trainer = sft(tmp_path, model, [callback])
    assert not seen
    trainer.train()
    assert seen
    assert all(seen)
    assert [len(list(own.dataset)) for own in callback.reference_sets] == [3]
    assert leak(model) < 1e-6
    assert not any(adapters_off(model))


@pytest.mark.parametrize("templated", [True, False])
def test_prompts_without_a_chat_template_are_told(tmp_path, templated, monkeypatch, caplog):
    monkeypatch.setattr(self_answers, "generate_ids", one_sentence)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    callback = Settings.read({"references": PROMPTS, "reference_samples": 3, "subspace_rank": 4}).callback()
    trainer = sft(tmp_path, plain(), [callback], max_steps=1)
    if not templated:
        callback.processing_class = tiny_tokenizer()
        callback.processing_class.chat_template = None
    trainer.train()
    assert ("completes the reference prompts as plain text" in caplog.text) is not templated


def test_each_model_answers_the_prompts_for_itself(tmp_path, monkeypatch):
    """As in a sweep, where one callback serves several models."""
    seen = []

    def answer(model, tokenizer, prompts, **settings):
        seen.append(model)
        return one_sentence(model, tokenizer, prompts)

    monkeypatch.setattr(self_answers, "generate_ids", answer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    callback = Settings.read({"references": PROMPTS, "reference_samples": 3, "subspace_rank": 4}).callback()
    models = [plain(), plain()]
    torch.nn.init.normal_(models[1].get_input_embeddings().weight)
    for model in models:
        sft(tmp_path, model, [callback], max_steps=1).train()
    assert len(seen) == 2


@pytest.mark.parametrize("event", ["on_init_end", "on_train_begin"])
def test_prompts_in_several_processes_are_refused(event):
    callback = Settings.read({"references": PROMPTS, "reference_samples": 3}).callback()
    with pytest.raises(ValueError, match=r"only in a single process\. Give references with answers"):
        getattr(callback, event)(types.SimpleNamespace(world_size=2), None, None, model=plain())


def test_a_missing_tokenizer_is_reported(tmp_path):
    callback = Settings.read({"references": PROMPTS, "reference_samples": 3}).callback()
    trainer = sft(tmp_path, plain(), [callback])
    trainer.callback_handler.processing_class = None
    with pytest.raises(ValueError, match="needs a tokenizer"):
        trainer.train()


# LLaMA-Factory


def write(path: Path, config: dict) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_llamafactory_gets_its_own_options_and_the_callback(tmp_path, monkeypatch):
    calls = []
    tuner = types.SimpleNamespace(run_exp=lambda config, callbacks: calls.append((config, callbacks)))
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    own = {"stage": "dpo", "finetuning_type": "lora", "pref_beta": 0.3, "seed": 5, "learning_rate": 1e-3}
    path = write(tmp_path / "run.yaml", {**own, "ogpsa": {"references": ROWS, "subspace_rank": 3}})
    llamafactory.main([path, "learning_rate=0.5", "ogpsa.subspace_rank=9"])
    ((config, (callback,)),) = calls
    assert config == {**own, "learning_rate": 0.5}
    assert type(callback) is ToolCallback
    assert (callback.seed, callback.config.subspace_rank, callback.reference_sets[0].beta) == (5, 9, 0.3)


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ({"stage": "sft"}, [], "has no `ogpsa`. Add it, for example ogpsa: .* or train without OGPSA"),
        ([], [], "must be a mapping of options"),
        ({"ogpsa": {}}, [], "references is missing"),
        ({"ogpsa": {"references": ROWS, "rnk": 3}}, [], "rnk is not an option"),
        ({"ogpsa": {"references": ROWS}}, ["ogpsa.subspace=x"], "subspace='x' is not allowed"),
        ({"ogpsa": {"references": ROWS}}, ["--do_train"], "'--do_train' is not option=value"),
        ({"ogpsa": {"references": ROWS}, "stage": "sft"}, ["stage.x=3"], "stage is not a mapping"),
        ({"ogpsa": {"references": ROWS}, "stage": "ppo"}, [], "stage='ppo' does not work with OGPSA"),
        ({"ogpsa": {"references": ROWS}, "finetuning_type": "full"}, [], "finetuning_type='full' makes no LoRA"),
        ({"ogpsa": {"references": ROWS}, "use_unsloth": True}, [], "use_unsloth: unsloth's fused kernels do not"),
        ({"ogpsa": {"references": ROWS}, "use_hyper_parallel": True}, [], "use_hyper_parallel: true trains with"),
    ],
)
def test_llamafactory_says_what_is_wrong(tmp_path, config, words, message):
    path = write(tmp_path / "run.yaml", config)
    with pytest.raises(SystemExit, match=message):
        llamafactory.main([path, *words])


@pytest.mark.parametrize("name", llamafactory.OTHER_BACKENDS)
def test_llamafactory_with_another_backend_is_refused(tmp_path, name, monkeypatch):
    path = write(tmp_path / "run.yaml", {"ogpsa": {"references": ROWS}})
    monkeypatch.setenv(name, "0")
    llamafactory.read([path])
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"{name}=1 trains with another backend of LLaMA-Factory"):
        llamafactory.read([path])


def test_llamafactory_may_use_unsloth_with_reference_gradients(tmp_path):
    config = {"use_unsloth": True, "ogpsa": {"references": ROWS, "subspace": "gradients"}}
    assert llamafactory.read([write(tmp_path / "run.yaml", config)])[0] == {"use_unsloth": True}


@pytest.mark.parametrize("words", [[], ["stage=sft"], ["missing.yaml"]])
def test_llamafactory_needs_a_file(words):
    with pytest.raises(SystemExit, match=r"CONFIG.yaml|No such file"):
        llamafactory.main(words)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_with_llamafactory_itself(tmp_path, stage, monkeypatch):
    pytest.importorskip("llamafactory")
    monkeypatch.chdir(tmp_path)
    base().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    rows = [{"instruction": f"What is {i}?", "output": "No.", "chosen": "No.", "rejected": "Yes."} for i in range(8)]
    Path("rows.json").write_text(json.dumps(rows))
    columns = {"sft": {"prompt": "instruction", "response": "output"}}
    columns["dpo"] = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {"rows": {"file_name": "rows.json", "ranking": stage == "dpo", "columns": columns[stage]}}
    Path("dataset_info.json").write_text(json.dumps(info))
    config = {
        "model_name_or_path": "model",
        "template": "default",
        "stage": stage,
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": ".",
        "cutoff_len": 128,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "output_dir": "out",
        "ogpsa": {"references": ROWS, "reference_samples": 4, "reference_max_length": 128, "subspace_rank": 8},
    }
    steps, at_step_end = [], ToolCallback.on_step_end

    def measured(self, args, state, control, model, **others):
        steps.append((projector_of(model).steps, leak(model), weights(model)))
        return at_step_end(self, args, state, control, model=model, **others)

    monkeypatch.setattr(ToolCallback, "on_step_end", measured)
    llamafactory.main([write(tmp_path / "run.yaml", config)])
    assert [count for count, _, _ in steps] == [1, 2, 3]
    assert max(leaked for _, leaked, _ in steps) < 1e-6
    values = steps[-1][2]
    assert any(value.abs().sum() > 0 for name, value in values.items() if "lora_B" in name)
    assert json.loads(Path("out/adapter_config.json").read_text())["peft_type"] == "LORA"


# axolotl

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


@pytest.fixture
def plugin(monkeypatch):
    """The plugin, over axolotl's own base class or one with the methods that the plugin defines."""
    try:
        importlib.import_module("axolotl.integrations.base")
    except ImportError:
        contract = types.ModuleType("axolotl.integrations.base")
        contract.BasePlugin = type(
            "BasePlugin",
            (),
            {
                "register": lambda self, cfg: None,
                "get_input_args": lambda self: None,
                "add_callbacks_pre_trainer": lambda self, cfg, model: [],
            },
        )
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "axolotl.integrations.base", contract)
        monkeypatch.delitem(sys.modules, "peft_ogpsa.integrations.axolotl", raising=False)
    pytest.importorskip("pydantic")
    module = importlib.import_module("peft_ogpsa.integrations.axolotl")
    yield module.OGPSAPlugin()
    sys.modules.pop("peft_ogpsa.integrations.axolotl", None)


def axolotl_config(**options):
    return {"adapter": "lora", "ogpsa": {"references": ROWS, "subspace_rank": 3}, **options}


def test_axolotl_finds_the_options(plugin):
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert list(arguments.model_fields) == ["ogpsa"]
    options = {"references": ROWS, "reference_budget": None}
    assert arguments(ogpsa=options).ogpsa == options
    assert arguments().ogpsa is None


def test_axolotl_gets_the_callback(plugin):
    config = axolotl_config(rl_beta=0.3, seed=5)
    plugin.register(config)
    assert all(config[name] is False for name in KERNELS)
    (callback,) = plugin.add_callbacks_pre_trainer(config, plain())
    assert type(callback) is ToolCallback
    assert (callback.seed, callback.config.subspace_rank, callback.reference_sets[0].beta) == (5, 3, 0.3)


@pytest.mark.parametrize(
    ("options", "beta"),
    [({"trl": {"beta": 0.5}, "rl_beta": 0.3}, 0.5), ({"trl": {}, "dpo_beta": 0.2}, 0.2), ({"trl": None}, 0.1)],
)
def test_axolotl_gives_its_beta(plugin, options, beta):
    (callback,) = plugin.add_callbacks_pre_trainer(axolotl_config(**options), plain())
    assert callback.reference_sets[0].beta == beta


def test_axolotl_may_use_its_kernels_with_reference_gradients(plugin):
    config = axolotl_config(ogpsa={"references": ROWS, "subspace": "gradients"}, lora_mlp_kernel=True)
    plugin.register(config)
    assert [config[name] for name in KERNELS] == [True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ogpsa": None}, "names OGPSAPlugin, but there is no `ogpsa`"),
        ({"ogpsa": {"references": ROWS, "rnk": 3}}, "rnk is not an option"),
        ({"ogpsa": {}}, "references is missing"),
        ({"adapter": None}, "adapter=None makes no LoRA adapter"),
        ({"relora": True}, "relora: true merges the adapter into the base"),
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel: axolotl's fused LoRA kernels do not .* lora_mlp_kernel: false"),
    ],
)
def test_axolotl_says_what_is_wrong_before_it_loads_anything(plugin, options, message):
    with pytest.raises(ValueError, match=message):
        plugin.register(axolotl_config(**options))


def test_with_axolotl_itself():
    pytest.importorskip("axolotl")
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    config = DictDefault(yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text()))
    config["ogpsa"]["reference_budget"] = None
    config["ogpsa"]["reference_weight"] = 1.0
    prepare_plugins(config)
    capabilities = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_90"}
    valid = validate_config(config, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
    assert not any(valid[name] for name in KERNELS)
    (callback,) = PluginManager.get_instance().add_callbacks_pre_trainer(valid, plain())
    assert callback.config.reference_budget is None
    assert [own.name for own in callback.reference_sets] == ["general", "arithmetic", "lookalikes"]
    assert {own.samples for own in callback.reference_sets} == {48}
    assert callback.seed == valid.seed


# ms-swift


@pytest.fixture
def callbacks_map(monkeypatch):
    """ms-swift's mapping of callbacks, or one like it."""
    try:
        return importlib.import_module("swift").callbacks_map
    except ImportError:
        made = types.ModuleType("swift")
        made.callbacks_map = {}
        monkeypatch.setitem(sys.modules, "swift", made)
        return made.callbacks_map


def test_swift_finds_the_callback_by_name(callbacks_map):
    swift.register({"references": ROWS, "subspace_rank": 3})
    callback = callbacks_map["ogpsa"](types.SimpleNamespace(seed=5, beta=0.3), None)
    assert type(callback) is ToolCallback
    assert (callback.seed, callback.config.subspace_rank, callback.reference_sets[0].beta) == (5, 3, 0.3)
    swift.register({"references": ROWS}, name="other")
    assert callbacks_map["other"](types.SimpleNamespace(seed=5), None).reference_sets[0].beta == 0.1


def test_swift_resumes_from_the_checkpoint_that_it_names(callbacks_map):
    swift.register({"references": ROWS})
    arguments = types.SimpleNamespace(seed=0, resume_from_checkpoint="v0/checkpoint-5")
    assert callbacks_map["ogpsa"](arguments, None).resume_from == "v0/checkpoint-5"
    swift.register({"references": ROWS, "resume_from": "elsewhere"})
    assert callbacks_map["ogpsa"](arguments, None).resume_from == "elsewhere"


def test_swift_says_what_is_wrong_when_the_plugin_is_imported(callbacks_map):
    with pytest.raises(ValueError, match="rnk is not an option"):
        swift.register({"references": ROWS, "rnk": 3}, name="wrong")
    assert "wrong" not in callbacks_map


def test_the_example_for_swift_is_a_plugin(callbacks_map, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("ms_swift_plugin")
    callback = callbacks_map["ogpsa"](types.SimpleNamespace(seed=0, beta=None), None)
    assert [own.name for own in callback.reference_sets] == ["general", "arithmetic", "lookalikes"]


# Fused kernels


def fuse(model):
    """Let the MLPs read the weights of their layers without calling the layers, as fused kernels do."""

    def forward(mlp, x):
        def apply(layer, x):
            out = functional.linear(x, layer.base_layer.weight)
            if layer.disable_adapters:
                return out
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            return out + layer.scaling["default"] * functional.linear(functional.linear(x, a), b)

        return apply(mlp.down_proj, functional.silu(apply(mlp.gate_proj, x)) * apply(mlp.up_proj, x))

    for layer in model.get_base_model().model.layers:
        layer.mlp.forward = types.MethodType(forward, layer.mlp)
    return model


def test_kernels_compute_the_same():
    model = randomize(plain()).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(fuse(model)(input_ids=ids).logits, expected)


def test_an_activation_subspace_under_kernels_is_refused_with_the_remedy(tmp_path):
    model = fuse(plain())
    before = weights(model)
    options = OGPSAConfig(subspace_rank=8)
    with pytest.raises(ValueError, match=r"6 adapted layers are not called .*fused kernels .*turn the kernels off"):
        sft(tmp_path, model, [ToolCallback(sets(), config=options)]).train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_steps_under_kernels_are_projected(tmp_path):
    """The subspace is built with the layers; the kernels come after it."""

    def trained(folder, change):
        model = plain()
        trainer = sft(tmp_path / folder, model, [ToolCallback(sets(), config=OGPSAConfig(subspace_rank=8))])
        trainer.train()
        change(model)
        sft(tmp_path / folder, model, [ToolCallback(sets(), config=OGPSAConfig(subspace_rank=8))]).train()
        assert leak(model) < 1e-6
        return weights(model)

    expected = trained("layers", lambda model: model)
    fused = trained("kernels", fuse)
    for name, value in fused.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_reference_gradients_under_kernels_constrain_the_step():
    model = fuse(randomize(plain()))
    projector = attach(model, OGPSAConfig(subspace="gradients", rows=8, refresh_steps=2))
    assert projector_of(model) is projector
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    violations = list(step_violations(model, optimizer, projector=projector))
    assert max(violations) < 1e-5
    assert projector.steps == len(violations)


# The page and the examples


@pytest.mark.parametrize("name", ["axolotl", "llamafactory"])
def test_the_examples_can_be_read(name):
    config = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    settings = Settings.read(config["ogpsa"])
    assert [own.name for own in settings.sets] == ["general", "arithmetic", "lookalikes"]


def test_the_example_for_llamafactory_can_be_read():
    config, _ = llamafactory.read([str(EXAMPLES / "llamafactory.yaml")])
    assert "ogpsa" not in config


def test_the_page_names_every_option_of_data_and_run():
    text = GUIDE.read_text()
    assert all(f"`{name}`" in text for name in DATA + RUN)
    assert not set(DATA + RUN) & set(PROJECTION)
