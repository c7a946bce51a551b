# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Contrast: harmless requests that sound dangerous, answered by the model itself, among the refusals.

Refusals alone teach that requests are refused. What a model takes for dangerous it can only learn from both kinds.
The idea is that of Röttger et al. (2023, XSTest) and of Bianchi et al. (2023, safety-tuned Llamas), who mix harmless
requests with answers into safety data; here the answers are the model's own, so that nothing else is learnt from them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .sets import AnsweredSet

_SENTENCE = re.compile(r"""(?s).*[.!?](?=["')\]*]*(?:\s|$))["')\]*]*""")


def with_contrast(
    rows: Iterable[Mapping[str, Any]], contrast: AnsweredSet, share: float = 0.2
) -> list[dict[str, Any]]:
    """Puts a model's own answers to harmless look-alikes among safety rows.

    They are spread evenly, and used more than once where there are too few. An answer that was cut ends with its last
    whole sentence, and is left out where it has none.

    Args:
        rows (`Iterable[Mapping]`): Safety rows in one of TRL's formats: `prompt` and `completion`, `messages`, or
            preference pairs of `prompt`, `chosen` and `rejected`. Of pairs the look-alike's answer is chosen and the
            refusal of a neighbouring row rejected.
        contrast (`AnsweredSet`): From `ReferenceSet.from_prompts`, with `peft_ogpsa.data.load_prompts("lookalikes")`
            for example.
        share (`float`): Of the look-alikes among all rows of the result.

    Returns:
        All given rows, in their order, and the look-alikes between them; columns are those named above.

    Raises:
        ValueError: If `share` is not between 0 and 1, there are no rows, one has another format, one kind is
            conversational and the other is not, or no answer has a whole sentence.
    """
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"with_contrast: share={share!r} must be a number between 0 and 1.")
    safety = list(rows)
    if not safety:
        raise ValueError("with_contrast: rows is empty. Give the safety rows to put look-alikes among.")
    answered = [(row["prompt"], ended) for row in contrast.dataset if (ended := _ended(row)) is not None]
    if not answered:
        raise ValueError(
            f"with_contrast: no answer of the set {contrast.name!r} has a whole sentence. Raise max_new_tokens of "
            "ReferenceSet.from_prompts."
        )
    mixed: list[dict[str, Any]] = []
    own = itertools.cycle(answered)
    due = 0.0
    for i, row in enumerate(safety):
        given = _safety_row(row, i)
        mixed.append(given)
        due += share / (1 - share)
        while due >= 1 - 1e-9:
            mixed.append(_like(given, *next(own), i))
            due -= 1
    return mixed


def _ended(row: Mapping[str, Any]) -> Any:
    """An answer, to its last whole sentence where it was cut; `None` if nothing is left."""
    completion = row["completion"]
    if not row["unfinished"]:
        return completion
    text = completion if isinstance(completion, str) else completion[0]["content"]
    whole = _SENTENCE.match(text)
    if whole is None:
        return None
    return whole[0] if isinstance(completion, str) else [{"role": "assistant", "content": whole[0]}]


def _safety_row(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    for columns in (("prompt", "chosen", "rejected"), ("prompt", "completion"), ("messages",)):
        if all(column in row for column in columns):
            return {column: row[column] for column in columns}
    raise ValueError(
        f"with_contrast: row {index} has the columns {sorted(row)}. Give it prompt and completion, messages, or "
        "prompt, chosen and rejected."
    )


def _like(row: Mapping[str, Any], prompt: Any, answer: Any, index: int) -> dict[str, Any]:
    """A look-alike's row in the format of a safety row."""
    given = row["messages"] if "messages" in row else row["prompt"]
    if isinstance(given, str) != isinstance(prompt, str):
        raise ValueError(
            f"with_contrast: row {index} is {'plain text' if isinstance(given, str) else 'conversational'}, and the "
            "look-alikes are not. Make both of one kind."
        )
    if "messages" in row:
        return {"messages": [*prompt, *answer]}
    if "chosen" in row:
        return {"prompt": prompt, "chosen": answer, "rejected": row["chosen"]}
    return {"prompt": prompt, "completion": answer}
