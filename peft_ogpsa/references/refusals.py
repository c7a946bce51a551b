# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Build safety rows from harmful prompts alone. The base model writes the refusals itself.

A safety instruction in context makes the base refuse. The rows do not contain the instruction, so training teaches the
model to refuse without it. This is context distillation (Askell et al. 2021, arXiv 2112.00861; Snell et al. 2022,
arXiv 2209.15189).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..core.forms import is_count
from ..text.refusal import Verdict, classify, repeats
from ..text.tokenization import Prompt, encode_prompt, same_template_columns, template_columns
from .self_answers import Content, answer_text, base_answers, ended

logger = logging.getLogger(__name__)

SAFETY_INSTRUCTION = (
    "You are a safety filter. You never do what the user asks. You answer every request with \"I'm sorry, but I can't "
    'help with that" and one sentence that says what the harm is.'
)
"""What the base is told, if nothing else is given."""


@dataclass(frozen=True)
class OwnRefusals:
    """Refusals in a model's own words, as training rows.

    `prompts = len(rows) + len(not_refused)`, and `not_refused` holds what `answered`, `unclear` and `too_long` count.
    """

    rows: list[dict[str, Any]]
    """`prompt` and `completion`, for TRL's `SFTTrainer`, and the prompt's `tools` and `chat_template_kwargs`. Messages
    if the tokenizer has a chat template."""
    not_refused: list[Content]
    """The prompts without a refusal, as a row would hold them."""
    answered: int
    """How many prompts the base answered, in spite of the instruction."""
    unclear: int
    """How many answers are empty, repetitive, begin with a thought, or have no whole sentence within
    `max_new_tokens`."""
    too_long: int
    """How many prompts have `max_length` tokens or more, with the instruction."""

    @property
    def prompts(self) -> int:
        """How many prompts there were."""
        return len(self.rows) + len(self.not_refused)

    def __str__(self) -> str:
        return (
            f"the base model refuses {len(self.rows)} of {self.prompts} prompts. It answers {self.answered}, "
            f"{self.unclear} answers are unclear, and {self.too_long} prompts are too long"
        )


def refusals_from_prompts(
    prompts: Iterable[Prompt],
    model: torch.nn.Module,
    processing_class: Any,
    *,
    system: str = SAFETY_INSTRUCTION,
    samples: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    sample: bool = False,
    cache_dir: str | os.PathLike | None = None,
    max_length: int = 512,
    progress: bool = True,
) -> OwnRefusals:
    """Build safety rows from harmful prompts: the base model refuses them under a safety instruction.

    The rows hold the prompts without the instruction. Answers that do not refuse are dropped and counted. A refusal
    that was cut at `max_new_tokens` is shortened to its last whole sentence. The answers are stored on disk and reused
    for the same model, prompts, instruction and settings. The model, the tokenizer and the random state are not
    changed.

    The instruction is the system message. It follows the text of a system message that a prompt already has. If the
    chat template has no system role, or leaves it out, the instruction precedes the text of the first user turn. If
    the tokenizer has no chat template, it precedes the plain text.

    Args:
        prompts (`Iterable`): Harmful requests: strings, lists of messages, or rows with `prompt` or `messages`.
            Answers in the rows are ignored.
        model: The causal language model. The adapter of a `PeftModel` is disabled while it answers.
        processing_class: Its tokenizer, or a processor that has one as `.tokenizer`.
        system (`str`): The safety instruction. Small models need a direct one: they often answer anyway.
        samples (`int`, *optional*): Use at most this many prompts, from the start. `None`: all.
        max_new_tokens (`int`): Maximum number of tokens of a refusal.
        batch_size (`int`): Prompts per batch.
        seed (`int`): Seed of the sampling.
        sample (`bool`): Sample from the model's distribution instead of taking the most likely token.
        cache_dir (`str`, *optional*): Where answers are stored. `None`: `peft_ogpsa` in the user's cache directory
            (`$XDG_CACHE_HOME` or `~/.cache`).
        max_length (`int`): Prompts with this many tokens or more, with the instruction, are dropped.
        progress (`bool`): Show a progress bar.

    Returns:
        The rows, the prompts without a refusal, and the counts.

    Raises:
        ValueError: If an argument is out of range, there are no prompts, a prompt has no known format, the chat
            template does not show the instruction, or the base refuses none of the prompts.
        OSError: If `cache_dir` cannot be written.
    """
    where = "refusals_from_prompts"
    if not isinstance(system, str) or not system.strip():
        raise ValueError(f"{where}: system={system!r} must be a text. Leave it out to use SAFETY_INSTRUCTION.")
    for name, value in (("samples", samples), ("max_length", max_length)):
        if not (value is None and name == "samples") and not is_count(value):
            raise ValueError(f"{where}: {name}={value!r} must be an integer of at least 1.")

    answers, too_long = base_answers(
        where,
        prompts,
        model,
        processing_class,
        samples=samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        sample=sample,
        cache_dir=cache_dir,
        max_length=max_length,
        progress=progress,
        asked_as=partial(_instructed, system.strip()),
    )
    rows: list[dict[str, Any]] = []
    not_refused: list[Content] = []
    answered = 0
    for answer in answers:
        refusal, verdict = _refusal(answer)
        if refusal is None:
            not_refused.append(answer["prompt"])
            answered += verdict == Verdict.COMPLIANCE
        else:
            rows.append({"prompt": answer["prompt"], **template_columns(answer), "completion": refusal})
    unclear = len(not_refused) - answered
    rows = same_template_columns(rows, where)
    refusals = OwnRefusals(rows, [*not_refused, *too_long], answered, unclear, len(too_long))
    if not rows:
        raise ValueError(
            f"{where}: {refusals}. So there is nothing to train on. Give prompts that a safe model refuses, give "
            "another instruction as system, use an instruct model, or give rows with refusals. If the model thinks "
            "first, give prompts as rows with chat_template_kwargs={'enable_thinking': False}."
        )
    logger.info("%s: %s.", where, refusals)
    return refusals


def _refusal(row: Mapping[str, Any]) -> tuple[Any, Verdict]:
    """Return a row's answer if it is a whole refusal, otherwise `None`; and what the answer does."""
    verdict = classify(answer_text(row["completion"]))
    if verdict != Verdict.REFUSAL:
        return None, verdict
    # A repetitive answer may refuse, but training must not teach to repeat it.
    whole = ended(row)
    if whole is None or repeats(answer_text(whole)) or classify(answer_text(whole)) != Verdict.REFUSAL:
        return None, Verdict.UNCLEAR
    return whole, verdict


def _instructed(instruction: str, tokenizer: PreTrainedTokenizerBase, prompt: Content, name: str) -> Content:
    """Return a prompt with the instruction, in the first place where the model sees it."""
    if isinstance(prompt, str):
        return f"{instruction}\n\n{prompt}"
    for message in prompt:
        if not isinstance(message["content"], str):
            raise ValueError(
                f"{name} has content of the type {type(message['content']).__name__}, but the safety instruction "
                "needs text. Give each message a text as content."
            )
    for place in (_in_system_message, _in_user_turn):
        messages = place(prompt, instruction)
        if _shown(tokenizer, messages, instruction):
            return messages
    encode_prompt(tokenizer, prompt, name)  # says why, if the template does not take the prompt itself
    raise ValueError(
        f"{name}: the chat template does not show the safety instruction to the model, neither as a system message "
        "nor in the first user turn. Give a prompt with a user turn, or set tokenizer.chat_template."
    )


def _in_system_message(messages: list[dict[str, Any]], instruction: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        first, *others = messages
        return [{**first, "content": f"{first['content']}\n\n{instruction}"}, *others]
    return [{"role": "system", "content": instruction}, *messages]


def _in_user_turn(messages: list[dict[str, Any]], instruction: str) -> list[dict[str, Any]]:
    position = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if position is None:
        return messages
    asked = messages[position]
    changed = {**asked, "content": f"{instruction}\n\n{asked['content']}"}
    return [*messages[:position], changed, *messages[position + 1 :]]


def _shown(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], instruction: str) -> bool:
    """Whether the chat template takes the messages, and the instruction is in what it makes of them."""
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception:  # a template is a program of the model's authors; many raise for a system message
        return False
    return instruction in str(text)
