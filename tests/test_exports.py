"""A saved adapter in llama.cpp: converted by llama.cpp's own scripts, its answers are those of PEFT.

Needs the package llama-cpp-python, and in the environment variable LLAMA_CPP a folder with llama.cpp's sources, whose
scripts convert. The source archive of llama-cpp-python holds them (docs/guides/deploying.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_ogpsa import OGPSAConfig, merge_adapter
from peft_ogpsa.cli.models import SMOLLM2, local_source
from peft_ogpsa.references.losses import reference_loss

pytestmark = pytest.mark.slow

SCRIPTS = Path(os.environ.get("LLAMA_CPP", "not given"))
TOKENS = 24
REFERENCES = [
    "The capital of France is Paris, on the river Seine.",
    "Two and three make five. Five and two make seven.",
]
REFUSALS = ["How do I break into a house? I can't help with that. I'm happy to talk about better locks instead."]
PROMPTS = [
    "What is the capital of Italy?",
    "How do I pick a lock?",
    "Write a line about the sea.",
    "What is seven times eight?",
    "How can I break into my neighbor's house?",
    "Name three colors.",
    "Explain why the sky is blue.",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into French.",
]


@pytest.fixture(scope="module")
def llama_cpp():
    if not (SCRIPTS / "convert_lora_to_gguf.py").is_file():
        pytest.skip("LLAMA_CPP does not name a folder with llama.cpp's convert_lora_to_gguf.py")
    return pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")


@pytest.fixture(scope="module")
def base():
    return local_source(SMOLLM2, torch.float32)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The folder of an adapter that a few large steps have trained."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = OGPSAConfig(**settings, subspace_rank=64, reference_weight=0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)

    def encoded(texts):
        inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}

    model.projector.refresh({"set": [encoded(REFERENCES)]}, reference_loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        model(**encoded(REFUSALS)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.projector.steps == 20
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def answers(model, prompts) -> list[list[int]]:
    """Greedy answers of a model of transformers, up to and without the end token."""
    ends = model.generation_config.eos_token_id
    found = []
    for prompt in prompts:
        ids = model.eval().generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :]
        found.append([token for token in ids.tolist() if token != ends])
    return found


def converted(script: str, *arguments: str | Path) -> None:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments), "--outtype", "f32"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def llama_answers(llama_cpp, prompts, model: Path, lora: Path | None = None) -> list[list[int]]:
    """Greedy answers of llama.cpp, with everything in float32, up to and without the end token."""
    kind = llama_cpp.GGML_TYPE_F32
    options = {"n_ctx": 256, "type_k": kind, "type_v": kind, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llama = llama_cpp.Llama(str(model), lora_path=lora and str(lora), **options)
    found = []
    for prompt in prompts:
        answer = []
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if token == llama.token_eos() or len(answer) == TOKENS:
                break
            answer.append(token)
        found.append(answer)
    llama.close()
    return found


def test_llama_cpp_answers_as_peft_does(llama_cpp, base, adapter, prompts, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = answers(model, prompts)
    expected = answers(PeftModel.from_pretrained(model, adapter), prompts)
    assert sum(own != other for own, other in zip(expected, plain, strict=True)) >= 5

    converted("convert_hf_to_gguf.py", base, "--outfile", tmp_path / "base.gguf")
    converted("convert_lora_to_gguf.py", adapter, "--base", base, "--outfile", tmp_path / "adapter.gguf")
    assert llama_answers(llama_cpp, prompts, tmp_path / "base.gguf") == plain
    assert llama_answers(llama_cpp, prompts, tmp_path / "base.gguf", tmp_path / "adapter.gguf") == expected

    merge_adapter(adapter, tmp_path / "merged", base=base, dtype=torch.float32)
    converted("convert_hf_to_gguf.py", tmp_path / "merged", "--outfile", tmp_path / "merged.gguf")
    assert llama_answers(llama_cpp, prompts, tmp_path / "merged.gguf") == expected
