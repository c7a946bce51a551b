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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..text.refusal import Verdict, classify
from ..text.tokenization import columns_of, same_template_columns, template_columns
from .self_answers import answer_text, ended
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
            preference pairs of `prompt`, `chosen` and `rejected`. In pairs, the look-alike's answer is `chosen`, and
            `rejected` is a refusal: the `chosen` answer of the row before it, or else of the next row that refuses.
        lookalikes (`AnsweredSet`): A set from `ReferenceSet.from_prompts`, for example with
            `peft_ogpsa.data.load_prompts("lookalikes")`.
        share (`float`): Share of the look-alikes among all rows of the result.

    Returns:
        All given rows in their order, with the look-alikes between them. The columns are those named above, and
        `tools` and `chat_template_kwargs` if a row has them. Other columns are left out.

    Raises:
        ValueError: If `share` is not between 0 and 1, there are no rows, a row has another format, one kind is
            conversational and the other is not, not all rows and look-alikes have the same `chat_template_kwargs`, no
            `chosen` answer of pairs is a refusal, or no answer has a whole sentence.
    """
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"with_lookalikes: share={share!r} must be a number between 0 and 1.")
    safety = list(rows)
    if not safety:
        raise ValueError("with_lookalikes: rows is empty. Give the safety rows to mix the look-alikes into.")
    answered = lookalike_rows(lookalikes)
    if not answered:
        raise ValueError(
            f"with_lookalikes: no answer in the reference set {lookalikes.name!r} has a whole sentence that the chat "
            "template shows as the model wrote it. Raise max_new_tokens of ReferenceSet.from_prompts. If the model "
            "thinks first, turn that off: give prompts as rows with chat_template_kwargs={'enable_thinking': False}."
        )
    mixed: list[dict[str, Any]] = []
    own = itertools.cycle(answered)
    due = 0.0
    checked = safety_rows(safety, conversational=not isinstance(answered[0]["prompt"], str))
    refuses: dict[int, bool] = {}
    for i, given in enumerate(checked):
        mixed.append(given)
        due += share / (1 - share)
        while due >= 1 - 1e-9:
            refusal = _refusal(checked, i, refuses) if "chosen" in given else None
            mixed.append(_like(given, next(own), refusal))
            due -= 1
    return same_template_columns(mixed, "with_lookalikes")


def lookalike_rows(lookalikes: AnsweredSet) -> list[dict[str, Any]]:
    """Return the look-alikes that can be mixed in, as `prompt`, `completion` and the columns for the chat template."""
    return [
        {"prompt": row["prompt"], "completion": answer, **template_columns(row)}
        for row in lookalikes.dataset
        if (answer := ended(row)) is not None
    ]


def safety_rows(rows: Iterable[Mapping[str, Any]], *, conversational: bool) -> list[dict[str, Any]]:
    """Check safety rows before a model answers the look-alikes for them.

    Args:
        rows: Safety rows, as in `with_lookalikes`.
        conversational: Whether the look-alikes are messages. They are if the tokenizer has a chat template.

    Returns:
        The rows, with the columns that look-alikes have too.

    Raises:
        ValueError: If a row has an unknown format, only one of it and the look-alikes is conversational, or no
            `chosen` answer of pairs is a refusal.
    """
    checked = [_safety_row(row, i) for i, row in enumerate(rows)]
    for i, row in enumerate(checked):
        if isinstance(row.get("messages", row.get("prompt")), str) == conversational:
            raise ValueError(
                f"with_lookalikes: row {i} is {'plain text' if conversational else 'conversational'}, but the "
                "look-alikes are not. Give both in the same format."
            )
    if any("chosen" in row for row in checked):
        _refusal(checked, 0, {})
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
            return {column: own[column] for column in columns} | template_columns(own)
    raise ValueError(
        f"with_lookalikes: row {index} has the columns {sorted(own)}. Give it the columns prompt/completion, "
        "messages, or prompt/chosen/rejected."
    )


def _refusal(rows: Sequence[Mapping[str, Any]], start: int, refuses: dict[int, bool]) -> Any:
    """Return the first `chosen` answer from a row on that is a refusal. After the last row, the first one follows.

    `refuses` keeps what is known of each row.
    """
    for i in itertools.chain(range(start, len(rows)), range(start)):
        if i not in refuses:
            refuses[i] = "chosen" in rows[i] and classify(answer_text(rows[i]["chosen"])) == Verdict.REFUSAL
        if refuses[i]:
            return rows[i]["chosen"]
    raise ValueError(
        "with_lookalikes: the pair of a look-alike rejects a refusal, but no chosen answer of the rows is one that "
        "the matcher knows. Give pairs whose chosen answers refuse, or write the pairs of the look-alikes yourself."
    )


def _like(given: Mapping[str, Any], own: Mapping[str, Any], refusal: Any) -> dict[str, Any]:
    """Build a look-alike's row in the format of a safety row."""
    prompt, answer, options = own["prompt"], own["completion"], template_columns(own)
    if "messages" in given:
        return {"messages": [*prompt, *answer], **options}
    if "chosen" in given:
        return {"prompt": prompt, "chosen": answer, "rejected": refusal, **options}
    return {"prompt": prompt, "completion": answer, **options}
