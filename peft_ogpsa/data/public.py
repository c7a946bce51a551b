# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Readers for public data sets, by name. They convert a set's columns to rows for TRL's trainers and `ReferenceSet`.

A reader takes one raw row and returns one conversational row, or `None` for a raw row that does not belong in the set
(an unsafe answer, a hallucination). Each set's card on the Hugging Face hub states its license and terms of use. For
some sets, you must accept the terms there first.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .. import extras
from .raw_rows import RawRow, check_samples, converted, from_file, from_hub, readable
from .raw_rows import values as _values

Row = dict[str, Any]

_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class PublicSet:
    """The location of a set on the hub, and the reader of its rows."""

    hub_id: str
    config: str | None
    split: str
    read: Callable[[RawRow], Row | None]
    large: bool = False
    """Whether to stream the set when only some of its rows are requested."""


def safe_rlhf(row: RawRow) -> Row | None:
    """PKU-SafeRLHF: the prompt and its safer response, if that response is safe.

    Columns: `prompt`, `response_0`, `response_1`, `is_response_0_safe`, `is_response_1_safe`, `safer_response_id`.
    """
    prompt, *responses = _values(row, "prompt", "response_0", "response_1")
    *safe, safer = _values(row, "is_response_0_safe", "is_response_1_safe", "safer_response_id")
    return _answered(prompt, responses[safer]) if safe[safer] else None


def safe_rlhf_pairs(row: RawRow) -> Row:
    """PKU-SafeRLHF: the prompt, the safer response and the other response.

    Columns: `prompt`, `response_0`, `response_1`, `safer_response_id`.
    """
    prompt, *responses, safer = _values(row, "prompt", "response_0", "response_1", "safer_response_id")
    return _pair(_user(prompt), _assistant(responses[safer]), _assistant(responses[1 - safer]))


def ultrafeedback(row: RawRow) -> Row | None:
    """UltraFeedback, binarized: the chosen conversation.

    Columns: `chosen` (messages).
    """
    (chosen,) = _values(row, "chosen")
    return _conversation(chosen)


def ultrafeedback_pairs(row: RawRow) -> Row | None:
    """UltraFeedback, binarized: the chosen and the rejected last turn after the same prompt.

    Columns: `chosen`, `rejected` (messages).
    """
    chosen, rejected = map(_conversation, _values(row, "chosen", "rejected"))
    if chosen is None or rejected is None or chosen["prompt"] != rejected["prompt"]:
        return None
    return _pair(chosen["prompt"], chosen["completion"], rejected["completion"])


def halueval(row: RawRow) -> Row | None:
    """HaluEval, general: user queries and ChatGPT's answers without hallucinations.

    Columns: `user_query`, `chatgpt_response`, `hallucination` ("yes" or "no").
    """
    query, response, hallucination = _values(row, "user_query", "chatgpt_response", "hallucination")
    return _answered(query, response) if str(hallucination).strip().lower() == "no" else None


def gsm8k(row: RawRow) -> Row:
    """GSM8K: word problems with worked answers. Calculator marks are removed, and `answer` is the result as text.

    Columns: `question`, `answer` (steps with `<<2*3=6>>` marks, then `#### result`).
    """
    question, worked = _values(row, "question", "answer")
    steps, mark, result = worked.rpartition("####")
    if not mark:
        raise ValueError("the column 'answer' has no '####' before its result")
    result = result.strip()
    steps = re.sub(r"<<.*?>>", "", steps).strip()
    return {**_answered(question, f"{steps}\nThe answer is {result}."), "answer": result}


def alpaca(row: RawRow) -> Row | None:
    """Alpaca: instructions, followed by their input if there is one.

    Columns: `instruction`, `output`, `input` (may be empty or absent).
    """
    instruction, output = _values(row, "instruction", "output")
    context = row.get("input")
    if not output.strip():
        return None
    return _answered(f"{instruction}\n\n{context}" if context else instruction, output)


def smoltalk(row: RawRow) -> Row | None:
    """SmolTalk: conversations up to their last assistant turn.

    Columns: `messages`.
    """
    (messages,) = _values(row, "messages")
    return _conversation(messages)


def xstest(row: RawRow) -> Row | None:
    """XSTest: prompts that sound unsafe but are safe, without answers. Their unsafe contrasts are left out.

    Columns: `prompt`, `type` (which begins with "contrast" for the unsafe ones).
    """
    prompt, kind = _values(row, "prompt", "type")
    return None if kind.startswith("contrast") else {"prompt": _user(prompt)}


def advbench(row: RawRow) -> Row:
    """AdvBench: harmful requests, without answers.

    Columns: `prompt`.
    """
    (prompt,) = _values(row, "prompt")
    return {"prompt": _user(prompt)}


PUBLIC: dict[str, PublicSet] = {
    "safe_rlhf": PublicSet("PKU-Alignment/PKU-SafeRLHF", None, "train", safe_rlhf),
    "safe_rlhf_pairs": PublicSet("PKU-Alignment/PKU-SafeRLHF", None, "train", safe_rlhf_pairs),
    "ultrafeedback": PublicSet("HuggingFaceH4/ultrafeedback_binarized", None, "train_sft", ultrafeedback, large=True),
    "ultrafeedback_pairs": PublicSet(
        "HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", ultrafeedback_pairs, large=True
    ),
    "halueval": PublicSet("pminervini/HaluEval", "general", "data", halueval),
    "gsm8k": PublicSet("openai/gsm8k", "main", "train", gsm8k),
    "alpaca": PublicSet("tatsu-lab/alpaca", None, "train", alpaca),
    "smoltalk": PublicSet("HuggingFaceTB/smoltalk", "all", "train", smoltalk, large=True),
    "xstest": PublicSet("natolambert/xstest-v2-copy", None, "prompts", xstest),
    "advbench": PublicSet("walledai/AdvBench", None, "train", advbench),
}


def load_public(name: str, samples: int | None = None, split: str | None = None, seed: int = 0) -> list[Row]:
    """Read a public set from the Hugging Face hub.

    Args:
        name: A key of `PUBLIC`.
        samples: Read at most this many rows of the shuffled set. `None`: all rows, in their own order. For large sets,
            only what is needed is downloaded, and rows are shuffled within parts of 10,000 rows.
        split: The split to read. Default: the set's own.
        seed: Seed of the shuffle.

    Returns:
        Conversational rows. They have `prompt` and `completion`, or `prompt`, `chosen` and `rejected`, or only
        `prompt`.

    Raises:
        OSError: If the set cannot be reached or does not exist as requested.
        ValueError: If `name` or `samples` is out of range, a column is missing, or no row is left.
    """
    public = _named(name)
    check_samples(samples)
    extras.check("cli", "Reading public data sets")
    streaming = public.large and samples is not None
    split = split or public.split

    def raw_rows() -> Iterable[RawRow]:
        try:
            dataset = from_hub(public.hub_id, public.config, split, streaming=streaming)
            yield from _shuffled(dataset, streaming, samples, seed)
        except Exception as error:  # many possible causes: offline, gated, removed, another split
            raise OSError(
                f"The set {name!r} (hub: {public.hub_id}, config={public.config!r}, split={split!r}) "
                f"cannot be loaded: {type(error).__name__}: {error} Connect to the hub, and accept the set's terms "
                f"there if it has any. Or download a file of it and use read_public({name!r}, path)."
            ) from error

    return _converted(name, public.read, raw_rows(), samples)


def read_public(name: str, path: str | Path, samples: int | None = None, seed: int = 0) -> list[Row]:
    """Read a public set from a local file with the set's own columns.

    Args:
        name: A key of `PUBLIC`.
        path: A `.jsonl`, `.json`, `.csv` or `.parquet` file.
        samples: Read at most this many rows of the shuffled set. `None`: all rows, in their own order.
        seed: Seed of the shuffle.

    Returns:
        The same kinds of rows as `load_public`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If `name`, `samples` or the kind of file is not allowed, a column is missing, or no row is left.
    """
    public, path = _named(name), Path(path)
    check_samples(samples)
    raw_rows = readable(name, path, _shuffled(from_file(name, path), True, samples, seed))
    return _converted(name, public.read, raw_rows, samples)


def _named(name: str) -> PublicSet:
    if name not in PUBLIC:
        raise ValueError(
            f"name={name!r} is not a public set that peft_ogpsa knows. Use one of {', '.join(map(repr, PUBLIC))}."
        )
    return PUBLIC[name]


def _shuffled(dataset: Any, streaming: bool, samples: int | None, seed: int) -> Iterable[RawRow]:
    if samples is None:
        return dataset
    return dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER) if streaming else dataset.shuffle(seed=seed)


def _converted(
    name: str, read: Callable[[RawRow], Row | None], raw_rows: Iterable[RawRow], samples: int | None
) -> list[Row]:
    rows = list(islice(converted(name, raw_rows, read), samples))
    if not rows:
        raise ValueError(f"The set {name!r} has no row that can be used. Check that this is the right file or split.")
    return rows


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _answered(prompt: str, answer: str) -> Row:
    return {"prompt": _user(prompt), "completion": _assistant(answer)}


def _pair(prompt: list[Any], chosen: list[Any], rejected: list[Any]) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _conversation(messages: Iterable[Mapping[str, Any]]) -> Row | None:
    """Cut a conversation after its last assistant turn, which must have a text and something before it."""
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2 or not turns[-1]["content"]:
        return None
    return {"prompt": turns[:-1], "completion": turns[-1:]}
