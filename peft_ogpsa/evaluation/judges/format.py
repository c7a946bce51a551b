# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The published format of a judge model: its prompt, and how its output is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from ...text.tokenization import decoded
from .judge import Kind, Label
from .special_tokens import special_ids, without_special_tokens

_PROBES = ("Qzxprobeprompt", "Qzxprobeanswer")


@dataclass(frozen=True)
class Format:
    """How to ask a judge model, and how to read what it says."""

    name: str
    model: str
    """Name on the Hugging Face hub."""
    asks: Literal["refusal", "harm"]
    kinds: tuple[Kind, ...]
    template: str | None
    """The prompt, with the fields `{prompt}` and `{answer}`. None: the tokenizer's chat template."""
    parse: Callable[[str], Label | None]
    """Reads the output. Returns None for an output that is not in the published format."""
    max_new_tokens: int
    """Length of the output."""
    answer_tokens: int = 256
    """Recommended length of the judged answers."""
    answer_limit: int | None = None
    """Tokens of an answer that the judge sees. None: all of them."""
    keeps_end: bool = False
    """Whether an answer over the limit keeps its end instead of its start."""
    bos_before_answer: bool = False
    """Whether the token that begins a text also precedes the answer."""
    grades: tuple[str, ...] = ()
    """Tokens whose logits give the verdict, from the lowest grade to the highest. Empty: the judge writes text."""
    multimodal: bool = False
    """Whether the model also reads images, and so has another class in transformers."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int] | None:
        """Return the token ids of the judge's prompt.

        Special tokens in the prompt and the answer are removed. If one is still left, the result is None: such an
        answer could end the judge's prompt, and is not judged.
        """
        prompt, answer = (without_special_tokens(text, tokenizer) for text in (prompt, answer))
        ids = self._ids(tokenizer, self.render(tokenizer, prompt, self._cut(tokenizer, answer)))
        special = special_ids(tokenizer)
        blank = self._ids(tokenizer, self.render(tokenizer, "", ""))
        return ids if [i for i in ids if i in special] == [i for i in blank if i in special] else None

    def render(self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
        """Return the text of the judge's prompt."""
        if self.template is None:
            as_parts = not _shows_plain_content(tokenizer)
            return _chat_text(tokenizer, prompt, answer, as_parts)
        before = (tokenizer.bos_token or "") if self.bos_before_answer else ""
        return self.template.format(prompt=prompt, answer=str(before) + answer)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that a tokenizer can be used with this format.

        Raises:
            ValueError: If its chat template is missing or leaves out the conversation, or a grade is not one token.
        """
        if self.template is None:
            if tokenizer.chat_template is None:
                raise ValueError(f"the tokenizer has no chat template, and {self.name} needs its own")
            text = self.render(tokenizer, *_PROBES)
            if not all(probe in text for probe in _PROBES):
                raise ValueError(
                    f"the tokenizer's chat template is not that of {self.name}: it leaves out the conversation"
                )
        missing = [grade for grade in self.grades if grade not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(f"the tokenizer has no tokens for the grades {', '.join(missing)}")

    def _ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        # A chat template has its special tokens in the text.
        return cast(list[int], tokenizer(text, add_special_tokens=self.template is not None)["input_ids"])

    def _cut(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
        if self.answer_limit is None:
            return answer
        ids = cast(list[int], tokenizer(answer, add_special_tokens=False)["input_ids"])
        if len(ids) <= self.answer_limit:
            return answer
        kept = ids[-self.answer_limit :] if self.keeps_end else ids[: self.answer_limit]
        return decoded(tokenizer, kept)


def _shows_plain_content(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a chat template shows contents that are strings. Some show lists of parts only."""
    text = _chat_text(tokenizer, *_PROBES, as_parts=False)
    return all(probe in text for probe in _PROBES)


def _chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, as_parts: bool) -> str:
    turns: list[dict[str, Any]] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if as_parts:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return cast(str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
