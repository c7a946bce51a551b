# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The same projection for training a model's own weights, as in the paper, instead of an adapter."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from . import attachment
from .config import ProjectionConfig
from .gradients import is_plain_linear
from .precision import LOW_PRECISION
from .projector import Projector
from .stacks import InputMatrix
from .targets import without_wrappers

logger = logging.getLogger(__name__)


@dataclass
class FullParameterConfig(ProjectionConfig):
    """Configuration of OGPSA for training a model's own weights.

    Pass it to `attach`, or to `OGPSACallback(..., config=...)`. The rows are `rows` times as large as the projected
    weights, so use only a few of them: the default is 4, each the gradient of a batch.

    Args:
        subspace (`str`): See [`OGPSAConfig`]; the default is `"gradients"`. With `"activations"` the change of every
            linear layer's weight is projected. Embeddings, norms and biases must then be frozen or named in `exclude`.
        subspace_rank (`int`, *optional*): See [`OGPSAConfig`].
        subspace_energy (`float`): See [`OGPSAConfig`].
        tokens (`str`): See [`OGPSAConfig`].
        constraint (`str`): See [`OGPSAConfig`].
        projection (`str`): See [`OGPSAConfig`].
        scope (`str`): The parameters projected together: a slice of each tensor (only if they are not sharded), each
            tensor, all parameters of a module (weight and bias), or all parameters.
        slices (`int`): See [`OGPSAConfig`].
        rows (`int`): Reference gradients stored per block, over all reference sets. The newest replace the oldest.
        rows_from (`str`): What one row is the gradient of: a `"batch"` (of all processes together), the mean over a
            `"set"`, or an `"example"`.
        rows_dtype (`str`): `"float32"`, `"bfloat16"` for half the memory, or `"int8"` for a quarter. `"int8"` requires
            weights that are not sharded.
        refresh_steps (`int`): Optimizer steps from one refresh of the rows to the next. There is another refresh after
            the first step.
        reference_budget (`float`, *optional*): See [`OGPSAConfig`].
        refresh_samples (`int`, *optional*): See [`OGPSAConfig`].
        reference_weight (`float`, *optional*): See [`OGPSAConfig`]; the default is 0.
        missing_reference (`str`): What an optimizer step does without reference rows, or with rows that are older than
            twice `refresh_steps`: `"error"`, `"warn"`, or `"ignore"`. Without rows, the last two train without
            projection.
        exclude (`Sequence[str]`): Modules whose parameters are trained but not projected, and for which no rows are
            stored. Give names or parts of dotted names, with `*` as in file names, such as `"embed_tokens"`,
            `"lm_head"`, `"*norm*"`, `"layers.0"`.
        rows_device (`str`): `"model"` stores the rows on the device of the parameters. `"cpu"` stores them in host
            memory and copies them from there twice in every step.

    Raises:
        ValueError: If a value is not allowed, or if two values contradict each other.
    """

    subspace: Literal["activations", "gradients", "both", "none"] = field(
        default="gradients",
        metadata={"help": "The directions that updates are projected away from, as for adapters."},
    )
    rows: int = field(
        default=4,
        metadata={
            "help": "Number of reference gradients stored per block, over all reference sets. The newest replace the "
            "oldest."
        },
    )
    rows_from: Literal["example", "batch", "set"] = field(
        default="batch",
        metadata={
            "help": "One row is the gradient of an 'example', the gradient of a 'batch', or the mean gradient of a "
            "'set'."
        },
    )
    reference_weight: float | None = field(
        default=0.0,
        metadata={
            "help": "How much of the mean reference gradient is added to the training gradient (replay). It is added "
            "only in steps with a refresh, and only new gradients count."
        },
    )
    exclude: Sequence[str] = field(
        default=(),
        metadata={
            "help": "Modules that are trained but not projected. Give names or parts of names, with * as a wildcard."
        },
    )
    rows_device: Literal["model", "cpu"] = field(
        default="model",
        metadata={
            "help": "Where the rows are stored. 'model' stores them on the device of the parameters. 'cpu' stores "
            "them in host memory."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = isinstance(self.exclude, Iterable) and not isinstance(self.exclude, str)
        given = tuple(self.exclude) if listed else ()
        if not listed or not all(isinstance(name, str) and name for name in given):
            raise ValueError(f"exclude={self.exclude!r} is not allowed. Use a list of module names.")
        self.exclude = given
        if self.rows_device not in ("model", "cpu"):
            raise ValueError(f"rows_device={self.rows_device!r} is not allowed. Use one of: 'model', 'cpu'.")

    @classmethod
    def paper(cls, stage: Literal["sft", "dpo"], **overrides: Any) -> FullParameterConfig:
        """The published rule and schedule (arXiv 2602.07892 and its code), which trains all weights.

        The gradient of each tensor loses its component in the span of one mean gradient per reference set (at most two
        sets, unless `rows` is raised). The mean gradients are recomputed from all reference examples every 30 (SFT) or
        5 (DPO) optimizer steps.

        Args:
            stage (`str`): `"sft"` or `"dpo"`.
            **overrides: Any field. It overrides the paper's value.

        Raises:
            ValueError: If `stage` is neither `"sft"` nor `"dpo"`.
        """
        return cls(**{**cls._paper_rule(stage), **overrides})


class WholeTargets:
    """The trainable parameters of a model.

    Args:
        model (`nn.Module`): The model, not wrapped in DDP. FSDP2 may shard it before or afterwards.
        config (`FullParameterConfig`): The settings.
    """

    kind = "projected"
    what = "a model with OGPSA"
    settings = "FullParameterConfig"
    untrained = (
        "no weight outside of exclude is in training. Unfreeze weights (requires_grad_(True)), or exclude fewer."
    )
    untied = (
        "Give both modules one nn.Parameter, as for tied embeddings, or give each its own memory "
        "(parameter.data = parameter.data.clone())."
    )
    names_others = False  # the user has excluded the other parameters

    def __init__(self, model: nn.Module, config: FullParameterConfig) -> None:
        self.model = model
        self.config = config
        self.rows_on_host = config.rows_device == "cpu"
        self._known: list[tuple[str, str, nn.Parameter]] | None = None

    def takes(self, config: FullParameterConfig) -> bool:
        """Take other settings for a next stage, unless they select other parameters. Return whether it took them."""
        same = (config.exclude, config.rows_device) == (self.config.exclude, self.config.rows_device)
        if not same or not self.trained():
            return False
        self.config = config
        return True

    def trained(self) -> list[tuple[str, str, nn.Parameter]]:
        """Name, owner (the module that it belongs to) and parameter of everything in training that is not excluded."""
        return [item for item in self._included() if item[2].requires_grad]

    def frozen(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of everything that is neither in training nor excluded."""
        return [(name, parameter) for name, _, parameter in self._included() if not parameter.requires_grad]

    def _included(self) -> list[tuple[str, str, nn.Parameter]]:
        known = self._known  # another thread may reset it in the meantime
        if known is None:
            found, owners = [], defaultdict(list)
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                name = without_wrappers(name)
                owner = name.rpartition(".")[0]
                if parameter not in owners:  # a shared one has the name of its first owner
                    found.append((name, owner, parameter))
                owners[parameter].append(owner)
            for pattern in self.config.exclude:
                if not any(_matches(owner, pattern) for own in owners.values() for owner in own):
                    raise ValueError(
                        f"exclude: {pattern!r} matches no module of this {type(self.model).__name__}. Use names of "
                        f"modules with parameters, for example {found[0][1]!r} or {found[-1][1]!r}."
                    )
            self._known = known = [
                item
                for item in found
                if not any(_matches(owner, pattern) for owner in owners[item[2]] for pattern in self.config.exclude)
            ]
        return known

    def matrices(self) -> list[InputMatrix]:
        """The weights of linear layers in training.

        Raises:
            ValueError: If other parameters are in training, if two layers share a weight, or if a subclass of
                `nn.Linear` has its own `forward`.
        """
        layers = {id(own.weight): own for own in self.model.modules() if isinstance(own, nn.Linear)}
        users = Counter(id(own.weight) for own in self.model.modules() if getattr(own, "weight", None) is not None)
        found, others, unknown = [], [], ""
        for name, owner, parameter in self.trained():
            layer = layers.get(id(parameter))
            if layer is not None and users[id(parameter)] == 1:
                if is_plain_linear(layer):
                    found.append(InputMatrix(name, owner, layer, layer, parameter))
                    continue
                unknown = (
                    f" {name} belongs to a {type(layer).__name__}, a subclass of nn.Linear with its own forward, so "
                    "OGPSA cannot know how it uses the weight. For such layers there is also subspace='gradients'."
                )
            others.append(name)
        if others:
            raise ValueError(
                f"subspace='activations' projects only weights of linear layers, but {len(others)} other parameters "
                f"are in training: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}. Such parameters are "
                "embeddings, norms, biases, and weights that several layers share. Freeze them, or name their "
                f"modules in exclude. Excluded modules are trained but not projected.{unknown}"
            )
        return found

    def original(self) -> AbstractContextManager:
        """A context with the model as it is, because its own weights are in training."""
        return nullcontext()

    def forget(self) -> None:
        """Forget the known parameters, because sharding or loading may have replaced them."""
        self._known = None

    def check(self) -> None:
        """Accept any model, because every pass uses the model's own weights."""


def _matches(owner: str, pattern: str) -> bool:
    return fnmatchcase(f".{owner}.", f"*.{pattern}.*")


def attach(model: nn.Module, config: FullParameterConfig) -> Projector:
    """Project the steps that optimizers make with a model's own weights. See `tuner.attaching.attach`.

    Raises:
        ValueError: If `exclude` names something that is not in the model, or leaves nothing to project.
    """
    targets = WholeTargets(model, config)
    if not targets.trained():
        raise ValueError(
            f"exclude={config.exclude!r} leaves no parameter to project: this {type(model).__name__} trains no other "
            "parameter. Exclude fewer modules, or unfreeze parameters."
        )
    low = [name for name, _, parameter in targets.trained() if parameter.dtype in LOW_PRECISION]
    if low:
        logger.warning(
            "%d weights in training have 16 bits, such as %s. The optimizer itself rounds its steps to them, so small "
            "steps are lost, with the projection and without. Load the model with dtype=torch.float32. It still "
            "computes in 16 bits with bf16=True or fp16=True.",
            len(low),
            low[0],
        )
    projector = Projector(targets)
    attachment.attach(model, projector)
    return projector
