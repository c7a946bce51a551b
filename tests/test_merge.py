"""Merging into full weights, for an adapter trained on a 4-bit base too."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
import transformers
from loops import LORA
from models import randomize, tiny_llama, tiny_tokenizer, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from peft_ogpsa import OGPSAConfig, merge_adapter

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def folders(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(hidden_size=64, vocab_size=259).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    four_bit = AutoModelForCausalLM.from_pretrained(base, quantization_config=FOUR_BIT, dtype=torch.float32)
    randomize(get_peft_model(four_bit, OGPSAConfig(**LORA))).save_pretrained(adapter)
    return base, adapter


def test_merged_model_is_the_unquantized_base_with_the_adapter(folders, tmp_path):
    base, adapter = folders
    merged = merge_adapter(adapter, tmp_path / "merged", dtype=torch.float32)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        wanted = expected(tokens()).logits
        torch.testing.assert_close(merged(tokens()).logits, wanted, rtol=1e-4, atol=1e-5)
        assert (plain(tokens()).logits - wanted).abs().max() > 1e-2
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(saved(tokens()).logits, wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert merge_adapter(adapter).dtype == torch.bfloat16


def test_quantized_base_is_refused(folders, tmp_path):
    base, adapter = folders
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=FOUR_BIT, dtype=torch.float32)
    model.save_pretrained(tmp_path / "four_bit")
    with pytest.raises(ValueError, match=r"is stored quantized.*base=NAME"):
        merge_adapter(adapter, base=tmp_path / "four_bit")


@pytest.mark.parametrize("adapted", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_is_merged_into_it_alone(adapted, tmp_path):
    tiny_llama(vocab_size=259, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = OGPSAConfig(**LORA | {"target_modules": ["q_proj", adapted]}, subspace="gradients")
    model = randomize(get_peft_model(base, config)).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        wanted = model(tokens()).logits
        for own in (merged, saved):
            torch.testing.assert_close(own(tokens()).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_the_base_is_of_the_revision_that_the_adapter_names(given, folders, monkeypatch):
    base, adapter = folders
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"revision": "abc123"}))
    load, asked = AutoModelForCausalLM.from_pretrained, []

    def loaded(name, revision=None, **settings):
        asked.append(revision)
        return load(name, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    merge_adapter(adapter, base=base if given else None)
    assert asked == [None if given else "abc123"]


def test_an_adapter_with_a_head_of_its_own_is_refused(tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    base = tiny_llama(cls=LlamaForSequenceClassification)
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"task_type='SEQ_CLS'.*would lose the trained head"):
        merge_adapter(tmp_path)


def test_a_merged_model_answers_as_the_saved_one(folders, tmp_path):
    """The frequencies of positions are computed in float32, also in the returned model."""
    merged = merge_adapter(folders[1], tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert {own.dtype for own in merged.buffers()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens()).logits, again(tokens()).logits, rtol=0, atol=0)


def test_what_transformers_keeps_in_float32_stays_so(folders, tmp_path, monkeypatch):
    """Biases of routers, for example."""
    base, adapter = folders
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    merged = merge_adapter(adapter, tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    expected = {name: own.dtype for name, own in plain.named_parameters()}
    assert {torch.float32, torch.bfloat16} == set(expected.values())
    assert {name: own.dtype for name, own in merged.named_parameters()} == expected
    assert {name: own.dtype for name, own in saved.items()} == {name: expected[name] for name in saved}


def qwen35(folder):
    """A model that AutoModelForCausalLM loads with another class, whose layers have other names."""
    if not hasattr(transformers, "Qwen3_5ForConditionalGeneration"):
        pytest.skip("transformers is older than Qwen3.5")
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 0, 0],
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
        },
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    tokens = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return transformers.Qwen3_5ForConditionalGeneration, AutoModelForCausalLM


@pytest.mark.parametrize("place", [0, 1], ids=["the class that the configuration names", "AutoModelForCausalLM"])
def test_a_base_of_two_classes_gets_the_one_that_the_adapter_fits(place, tmp_path):
    kind = qwen35(tmp_path / "base")[place]
    base = kind.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = LORA | {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    model = randomize(get_peft_model(base, OGPSAConfig(subspace="gradients", **settings))).eval()
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", dtype=torch.float32).eval()
    assert type(merged) is type(model.get_base_model())
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - wanted).abs().max() > 1e-2


def test_the_first_class_is_freed_before_the_second_is_loaded(tmp_path, monkeypatch):
    kind, _ = qwen35(tmp_path / "base")
    base = kind.from_pretrained(tmp_path / "base", dtype=torch.float32)
    get_peft_model(base, LoraConfig(**LORA | {"target_modules": ["up_proj"]})).save_pretrained(tmp_path / "adapter")
    load, earlier = transformers.PreTrainedModel.from_pretrained.__func__, []

    def loaded(cls, *arguments, **options):
        assert [own() for own in earlier] == [None] * len(earlier)
        model = load(cls, *arguments, **options)
        earlier.append(weakref.ref(model))
        return model

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loaded))
    assert type(merge_adapter(tmp_path / "adapter")) is kind
    assert len(earlier) == 2


def test_an_adapter_without_weights_for_its_layers_is_refused(folders, tmp_path):
    _, adapter = folders
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({f"other.{name}": value for name, value in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter=.* does not fit base=.*no weights for some of the layers"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
