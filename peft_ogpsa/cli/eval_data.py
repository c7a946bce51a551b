# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The data of `ogpsa eval`: rows of the built-in kinds, and public sets of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import data
from ..data.prompt_sets import PROMPT_SETS, PromptRow, load_prompt_set, read_prompt_set
from ..text.tokenization import Prompt, encode_prompt, encode_row
from .datasets import load_rows

_KWARGS = "chat_template_kwargs"

ANSWER_TOKENS = {"facts": 32, "arithmetic": 128}
"""Held-out sets with right answers, and the maximum number of tokens in an answer. Word problems need a few steps."""


@dataclass(frozen=True)
class EvalData:
    """What a model is measured on."""

    name: str
    """Where the rows come from."""
    rows: dict[str, list[dict[str, Any]]]
    """Rows by kind, as in `load_test_rows`. Empty if only public sets are measured."""
    sets: dict[str, list[PromptRow]]
    """Public sets of prompts, by name."""

    def with_template_arguments(self, arguments: Mapping[str, Any]) -> EvalData:
        """Return the same data with arguments for the chat template. A row's own take precedence."""

        def added(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
            return {
                name: [{**row, _KWARGS: {**arguments, **(row.get(_KWARGS) or {})}} for row in own]
                for name, own in rows.items()
            }

        return EvalData(self.name, added(self.rows), added(self.sets)) if arguments else self


def load_eval_data(source: str, samples: int | None) -> EvalData:
    """Load the data that `--data` names.

    Args:
        source: `builtin`, `heldout` or a folder, and public sets as NAME or NAME=FILE, separated by commas.
        samples: Maximum number of rows of each kind. `None`: all rows.

    Raises:
        ValueError: If a source cannot be read, or there is more than one of the first three.
        OSError: If a public set cannot be reached, or its file does not exist.
    """
    sources = [part.strip() for part in source.split(",") if part.strip()]
    public = [part for part in sources if part.partition("=")[0] in PROMPT_SETS]
    own = [part for part in sources if part not in public]
    if len(own) > 1:
        raise ValueError(
            f"data={source!r} contains {' and '.join(own)}. Of builtin, heldout and a folder, give only one. "
            f"Public sets are {', '.join(PROMPT_SETS)}."
        )
    sets = {}
    for part in public:
        name, _, path = part.partition("=")
        if name in sets:
            raise ValueError(f"data={source!r} contains {name} twice. Give each set once.")
        sets[name] = read_prompt_set(name, path, samples) if path else load_prompt_set(name, samples)
    rows = load_test_rows(own[0] if own else source, samples) if own or not public else {}
    return EvalData(own[0] if own else "", rows, sets)


def check_rows(data: EvalData, tokenizer: Any, max_length: int, *, kl: bool) -> None:
    """Encode all rows once, so that a bad one is an error before anything is measured.

    Args:
        data: The rows.
        tokenizer: The tokenizer with which the base and the adapters are asked.
        max_length: Maximum number of tokens of a general row.
        kl: Whether the KL from base is measured on the prompts of the general rows.

    Raises:
        ValueError: If a row cannot be measured. The message names its file or set.
    """
    for kind, rows in data.rows.items():
        file = Path(data.name) / f"{kind}_test.jsonl"
        place = str(file) if file.is_file() else f"data={data.name!r}: {kind}"
        if kind == "general":
            remedy = "Drop the row, shorten its prompt, or raise --max_length of `ogpsa eval`."
            refuse_bad_answers(tokenizer, rows, place, max_length, remedy)
        if kind != "general" or kl:
            refuse_bad_prompts(tokenizer, rows, place)
    for name, prompts in data.sets.items():
        refuse_bad_prompts(tokenizer, prompts, f"The set {name!r}")


def refuse_bad_prompts(tokenizer: Any, prompts: Iterable[Prompt], place: str) -> None:
    """Encode prompts, to find those that a model cannot answer.

    Raises:
        ValueError: If there is one. The message begins with `place`.
    """
    for i, prompt in enumerate(prompts):
        if not encode_prompt(tokenizer, prompt, f"{place}: row {i}"):
            raise ValueError(f"{place}: row {i} has no tokens. Give its prompt some text.")


def refuse_bad_answers(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    place: str,
    max_length: int | None = None,
    remedy: str = "Drop the row, or shorten its prompt.",
) -> None:
    """Encode rows, to find those without an answer within `max_length` tokens.

    Raises:
        ValueError: If there is one. The message begins with `place`. If the row is too long, it ends with `remedy`.
    """
    for i, row in enumerate(rows):
        example = encode_row(tokenizer, row, f"{place}: row {i}")
        if max_length is not None and example.cut(max_length) is None:
            raise ValueError(
                f"{place}: row {i} has no answer token left: its prompt takes {example.answer_start} tokens, and "
                f"{max_length} are used. {remedy}"
            )


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
            **{name: data.load_heldout(name)[:samples] for name in ANSWER_TOKENS},
        }
    if source == "builtin":
        specs = {name: f"builtin:{name}:test" for name in data.NAMES}
    else:
        paths = {name: Path(source) / f"{name}_test.jsonl" for name in data.NAMES}
        specs = {name: str(path) for name, path in paths.items() if path.is_file()}
    if not specs:
        wanted = ", ".join(f"{name}_test.jsonl" for name in data.NAMES)
        raise ValueError(
            f"data={source!r} contains none of {wanted}. Give a folder with at least one of them, builtin, or "
            f"heldout. Public sets are {', '.join(PROMPT_SETS)}."
        )
    return {name: load_rows(spec, "data").to_list()[:samples] for name, spec in specs.items()}
