# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A judge that is a model: it reads its published prompt and writes its verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from ... import extras
from ...core.precision import compute_dtype
from ...text.generation import generate_ids
from ...text.tokenization import decoded
from .format import Format
from .judge import Judge, Kind, Label


class ModelJudge(Judge):
    """Judge with a model in its own published format. The model is loaded when it is first used.

    Args:
        format: The format, for example `FORMATS["wildguard"]`.
        source: A folder with the model, or its name on the hub. Default: the name in the format.
        name: Name of the judge in results. Default: `"model:"` and the format's name.
        load_in_4bit: Load the model in 4 bits (nf4). Its verdicts may differ from those of the published model.
        batch_size: Answers per batch.
        progress: Show a progress bar.
        model: A loaded model to use. It is not freed by `release`.
        tokenizer: The tokenizer of a loaded model.
    """

    def __init__(
        self,
        format: Format,
        source: str | None = None,
        *,
        name: str | None = None,
        load_in_4bit: bool = False,
        batch_size: int = 8,
        progress: bool = False,
        model: torch.nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.format = format
        self.source = source or format.model
        self.name = name or f"model:{format.name}"
        self.kinds = format.kinds
        self.asks = format.asks
        self.answer_tokens = format.answer_tokens
        self.load_in_4bit = load_in_4bit
        self.batch_size = batch_size
        self.progress = progress
        self._given = model
        self._model = model
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The judge's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self._load(AutoTokenizer.from_pretrained)
        return self._tokenizer

    @property
    def model(self) -> torch.nn.Module:
        """The judge's model."""
        if self._model is None:
            kind: Any = AutoModelForImageTextToText if self.format.multimodal else AutoModelForCausalLM
            self._model = self._load(kind.from_pretrained, **self._options()).eval()
        return self._model

    @property
    def conditions(self) -> dict[str, Any]:
        """Where the model is from, the state of its files, and whether it is quantized."""
        return {
            "judge_source": self.source,
            "judge_files": _files(self.source),
            "judges_in_4bit": self.load_in_4bit,
        }

    def judge(self, kind: Kind, prompts: Sequence[str], answers: Sequence[str]) -> list[Label | None]:
        """Return one verdict for each answer. None: the output is not in the published format."""
        self.check(kind, prompts, answers)
        return [None if output is None else self.format.parse(output) for output in self.outputs(prompts, answers)]

    def outputs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str | None]:
        """Return what the model writes about each answer. None: special tokens are left in the judge's prompt."""
        encoded = [
            self.format.encode(self.tokenizer, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        asked = [ids for ids in encoded if ids is not None]
        texts = iter(self._asked(asked) if asked else [])
        return [None if ids is None else next(texts) for ids in encoded]

    def prepare(self) -> None:
        """Load the tokenizer and check it.

        Raises:
            ValueError: If it cannot be loaded, or does not fit the format.
            ImportError: If 4 bits are requested and bitsandbytes is not installed.
        """
        if self.load_in_4bit:
            extras.check("qlora", "A judge in 4 bits")
        try:
            self.format.check(self.tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{self.name} cannot be used: {error}. Give the folder of a model of this kind."
            ) from error

    def release(self) -> None:
        """Free the model, unless it was given."""
        self._model = self._given
        if self._given is None and torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _asked(self, encoded: list[list[int]]) -> list[str]:
        outputs = generate_ids(
            self.model,
            self.tokenizer,
            encoded,
            max_new_tokens=self.format.max_new_tokens,
            batch_size=self.batch_size,
            sample=False,
            seed=0,
            progress=self.progress,
            description=self.name,
        )
        return [decoded(self.tokenizer, output, skip_special_tokens=True) for output in outputs]

    def _options(self) -> dict[str, Any]:
        dtype = compute_dtype()
        options: dict[str, Any] = {"dtype": dtype}
        if torch.accelerator.is_available():
            options["device_map"] = "auto"
        if self.load_in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        return options

    def _load(self, load: Callable[..., Any], **options: Any) -> Any:
        try:
            return load(self.source, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.name}: {self.source!r} cannot be loaded: {str(error).rstrip('.')}. Accept its terms on the "
                f"Hugging Face hub and log in, or give a local folder: model:{self.format.name}=/path/to/folder."
            ) from error


def _files(source: str) -> str | list[list[Any]] | None:
    """Return the commit of a model from the hub, or the sizes and dates of the files in a folder."""
    folder = Path(source)
    if folder.is_dir():
        files = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
        return [[name, state.st_size, state.st_mtime_ns] for name, state in files]
    cached = try_to_load_from_cache(source, "tokenizer_config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None
