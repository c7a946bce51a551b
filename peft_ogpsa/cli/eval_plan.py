# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The pieces that `ogpsa eval` measures on every model, as its options ask for."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, cast

import peft
import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__
from ..data.prompt_sets import PromptRow
from ..evaluation import Evaluator, TaskRunner, fingerprint
from ..evaluation.pieces import Piece
from ..evaluation.store import Conditions
from ..text.tokenization import Prompt, template_columns
from .eval_arguments import EvalArguments
from .eval_data import ANSWER_TOKENS, EvalData


def task_runner(parsed: EvalArguments) -> TaskRunner | None:
    """Load the lm-eval tasks, if there are any.

    Raises:
        ImportError: If lm-eval is not installed, or too old.
        ValueError: If a task cannot be loaded.
    """
    if not parsed.tasks:
        return None
    return TaskRunner(
        [name.strip() for name in parsed.tasks.split(",") if name.strip()],
        include_path=parsed.include_path,
        limit=parsed.limit,
        chat_template=parsed.chat_template,
        chat_template_kwargs=parsed.template_arguments(),
        batch_size=parsed.batch_size,
    )


def evaluator(parsed: EvalArguments, tokenizer: Any, **data: Any) -> Evaluator:
    """Build an evaluator of some data, with the settings of the command."""
    return Evaluator(
        tokenizer,
        **data,
        max_new_tokens=cast(int, parsed.max_new_tokens),  # the judges have chosen it by now
        batch_size=parsed.batch_size,
        max_length=parsed.max_length,
        seed=parsed.seed,
        progress=sys.stderr.isatty(),
    )


def plan(
    parsed: EvalArguments, data: EvalData, runner: TaskRunner | None, tokenizer: Any, *, divergence: bool
) -> list[Piece]:
    """List the pieces in their order.

    Args:
        parsed: The options.
        data: The rows and the sets.
        runner: The lm-eval tasks.
        tokenizer: The tokenizer with which the base and the adapters are asked.
        divergence: Measure the KL from base on the general rows. A model without an adapter is the base itself.
    """
    rows = data.rows
    pieces = []
    if rows.keys() - ANSWER_TOKENS.keys():
        own = evaluator(
            parsed,
            tokenizer,
            harmful=rows.get("harmful"),
            benign=rows.get("benign"),
            general={"general": rows["general"]} if "general" in rows else None,
            divergence_prompts=rows.get("general") if divergence else None,
        )
        pieces.append(Piece.of_data(data.name, own))
    pieces += [
        Piece.of_set(name, evaluator(parsed, tokenizer, harmful=_of(own, "harmful"), benign=_of(own, "benign")))
        for name, own in data.sets.items()
    ]
    answers = {"batch_size": parsed.batch_size, "progress": sys.stderr.isatty()}
    pieces += [
        Piece.of_answers(name, tokenizer, rows[name], max_new_tokens=tokens, **answers)
        for name, tokens in ANSWER_TOKENS.items()
        if name in rows
    ]
    if runner is not None:
        taken = {piece.name for piece in pieces}
        for name in runner.names:
            piece = Piece.of_task(name, tokenizer, runner)
            pieces.append(replace(piece, name=f"lm-eval {name}") if name in taken else piece)
    return pieces


def common_conditions(parsed: EvalArguments, base: PreTrainedModel, tokenizer: Any) -> Conditions:
    """Return what the results of all pieces depend on, apart from the weights."""
    return {
        "base_model": str(base.name_or_path),
        "config": fingerprint.of_settings(base),
        "dtype": parsed.dtype,
        "load_in_4bit": parsed.load_in_4bit,
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
        **versions(),
    }


def versions() -> Conditions:
    """Return the versions of the packages that results depend on."""
    return {"peft_ogpsa": __version__} | {own.__name__: own.__version__ for own in (peft, torch, transformers)}


def _of(rows: list[PromptRow], kind: str) -> list[Prompt] | None:
    """Return the prompts of one kind: texts, or rows if they have arguments for the chat template."""
    given = [(row["prompt"], template_columns(row)) for row in rows if row["kind"] == kind]
    return [{"prompt": prompt, **columns} if columns else prompt for prompt, columns in given] or None
