# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""How far a model has moved from its base, where the base itself goes.

A loss on reference answers can fall because the model learns their style. KL(base || model) cannot be gained that
way: it is zero for the base alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..core.isolation import undisturbed
from ..text.access import language_model
from ..text.generation import generate_ids
from ..text.logits import answer_logits, length_batches
from ..text.tokenization import Example, Prompt, encode_prompt
from ..tuner.adapters import base_model
from .losses import LossResult


@dataclass(frozen=True)
class BaseAnswers:
    """The base model's own answers, kept so that one base serves many measurements."""

    examples: list[Example]
    batch_size: int
    """Examples a forward pass. The base's and the model's passes have the same shape, so an unchanged model comes out
    at exactly 0, in bfloat16 too."""
    log_probs: list[torch.Tensor] | None = None
    """The base's log-probabilities, (answer tokens, vocabulary) an example, float32, on the CPU; None: too large to
    keep, computed anew each time."""

    def batches(self) -> list[list[int]]:
        """The examples' positions, a forward pass each."""
        return length_batches([len(example.ids) for example in self.examples], self.batch_size)


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
    """Let the base model answer, drawing at temperature 1.

    Drawn, not greedy: KL(base || model) of whole answers is an expectation over the base's distribution, and by the
    chain rule the per-token divergences along drawn answers estimate it without bias. Greedy answers would visit
    only the base's favourite path.

    Args:
        model: The base model; disable an adapter first.
        tokenizer: Its tokenizer.
        prompts: As in `generate`; held out from training and references.
        max_new_tokens: Where an unfinished answer is cut.
        batch_size: Prompts at once, here and in `kl_from_base`.
        seed: Of the draws.
        cache_bytes: Keep the log-probabilities if they take no more than this.

    Raises:
        ValueError: No prompts.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if not encoded:
        raise ValueError("prompts is empty; give at least one prompt to measure the divergence on.")
    drawn = generate_ids(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, sample=True, seed=seed
    )
    examples = [Example(prompt + answer, len(prompt)) for prompt, answer in zip(encoded, drawn, strict=True)]
    answers = BaseAnswers(examples, batch_size)
    vocabulary = language_model(model).config.get_text_config().vocab_size
    if 4 * vocabulary * sum(map(len, drawn)) > cache_bytes:
        return answers
    log_probs: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    with undisturbed(model):
        for batch in answers.batches():
            for position, logits in zip(batch, _logits(model, answers, batch), strict=True):
                log_probs[position] = logits.float().log_softmax(-1).cpu()
    return BaseAnswers(examples, batch_size, log_probs)


def kl_from_base(model: torch.nn.Module, answers: BaseAnswers) -> LossResult:
    """KL(base || model) per token in nats, exact over the vocabulary, along the base's own answers.

    Args:
        model: The trained model. It must be a `PeftModel` if `answers` holds no log-probabilities.
        answers: From `own_answers`.

    Raises:
        ValueError: The base is neither kept nor reachable.
    """
    sums = [0.0] * len(answers.examples)
    with undisturbed(model):
        for batch in answers.batches():
            if answers.log_probs is None:
                with base_model(model):
                    base = [logits.float().log_softmax(-1) for logits in _logits(model, answers, batch)]
            else:
                base = [answers.log_probs[position] for position in batch]
            for position, expected, logits in zip(batch, base, _logits(model, answers, batch), strict=True):
                sums[position] = _kl(expected.to(logits.device), logits.float().log_softmax(-1)).sum().item()
    return LossResult.from_sums(sums, [len(example.answer) for example in answers.examples])


def _logits(model: torch.nn.Module, answers: BaseAnswers, batch: list[int]) -> list[torch.Tensor]:
    return answer_logits(model, [answers.examples[position] for position in batch])


def _kl(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL a row of log-probabilities; a token that the base rules out (-inf) adds nothing, rounding below 0 is cut."""
    terms = base.exp() * (base - model)
    return terms.masked_fill(base == -torch.inf, 0.0).sum(-1).clamp_min(0.0)
