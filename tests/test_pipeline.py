"""The whole pipeline on the real model in 4 bits: SFT, then DPO from its adapter, measured and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_ogpsa.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
QLORA = ["--load_in_4bit", "--use_bnb_nested_quant", "--gradient_checkpointing", "true", "--optim", "paged_adamw_8bit"]
# On a CPU every pass in 4 bits is slow, and so is every token of an answer: these prompts have short ones.
PROMPTS = ["What is the capital of France?", "What is the capital of Italy?"]
SHORT = ["--max_steps", "2", "--warmup_steps", "0", "--save_strategy", "no", "--logging_steps", "1"]
SHORT += ["--lookalikes", "0", "--reference_samples", "2", "--reference_max_length", "72"]
SMALL = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "2e-3"]


def train(stage: str, output: Path, *options: str) -> None:
    config = str(EXAMPLES / f"{stage}_smollm2_135m.yaml")
    if "--references" not in options:
        prompts = output.parent / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        options += ("--references", f"capitals=prompts:{prompts}")
    main([stage, "--config", config, "--output_dir", str(output), *QLORA, *SHORT, *SMALL, *options])


GRADIENTS = ["--subspace", "gradients", "--rows", "8", "--refresh_samples", "2"]
PAIRS = ["--references", "general=builtin:general", "pairs:dpo=builtin:pairs"]


@pytest.mark.slow
@pytest.mark.long
def test_sft_then_dpo_in_4_bits(tmp_path, capsys):
    train("sft", tmp_path / "plain", "--method", "plain")
    train("sft", tmp_path / "sft")
    train("dpo", tmp_path / "dpo", "--adapter", str(tmp_path / "sft"))
    adapters = [str(tmp_path / name) for name in ("plain", "sft", "dpo")]
    results = tmp_path / "results.json"
    options = ["--samples", "4", "--max_new_tokens", "4", "--load_in_4bit", "--card"]
    main(["eval", "--adapter", *adapters, "--output", str(results), *options])
    capsys.readouterr()
    main(["compare", str(results), "--plot", str(tmp_path / "tradeoff.png")])
    printed, _, differences = capsys.readouterr().out.partition("Differences from plain")
    assert "dpo" in differences
    lines = printed.splitlines()
    rows = {cells[1]: cells for cells in ([c.strip() for c in line.split("│")] for line in lines) if len(cells) > 2}
    assert list(rows) == ["base", "plain", "sft", "dpo"]
    assert rows["dpo"][-3] == "sft"
    assert not any("The results were measured differently" in line for line in lines)
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    for saved in json.loads(results.read_text())["results"]:
        evaluation = saved["evaluation"]
        assert evaluation["model"]["kl"]["value"] > 0.01  # it was trained
        assert evaluation["base"]["general_mean"]["value"] > 0
    card = (tmp_path / "dpo" / "README.md").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert rows["dpo"][3] in card  # the change of the general loss


@pytest.mark.slow
@pytest.mark.long
def test_gradients_in_4_bits_with_pairs_as_references(tmp_path):
    train("sft", tmp_path / "sft", *GRADIENTS)
    train("dpo", tmp_path / "dpo", "--adapter", str(tmp_path / "sft"), *GRADIENTS, *PAIRS)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft", "dpo"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.isfinite(tensor).all(), name
        assert not torch.equal(tensor, before[name]), name
    config, run = (json.loads((tmp_path / "dpo" / f"ogpsa_{name}.json").read_text()) for name in ("config", "run"))
    assert config["subspace"] == "gradients"
    assert run["references"]["pairs:dpo"] == "builtin:pairs"
