# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Score short answers that are either right or wrong."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def correct(row: Mapping[str, Any], answer: str) -> bool:
    """Check a model's answer to a row of the held-out facts or arithmetic problems.

    Args:
        row: A row with `accept` (words or phrases: one must be in the answer) or with `answer` (a number: it must be
            the last one in the answer).
        answer: The answer of the model.

    Raises:
        ValueError: If the row has neither column.
    """
    if "accept" in row:
        return any(_has(answer.lower(), words) for words in row["accept"])
    if "answer" in row:
        numbers = [Decimal(found.replace(",", "")) for found in _NUMBER.findall(answer)]
        return bool(numbers) and numbers[-1] == Decimal(row["answer"])
    raise ValueError(f"The row has the columns {', '.join(sorted(row))}. Give a row with accept or answer.")


def _has(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
