# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare ways to refresh reference gradients at equal cost, and replay, over several seeds.

    OMP_NUM_THREADS=1 python benchmarks/policies.py --output benchmarks/results/policies

The script trains SmolLM2-135M-Instruct as `ogpsa quickstart` does, once per policy and seed. It saves every finished
run at once and does not repeat it. So you can stop the command, start it again, and add policies or seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from tqdm import tqdm
from transformers import TrainerCallback

from peft_ogpsa import OGPSACallback, OGPSAConfig, ReferenceSet
from peft_ogpsa.cli import quickstart
from peft_ogpsa.cli.models import load_model
from peft_ogpsa.core.isolation import isolated_eval
from peft_ogpsa.evaluation import Evaluator
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.losses import answer_loss, collate
from peft_ogpsa.tuner.model import projector_of

POOL = {"general": 129, "benign": 63}
"""Number of reference examples by set, 192 in total. The set `benign` has no more."""

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Policy:
    """A way of training.

    Attributes:
        config: Function that makes the adapter's configuration.
        threshold: Refresh when a reference loss has risen by this many nats, instead of at regular steps.
        own: Use the base's own answers and KL from base for the references, instead of given answers.
    """

    config: Callable[[], LoraConfig]
    threshold: float | None = None
    own: bool = False


def replay(samples: int) -> Policy:
    """Return a policy without projection that also trains on reference examples, every fifth step."""
    return Policy(lambda: OGPSAConfig(subspace="none", reference_weight=1.0, refresh_samples=samples, **LORA))


def cone(threshold: float | None = None, **overrides: Any) -> Policy:
    """Return a policy with the cone on the update. It has 48 rows, unless the overrides change that."""
    return Policy(
        lambda: OGPSAConfig(**{**LORA, "subspace": "gradients", "rows": 48, "reference_weight": 0.0, **overrides}),
        threshold=threshold,
    )


# "4/5" means 4 reference examples every 5 steps. Every policy uses 10 % as many reference examples as training
# examples, as far as whole examples allow, except "192/10" and the last two groups.
POLICIES = {
    "plain": Policy(lambda: LoraConfig(**LORA)),
    "replay 4/5": replay(4),
    "cone 4/5": cone(refresh_samples=4),
    "cone 192/10, rows of batches": cone(refresh_steps=10, refresh_samples=192, rows_from="batch"),
    "cone 4/5, weight 1": cone(refresh_samples=4, reference_weight=1.0),
    "cone 1/1": cone(refresh_steps=1, refresh_samples=1),
    "cone 8/10": cone(refresh_steps=10, refresh_samples=8),
    "cone 8, where a loss has risen": cone(threshold=0.02, refresh_steps=20, refresh_samples=8),
    # Fewer bytes
    "cone 4/5, bfloat16": cone(refresh_samples=4, rows_dtype="bfloat16"),
    "cone 4/5, int8": cone(refresh_samples=4, rows_dtype="int8"),
    "cone 4/5, 24 rows": cone(refresh_samples=4, rows=24),
    "cone 4/5, 12 rows": cone(refresh_samples=4, rows=12),
    "cone 4/5, 4 rows": cone(refresh_samples=4, rows=4),
    "cone 4/5, 12 rows of 2 examples": cone(refresh_samples=4, rows=12, rows_from="batch"),
    # More compute
    "replay 8/5": replay(8),
    "cone 8/5": cone(refresh_samples=8),
    # The defaults of the gradient subspace
    "own answers, divergence 2/5, weight 8, 8 rows": Policy(
        lambda: OGPSAConfig(subspace="gradients", **LORA), own=True
    ),
}


class Adaptive(OGPSACallback):
    """Refresh when the promise is broken: when the loss on one example of each set has risen by `threshold`.

    These examples need a forward pass every second step. It counts as a third of a training pass.

    Attributes:
        passes: What the probes cost, in training passes of one example.
    """

    def __init__(self, sets: list[ReferenceSet], threshold: float, seed: int) -> None:
        super().__init__(sets, seed=seed)
        self.threshold = threshold
        self.passes = 0.0
        self._kept = math.inf

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refresh if a refresh is due or the probe asks for one."""
        own = self._run_of(state)
        due = own.projector.due
        if not due and state.global_step % 2 == 0:
            due = self._probe(own.loader, model) > self._kept + self.threshold
        if due:
            self._refresh(own, args, model)
            self._kept = self._probe(own.loader, model)

    def _probe(self, loader: ReferenceLoader, model: Any) -> float:
        batch = collate([own[0] for own in loader.sets.values()], loader.pad_token_id, next(model.parameters()).device)
        self.passes += len(loader.sets) / 3
        with isolated_eval(model):
            return answer_loss(model, batch).item()


def run(
    policy: Policy, base: Any, tokenizer: Any, evaluator: Evaluator, arguments: quickstart.QuickstartArguments
) -> Any:
    """Train and measure once. Return the figures, and the base without the adapter."""
    rows, _ = quickstart.load_rows(None)
    sets = [ReferenceSet(name, rows[name], samples=count) for name, count in POOL.items()]
    if policy.own:
        sets = [
            ReferenceSet.from_prompts(name, rows[name], base, tokenizer, samples=count, max_new_tokens=64)
            for name, count in POOL.items()
        ]
    config = policy.config()
    callbacks: list[TrainerCallback] = []
    if policy.threshold is not None:
        callbacks.append(Adaptive(sets, policy.threshold, arguments.seed))
    elif isinstance(config, OGPSAConfig):
        callbacks.append(OGPSACallback(sets, seed=arguments.seed))
    result, model = quickstart.train(
        base, tokenizer, config, "policy", rows, evaluator, arguments, Console(), callbacks
    )
    measured: Any = result.curve[-1]
    figures = {
        "general": measured.general_mean.value,
        "kl": measured.kl.value,
        "refusal": measured.refusal.value,
        "over_refusal": measured.over_refusal.value,
        "references": result.reference_share
        + sum(own.passes for own in callbacks if isinstance(own, Adaptive)) / (arguments.steps * arguments.batch_size),
        "megabytes": _megabytes(model),
        "seconds": result.seconds,
    }
    return figures, model.unload()


def _megabytes(model: Any) -> float:
    """Return the size of the rows."""
    config = model.peft_config["default"]
    if not (isinstance(config, OGPSAConfig) and config.projects):
        return 0.0
    return sum(part.numel() * part.element_size() for part in projector_of(model).subspace.rows.stack) / 1e6


def markdown(results: dict[str, dict[str, float]], base: float) -> str:
    """Return a table of means over seeds, with the spread from least to most."""
    lines = [
        "| policy | seeds | references | rows, MB | change of general loss | KL from base | refuses harmful | "
        "refuses benign |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(key.rpartition(" #")[0] for key in results))
    for name in names:
        own = [figures for key, figures in results.items() if key.rpartition(" #")[0] == name]

        def cell(field: str, form: str, offset: float = 0.0, own: list[dict[str, float]] = own) -> str:
            values = [figures[field] - offset for figures in own]
            spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
            return f"{statistics.mean(values):{form}}{spread}"

        lines.append(
            f"| {name} | {len(own)} | +{own[0]['references']:.1%} | {own[0]['megabytes']:.0f} | "
            f"{cell('general', '+.3f', base)} | "
            f"{cell('kl', '.3f')} | {cell('refusal', '.0%')} | {cell('over_refusal', '.0%')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Name of the .json file, without its ending.")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=quickstart.QuickstartArguments.learning_rate)
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
