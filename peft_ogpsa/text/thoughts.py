# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The thoughts that a reasoning model writes before its answer, between `<think>` and `</think>`."""

from __future__ import annotations

import re

_START = re.compile(r"[\s*_#>~]*<think>", re.IGNORECASE)
_END = re.compile(r".*?</think>", re.IGNORECASE | re.DOTALL)
MARKS = ("<think>", "</think>")
_OTHER_MARKS = {
    # gpt-oss
    "<|channel|>analysis<|message|>": "<think>",
    "<|start|>assistant<|channel|>final<|message|>": "</think>",
    "<|channel|>final<|message|>": "</think>",
    # Gemma 4
    "<|channel>thought": "<think>",
    "<channel|>": "</think>",
    # Magistral
    "[THINK]": "<think>",
    "[/THINK]": "</think>",
    # Command A
    "<|START_THINKING|>": "<think>",
    "<|END_THINKING|>": "</think>",
}
"""Marks of models that do not write `<think>`. Most of them are special tokens, or consist of several tokens."""


def after_thought(text: str) -> str | None:
    """Return an answer without the thoughts before it. `None`: a thought does not end.

    Some chat templates open the thought themselves, so that a text has only the end of it. If a template writes an
    empty thought, some models open another one.
    """
    while True:
        start, end = _START.match(text), _END.match(text)
        if end is None:
            return None if start else text
        after = text[end.end() :]
        if not start and not any(map(str.isalnum, after)):  # a mark after which nothing comes closes no thought
            return text[: end.end() - len("</think>")] + after
        if not _START.match(after):
            return after
        text = after


def with_think_marks(text: str) -> str:
    """Write the marks of other models as `<think>` and `</think>`."""
    for mark, own in _OTHER_MARKS.items():
        text = text.replace(mark, own)
    return text


def opened(prompt: str) -> str:
    """Return the mark `<think>` and a line break if a prompt ends with a mark that opens a thought, else nothing."""
    return "<think>\n" if with_think_marks(prompt).rstrip().endswith("<think>") else ""
