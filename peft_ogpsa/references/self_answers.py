# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Build reference sets from prompts alone. The base model answers the prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from transformers import PreTrainedTokenizerBase

from ..core.files import check_writable, json_lines, replacing
from ..core.precision import bit_sum
from ..text.access import base_parameters, input_device, language_model
from ..text.cache import cache_dir as default_cache
from ..text.generation import decoded_answer, generate_ids
from ..text.refusal import Verdict, classify, repeats
from ..text.thoughts import after_thought
from ..text.tokenization import (
    Message,
    ProcessingClass,
    Prompt,
    content_of,
    decoded,
    encode_prompt,
    encode_row,
    prompt_text,
    template_columns,
    text_or_messages,
    tokenizer_of,
)
from ..tuner.adapters import base_of

logger = logging.getLogger(__name__)

_SHORT = 20  # characters of an answer whose words the matcher does not know
_FORMAT = 5  # version of the cache file's format
_LIST_MARK = re.compile(r"(?:^|\n)[^\w\n]*\d{1,3}[.)][^\w\n]*$")  # "2." at the start of an item that was cut
_SENTENCE = re.compile(r"""(?s).*(?:[.!?](?=["')\]*]*(?:\s|$))|[。！？।])["')\]*”’」』）]*""")

Content: TypeAlias = str | list[dict[str, Any]]
"""A prompt as its row stores it: plain text, or messages."""


@dataclass(frozen=True)
class AnswerCounts:
    """What happened to the prompts: `prompts = kept + refused + unclear + too_long`."""

    prompts: int
    kept: int
    refused: int
    """The base model declined, according to `evaluation.classify`."""
    unclear: int
    """The answer is empty, symbols, or a loop, according to the same matcher. Short answers and numbers are kept."""
    too_long: int
    """The prompt alone already has `max_length` tokens or more."""
    unfinished: int
    """How many of the kept answers were cut at `max_new_tokens`."""

    @property
    def summary(self) -> str:
        """The counts in sentences."""
        return (
            f"the base model answers {self.kept} of {self.prompts} prompts. It refuses {self.refused}, {self.unclear} "
            f"answers are unclear, and {self.too_long} prompts are too long. {self.unfinished} of the {self.kept} "
            "answers are cut."
        )


def base_answers(
    where: str,
    prompts: Iterable[Prompt],
    model: torch.nn.Module,
    processing_class: Any,
    *,
    samples: int | None,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    sample: bool,
    cache_dir: str | os.PathLike | None,
    max_length: int,
    progress: bool,
    asked_as: Callable[[PreTrainedTokenizerBase, Content, str], Content] | None = None,
) -> tuple[list[dict[str, Any]], list[Content]]:
    """Let the base model answer prompts, or read its answers from an earlier call.

    `where` begins the error messages. `asked_as` takes the tokenizer, a prompt and its name, and returns how the model
    is asked; the rows have the prompt itself. The other arguments are those of `from_prompts`.

    Returns:
        One row for each prompt that has an answer, and the prompts that leave no room for one. A row has `prompt`,
        `completion` and `unfinished`, and the prompt's `tools` and `chat_template_kwargs`. If the chat
        template would show another answer than the base wrote, or another context, it also has the tokens (`ids`),
        where the answer starts in them (`answer_start`), and whether the template shows all but their end (`shown`).
    """
    tokenizer = tokenizer_of(processing_class)
    if tokenizer.chat_template is None and getattr(processing_class, "chat_template", None) is not None:
        raise ValueError(
            f"{where}: the processor has a chat template and its tokenizer has none, so the prompts would be asked "
            "without it. Set processor.tokenizer.chat_template = processor.chat_template."
        )
    if isinstance(prompts, str | Mapping):
        raise ValueError(f"{where}: prompts is a single {type(prompts).__name__}. Give a list of prompts.")
    asked = list(islice(prompts, samples))
    options = [template_columns(prompt) if isinstance(prompt, Mapping) else {} for prompt in asked]
    given = [_content(prompt, tokenizer, f"{where}: prompt {i}") for i, prompt in enumerate(asked)]
    if not given:
        raise ValueError(f"{where} has no prompts. Give it at least one prompt.")
    questions = given
    if asked_as is not None:
        questions = [asked_as(tokenizer, prompt, f"{where}: prompt {i}") for i, prompt in enumerate(given)]
    encoded = [
        encode_prompt(processing_class, {"prompt": question, **own}, f"{where}: prompt {i}")
        for i, (question, own) in enumerate(zip(questions, options, strict=True))
    ]
    fitting = [position for position, ids in enumerate(encoded) if len(ids) < max_length]
    if not fitting:
        raise ValueError(
            f"{where}: all {len(given)} prompts have max_length={max_length} tokens or more, so there "
            "is no room for an answer. Raise max_length, or shorten the prompts."
        )
    fit = [given[position] for position in fitting]
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "sample": sample,
    }
    folder = Path(cache_dir) if cache_dir is not None else default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    told = [{"prompt": questions[i], **options[i]} if options[i] else questions[i] for i in fitting]
    path = folder / f"{_key(model, processing_class, told, settings)}.jsonl"
    rows = _read(path, fit)
    if rows is None:
        check_writable(folder, "cache_dir")
        prompt_ids = [encoded[position] for position in fitting]
        _warn_of_cpu(where, model)
        with base_of(model):
            answers = generate_ids(model, tokenizer, prompt_ids, progress=progress, **settings)
        rows = [
            _row(processing_class, given[position], options[position], ids, answer, max_new_tokens)
            for position, ids, answer in zip(fitting, prompt_ids, answers, strict=True)
        ]
        _store(path, rows, where)
    too_long = [prompt for prompt, ids in zip(given, encoded, strict=True) if len(ids) >= max_length]
    return rows, too_long


def _warn_of_cpu(where: str, model: torch.nn.Module) -> None:
    """Warn if the base will answer on the CPU beside an accelerator: a trainer moves the model there only later."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and input_device(language_model(model)).type == "cpu":
        logger.warning(
            "%s: the base model answers these prompts on the CPU, which is slow, although there is a %s device. Move "
            "the model first, such as with from_pretrained(..., device_map=%r) or model.to(%r).",
            where,
            accelerator.type,
            accelerator.type,
            accelerator.type,
        )


def ended(row: Mapping[str, Any]) -> Any:
    """Return an answer to train on, up to its last whole sentence if it was cut.

    Return `None` if nothing is left, if the answer is a thought that was cut, or if the chat template would show
    another answer than the base wrote, as templates do that drop thoughts.
    """
    if not row.get("shown", True):
        return None
    completion = row["completion"]
    if not row["unfinished"]:
        return completion
    text = _whole_sentences(answer_text(completion))
    if not text or after_thought(text) is None:
        return None
    return text if isinstance(completion, str) else [{"role": "assistant", "content": text}]


def _whole_sentences(text: str) -> str:
    """Return a text up to its last whole sentence. A list's number alone is no sentence."""
    while whole := _SENTENCE.match(text):
        text = whole[0]
        mark = _LIST_MARK.search(text)
        if mark is None:
            return text
        text = text[: mark.start()]
    return ""


def kept_answers(
    where: str, rows: Sequence[dict[str, Any]], too_long: int
) -> tuple[list[dict[str, Any]], AnswerCounts]:
    """Return the rows whose answers are kept, and the counts, with the number of prompts that are too long.

    Raises:
        ValueError: If none is kept. The message begins with `where`.
    """
    verdicts = [_verdict(row) for row in rows]
    kept = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict == Verdict.COMPLIANCE]
    counts = AnswerCounts(
        prompts=len(rows) + too_long,
        kept=len(kept),
        refused=verdicts.count(Verdict.REFUSAL),
        unclear=verdicts.count(Verdict.UNCLEAR),
        too_long=too_long,
        unfinished=sum(row["unfinished"] for row in kept),
    )
    if not kept:
        raise ValueError(
            f"{where}: {counts.summary} So there is nothing to preserve. Give prompts that it answers, an instruct "
            "model, or rows with answers."
        )
    logger.info("%s: %s", where, counts.summary)
    return kept, counts


def _verdict(row: Mapping[str, Any]) -> Verdict:
    """Classify an answer. Short answers and numbers, such as "No." or "42", and thoughts that were cut are answers."""
    text = answer_text(row["completion"])
    verdict = classify(text)
    if verdict != Verdict.UNCLEAR or repeats(text):
        return verdict
    answer = after_thought(text)
    if answer is None:
        return Verdict.COMPLIANCE
    short = len(answer) <= _SHORT or not any(map(str.isalpha, answer))
    return Verdict.COMPLIANCE if short and any(map(str.isalnum, answer)) and not row["unfinished"] else verdict


def _content(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, name: str) -> Content:
    """Return a prompt as its row stores it: messages if the tokenizer has a chat template, plain text if not."""
    prompt = content_of(prompt, name)
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if tokenizer.chat_template is not None else prompt
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name} is conversational, but the tokenizer has no chat template. Use an instruct model's tokenizer, "
            "set tokenizer.chat_template, or give plain text."
        )
    messages = [dict(message) for message in cast(list[Message], text_or_messages(prompt, name))]
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def _row(
    processing_class: ProcessingClass,
    prompt: Content,
    options: Mapping[str, Any],
    prompt_ids: list[int],
    answer_ids: list[int],
    max_new_tokens: int,
) -> dict[str, Any]:
    tokenizer = tokenizer_of(processing_class)
    # An answer that ends exactly on the last token also counts as unfinished. The only cost is that token's score.
    unfinished = len(answer_ids) >= max_new_tokens
    if isinstance(prompt, str):
        # Decode prompt and answer together: some tokenizers drop the space at the start of a text.
        before = decoded(tokenizer, prompt_ids, skip_special_tokens=True)
        text = decoded(tokenizer, prompt_ids + answer_ids, skip_special_tokens=True)[len(before) :]
    else:
        text = decoded_answer(tokenizer, answer_ids).strip()
    if unfinished:
        text = text.rstrip("\ufffd")  # an incomplete character
    completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    row = {"prompt": prompt, **options, "completion": completion, "unfinished": unfinished}
    if text and not _renders(processing_class, row, answer_ids):
        row |= {"ids": prompt_ids + answer_ids, "answer_start": len(prompt_ids)}
        # Some templates only leave out the end of a turn.
        row["shown"] = _renders(processing_class, row, answer_ids[:-1])
    return row


def _renders(processing_class: ProcessingClass, row: Mapping[str, Any], answer_ids: list[int]) -> bool:
    """Whether a row, as it is tokenized for training, has the answer as the model wrote it, where it writes one.

    Templates of reasoning models drop or close a thought, or open one for the model. Then the row keeps the tokens
    themselves.
    """
    example = encode_row(processing_class, row, "An answer")
    before = encode_prompt(processing_class, row, "An answer")
    shown, written = (decoded(tokenizer_of(processing_class), ids).strip() for ids in (example.answer, answer_ids))
    return example.ids[: len(before)] == before and shown.startswith(written.rstrip("\ufffd"))


def answer_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of an answer. Of several messages, it is the last one."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _key(
    model: torch.nn.Module, processing_class: ProcessingClass, prompts: Sequence[Any], settings: Mapping[str, Any]
) -> str:
    """Digest what the answers depend on, in 32 hexadecimal digits."""
    lm, tokenizer = language_model(model), tokenizer_of(processing_class)
    ends = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    # Without the chat template, which may show today's date.
    rules = [tokenizer(prompt_text(prompt))["input_ids"] for prompt in prompts]
    facts = {
        "format": _FORMAT,
        "model": [type(lm).__name__, lm.name_or_path, lm.config.to_dict(), ends],
        "tokenizer": [len(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map, rules],
        "prompts": prompts,
        "settings": settings,
    }
    if tokenizer is not processing_class:
        facts["processor"] = [type(processing_class).__name__, getattr(processing_class, "chat_template", None)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(_weights_digest(lm))
    return digest.hexdigest()[:32]


def _weights_digest(lm: torch.nn.Module) -> bytes:
    """Digest a few values of every base weight, and the sum of all its bits.

    Any training changes the digest. It is the same with and without an adapter on top, and on every device.
    """
    digest = hashlib.sha256()
    values, sums = {}, {}
    for name, parameter in base_parameters(lm):
        if parameter.is_meta:
            continue
        flat = parameter.detach().flatten()
        values[name] = flat[:: len(flat) // 32 + 1]
        sums[name] = bit_sum(flat)
    for name in sorted(values):
        digest.update(f"{name} {values[name].dtype} {sums[name]}".encode())
        digest.update(values[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _read(path: Path, prompts: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Read the cached rows. Return `None` if there are none or they cannot be used."""
    if not path.is_file():
        return None
    try:
        rows = list(json_lines(path.read_text(encoding="utf-8")))
        if [row["prompt"] for row in rows] != list(prompts):
            raise ValueError("its prompts are not the requested ones")
        for row in rows:
            if not isinstance(answer_text(row["completion"]), str) or not isinstance(row["unfinished"], bool):
                raise ValueError("a row is not an answer")
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("%s is damaged (%s: %s). The answers are generated again.", path, type(error).__name__, error)
        return None
    return rows


def _store(path: Path, rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """Write the rows. The old file is replaced only when the new one is complete. A full disk does not lose them."""
    try:
        with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        logger.warning("%s: the answers are used, but cannot be stored for the next run: %s", where, error)
        return
    logger.info("%s: the answers are stored in %s.", where, path)
