# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert rows and prompts to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..core.examples import IGNORED

Message = Mapping[str, Any]
Row = Mapping[str, Any]
Prompt = str | Sequence[Message] | Mapping[str, Any]
ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

_NOT_TEXT = ("image", "images", "video", "videos", "audio")
_ROLES = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}


@dataclass(frozen=True)
class Example:
    """A prompt and its answer. `ids[:answer_start]` is the prompt, and the rest is scored."""

    ids: list[int]
    answer_start: int
    loss: str = "answer"
    """Name of the loss that scores the answer when it is a reference: a key of `references.losses.LOSSES`."""

    @property
    def answer(self) -> list[int]:
        """The scored tokens."""
        return self.ids[self.answer_start :]

    @property
    def labels(self) -> list[int]:
        """The tokens, with -100 in place of the prompt. transformers' losses skip -100."""
        return [IGNORED] * self.answer_start + self.answer

    def cut(self, max_length: int) -> Example | None:
        """Return the first `max_length` tokens, or `None` if no token of the answer is among them."""
        return replace(self, ids=self.ids[:max_length]) if self.answer_start < max_length else None


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, or a tokenizer itself.

    Raises:
        ValueError: If it is the tokenizer of mistral-common, which has no chat template that could be read.
    """
    if type(processing_class).__name__ in ("MistralCommonBackend", "MistralCommonTokenizer"):
        raise ValueError(
            f"The tokenizer is a {type(processing_class).__name__}, which cannot say what a template of its own adds "
            "to messages. AutoTokenizer takes it where mistral-common is installed. Load the tokenizer with a chat "
            "template instead: PreTrainedTokenizerFast.from_pretrained(NAME)."
        )
    if isinstance(processing_class, PreTrainedTokenizerBase):  # some have a `tokenizer` of another kind inside
        return processing_class
    return cast(PreTrainedTokenizerBase, getattr(processing_class, "tokenizer", processing_class))


def template_of(processing_class: Any) -> Any:
    """Return the chat template that is used: a processor's own, or that of its tokenizer."""
    own = getattr(processing_class, "chat_template", None)
    return getattr(tokenizer_of(processing_class), "chat_template", None) if own is None else own


def encode_row(processing_class: ProcessingClass, row: Row, name: str) -> Example:
    """Encode a training row as the model sees it in training.

    The answer begins where the row's tokens first differ from those of the prompt with the generation prompt added. So
    templates that rewrite earlier turns or merge tokens over the boundary are cut in the right place. The answer
    includes the end of the turn (templates) or the end-of-sequence token (plain strings).

    Args:
        processing_class: The tokenizer, or a processor with one. It needs a chat template if the row is made of
            messages.
        row: A row in a format that TRL's trainers read, with messages or plain strings: `chosen` and `rejected` with
            or without their `prompt` (the answer is the chosen one), `prompt` and `completion`, `messages` (the answer
            is the last assistant turn), or `text` (all of it is the answer). If it has the columns of several formats,
            the first of these counts. The chat template gets its `tools` and `chat_template_kwargs`.
        name: Name of the row in error messages.

    Raises:
        ValueError: If the row has other columns or no answer, mixes a conversation and plain text, has messages
            without a template, has images or other content that is not text, or has an answer that should not be
            learned (`label` is `False`).
    """
    tokenizer, columns = tokenizer_of(processing_class), columns_of(row, name)
    if columns.get("label") is False:
        raise ValueError(
            f"{name} has label=False, so its completion is an example of what not to answer. Leave such rows out."
        )
    prompt, answer = (text_or_messages(part, name) for part in _split(columns, name))
    _check_text_only(columns, (prompt, answer), name)
    check_answer(answer, name)
    if isinstance(answer, str):
        if not isinstance(prompt, str):
            raise ValueError(
                f"{name} mixes a conversational prompt with a plain answer. Give both in the same format."
            )
        prefix = _prompt_ids(tokenizer, prompt, name) if prompt else []
        ids = _text_ids(tokenizer, prompt + answer, name)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{name} is conversational, but the tokenizer has no chat template. Use an instruct model's "
                "tokenizer, set tokenizer.chat_template, or give plain text."
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        options = template_columns(columns)
        prefix = _chat_ids(processing_class, messages, name, options, add_generation_prompt=True) if messages else []
        ids = _chat_ids(processing_class, [*messages, *answer], name, options)
    # Nothing predicts the first token.
    return Example(ids, max(shared_length(prefix, ids), 1))


def template_columns(row: Row) -> dict[str, Any]:
    """Return the columns for the chat template, as TRL's trainers read them: `tools` and further arguments."""
    # An empty list of tools is not the same as none, because a template may test for none. An empty text is none.
    tools, arguments = row.get("tools"), row.get("chat_template_kwargs")
    own = {"tools": None if tools == "" else tools, "chat_template_kwargs": arguments or None}
    return {name: value for name, value in own.items() if value is not None}


def as_messages(row: Row) -> dict[str, Any]:
    """Return a row whose plain-text prompt and answers are messages of the user and the assistant.

    A row without the column `prompt` stays as it is: which part of its text the user says is not known.
    """
    return {
        column: [{"role": _ROLES[column], "content": value}]
        if column in _ROLES and isinstance(value, str) and "prompt" in row
        else value
        for column, value in row.items()
    }


def same_template_columns(rows: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Give all rows the columns for the chat template that one of them has. `Dataset.from_list` reads the first row's.

    Raises:
        ValueError: If `chat_template_kwargs` differ in their keys. A data set would fill the others with None, which
            TRL cannot read or templates take for a value. The message begins with `where`.
    """
    keys = [sorted(row.get("chat_template_kwargs", {})) for row in rows]
    other = next((own for own in keys if own != keys[0]), None)
    if other is not None:
        raise ValueError(
            f"{where}: chat_template_kwargs has the keys {keys[0]} in one row and {other} in another. Give all rows "
            "and prompts the same keys."
        )
    names = [name for name in ("tools", "chat_template_kwargs") if any(name in row for row in rows)]
    return [{**row, **{name: row.get(name) for name in names}} for row in rows]


def check_answer(answer: str | Sequence[Message], name: str) -> None:
    """Reject a text, or messages, without an answer to learn from.

    Raises:
        ValueError: If the text is blank, or no message of the assistant has content or calls a tool.
    """
    if isinstance(answer, str):
        found = has_text(answer)
    else:
        found = any(m["role"] == "assistant" and (has_text(m["content"]) or m.get("tool_calls")) for m in answer)
    if not found:
        raise ValueError(
            f"{name} has no answer: its completion is empty, or its messages have no assistant turn. Add an answer."
        )


def has_text(content: Any) -> bool:
    """Return whether a message's content, or a text, is more than white space. Templates may remove that."""
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading items two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def columns_of(row: Any, name: str) -> dict[str, Any]:
    """Return the columns of a row that have a value. Data sets put None where a row lacks a column.

    Raises:
        ValueError: If the row is not a mapping.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} is of the type {type(row).__name__}. Give a mapping of columns, such as a dict.")
    return {column: value for column, value in row.items() if value is not None}


def text_or_messages(part: Any, name: str) -> str | list[Message]:
    """Return a text, or messages as a list.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, Iterable) or isinstance(part, bytes | Mapping):
        raise ValueError(f"{name} has a value of the type {type(part).__name__}. Give text or a list of messages.")
    messages = list(part)
    for message in messages:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or "content" not in message
            or not isinstance(message["content"], str | list | tuple | Mapping | None)
            or (message["content"] is None and not message.get("tool_calls"))
        ):
            raise ValueError(
                f"{name} has the message {repr(message)[:80]}. Give each message a role, and a text as content."
            )
    return messages


def _check_text_only(row: Any, parts: Iterable[str | list[Message]], name: str) -> None:
    """Reject what token ids cannot hold. A chat template puts a mark in its place, and the model sees nothing.

    Raises:
        ValueError: If a row has images or videos, or a message has a part that is not text.
    """
    found = [column for column in _NOT_TEXT if isinstance(row, Mapping) and row.get(column)]
    for message in (message for part in parts if not isinstance(part, str) for message in part):
        content = message["content"] if isinstance(message["content"], list | tuple) else []
        kinds = [part.get("type", "text") for part in content if isinstance(part, Mapping)]
        found += [kind for kind in kinds if kind != "text"]
    if found:
        raise ValueError(f"{name} has content of the type {found[0]!r}, but only text is used here. Give text alone.")


def _split(row: Row, name: str) -> tuple[Any, Any]:
    """Return the prompt and the answer of a row, plain or as messages."""
    if "chosen" in row:
        chosen = text_or_messages(row["chosen"], name)
        # A plain prompt beside conversations may be repeated in them. TRL then reads the conversations.
        repeated = isinstance(row.get("prompt"), str) and _is_conversation(chosen)
        if "prompt" in row and not repeated:
            return row["prompt"], chosen
        length = _prompt_length(chosen, text_or_messages(row.get("rejected", ()), name))
        return chosen[:length], chosen[length:]
    if "prompt" in row and "completion" in row:
        return row["prompt"], row["completion"]
    if "messages" in row:
        messages = text_or_messages(row["messages"], name)
        if isinstance(messages, str):
            raise ValueError(f"{name} has text in the column messages. Give a list of messages.")
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        return messages[:-1], messages[-1:]
    if "text" in row:
        return "", row["text"]
    raise ValueError(
        f"{name} has the columns {sorted(row)}. Give it the columns messages, prompt/completion, text, or "
        "prompt/chosen/rejected."
    )


def _prompt_length(chosen: str | list[Message], rejected: str | list[Message]) -> int:
    """Return how many characters or turns of a pair's answers are its prompt, as TRL's `extract_prompt` finds them.

    Both answers share the prompt, and each of them has something after it.
    """
    if not rejected or isinstance(chosen, str) != isinstance(rejected, str):  # there is nothing to share
        return 0 if isinstance(chosen, str) else len(chosen) - 1
    shared = shared_length(chosen, rejected)
    shortest = min(len(chosen), len(rejected))
    if 0 < shared < shortest and chosen[shared - 1] == " ":
        return shared - 1  # the space belongs to the answers
    return min(shared, shortest - 1)


def _is_conversation(answer: str | list[Message]) -> bool:
    """Whether an answer holds turns before it: those of the user, or a system message."""
    return not isinstance(answer, str) and bool(answer) and answer[0]["role"] != "assistant"


def encode_prompt(processing_class: ProcessingClass, prompt: Prompt, name: str = "A prompt") -> list[int]:
    """Encode a prompt as the model sees it when it is about to answer.

    Args:
        processing_class: The tokenizer, or a processor with one. Its chat template is applied if it has one.
        prompt: A string (one user turn), messages, or a row with `prompt` or `messages`. A last turn of the assistant
            is dropped, except from the column `prompt`: there it would be the beginning of the answer.
        name: Name of the prompt in error messages.

    Raises:
        ValueError: If the prompt has another form, is conversational and there is no chat template, or has images or
            other content that is not text, or if the column `prompt` ends with a turn of the assistant.
    """
    content = text_or_messages(content_of(prompt, name), name)
    _check_text_only(prompt, (content,), name)
    tokenizer = tokenizer_of(processing_class)
    if isinstance(content, str) and tokenizer.chat_template is None:
        return _prompt_ids(tokenizer, content, name)
    options = template_columns(prompt) if isinstance(prompt, Mapping) else {}
    return _chat_ids(processing_class, _turns(content), name, options, add_generation_prompt=True)


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as plain text, for people and judges.

    A single turn is its text. Of several turns, each has a line that begins with its role: `User: ...`. A last turn of
    the assistant is dropped, as in `encode_prompt`. Of content in parts, the texts are joined by line breaks.
    """
    turns = _turns(text_or_messages(content_of(prompt, "A prompt"), "A prompt"))
    texts = [_plain(turn["content"]) for turn in turns]
    if len(turns) == 1:
        return texts[0]
    return "\n".join(f"{turn['role'].capitalize()}: {text}" for turn, text in zip(turns, texts, strict=True))


def _turns(content: str | list[Message]) -> list[Message]:
    """Return a prompt's turns, without a last one of the assistant."""
    turns: list[Message] = [{"role": "user", "content": content}] if isinstance(content, str) else content
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns


def _plain(content: Any) -> str:
    """Return the text of a turn. Parts without text, such as images, are left out."""
    return "" if content is None else str(_joined(content))


def _in_parts(content: Any) -> Any:
    """Return text as content in parts. Other content stays as it is."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _joined(content: Any) -> Any:
    """Join the texts of content in parts by line breaks. Other content stays as it is."""
    if not isinstance(content, list | tuple):
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "\n".join(text for text in texts if isinstance(text, str))


def content_of(prompt: Prompt, name: str) -> str | Sequence[Message]:
    """Return a prompt without its row.

    Raises:
        ValueError: If it is a row with neither `prompt` nor `messages`, or its `prompt` ends with a turn of the
            assistant.
    """
    if not isinstance(prompt, Mapping):
        return prompt
    row = columns_of(prompt, name)
    if "prompt" not in row and "messages" not in row:
        raise ValueError(f"{name} has the columns {sorted(row)}. Give it the column prompt or messages.")
    if "prompt" not in row:
        return row["messages"]
    content = row["prompt"]
    last = content[-1] if isinstance(content, list | tuple) and content else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        raise ValueError(
            f"{name} has a prompt that ends with a turn of the assistant. Models are asked for a whole answer, not to "
            "continue one. Leave out that turn."
        )
    return content


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, skip_special_tokens: bool = False) -> str:
    """Return the text of tokens as it is. Some tokenizers' settings remove the spaces before punctuation in it."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(ids, **options))


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> list[int]:
    ids = _text_ids(tokenizer, text, name)
    # Some tokenizers end every text with a special token. It does not belong inside a sequence.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has text that is not valid Unicode ({error.reason}).") from error
    return cast(list[int], tokenizer(text)["input_ids"])


def _chat_ids(
    processing_class: ProcessingClass,
    messages: Sequence[Message],
    name: str,
    options: Mapping[str, Any],
    add_generation_prompt: bool = False,
) -> list[int]:
    tools = options.get("tools")
    # TRL asks the processor, which also adds the special tokens that a tokenizer leaves out of a conversation.
    by_processor = isinstance(processing_class, ProcessorMixin) and processing_class.chat_template is not None
    owner = processing_class if by_processor else tokenizer_of(processing_class)

    def apply(messages: Any, *, tokenize: bool) -> Any:
        return owner.apply_chat_template(
            messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
            return_dict=False,
            **options.get("chat_template_kwargs", {}),
        )

    turns: list[Message] = [dict(message) for message in messages]
    if by_processor:  # most of their templates need parts
        turns = [{**turn, "content": _in_parts(turn["content"])} for turn in turns]
    in_parts = [turn["content"] for turn in turns if isinstance(turn["content"], list | tuple)]

    def knows_parts() -> bool:
        """Templates for text alone fail, or show the model how Python writes a list."""
        try:
            return not any(str(content) in apply(turns, tokenize=False) for content in in_parts)
        except Exception:
            return False

    if in_parts and not knows_parts():
        turns = [{**turn, "content": _joined(turn["content"])} for turn in turns]
    try:
        ids = apply(turns, tokenize=True)
    except Exception as error:  # a template is a program of the model's authors
        raise ValueError(f"{name} does not work with the tokenizer's chat template: {error}") from error
    # A processor may return a batch of one, and as a tensor.
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return list(ids[0] if ids and isinstance(ids[0], list) else ids)
