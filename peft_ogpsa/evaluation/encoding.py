# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows and prompts as token ids, and a model's logits where an answer is predicted."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from peft_ogpsa.evaluation.modes import input_device, language_model

Message = Mapping[str, Any]
Row = Mapping[str, Any]
Prompt = str | Sequence[Message] | Row


@dataclass(frozen=True)
class Example:
    """A prompt and its answer: `ids[:answer_start]` is the prompt, the rest is scored."""

    ids: list[int]
    answer_start: int

    @property
    def answer(self) -> list[int]:
        """The tokens scored."""
        return self.ids[self.answer_start :]


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int, name: str) -> Example:
    """A training row as the model would see it in training.

    The answer begins where the row's tokens part from those of the prompt with the generation prompt added, so
    templates that rewrite earlier turns or merge tokens over the boundary are cut in the right place. It includes
    the end of the turn (templates) or the end-of-sequence token (plain strings).

    Args:
        tokenizer: With a chat template, if the row is made of messages.
        row: `prompt` and `completion` (messages or strings), or `messages`, whose last assistant turn is scored.
        max_length: Tokens kept, from the left.
        name: What errors call the row.

    Raises:
        ValueError: Other columns, no assistant turn, or no answer token within `max_length`.
    """
    if "messages" in row:
        messages = list(row["messages"])
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        prompt, completion = messages[:-1], messages[-1:]
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    else:
        raise ValueError(f"{name} has the columns {sorted(row)}; give it prompt and completion, or messages.")
    if not completion:
        raise ValueError(f"{name} has no answer: its completion is empty or its messages hold no assistant turn.")

    if isinstance(prompt, str):
        prefix = _text_ids(tokenizer, prompt)
        # Some tokenizers end every text with a special token; inside a sequence it does not belong.
        if prefix and prefix[-1] == tokenizer.eos_token_id:
            prefix = prefix[:-1]
        ids = _text_ids(tokenizer, prompt + completion)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
    else:
        prefix = encode_prompt(tokenizer, prompt) if prompt else []
        ids = _chat_ids(tokenizer, [*prompt, *completion])
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prefix, ids, strict=False)))
    # Nothing predicts the first token.
    start = max(shared, 1)
    if start >= min(len(ids), max_length):
        raise ValueError(
            f"{name} has no answer token left: its prompt takes {start} tokens, max_length is {max_length}."
            " Raise max_length or drop the row."
        )
    return Example(list(ids[:max_length]), start)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """A prompt as the model sees it when it is about to answer.

    Args:
        tokenizer: Its chat template is applied, if it has one.
        prompt: A string (one user turn), messages, or a row with `prompt` or `messages` (an assistant's last turn is
            dropped).
    """
    content = _content(prompt)
    if isinstance(content, str):
        if tokenizer.chat_template is None:
            return _text_ids(tokenizer, content)
        content = [{"role": "user", "content": content}]
    messages = list(content)
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return _chat_ids(tokenizer, messages, add_generation_prompt=True)


def prompt_text(prompt: Prompt) -> str:
    """What a person reads of a prompt: its last user turn."""
    content = _content(prompt)
    if isinstance(content, str):
        return content
    return next((str(message["content"]) for message in reversed(content) if message["role"] == "user"), "")


def _content(prompt: Prompt) -> str | Sequence[Message]:
    if not isinstance(prompt, Mapping):
        return prompt
    if "prompt" not in prompt and "messages" not in prompt:
        raise ValueError(f"A prompt has the columns {sorted(prompt)}; give it prompt or messages.")
    return prompt["prompt"] if "prompt" in prompt else prompt["messages"]


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast(list[int], tokenizer(text)["input_ids"])


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    return cast(list[int], ids)


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches of like length, longest first (a batch too large for memory then fails at once).

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1.")
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_logits(model: torch.nn.Module, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The logits that predict each example's answer tokens.

    Call it under `measuring`. The output layer is skipped for the prompts where the model allows it.

    Returns:
        One tensor an example, (answer tokens, vocabulary), in the model's own precision: upcasting one example at a
        time keeps the memory small.
    """
    lm = language_model(model)
    device = input_device(lm)
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
    first = min(example.answer_start for example in examples) - 1
    options = {"logits_to_keep": width - first} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    output = lm(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options)
    logits = output.logits[:, first - width :]
    return [
        logits[row, example.answer_start - 1 - first : len(example.ids) - 1 - first]
        for row, example in enumerate(examples)
    ]
