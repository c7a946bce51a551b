"""Merging into full weights, for an adapter trained on a 4-bit base too."""

from __future__ import annotations

import pytest
import torch
from loops import LORA
from models import randomize, tiny_llama, tiny_tokenizer, tokens
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

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
