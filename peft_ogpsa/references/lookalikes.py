# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Mix benign look-alikes, answered by the model itself, into the refusals.

Refusals alone teach the model to refuse requests. It can only learn what is dangerous from both kinds. The idea comes
from Röttger et al. (2023, XSTest) and Bianchi et al. (2023, safety-tuned Llamas), who mix harmless requests with
answers into safety data. Here the answers are the model's own, so that it learns nothing else from them.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..text.tokenization import columns_of
from .self_answers import ended
from .sets import AnsweredSet


def with_lookalikes(
    rows: Iterable[Mapping[str, Any]], lookalikes: AnsweredSet, share: float = 0.2
) -> list[dict[str, Any]]:
    """Mix benign look-alikes, with a model's own answers, into safety rows.

    The look-alikes are spread evenly. If there are too few, they are used more than once. An answer that was cut is
    shortened to its last whole sentence. It is left out if it has no whole sentence, or if the chat template would
    show another answer than the model wrote, such as one without its thought.

    Args:
        rows (`Iterable[Mapping]`): Safety rows in one of TRL's formats: `prompt` and `completion`, `messages`, or
            preference pairs of `prompt`, `chosen` and `rejected`. In pairs, the look-alike's answer is `chosen` and
            the refusal of a neighboring row is `rejected`.
        lookalikes (`AnsweredSet`): A set from `ReferenceSet.from_prompts`, for example with
            `peft_ogpsa.data.load_prompts("lookalikes")`.
        share (`float`): Share of the look-alikes among all rows of the result.

    Returns:
        All given rows in their order, with the look-alikes between them. The columns are those named above. Others,
        such as `tools`, are left out.

    Raises:
        ValueError: If `share` is not between 0 and 1, there are no rows, a row has another format, one kind is
            conversational and the other is not, or no answer has a whole sentence.
    """
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"with_lookalikes: share={share!r} must be a number between 0 and 1.")
    safety = list(rows)
    if not safety:
        raise ValueError("with_lookalikes: rows is empty. Give the safety rows to mix the look-alikes into.")
    answered = [(row["prompt"], answer) for row in lookalikes.dataset if (answer := ended(row)) is not None]
    if not answered:
        raise ValueError(
            f"with_lookalikes: no answer in the reference set {lookalikes.name!r} has a whole sentence that the chat "
            "template shows as the model wrote it. Raise max_new_tokens of ReferenceSet.from_prompts. If the model "
            "thinks first, turn that off: give prompts as rows with chat_template_kwargs={'enable_thinking': False}."
        )
    mixed: list[dict[str, Any]] = []
    own = itertools.cycle(answered)
    due = 0.0
    for given in safety_rows(safety, conversational=not isinstance(answered[0][0], str)):
        mixed.append(given)
        due += share / (1 - share)
        while due >= 1 - 1e-9:
            mixed.append(_like(given, *next(own)))
            due -= 1
    return mixed


def safety_rows(rows: Iterable[Mapping[str, Any]], *, conversational: bool) -> list[dict[str, Any]]:
    """Check safety rows before a model answers the look-alikes for them.

    Args:
        rows: Safety rows, as in `with_lookalikes`.
        conversational: Whether the look-alikes are messages. They are if the tokenizer has a chat template.

    Returns:
        The rows, with the columns that look-alikes have too.

    Raises:
        ValueError: If a row has an unknown format, or only one of it and the look-alikes is conversational.
    """
    checked = [_safety_row(row, i) for i, row in enumerate(rows)]
    for i, row in enumerate(checked):
        if isinstance(row.get("messages", row.get("prompt")), str) == conversational:
            raise ValueError(
                f"with_lookalikes: row {i} is {'plain text' if conversational else 'conversational'}, but the "
                "look-alikes are not. Give both in the same format."
            )
    return checked


def with_contrast(
    rows: Iterable[Mapping[str, Any]], contrast: AnsweredSet, share: float = 0.2
) -> list[dict[str, Any]]:
    """Call `with_lookalikes`, which is the new name."""
    warnings.warn("with_contrast is now with_lookalikes, and will go.", DeprecationWarning, stacklevel=2)
    return with_lookalikes(rows, contrast, share)


def _safety_row(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    own = columns_of(row, f"with_lookalikes: row {index}")
    for columns in (("prompt", "chosen", "rejected"), ("prompt", "completion"), ("messages",)):
        if all(column in own for column in columns):
            return {column: own[column] for column in columns}
    raise ValueError(
        f"with_lookalikes: row {index} has the columns {sorted(own)}. Give it the columns prompt/completion, "
        "messages, or prompt/chosen/rejected."
    )


def _like(row: Mapping[str, Any], prompt: Any, answer: Any) -> dict[str, Any]:
    """Build a look-alike's row in the format of a safety row."""
    if "messages" in row:
        return {"messages": [*prompt, *answer]}
    if "chosen" in row:
        return {"prompt": prompt, "chosen": answer, "rejected": row["chosen"]}
    return {"prompt": prompt, "completion": answer}
