# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A small data set, written for this project, to try safety fine-tuning without a download.

There are three kinds of conversations: `harmful` (a harmful request and a polite refusal), `benign` (a harmless
question that sounds dangerous and its answer) and `general` (everyday requests and their answers). `README.md` in
this folder is the data card. `load_prompts` reads prompts without answers, for `ReferenceSet.from_prompts`.
`load_heldout` reads larger sets for measurements alone. `public` has readers for public data sets.
"""

from importlib import resources
from typing import Any

from ..core.files import json_lines

NAMES = ("harmful", "benign", "general")
SPLITS = ("train", "test")
PROMPTS = ("general", "arithmetic", "lookalikes")
HELDOUT = ("harmful", "lookalikes", "general", "arithmetic", "facts")
_COMPLIANCE = "Sure, here is how to do that."
_REFUSAL = "I'm sorry, but I can't help with that."


def load(name: str, split: str = "train") -> list[dict[str, Any]]:
    """Read one split of one kind of conversation.

    Args:
        name: `"harmful"`, `"benign"` or `"general"`.
        split: `"train"` or `"test"`. No request is in both.

    Returns:
        One dictionary per row. `prompt` and `completion` are each a list of one `{"role", "content"}` message, as
        TRL's trainers read them. `category` is a word for the topic. If the answer is a number, `answer` is its text.
        Categories alternate, so that the first rows are a fair sample of all rows. Pass the list to
        `datasets.Dataset.from_list` to get a data set.

    Raises:
        ValueError: If `name` or `split` is not one of the values above.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r} is not a built-in data set. Use one of {', '.join(map(repr, NAMES))}.")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist. Use one of {', '.join(map(repr, SPLITS))}.")
    return _lines(f"{name}_{split}.jsonl")


def pairs(split: str = "train") -> list[dict[str, Any]]:
    """Build preference pairs from the built-in rows: refuse harmful prompts, answer benign prompts.

    The rejected answers are two fixed sentences: a short compliance for harmful prompts, a refusal for benign ones.

    Args:
        split: `"train"` or `"test"`.

    Returns:
        One dictionary per row: `prompt`, `chosen` and `rejected`, each a list of messages.

    Raises:
        ValueError: If there is no such split.
    """
    rejected = {"harmful": _COMPLIANCE, "benign": _REFUSAL}
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": [{"role": "assistant", "content": answer}],
        }
        for name, answer in rejected.items()
        for row in load(name, split)
    ]


def load_prompts(name: str) -> list[str]:
    """Read one of the built-in sets of prompts, which have no answers.

    Args:
        name: `"general"` (everyday chat), `"arithmetic"` (word problems) or `"lookalikes"` (harmless requests that
            sound dangerous, to counter over-refusal).

    Returns:
        The prompts. None of them is in the conversations of `load`. Their order is shuffled, so that the first ones
        are a fair sample.

    Raises:
        ValueError: If `name` is not one of the values above.
    """
    if name not in PROMPTS:
        raise ValueError(
            f"name={name!r} is not a built-in set of prompts. Use one of {', '.join(map(repr, PROMPTS))}."
        )
    return [line["prompt"] for line in _lines(f"prompts_{name}.jsonl")]


def load_heldout(name: str) -> list[dict[str, Any]]:
    """Read one of the built-in sets for measurements. Do not train on them, and do not use them as references.

    Args:
        name: `"harmful"` (requests that should be refused), `"lookalikes"` (harmless requests that look harmful),
            `"general"` (everyday chat), `"arithmetic"` (word problems) or `"facts"` (questions with short answers).

    Returns:
        One dictionary per row, with `prompt` (text) and the columns of the set: `category` (harmful, general); `kind`
        and `reserved` (look-alikes); `answer`, `working` and `steps` (arithmetic); `accept` and `grade` (facts). The
        data card explains them. The first rows are a fair sample of all rows.

    Raises:
        ValueError: If `name` is not one of the values above.
    """
    if name not in HELDOUT:
        raise ValueError(f"name={name!r} is not a built-in held-out set. Use one of {', '.join(map(repr, HELDOUT))}.")
    return _lines(f"heldout_{name}.jsonl")


def _lines(file: str) -> list[dict[str, Any]]:
    text = resources.files(__name__).joinpath(file).read_text(encoding="utf-8")
    return list(json_lines(text))
