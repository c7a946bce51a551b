# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Build reference sets from prompts alone. The base model answers the prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from ..core.files import json_lines, replacing
from ..text.access import language_model
from ..text.cache import cache_dir as default_cache
from ..text.generation import generate_ids
from ..text.refusal import Verdict, classify
from ..text.tokenization import Message, Prompt, encode_prompt, text_or_messages
from ..tuner.adapters import base_of

logger = logging.getLogger(__name__)

_FORMAT = 1  # version of the cache file's format


@dataclass(frozen=True)
class AnswerCounts:
    """What happened to the prompts: `prompts = kept + refused + unclear + too_long`."""

    prompts: int
    kept: int
    refused: int
    """The base model declined, according to `evaluation.classify`."""
    unclear: int
    """The answer is empty, symbols, or a loop, according to the same matcher."""
    too_long: int
    """The prompt alone already has `max_length` tokens or more."""
    unfinished: int
    """How many of the kept answers were cut at `max_new_tokens`."""


def self_answers(
    name: str,
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
) -> tuple[list[dict[str, Any]], AnswerCounts]:
    """Return rows with the model's own answers, and the counts. The arguments are those of `from_prompts`."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(prompts, str | Mapping):
        raise ValueError(
            f"Reference set {name!r}: prompts is a single {type(prompts).__name__}. Give a list of prompts."
        )
    given = [
        _content(prompt, tokenizer, f"Reference set {name!r}: prompt {i}")
        for i, prompt in enumerate(islice(prompts, samples))
    ]
    if not given:
        raise ValueError(f"Reference set {name!r} has no prompts. Give it at least one prompt.")
    encoded = [
        encode_prompt(tokenizer, prompt, f"Reference set {name!r}: prompt {i}") for i, prompt in enumerate(given)
    ]
    fitting = [position for position, ids in enumerate(encoded) if len(ids) < max_length]
    if not fitting:
        raise ValueError(
            f"Reference set {name!r}: all {len(given)} prompts have max_length={max_length} tokens or more, so there "
            "is no room for an answer. Raise max_length, or shorten the prompts."
        )
    asked = [given[position] for position in fitting]
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "sample": sample,
    }
    folder = Path(cache_dir) if cache_dir is not None else default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(model, tokenizer, asked, settings)}.jsonl"
    rows = _read(path, asked)
    if rows is None:
        prompt_ids = [encoded[position] for position in fitting]
        with base_of(model):
            answers = generate_ids(model, tokenizer, prompt_ids, progress=progress, **settings)
        rows = [
            _row(tokenizer, prompt, ids, answer, max_new_tokens)
            for prompt, ids, answer in zip(asked, prompt_ids, answers, strict=True)
        ]
        _write(path, rows)
    kept, counts = _kept(rows, len(given))
    summary = (
        f"kept {counts.kept} of {counts.prompts} answers ({counts.unfinished} of them were cut at max_new_tokens), "
        f"and dropped {counts.refused} refusals, {counts.unclear} unclear answers and {counts.too_long} prompts that "
        "are too long"
    )
    if not kept:
        raise ValueError(
            f"Reference set {name!r}: {summary}. The base model answers none of these prompts, so there is nothing "
            "to preserve. Give prompts that it answers, an instruct model, or rows with answers."
        )
    logger.info("Reference set %r: %s. The answers are stored in %s.", name, summary, path)
    return kept, counts


def _kept(rows: list[dict[str, Any]], prompts: int) -> tuple[list[dict[str, Any]], AnswerCounts]:
    """Return the rows whose answers are kept, and the counts. `prompts` includes those too long to be answered."""
    verdicts = [classify(_text(row["completion"])) for row in rows]
    kept = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict == Verdict.COMPLIANCE]
    return kept, AnswerCounts(
        prompts=prompts,
        kept=len(kept),
        refused=verdicts.count(Verdict.REFUSAL),
        unclear=verdicts.count(Verdict.UNCLEAR),
        too_long=prompts - len(rows),
        unfinished=sum(row["unfinished"] for row in kept),
    )


def _content(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, name: str) -> str | list[dict[str, Any]]:
    """Return a prompt as its row stores it: messages if the tokenizer has a chat template, plain text if not."""
    if isinstance(prompt, Mapping):
        if "prompt" not in prompt and "messages" not in prompt:
            raise ValueError(f"{name} has the columns {sorted(prompt)}. Give it the column prompt or messages.")
        prompt = prompt["prompt"] if "prompt" in prompt else prompt["messages"]
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
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, Any]],
    prompt_ids: list[int],
    answer_ids: list[int],
    max_new_tokens: int,
) -> dict[str, Any]:
    # An answer that ends exactly on the last token also counts as unfinished. The only cost is that token's score.
    unfinished = len(answer_ids) >= max_new_tokens
    if isinstance(prompt, str):
        # Decode prompt and answer together: some tokenizers drop the space at the start of a text.
        before = str(tokenizer.decode(prompt_ids, skip_special_tokens=True))
        text = str(tokenizer.decode(prompt_ids + answer_ids, skip_special_tokens=True))[len(before) :]
    else:
        text = str(tokenizer.decode(answer_ids, skip_special_tokens=True)).strip()
    if unfinished:
        text = text.rstrip("\ufffd")  # an incomplete character
    completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    return {"prompt": prompt, "completion": completion, "unfinished": unfinished}


def _text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def _key(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], settings: Mapping[str, Any]
) -> str:
    """Digest what the answers depend on, in 32 hexadecimal digits."""
    lm = language_model(model)
    ends = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    facts = {
        "format": _FORMAT,
        "model": [type(lm).__name__, lm.name_or_path, lm.config.to_dict(), ends],
        "tokenizer": [len(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map],
        "prompts": prompts,
        "settings": settings,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(_weights_digest(lm))
    return digest.hexdigest()[:32]


def _weights_digest(lm: torch.nn.Module) -> bytes:
    """Digest a few values of every base weight.

    Any training changes the digest. It is the same with and without an adapter on top.
    """
    digest = hashlib.sha256()
    values = {}
    for name, parameter in lm.named_parameters():
        if "lora_" in name or ".modules_to_save." in name or parameter.is_meta:
            continue
        flat = parameter.detach().flatten()
        values[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = flat[:: len(flat) // 32 + 1]
    for name in sorted(values):
        digest.update(f"{name} {values[name].dtype}".encode())
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
            if not isinstance(_text(row["completion"]), str) or not isinstance(row["unfinished"], bool):
                raise ValueError("a row is not an answer")
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("%s is damaged (%s: %s). The answers are generated again.", path, type(error).__name__, error)
        return None
    return rows


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows. The old file is replaced only when the new one is complete."""
    with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
