# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A few reference examples whose gradients are measured at every step. No row is made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peft_ogpsa.core.gradients import example_gradients
from peft_ogpsa.core.isolation import isolated_eval
from peft_ogpsa.core.layout import Blocks, Stack
from peft_ogpsa.core.rows import Slots
from peft_ogpsa.references.losses import answer_loss, collate
from peft_ogpsa.text.tokenization import Example


class Probe:
    """Reference examples, sorted by length so that they need little padding.

    Args:
        sets: Tokenised examples by set.
        pad: The token to pad with.
        batch: Examples per pass.

    Attributes:
        names: Names of the sets.
        owners: Set of each example.
    """

    def __init__(self, sets: Mapping[str, Sequence[Example]], pad: int, batch: int) -> None:
        pairs = sorted(((name, own) for name, rows in sets.items() for own in rows), key=lambda pair: len(pair[1].ids))
        self.names = list(sets)
        self.owners = [name for name, _ in pairs]
        self._examples = [own for _, own in pairs]
        self._pad, self._batch = pad, batch

    def gradients(self, model: Any, blocks: Blocks) -> Stack:
        """Return the gradient of every example at the current parameters: `(pieces, examples, numel)` per group."""
        linears = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
        layers = [linears.get(id(parameter)) for parameter in blocks.flat_parameters()]
        stack = blocks.zeros(rows=len(self.owners))
        ones = [torch.ones(part.shape[:2]) for part in stack]
        with isolated_eval(model, gradients=True):
            for start in range(0, len(self.owners), self._batch):
                part = self._examples[start : start + self._batch]
                slots = Slots(blocks, stack, ones, range(start, start + len(part)))
                inputs = collate(part, self._pad, blocks.device)
                example_gradients(model, inputs, answer_loss, blocks, slots, layers)
        return stack

    def means(self, gradients: Stack) -> Stack:
        """Return the mean of these gradients over each set: `(pieces, sets, numel)` per group."""
        members = [[i for i, owner in enumerate(self.owners) if owner == name] for name in self.names]
        return [torch.stack([part[:, own].mean(1) for own in members], 1) for part in gradients]
