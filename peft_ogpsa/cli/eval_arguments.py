# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The options of `ogpsa eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser

from ..core.files import check_suffix, json_object
from ..core.precision import compute_dtype
from .arguments import refuse_repeated_lists

FAST = 24
"""With `fast`: the maximum number of rows of each kind, and of examples per lm-eval task."""


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
    adapter: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or more saved adapters of the same base. The base is loaded and measured once, and each "
            "adapter on it."
        },
    )
    card: bool = field(
        default=False, metadata={"help": "Also write the table to the model card in each adapter's folder."}
    )
    plot: str | None = field(
        default=None, metadata={"help": "PNG file for a plot of general loss against the refusal of harmful prompts."}
    )
    name: list[str] | None = field(
        default=None,
        metadata={"help": "Name of each result in tables. By default, this is the name of the adapter or the model."},
    )
    data: str = field(
        default="builtin",
        metadata={
            "help": "Folder with harmful_test.jsonl, benign_test.jsonl and general_test.jsonl in the format of the "
            "built-in data. A kind whose file is missing is not measured. 'builtin' uses the built-in test rows, "
            "'heldout' the larger built-in sets of harmful prompts and look-alikes, the same general rows, and "
            "facts and arithmetic. Public sets of prompts can follow, or stand alone, separated by commas: "
            "builtin,xstest,or-bench-hard, or xstest=FILE for a local file."
        },
    )
    fast: bool = field(
        default=False,
        metadata={
            "help": f"A first look: --samples {FAST} and, for lm-eval tasks, --limit {FAST}, unless they are given. "
            "Takes about two minutes for a model of 135M parameters and its base on a CPU. Says how wide the "
            "intervals are."
        },
    )
    samples: int | None = field(
        default=None, metadata={"help": "Maximum number of rows of each kind. By default, all rows are used."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the base's weights. By default, it is float32 on a CPU, float16 on a GPU that only "
            "emulates bfloat16 (T4), and bfloat16 elsewhere.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the base in 4 bits (nf4). This needs less memory and raises losses a little."},
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens in an answer. By default, 32 for the matcher, as a refusal shows in its "
            "first words, and what the other judges recommend."
        },
    )
    judges: str = field(
        default="matcher",
        metadata={
            "help": "Who judges the answers, separated by commas: matcher, model:NAME (harmbench, wildguard, "
            "llama-guard-3-8b, strongreject, ...), model:NAME=FOLDER, or openai:MODEL with OPENAI_BASE_URL and "
            "OPENAI_API_KEY in the environment."
        },
    )
    judges_in_4bit: bool = field(default=False, metadata={"help": "Load judge models in 4 bits (nf4)."})
    batch_size: int = field(
        default=16, metadata={"help": "Rows or prompts per batch. Larger batches are faster and need more memory."}
    )
    max_length: int = field(
        default=1024, metadata={"help": "Maximum number of tokens in a general row. Longer rows are cut off."}
    )
    seed: int = field(
        default=0, metadata={"help": "Random seed for the base's answers. KL from base is measured on these answers."}
    )

    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "Arguments for the chat template, as JSON. For a model that thinks before it answers: "
            "'{\"enable_thinking\": false}'. They apply to all rows, sets and lm-eval tasks."
        },
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
        if self.fast:
            self.samples = FAST if self.samples is None else self.samples
            self.limit = FAST if self.limit is None and self.tasks else self.limit
        for name in ("samples", "limit", "max_new_tokens", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.chat_template_kwargs is not None:  # in one form, because results are compared by it
            self.chat_template_kwargs = json.dumps(self.template_arguments(), sort_keys=True)
        if not (self.model or self.adapter):
            raise ValueError("model is missing. Give a folder or a name on the Hugging Face hub.")
        if self.card and not (self.adapter and all(Path(adapter).is_dir() for adapter in self.adapter)):
            raise ValueError(
                f"card needs the folder of an adapter, but adapter={self.adapter!r} is not a folder. Give a folder as "
                "adapter, or leave out card."
            )
        for name in ("limit", "include_path"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without tasks. Give tasks, or leave out {name}."
                )
        if len({Path(adapter).resolve() for adapter in self.adapter or []}) < len(self.adapter or []):
            raise ValueError(f"adapter={self.adapter!r} names an adapter twice. Give each adapter once.")
        results = len(self.adapter or [self.model])
        if self.name is not None and (len(self.name) != results or len(set(self.name)) < results):
            raise ValueError(f"name={self.name!r} must be {results} different names, one for each result.")
        check_suffix(self.output, ".json", "output")
        if self.plot:
            check_suffix(self.plot, ".png", "plot")

    def template_arguments(self) -> dict[str, Any]:
        """Return the arguments for the chat template.

        Raises:
            ValueError: If they are not a JSON object.
        """
        if self.chat_template_kwargs is None:
            return {}
        try:
            return json_object(self.chat_template_kwargs)
        except ValueError as error:
            raise ValueError(
                f"chat_template_kwargs={self.chat_template_kwargs!r} must be a JSON object, such as "
                '{"enable_thinking": false}.'
            ) from error


def parse(arguments: Sequence[str]) -> EvalArguments:
    """Parse the command line.

    Raises:
        ValueError: If an option is out of range, an option that takes a list is given twice, or options do not fit
            together.
    """
    parser = HfArgumentParser(cast(Any, EvalArguments), prog="ogpsa eval")
    for action in parser._actions:
        if "--no_chat_template" in action.option_strings:  # HfArgumentParser repeats the text of --chat_template
            action.help = "Do not apply the chat template in lm-eval tasks."
            action.default = argparse.SUPPRESS
    refuse_repeated_lists(parser, arguments)
    (parsed,) = parser.parse_args_into_dataclasses(list(arguments))
    parsed.dtype = parsed.dtype or str(compute_dtype()).removeprefix("torch.")
    return parsed
