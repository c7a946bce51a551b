# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Test the first-order promise on a real model, with training that conflicts with the references.

    python benchmarks/first_order.py --output benchmarks/results/first_order

The references are prompts with the model's own answers. The training rows are the same prompts, answered with
refusals, which is the hardest conflict. Rows are refreshed at every step and the learning rate is small, so that the
first-order approximation holds. The script writes a plot, and the curves as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model

from peft_ogpsa import OGPSAConfig, ReferenceSet, data
from peft_ogpsa.cli.models import load_model
from peft_ogpsa.core.isolation import isolated_eval
from peft_ogpsa.references.losses import answer_loss, collate
from peft_ogpsa.text.generation import generate_ids
from peft_ogpsa.text.tokenization import Example, encode_prompt

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
METHODS = {
    "plain LoRA": lambda rows: LoraConfig(**LORA),
    "paper's rule": lambda rows: OGPSAConfig.paper("sft", refresh_steps=1, **LORA),
    "OGPSA (cone on the update)": lambda rows: OGPSAConfig(
        subspace="gradients", refresh_steps=1, rows=rows, reference_weight=0.0, **LORA
    ),
}


def own_answers(model, tokenizer, prompts: list) -> list[Example]:
    """Return the model's own most likely answers to the prompts."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = generate_ids(model, tokenizer, ids, max_new_tokens=24, batch_size=8, sample=False, seed=0)
    return [Example(prompt + answer, len(prompt)) for prompt, answer in zip(ids, answers, strict=True)]


def curves(base, tokenizer, steps: int = 20, learning_rate: float = 7e-5, examples: int = 2) -> dict:
    """Train with every method, and return the reference losses and the training loss.

    The loss of each reference set is measured before every step and after the last one.

    Returns:
        `{method: {"general": [...], "benign": [...], "training": [...]}}`, in nats per token.
    """
    prompts = {name: [row["prompt"] for row in data.load(name)[:examples]] for name in ("general", "benign")}
    references = {name: collate(own_answers(base, tokenizer, own), 0, base.device) for name, own in prompts.items()}
    refusals = [row["completion"] for row in data.load("harmful")]
    conflicting = [
        {"prompt": prompt, "completion": refusal}
        for prompt, refusal in zip([p for own in prompts.values() for p in own], refusals, strict=False)
    ]
    training = collate(ReferenceSet("training", conflicting).tokenize(tokenizer), 0, base.device)
    results = {}
    for method, config in METHODS.items():
        torch.manual_seed(0)
        model = get_peft_model(base, config(len(prompts) * examples))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
        curve: dict[str, list[float]] = {"general": [], "benign": [], "training": []}
        for step in range(steps + 1):
            if method == "plain LoRA" or step == steps:
                with isolated_eval(model):
                    losses = {name: answer_loss(model, batch).item() for name, batch in references.items()}
            else:
                losses = model.projector.refresh({name: [b] for name, b in references.items()}, answer_loss)
            for name, loss in losses.items():
                curve[name].append(loss)
            if step < steps:
                loss = answer_loss(model, training)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                curve["training"].append(loss.item())
        results[method] = curve
        base = model.unload()
    return results


def plot(results: dict, path: Path) -> None:
    """Plot the change of the reference losses (mean over sets) and the training loss, step by step."""
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (method, curve) in zip(("#0072B2", "#D55E00", "#009E73"), results.items(), strict=True):
        change = [
            (g + b) / 2 - (curve["general"][0] + curve["benign"][0]) / 2
            for g, b in zip(curve["general"], curve["benign"], strict=True)
        ]
        left.plot(change, color=color, label=method, linewidth=2)
        right.plot(curve["training"], color=color, label=method, linewidth=2)
    left.axhline(0, color="#555555", linewidth=0.8, linestyle="--")
    left.set_title("reference loss, change from the base", loc="left", fontsize=11)
    right.set_title("training loss", loc="left", fontsize=11)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("first_order"), help="path without suffix")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=7e-5)
    parser.add_argument("--examples", type=int, default=2, help="examples in each reference set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    base, tokenizer, source = load_model(dtype=torch.float32, device=arguments.device)
    results = curves(base, tokenizer, arguments.steps, arguments.learning_rate, arguments.examples)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"model": source, "steps": arguments.steps, "learning_rate": arguments.learning_rate, "curves": results}
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(results, arguments.output.with_suffix(".png"))
    for method, curve in results.items():
        changes = ", ".join(f"{name} {curve[name][-1] - curve[name][0]:+.4f}" for name in ("general", "benign"))
        print(f"{method:28} {changes}, training {curve['training'][0]:.3f} -> {curve['training'][-1]:.3f}")


if __name__ == "__main__":
    main()
