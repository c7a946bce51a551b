# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A tiny random chat model in a folder, for a rehearsal: `python -m benchmarks.gpu.toy FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..byte_tokenizer import byte_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make(folder: Path) -> None:
    """Write the model, and its tokenizer, whose tokens are bytes."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # The model repeats the alphabet. That passes for an answer, while a shorter cycle would not.
        ids = tokenizer.convert_tokens_to_ids([*LETTERS, "\u0120"])
        for place, (own, following) in enumerate(zip(ids, ids[1:] + ids[:1], strict=True)):
            model.get_input_embeddings().weight[own, place] = 1.0
            model.get_output_embeddings().weight[following, place] = 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
