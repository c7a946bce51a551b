# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A variant that the library does not have: B does not change on what A passes to it on reference tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_ogpsa import ReferenceSet
from peft_ogpsa.core.config import ProjectionConfig
from peft_ogpsa.core.isolation import isolated_eval
from peft_ogpsa.references.loader import ReferenceLoader


class HeldB(TrainerCallback):
    """Project the change of every B onto the complement of the leading half of its inputs on reference tokens.

    The input of B is `A x`, which has as many numbers as the rank, and A changes in training. So the second moment of
    these inputs is measured on a few reference examples before the first step, after it, and then every five steps. A
    gradient subspace is refreshed at the same steps.

    Args:
        sets: The reference sets.
        samples: Examples per measurement.
    """

    def __init__(self, sets: Sequence[ReferenceSet], samples: int = 4) -> None:
        self.sets, self.samples = sets, samples
        self.examples = 0
        self._held: dict[nn.Module, Tensor] = {}
        self._before: dict[nn.Module, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tokenize the references, and add hooks to the optimizer's steps."""
        config = ProjectionConfig(subspace="gradients", refresh_samples=self.samples)
        size = args.train_batch_size
        tokenizer = kwargs["processing_class"]
        self._loader = ReferenceLoader.from_sets(self.sets, tokenizer, config, size, size, args.seed)
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        optimizer.register_step_pre_hook(lambda *_: self._keep())
        optimizer.register_step_post_hook(lambda *_: self._project())

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure if a measurement is due."""
        if state.global_step and state.global_step % 5 != 1:
            return
        layers = {name: module for name, module in model.named_modules() if name.endswith("lora_B.default")}
        moments = {layer: torch.zeros(layer.in_features, layer.in_features) for layer in layers.values()}
        with isolated_eval(model):
            for batches in self._loader.batches(next(model.parameters()).device).values():
                for batch in batches:
                    self._add(model, batch, moments)
                    self.examples += len(batch["input_ids"])
        self._held = {layer: torch.linalg.eigh(c).eigenvectors[:, len(c) // 2 :] for layer, c in moments.items()}

    @staticmethod
    def _add(model: Any, batch: Any, moments: dict[nn.Module, Tensor]) -> None:
        real = batch["attention_mask"].bool()

        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach()[real].float()
            moments[layer] += (rows.T @ rows).cpu()

        hooks = [layer.register_forward_pre_hook(add) for layer in moments]
        try:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self) -> None:
        self._before = {layer: layer.weight.detach().clone() for layer in self._held}

    @torch.no_grad()
    def _project(self) -> None:
        for layer, directions in self._held.items():
            change, directions = layer.weight - self._before[layer], directions.to(layer.weight)
            layer.weight.sub_(change @ directions @ directions.T)
