# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""How reference gradients are best spent: ways of refreshing at equal cost, over several seeds, beside replay.

    python benchmarks/policies.py --output docs/policies

Trains SmolLM2-135M-Instruct as `ogpsa quickstart` does, once for each policy and seed. Every finished run is written
down at once and not done again, so the command can be stopped and repeated, and more policies or seeds added.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import TrainerCallback

from peft_ogpsa import OGPSAConfig, ReferenceSet
from peft_ogpsa.cli import quickstart
from peft_ogpsa.cli.models import load_model
from peft_ogpsa.evaluation import Evaluator
from peft_ogpsa.reference import ReferenceLoader, answer_loss, collate

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Policy:
    """A way of training: an adapter's configuration, or plain LoRA with so many replayed examples every 5 steps."""

    config: Callable[[], LoraConfig]
    replay: int = 0


def cone(**knobs: Any) -> Policy:
    """The cone on the update, with settings of its own."""
    return Policy(lambda: OGPSAConfig(**{**LORA, **knobs}))


POLICIES = {
    "plain": Policy(lambda: LoraConfig(**LORA)),
    "replay 4/5": Policy(lambda: LoraConfig(**LORA), replay=4),
    "replay 8/5": Policy(lambda: LoraConfig(**LORA), replay=8),
    "cone 4/5": cone(refresh_samples=4),
    "cone 8/5": cone(refresh_samples=8),
    "cone 2/2": cone(refresh_steps=2, refresh_samples=2),
    "cone 8/10": cone(refresh_steps=10, refresh_samples=8),
    "cone 4/5, weight 1": cone(refresh_samples=4, reference_weight=1.0),
    "cone 4/5, 24 rows": cone(refresh_samples=4, rows=24),
    "cone 4/5, 12 rows": cone(refresh_samples=4, rows=12),
    "cone 4/5, bfloat16": cone(refresh_samples=4, rows_dtype="bfloat16"),
    "cone 192/10": cone(refresh_steps=10, refresh_samples=192, rows=48, rows_from="batch"),
}


class Replay(TrainerCallback):
    """Adds the mean gradient of some reference examples to every fifth step's."""

    def __init__(self, sets: list[ReferenceSet], tokenizer: Any, samples: int, seed: int) -> None:
        examples = {reference.name: reference.tokenize(tokenizer) for reference in sets}
        self._loader = ReferenceLoader(examples, samples, batch_size=8, seed=seed)
        self._pad = tokenizer.pad_token_id
        self.examples = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Adds the gradient."""
        if state.global_step % 5:
            return
        drawn = [batch for batches in self._loader.draw().values() for batch in batches]
        for batch in drawn:
            inputs = collate(batch, self._pad, next(model.parameters()).device)
            (answer_loss(model, inputs) / len(drawn)).backward()
            self.examples += len(batch)


def run(
    policy: Policy, base: Any, tokenizer: Any, evaluator: Evaluator, arguments: quickstart.QuickstartArguments
) -> Any:
    """Trains and measures once; returns the figures, and the base without adapter."""
    rows, _ = quickstart.load_rows(None)
    sets = [ReferenceSet(name, rows[name], samples=arguments.reference_samples) for name in ("general", "benign")]
    extra = [Replay(sets, tokenizer, policy.replay, arguments.seed)] if policy.replay else []
    result, model = quickstart.train(
        base, tokenizer, policy.config(), "policy", rows, evaluator, arguments, callbacks=extra
    )
    measured: Any = result.curve[-1]
    examples = arguments.steps * arguments.batch_size
    figures = {
        "general": measured.general_mean.value,
        "kl": measured.kl.value,
        "refusal": measured.refusal.value,
        "over_refusal": measured.over_refusal.value,
        "references": extra[0].examples / examples if extra else result.reference_share,
        "seconds": result.seconds,
    }
    return figures, model.unload()


def markdown(results: dict[str, dict[str, float]], base: float) -> str:
    """A table: means over seeds, with the spread from least to most."""
    lines = [
        "| policy | seeds | references | change of general loss | KL from base | refuses harmful | refuses benign |",
        "|---|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(key.rpartition(" #")[0] for key in results))
    for name in names:
        own = [figures for key, figures in results.items() if key.rpartition(" #")[0] == name]

        def cell(field: str, form: str, offset: float = 0.0, own: list[dict[str, float]] = own) -> str:
            values = [figures[field] - offset for figures in own]
            spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
            return f"{statistics.mean(values):{form}}{spread}"

        lines.append(
            f"| {name} | {len(own)} | +{own[0]['references']:.0%} | {cell('general', '+.3f', base)} | "
            f"{cell('kl', '.3f')} | {cell('refusal', '.0%')} | {cell('over_refusal', '.0%')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Name of the .json file, without its ending.")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path = arguments.output.with_suffix(".json")
    conditions = {
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "threads": torch.get_num_threads(),
    }
    report: dict[str, Any] = {"conditions": conditions, "base": None, "runs": {}}
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["conditions"] != conditions:
            raise SystemExit(
                f"{path} holds runs under other conditions, {report['conditions']}. Give another --output."
            )
    base, tokenizer, _ = load_model()
    _, test_rows = quickstart.load_rows(None)
    evaluator = Evaluator(
        tokenizer,
        harmful=test_rows["harmful"],
        benign=test_rows["benign"],
        general={"general": test_rows["general"]},
        divergence_prompts=test_rows["general"][:32],
        max_new_tokens=12,  # a refusal shows in its first words
        batch_size=32,
    )
    measured: Any = evaluator.base(base)
    report["base"] = measured.general_mean.value
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = [(name, seed) for seed in arguments.seeds for name in arguments.policies]
    for name, seed in tqdm([item for item in todo if f"{item[0]} #{item[1]}" not in report["runs"]], "Runs"):
        own = quickstart.QuickstartArguments(
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            reference_samples=48,
            measurements=1,
            seed=seed,
            output_dir=str(path.parent / ".policies"),
        )
        figures, base = run(POLICIES[name], base, tokenizer, evaluator, own)
        report["runs"][f"{name} #{seed}"] = figures
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(report["runs"], report["base"]))


if __name__ == "__main__":
    main()
