"""OGPSAModel behaves as LoRA does, everywhere, and its projector is found from everywhere."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from coverage_page import SAME, covers
from loops import LORA, batch, loss_of, ogpsa_model, parameters_of, references
from models import VOCABULARY, randomize, tiny_bert, tiny_llama, tiny_mixtral, tiny_t5, tokens
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForSequenceClassification,
)

from peft_ogpsa import OGPSAConfig, OGPSAModel
from peft_ogpsa.core import hooks
from peft_ogpsa.core.projector import Projector
from peft_ogpsa.tuner.model import projector_of

LINEARS = ["q_proj", "v_proj"]


def both(factory, **overrides):
    """The same adapter on the same model, once as LoRA and once as OGPSA."""
    models = []
    for config_cls in (LoraConfig, OGPSAConfig):
        base = factory()
        torch.manual_seed(1)
        # Which goes with everything that LoRA does.
        own = {"subspace": "gradients"} if config_cls is OGPSAConfig else {}
        models.append(get_peft_model(base, config_cls(**own, **overrides)))
    return models


def assert_same_parameters(lora, ogpsa):
    theirs, ours = dict(lora.named_parameters()), dict(ogpsa.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(parameter, ours[name]), name
        assert parameter.requires_grad == ours[name].requires_grad, name
        assert parameter.dtype == ours[name].dtype
    assert list(ogpsa.state_dict()) == list(lora.state_dict())


def outputs(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs).to_tuple()[0]


def assert_same_outputs(lora, ogpsa, **inputs):
    inputs = inputs or {"input_ids": tokens()}
    assert torch.equal(outputs(lora, **inputs), outputs(ogpsa, **inputs))


def llama_pair(seed=0, **overrides):
    lora, ogpsa = both(tiny_llama, **{"r": 4, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **overrides})
    return randomize(lora, seed), randomize(ogpsa, seed)


def ogpsa_llama(**overrides):
    return llama_pair(**overrides)[1]


# One adapter


LORAS = [
    {},
    {"target_modules": None},
    {"target_modules": "all-linear"},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"layers_to_transform": [1]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"modules_to_save": ["lm_head"]},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    {"use_dora": True},
    {"use_rslora": True},
    {"lora_bias": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa"},
    {"layer_replication": [[0, 2], [1, 2]]},
    {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    {"trainable_token_indices": [5, 6]},
    {"lora_dropout": 0.5},
]


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(own, marks=covers(SAME, *(own.keys() - {"lora_dropout"}))) for own in LORAS],  # in eval mode
    ids=lambda overrides: ",".join(overrides) or "plain",
)
def test_same_as_lora(overrides):
    lora, ogpsa = both(tiny_llama, **{"r": 4, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **overrides})
    assert isinstance(ogpsa.base_model, OGPSAModel)
    assert_same_parameters(lora, ogpsa)
    randomize(lora)
    randomize(ogpsa)
    assert_same_outputs(lora, ogpsa)
    assert not torch.equal(outputs(ogpsa, input_ids=tokens()), outputs(tiny_llama(), input_ids=tokens()))
    assert ogpsa.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()
    assert ogpsa.base_model.targeted_module_names == lora.base_model.targeted_module_names


@covers(SAME, "bias")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_same_as_lora_with_bias(bias):
    lora, ogpsa = both(tiny_bert, r=4, target_modules=["query"], bias=bias)
    assert_same_parameters(lora, ogpsa)
    assert any(p.requires_grad and name.endswith("bias") for name, p in ogpsa.named_parameters())
    assert_same_outputs(randomize(lora), randomize(ogpsa))


IDS = tokens()
MASK = torch.ones_like(IDS)


@covers(SAME, "task_type")
@pytest.mark.parametrize(
    ("task_type", "factory", "inputs"),
    [
        ("CAUSAL_LM", tiny_llama, {"labels": IDS}),
        ("SEQ_CLS", lambda: tiny_bert(cls=BertForSequenceClassification), {"labels": torch.tensor([0, 1])}),
        ("SEQ_CLS", lambda: tiny_llama(cls=LlamaForSequenceClassification), {"labels": torch.tensor([0, 1])}),
        ("TOKEN_CLS", lambda: tiny_bert(cls=BertForTokenClassification), {"labels": torch.zeros_like(IDS)}),
        (
            "QUESTION_ANS",
            lambda: tiny_bert(cls=BertForQuestionAnswering),
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        ),
        ("FEATURE_EXTRACTION", tiny_bert, {}),
        ("SEQ_2_SEQ_LM", tiny_t5, {"labels": IDS}),
        (None, tiny_llama, {"labels": IDS}),
    ],
    ids=["causal", "sequence-bert", "sequence-llama", "token", "question", "feature", "seq2seq", "none"],
)
def test_every_task_type(task_type, factory, inputs):
    lora, ogpsa = both(factory, r=4, task_type=task_type)
    assert type(ogpsa) is type(lora)
    assert_same_parameters(lora, ogpsa)
    randomize(lora)
    randomize(ogpsa)
    assert_same_outputs(lora, ogpsa, input_ids=IDS, attention_mask=MASK, **inputs)
    loss = ogpsa(input_ids=IDS, attention_mask=MASK, **inputs)[0].float().mean()
    loss.backward()
    trained = [name for name, p in ogpsa.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in lora.named_parameters() if p.requires_grad]
    assert all(p.grad is not None for p in ogpsa.parameters() if p.requires_grad)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.convolution = nn.Conv2d(1, 3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, input_ids):
        return self.head(self.convolution(self.embedding(input_ids)[:, None]).mean((2, 3)))


def test_layers_of_every_kind_in_a_plain_module():
    def factory():
        torch.manual_seed(0)
        return Convolutional()

    lora, ogpsa = both(factory, r=4, target_modules=["embedding", "convolution", "head"])
    assert_same_parameters(lora, ogpsa)
    randomize(lora)
    randomize(ogpsa)
    assert torch.equal(lora(tokens()), ogpsa(tokens()))
    assert torch.equal(lora.merge_and_unload()(tokens()), ogpsa.merge_and_unload()(tokens()))


def test_no_matching_target_is_pefts_error():
    with pytest.raises(ValueError, match=r"Target modules .*nothing_like_it.* not found"):
        get_peft_model(tiny_llama(), OGPSAConfig(target_modules=["nothing_like_it"]))


def test_low_cpu_mem_usage():
    config = OGPSAConfig(r=4, target_modules=LINEARS)
    model = get_peft_model(tiny_llama(), config, low_cpu_mem_usage=True)
    assert {p.device.type for name, p in model.named_parameters() if "lora_" in name} == {"meta"}
    assert isinstance(model.projector, Projector)


def test_half_precision_adapters_are_cast_as_loras():
    lora, ogpsa = both(lambda: tiny_llama().to(torch.bfloat16), r=4, target_modules=LINEARS)
    assert_same_parameters(lora, ogpsa)
    assert {p.dtype for name, p in ogpsa.named_parameters() if "lora_" in name} == {torch.float32}


def test_gradient_checkpointing():
    lora, ogpsa = llama_pair()
    for model in (lora, ogpsa):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    for (name, theirs), ours in zip(lora.named_parameters(), ogpsa.parameters(), strict=True):
        if theirs.requires_grad:
            assert torch.equal(theirs.grad, ours.grad), name


def test_mixture_of_experts_targets_are_converted_as_loras():
    # names of transformers 4, which 5 fuses into parameters
    lora, ogpsa = both(tiny_mixtral, r=4, target_modules=["q_proj", "w1", "w2", "w3"], task_type="CAUSAL_LM")
    assert any("experts" in name for name, p in ogpsa.named_parameters() if "lora_" in name)
    assert_same_parameters(lora, ogpsa)
    assert_same_outputs(randomize(lora), randomize(ogpsa))
    assert ogpsa.peft_config["default"].peft_type is PeftType.OGPSA


def test_mamba_layers_that_lora_refuses():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    for config_cls in (LoraConfig, OGPSAConfig):
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            get_peft_model(transformers.MambaForCausalLM(config), config_cls(target_modules=["out_proj"]))


# Merging and removing


def test_merge_and_unload_speaks_as_before():
    lora, ogpsa = llama_pair(target_modules="all-linear")
    before = outputs(ogpsa, input_ids=tokens())
    merged = ogpsa.merge_and_unload()
    torch.testing.assert_close(outputs(merged, input_ids=tokens()), before, atol=1e-5, rtol=1e-5)
    assert_same_outputs(lora.merge_and_unload(), merged)
    assert list(merged.state_dict()) == list(tiny_llama().state_dict())


def test_unload_gives_the_base_back():
    ogpsa = ogpsa_llama()
    base = ogpsa.unload()
    assert torch.equal(outputs(base, input_ids=tokens()), outputs(tiny_llama(), input_ids=tokens()))
    again = get_peft_model(base, OGPSAConfig(r=4, target_modules=LINEARS))
    assert again.projector is projector_of(again)


def test_merge_and_unmerge_in_place():
    ogpsa = ogpsa_llama()
    before = outputs(ogpsa, input_ids=tokens())
    ogpsa.merge_adapter()
    torch.testing.assert_close(outputs(ogpsa, input_ids=tokens()), before, atol=1e-5, rtol=1e-5)
    with ogpsa.disable_adapter():
        torch.testing.assert_close(
            outputs(ogpsa, input_ids=tokens()), outputs(tiny_llama(), input_ids=tokens()), atol=1e-5, rtol=1e-5
        )
    ogpsa.unmerge_adapter()
    torch.testing.assert_close(outputs(ogpsa, input_ids=tokens()), before, atol=1e-5, rtol=1e-5)


def test_disable_adapter():
    ogpsa = ogpsa_llama()
    base = outputs(tiny_llama(), input_ids=tokens())
    adapted = outputs(ogpsa, input_ids=tokens())
    with ogpsa.disable_adapter():
        assert torch.equal(outputs(ogpsa, input_ids=tokens()), base)
    assert torch.equal(outputs(ogpsa, input_ids=tokens()), adapted)
    assert not torch.equal(adapted, base)


# Several adapters


def two_adapters():
    models = []
    for model, config_cls in zip(llama_pair(), (LoraConfig, OGPSAConfig), strict=True):
        torch.manual_seed(2)
        model.add_adapter("second", config_cls(r=4, target_modules=LINEARS, lora_alpha=32, task_type="CAUSAL_LM"))
        models.append(randomize(model))
    return models


def test_add_set_and_delete():
    lora, ogpsa = two_adapters()
    assert_same_parameters(lora, ogpsa)
    first = outputs(ogpsa, input_ids=tokens())
    for model in (lora, ogpsa):
        model.set_adapter("second")
    assert_same_parameters(lora, ogpsa)
    assert_same_outputs(lora, ogpsa)
    assert not torch.equal(outputs(ogpsa, input_ids=tokens()), first)
    for model in (lora, ogpsa):
        model.delete_adapter("second")
        model.set_adapter("default")
    assert_same_parameters(lora, ogpsa)
    assert list(ogpsa.peft_config) == ["default"]
    assert torch.equal(outputs(ogpsa, input_ids=tokens()), first)


def test_two_adapters_in_one_batch():
    lora, ogpsa = two_adapters()
    assert_same_outputs(lora, ogpsa, input_ids=tokens(), adapter_names=["second", "__base__"])


@pytest.mark.parametrize(
    "combination",
    [
        "linear",
        "cat",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_ties",
        "dare_linear_svd",
        "dare_ties_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
    ],
)
def test_weighted_combination(combination):
    pair = two_adapters()
    density = {} if combination in ("linear", "cat", "svd") else {"density": 0.5}
    for model in pair:
        torch.manual_seed(3)
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type=combination, **density)
        model.set_adapter("both")
    lora, ogpsa = pair
    assert isinstance(ogpsa.peft_config["both"], OGPSAConfig)
    assert ogpsa.peft_config["both"].peft_type is PeftType.OGPSA
    assert_same_parameters(lora, ogpsa)
    assert_same_outputs(lora, ogpsa)


def test_hotswap(tmp_path):
    first, second = ogpsa_llama(seed=1), ogpsa_llama(seed=2)
    second.save_pretrained(tmp_path)
    expected = outputs(second, input_ids=tokens())
    assert not torch.equal(outputs(first, input_ids=tokens()), expected)
    hotswap_adapter(first, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(outputs(first, input_ids=tokens()), expected)


def test_hotswap_refuses_what_lora_refuses(tmp_path):
    ogpsa_llama(use_rslora=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_rslora"):
        hotswap_adapter(ogpsa_llama(), str(tmp_path), "default", torch_device="cpu")


# Beside other types


@pytest.mark.parametrize(
    "other", [LoraConfig(target_modules=LINEARS), IA3Config(target_modules=LINEARS, feedforward_modules=[])]
)
def test_a_base_with_other_adapters_is_refused(other):
    config = OGPSAConfig(target_modules=LINEARS)
    injected = inject_adapter_in_model(other, tiny_llama())
    with pytest.raises(ValueError, match=rf"'default' \({other.peft_type.value}\).*merge_and_unload"):
        get_peft_model(injected, config)
    with pytest.raises(ValueError, match=rf"'default' \({other.peft_type.value}\).*merge_and_unload"):
        get_peft_model(get_peft_model(tiny_llama(), other), config)
    with pytest.raises(ValueError, match=r"'default' \(type unknown\)"):
        get_peft_model(nn.Sequential(injected), config)


def test_a_base_with_other_adapters_is_left_as_it_was():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=LINEARS))
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="LORA"):
        get_peft_model(model, OGPSAConfig(target_modules=LINEARS))
    assert list(model.state_dict()) == names
    get_peft_model(model.merge_and_unload(), OGPSAConfig(target_modules=LINEARS))


def test_a_model_with_an_adapter_is_no_base_for_another_one():
    with pytest.raises(ValueError, match=r"PeftModel and not a base model.*add_adapter"):
        get_peft_model(ogpsa_llama(), OGPSAConfig(target_modules=LINEARS))


def test_peft_refuses_to_add_another_type():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        ogpsa_llama().add_adapter("other", LoraConfig(target_modules=LINEARS))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        llama_pair()[0].add_adapter("other", OGPSAConfig(target_modules=LINEARS))


def test_a_mixed_model_takes_the_lora_view_only():
    config = OGPSAConfig(target_modules=LINEARS)
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(tiny_llama(), config, mixed=True)
    mixed = get_peft_model(tiny_llama(), config.lora_config(), mixed=True)
    with pytest.raises(ValueError, match="not compatible"):
        mixed.add_adapter("other", config)
    mixed.add_adapter("other", AdaLoraConfig(target_modules=["k_proj"], total_step=10))
    assert isinstance(mixed, PeftMixedModel)
    with pytest.raises(ValueError, match="PeftMixedModel has no OGPSA adapter"):
        projector_of(mixed)


# The projector


def test_the_projector_is_found_from_everywhere():
    model = ogpsa_llama()
    projector = model.projector
    assert isinstance(projector, Projector)
    wrappers = [model, model.base_model, model.get_base_model(), torch.compile(model), nn.Sequential(model)]
    assert [projector_of(wrapper) for wrapper in wrappers] == [projector] * len(wrappers)
    assert model.base_model.projector is torch.compile(model).projector is projector


def test_a_compiled_model_is_one_graph():
    model = ogpsa_llama()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, input_ids=tokens()), outputs(model, input_ids=tokens()))


def test_the_projector_is_no_part_of_the_model():
    lora, ogpsa = llama_pair()
    assert [name for name, _ in ogpsa.named_modules()] == [name for name, _ in lora.named_modules()]
    assert list(ogpsa.state_dict()) == list(lora.state_dict())


def test_without_an_adapter_there_is_no_projector():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no OGPSA adapter.*OGPSAConfig"):
        projector_of(tiny_llama())
    with pytest.raises(ValueError, match="no OGPSA adapter"):
        projector_of(llama_pair()[0])


@pytest.mark.parametrize("removed", ["unload", "merge_and_unload"])
def test_the_projector_goes_with_the_adapter(removed):
    base = getattr(ogpsa_llama(), removed)()
    with pytest.raises(ValueError, match="no OGPSA adapter"):
        projector_of(base)
    assert not [name for name in vars(base) if "ogpsa" in name]


def test_a_projector_without_an_adapter_says_so():
    model = ogpsa_llama()
    projector = model.projector
    model.delete_adapter("default")
    for ask in (lambda: projector.due, lambda: projector.config):
        with pytest.raises(ValueError, match=r"no adapter of this projector any more.*add_adapter"):
            ask()


def test_a_failed_unload_keeps_the_projector():
    model = ogpsa_llama()
    model.base_model._check_merge_allowed = lambda: (_ for _ in ()).throw(ValueError("not now"))
    with pytest.raises(ValueError, match="not now"):
        model.merge_and_unload()
    assert isinstance(model.projector, Projector)


def test_injection_keeps_the_projector_alive():
    base = tiny_llama()
    inject_adapter_in_model(OGPSAConfig(r=4, target_modules=LINEARS), base)
    gc.collect()
    assert isinstance(projector_of(base), Projector)
    lora = inject_adapter_in_model(LoraConfig(r=4, target_modules=LINEARS), tiny_llama())
    assert list(base.state_dict()) == list(lora.state_dict())


def test_a_second_injection_shares_the_projector():
    base = tiny_llama()
    inject_adapter_in_model(OGPSAConfig(r=4, target_modules=LINEARS), base)
    projector = projector_of(base)
    inject_adapter_in_model(OGPSAConfig(r=4, target_modules=LINEARS), base, "second")
    assert projector_of(base) is projector
    assert set(base.peft_config) == {"default", "second"}


def test_everything_is_freed():
    model = ogpsa_llama()
    gone = [weakref.ref(model.projector), weakref.ref(model.base_model), weakref.ref(model.get_base_model())]
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("injected", [False, True])
def test_a_copy_has_its_own_projector(copied, injected):
    model = tiny_llama()
    if injected:
        inject_adapter_in_model(OGPSAConfig(r=4, target_modules=LINEARS), model)
        inject_adapter_in_model(OGPSAConfig(r=4, target_modules=LINEARS), model, "second")
    else:
        model = get_peft_model(model, OGPSAConfig(r=4, target_modules=LINEARS))
    projector_of(model).rows_of_a_run = threading.Lock()  # which cannot be copied
    twin = copied(model)
    assert projector_of(twin) is not projector_of(model)
    assert not hasattr(projector_of(twin), "rows_of_a_run")
    assert_same_parameters(model, twin)
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in twin.parameters()}
    assert projector_of(twin).targets.model.model in list(twin.modules())
    assert_same_outputs(model, twin)


# transformers' own adapters


def test_transformers_add_set_disable_delete():
    models = []
    for config_cls in (LoraConfig, OGPSAConfig):
        model = tiny_llama()
        torch.manual_seed(1)
        model.add_adapter(config_cls(r=4, target_modules=LINEARS))
        model.add_adapter(config_cls(r=4, target_modules=LINEARS), "second")
        models.append(randomize(model))
    lora, ogpsa = models
    assert_same_parameters(lora, ogpsa)
    assert_same_outputs(lora, ogpsa)
    assert list(ogpsa.get_adapter_state_dict()) == list(lora.get_adapter_state_dict())
    for model in models:
        model.set_adapter("default")
    assert_same_parameters(lora, ogpsa)
    assert_same_outputs(lora, ogpsa)
    for model in models:
        model.disable_adapters()
    assert torch.equal(outputs(ogpsa, input_ids=tokens()), outputs(tiny_llama(), input_ids=tokens()))
    for model in models:
        model.enable_adapters()
        model.delete_adapter("default")
    assert_same_parameters(lora, ogpsa)
    assert_same_outputs(lora, ogpsa)
    ogpsa.delete_adapter("second")
    assert not ogpsa._hf_peft_config_loaded
    ogpsa.add_adapter(OGPSAConfig(r=4, target_modules=LINEARS), "third")
    assert projector_of(ogpsa).targets.model.peft_config is ogpsa.peft_config


def test_transformers_refuses_a_second_type():
    model = tiny_llama()
    model.add_adapter(LoraConfig(target_modules=LINEARS))
    with pytest.raises(ValueError, match=r"'default' \(LORA\)"):
        model.add_adapter(OGPSAConfig(target_modules=LINEARS), "second")


# 4 bit


@pytest.mark.slow
def test_a_4_bit_base(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def factory():
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}
        )
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    def logits(model):  # in training mode: on some CPUs bitsandbytes repacks 4-bit weights for good in evaluation mode
        with torch.no_grad():
            return model.train()(tokens()).logits

    lora, ogpsa = both(factory, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    assert type(ogpsa.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert_same_parameters(lora, ogpsa)
    assert torch.equal(logits(randomize(lora)), logits(randomize(ogpsa)))
    for model in (lora, ogpsa):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for (name, theirs), ours in zip(lora.named_parameters(), ogpsa.parameters(), strict=True):
        if theirs.requires_grad:
            assert torch.equal(theirs.grad, ours.grad), name
    ogpsa.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(factory(), tmp_path / "adapter")
    assert isinstance(loaded.base_model, OGPSAModel)
    assert torch.equal(logits(loaded), logits(ogpsa))


def test_transformers_may_delete_an_adapter_and_add_another_one():
    base = tiny_llama()
    projectors = []
    for _ in range(2):
        base.add_adapter(OGPSAConfig(subspace="gradients", rows=8, refresh_steps=2, reference_weight=0.0, **LORA))
        projectors.append(projector_of(base))
        projectors[-1].refresh(references(0), loss_of)
        loss_of(base, batch(0)).backward()
        torch.optim.AdamW(parameters_of(base), lr=1e-2).step()
        if len(projectors) == 1:
            base.delete_adapter("default")
    assert projectors[0] is not projectors[1]
    assert projectors[1].steps == 1
    assert projectors[0] not in hooks._watchers


def test_an_adapter_injected_again_under_its_name_is_a_new_one():
    config = OGPSAConfig(subspace="gradients", rows=8, refresh_steps=2, reference_weight=0.0, **LORA)
    base = inject_adapter_in_model(config, tiny_llama())
    projector = projector_of(base)
    projector.refresh(references(0), loss_of)
    assert not projector.due
    old = parameters_of(base)
    inject_adapter_in_model(config, base)
    assert parameters_of(base)[0] is not old[0]
    assert projector_of(base).due


def test_adapters_in_training_together_must_have_the_same_settings():
    model = ogpsa_model()
    model.add_adapter(
        "other", OGPSAConfig(subspace="gradients", rows=4, refresh_steps=2, reference_weight=0.0, **LORA)
    )
    assert model.projector.config.rows == 8
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\], have different OGPSA settings"):
        model.projector.refresh(references(0), loss_of)


def test_experts_that_peft_targets_as_parameters_are_refused_at_once():
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    plain = get_peft_model(tiny_mixtral(), LoraConfig(**settings)).peft_config["default"]
    if not plain.target_parameters:
        pytest.skip("with these versions, experts are linear layers")
    get_peft_model(tiny_mixtral(), OGPSAConfig(subspace="gradients", **settings))
    with pytest.raises(ValueError, match=r"the weights of experts\. Name the linear layers of the attention"):
        get_peft_model(tiny_mixtral(), OGPSAConfig(**settings))
    get_peft_model(tiny_mixtral(), OGPSAConfig(**{**settings, "target_modules": ["q_proj", "v_proj"]}))
