# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure how far a model has moved from its base, along the base's own answers.

A loss on reference answers can fall because the model learns their style. KL(base || model) cannot be lowered that
way: it is zero only for the base itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..core.isolation import isolated_eval
from ..text.access import language_model
from ..text.batching import by_length
from ..text.generation import generate_ids
from ..text.logits import answer_logits
from ..text.tokenization import Example, Prompt, encode_prompt
from ..tuner.adapters import without_adapter
from .losses import LossResult


@dataclass(frozen=True)
class BaseAnswers:
    """The base model's own answers, stored so that many measurements can use the same base."""

    examples: list[Example]
    batch_size: int
    """Examples per forward pass. The base's and the model's passes have the same shape, so an unchanged model has a KL
    of exactly 0, also in bfloat16."""
    log_probs: list[torch.Tensor] | None = None
    """The base's log-probabilities, one float32 tensor (answer tokens, vocabulary) per example, on the CPU. None: they
    are too large to keep and are computed again each time."""

    def batches(self) -> list[list[int]]:
        """Return the examples' positions, one list per forward pass."""
        positions = range(len(self.examples))
        return by_length(positions, self.batch_size, lambda i: len(self.examples[i].ids), longest_first=True)


def own_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    cache_bytes: int = 2**28,
) -> BaseAnswers:
    """Let the base model answer, sampling at temperature 1.

    The answers are sampled, not greedy. KL(base || model) of whole answers is an expectation over the base's
    distribution, and by the chain rule the per-token divergences along sampled answers estimate it without bias.
    Greedy answers would follow only the base's most likely path.

    Args:
        model: The base model. Disable an adapter first.
        tokenizer: Its tokenizer.
        prompts: Prompts as in `generate`, held out from training and references.
        max_new_tokens: Length at which an unfinished answer is cut.
        batch_size: Prompts per batch, here and in `kl_from_base`.
        seed: Seed of the sampling.
        cache_bytes: Keep the log-probabilities if they take at most this many bytes.

    Raises:
        ValueError: If there are no prompts.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if not encoded:
        raise ValueError("prompts is empty. Give at least one prompt to measure the KL from base.")
    drawn = generate_ids(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, sample=True, seed=seed
    )
    examples = [Example(prompt + answer, len(prompt)) for prompt, answer in zip(encoded, drawn, strict=True)]
    answers = BaseAnswers(examples, batch_size)
    vocabulary = language_model(model).config.get_text_config().vocab_size
    if 4 * vocabulary * sum(map(len, drawn)) > cache_bytes:
        return answers
    log_probs: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    with isolated_eval(model):
        for batch in answers.batches():
            for position, logits in zip(batch, _logits(model, answers, batch), strict=True):
                log_probs[position] = logits.float().log_softmax(-1).cpu()
    return BaseAnswers(examples, batch_size, log_probs)


def kl_from_base(model: torch.nn.Module, answers: BaseAnswers) -> LossResult:
    """Compute KL(base || model) per token in nats, exact over the vocabulary, along the base's own answers.

    Args:
        model: The trained model. It must have an adapter if `answers` holds no log-probabilities.
        answers: Answers from `own_answers`.

    Raises:
        ValueError: If the base's log-probabilities are not stored and the base is not reachable.
    """
    sums = [0.0] * len(answers.examples)
    with isolated_eval(model):
        for batch in answers.batches():
            if answers.log_probs is None:
                with without_adapter(model):
                    base = [logits.float().log_softmax(-1) for logits in _logits(model, answers, batch)]
            else:
                base = [answers.log_probs[position] for position in batch]
            for position, expected, logits in zip(batch, base, _logits(model, answers, batch), strict=True):
                sums[position] = _kl(expected.to(logits.device), logits.float().log_softmax(-1)).sum().item()
    return LossResult.of_examples(sums, answers.examples)


def _logits(model: torch.nn.Module, answers: BaseAnswers, batch: list[int]) -> list[torch.Tensor]:
    return answer_logits(model, [answers.examples[position] for position in batch])


def _kl(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return the KL of each row of log-probabilities.

    A token that the base rules out (-inf) adds nothing. Results that rounding puts below 0 become 0.
    """
    terms = base.exp() * (base - model)
    return terms.masked_fill(base == -torch.inf, 0.0).sum(-1).clamp_min(0.0)
