# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""`ogpsa eval`: measure what a model refuses and what it has lost, and do the same for its base."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from rich.console import Console
from transformers import HfArgumentParser
from trl import ModelConfig

from .. import data
from ..core.files import check_writable, replacing
from ..evaluation import Evaluation, TaskRunner, TaskScore, accuracy, evaluate, table, task_table
from ..sharing.card import read_run, save_card, weights_digest
from ..tuner.adapters import without_adapter
from .datasets import load_rows
from .errors import input_errors
from .loading import load_adapter, load_base, read_adapter_config
from .models import compute_dtype

_ANSWER_TOKENS = {"facts": 32, "arithmetic": 128}
"""Held-out sets with right answers, and the maximum number of tokens in an answer. Word problems need a few steps."""


@dataclass
class EvalArguments:
    """Options of `ogpsa eval`."""

    output: str = field(metadata={"help": "JSON file for the result. `ogpsa compare` reads it."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Base model: a folder or a name on the hub. By default, this is the base that the adapter names."
        },
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Saved adapter. If it is given, the base is measured too."}
    )
    card: bool = field(
        default=False, metadata={"help": "Also write the table to the model card in the adapter's folder."}
    )
    name: str | None = field(
        default=None,
        metadata={"help": "Name of the result in tables. By default, this is the name of the adapter or the model."},
    )
    data: str = field(
        default="builtin",
        metadata={
            "help": "Folder with harmful_test.jsonl, benign_test.jsonl and general_test.jsonl in the format of the "
            "built-in data. A kind whose file is missing is not measured. 'builtin' uses the built-in test rows, "
            "'heldout' the larger built-in sets of harmful prompts and look-alikes, the same general rows, and "
            "facts and arithmetic."
        },
    )
    samples: int | None = field(
        default=None, metadata={"help": "Maximum number of rows of each kind. By default, all rows are used."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the base's weights. By default, it is float32 on a CPU and bfloat16 elsewhere.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the base in 4 bits (nf4). This needs less memory and raises losses a little."},
    )
    max_new_tokens: int = field(
        default=32, metadata={"help": "Maximum number of tokens in an answer. A refusal shows in its first words."}
    )
    batch_size: int = field(
        default=16, metadata={"help": "Rows or prompts per batch. Larger batches are faster and need more memory."}
    )
    max_length: int = field(
        default=1024, metadata={"help": "Maximum number of tokens in a general row. Longer rows are cut off."}
    )
    seed: int = field(
        default=0, metadata={"help": "Random seed for the base's answers. KL from base is measured on these answers."}
    )

    tasks: str | None = field(
        default=None,
        metadata={
            "help": "lm-eval tasks, groups or tags, separated by commas: for example gsm8k,ifeval,arc_easy. "
            "ogpsa_refusal, ogpsa_over_refusal, ogpsa_facts and ogpsa_arithmetic come with this package. Needs the "
            "extra lm-eval."
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "Maximum number of examples per lm-eval task. By default, all are used."}
    )
    include_path: str | None = field(default=None, metadata={"help": "Folder with your own lm-eval task files."})
    chat_template: bool = field(
        default=True,
        metadata={
            "help": "Apply the chat template in lm-eval tasks. lm-eval's own command does so only with "
            "--apply_chat_template."
        },
    )

    def __post_init__(self) -> None:
        for name in ("samples", "limit", "max_new_tokens", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not (self.model or self.adapter):
            raise ValueError("model is missing. Give a folder or a name on the Hugging Face hub.")
        if self.card and not (self.adapter and Path(self.adapter).is_dir()):
            raise ValueError(
                f"card needs the folder of an adapter, but adapter={self.adapter!r} is not a folder. Give a folder as "
                "adapter, or leave out card."
            )
        for name in ("limit", "include_path"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without tasks. Give tasks, or leave out {name}."
                )
        if Path(self.output).suffix != ".json":
            raise ValueError(f"output={self.output!r} must be a .json file. Change the end of its name to .json.")


def load_test_rows(source: str, samples: int | None) -> dict[str, list[dict[str, Any]]]:
    """Load the held-out rows by kind: harmful, benign and general, and for `heldout` also facts and arithmetic.

    Raises:
        ValueError: If the folder has none of the files, or one of them cannot be read.
    """
    if source == "heldout":
        return {
            "harmful": data.load_heldout("harmful")[:samples],
            "benign": data.load_heldout("lookalikes")[:samples],
            "general": data.load("general", "test")[:samples],
            **{name: data.load_heldout(name)[:samples] for name in _ANSWER_TOKENS},
        }
    if source == "builtin":
        specs = {name: f"builtin:{name}:test" for name in data.NAMES}
    else:
        paths = {name: Path(source) / f"{name}_test.jsonl" for name in data.NAMES}
        specs = {name: str(path) for name, path in paths.items() if path.is_file()}
    if not specs:
        wanted = ", ".join(f"{name}_test.jsonl" for name in data.NAMES)
        raise ValueError(
            f"data={source!r} contains none of {wanted}. Give a folder with at least one of them, builtin, or heldout."
        )
    return {name: load_rows(spec, "data").to_list()[:samples] for name, spec in specs.items()}


def _task_runner(parsed: EvalArguments) -> TaskRunner | None:
    if not parsed.tasks:
        return None
    return TaskRunner(
        [name.strip() for name in parsed.tasks.split(",") if name.strip()],
        include_path=parsed.include_path,
        limit=parsed.limit,
        chat_template=parsed.chat_template,
        batch_size=parsed.batch_size,
    )


def _with_tasks(evaluation: Evaluation, model: Any, score: Callable[[], list[TaskScore]]) -> Evaluation:
    """Add the scores of the model and, with its adapter off, of its base."""
    base = evaluation.base
    if base is not None:
        with without_adapter(model):
            base = replace(base, tasks=score())
    return replace(evaluation, model=replace(evaluation.model, tasks=score()), base=base)


def _scores(
    parsed: EvalArguments, rows: dict[str, list[dict[str, Any]]], runner: TaskRunner | None, model: Any, tokenizer: Any
) -> list[TaskScore]:
    """Score the model in its current state on the rows with right answers, and on lm-eval's tasks."""
    scores = [
        accuracy(
            model,
            tokenizer,
            name,
            rows[name],
            max_new_tokens=tokens,
            batch_size=parsed.batch_size,
            progress=sys.stderr.isatty(),
        )
        for name, tokens in _ANSWER_TOKENS.items()
        if name in rows
    ]
    return scores + (runner.run(model, tokenizer) if runner else [])


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    with input_errors("eval"):
        argument_parser = HfArgumentParser(cast(Any, EvalArguments), prog="ogpsa eval")
        (parsed,) = argument_parser.parse_args_into_dataclasses(list(arguments))
        output = Path(parsed.output)
        check_writable(output.parent, "output")
        parsed.dtype = parsed.dtype or str(compute_dtype()).removeprefix("torch.")
        runner = _task_runner(parsed)
        rows = load_test_rows(parsed.data, parsed.samples)
        config = read_adapter_config(parsed.adapter) if parsed.adapter else None
        name = parsed.model or (config.base_model_name_or_path if config else None)
        base, processing_class = load_base(
            ModelConfig(model_name_or_path=name, dtype=parsed.dtype, load_in_4bit=parsed.load_in_4bit)
        )
        model = base if config is None else load_adapter(base, parsed.adapter, config, trainable=False)
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    evaluation = evaluate(
        model,
        tokenizer,
        harmful=rows.get("harmful"),
        benign=rows.get("benign"),
        general={"general": rows["general"]} if "general" in rows else None,
        # KL is measured from the base. A model without an adapter is the base itself.
        divergence_prompts=rows.get("general") if isinstance(model, PeftModel) else None,
        max_new_tokens=parsed.max_new_tokens,
        batch_size=parsed.batch_size,
        max_length=parsed.max_length,
        seed=parsed.seed,
        progress=sys.stderr.isatty(),
    )
    evaluation = _with_tasks(evaluation, model, lambda: _scores(parsed, rows, runner, model, tokenizer))
    title = parsed.name or Path(str(parsed.adapter or name)).name
    saved = {
        "name": title,
        "base_model": base.name_or_path,
        "arguments": asdict(parsed),
        "evaluation": evaluation.to_dict(),
    }
    if runner is not None:
        saved["lm_eval"] = runner.version
    if parsed.adapter:  # `compare` uses them to find the adapter that a stage continued
        saved["weights"] = weights_digest(parsed.adapter)
        saved["started_from"] = read_run(parsed.adapter).get("started_from_weights")
    with replacing(output) as part:
        part.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    if parsed.card:
        save_card(parsed.adapter, evaluation=saved)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table({title: evaluation}))
    if evaluation.model.tasks:
        base_column = {} if evaluation.base is None else {evaluation.base.name: evaluation.base}
        console.print(task_table({**base_column, title: evaluation.model}))
    console.print(f"Saved the result: {output.resolve()}", soft_wrap=True)
