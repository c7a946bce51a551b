# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Generate a model's answers to prompts."""

from collections.abc import Iterable, Sequence

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..core.isolation import isolated_eval
from .access import acting_model, input_device
from .batching import by_length, padded_ids
from .thoughts import MARKS, opened, with_think_marks
from .tokenization import Prompt, decoded, encode_prompt

_MARK_TOKENS = 8
"""The mark that opens a thought has no more tokens than this at the end of a prompt."""


def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    sample: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> list[str]:
    """Answer each prompt, greedily by default.

    The model's own generation settings (temperature, penalties, ...) are ignored, so that figures of different models
    are comparable. Only its end tokens are used. The model, the tokenizer and the global random state are not changed.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: Its tokenizer. The chat template is applied if it has one.
        prompts: Strings (one user turn each), lists of messages, or rows with `prompt` or `messages`.
        max_new_tokens: Length at which an unfinished answer is cut.
        batch_size: Prompts per batch.
        sample: Sample from the model's distribution (temperature 1) instead of taking the most likely token.
        seed: Seed of the sampling. With `sample`, the answers also depend on `batch_size`.
        progress: Show a progress bar.

    Returns:
        The answers without special tokens, in the order of the prompts. A thought before an answer is between the
        marks `<think>` and `</think>`, also if the chat template opens it, or the model has other marks that
        `thoughts.py` knows.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = generate_ids(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sample=sample,
        seed=seed,
        progress=progress,
    )
    return [
        opened(decoded(tokenizer, ids[-_MARK_TOKENS:])) + decoded_answer(tokenizer, answer).strip()
        for ids, answer in zip(encoded, answers, strict=True)
    ]


def decoded_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of an answer without special tokens. The marks of a thought become `<think>` and `</think>`."""
    text = decoded(tokenizer, ids, skip_special_tokens=True)
    marked = with_think_marks(decoded(tokenizer, ids))
    if all(marked.count(mark) == text.count(mark) for mark in MARKS):
        return text
    for token in set(ids):
        special = decoded(tokenizer, [token])
        if special not in MARKS and not decoded(tokenizer, [token], skip_special_tokens=True):
            marked = marked.replace(special, "")
    return marked


def generate_ids(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sample: bool,
    seed: int,
    progress: bool = False,
    description: str = "generating",
) -> list[list[int]]:
    """Generate as `generate` does, but on token ids. Each answer runs up to and including its end token.

    `description` is the text before the progress bar.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}. Give at least 1.")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"Prompt {index} has no tokens. Give it some text, or give the tokenizer a chat template."
            )
    lm = acting_model(model)
    device = input_device(lm)
    own_config = lm.generation_config
    ends = _end_ids(own_config, tokenizer)
    padding = ends[0] if ends else 0
    config = GenerationConfig(
        do_sample=sample,
        top_k=0 if sample else None,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=padding,
        use_cache=True,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    bar = tqdm(total=len(prompts), desc=description, disable=not progress)
    with isolated_eval(model, seed=seed), bar:
        # `generate` fills gaps in the given settings from the model's own settings.
        lm.generation_config = GenerationConfig()
        try:
            order = by_length(range(len(prompts)), batch_size, lambda i: len(prompts[i]), longest_first=True)
            for batch in order:
                inputs = padded_ids([prompts[position] for position in batch], padding, device, left=True)
                output = lm.generate(**inputs, generation_config=config)  # type: ignore[operator]
                width = inputs["input_ids"].shape[1]
                for position, answer in zip(batch, output[:, width:].tolist(), strict=True):
                    end = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
                    answers[position] = answer[:end]
                bar.update(len(batch))
        finally:
            lm.generation_config = own_config
    return answers


def _end_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all end tokens.

    Chat models often end a turn with a different token than the tokenizer's. Only their settings name that token.
    """
    ends = config.eos_token_id if config.eos_token_id is not None else []
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends
