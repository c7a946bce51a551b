# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The same projection where a model's own weights are trained, as in the paper, and not an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from .activation_subspace import InputMatrix
from .config import ProjectionConfig
from .projector import Projector

# Where a model keeps its projector. Set in `__dict__`, past nn.Module: it is neither submodule nor state.
PROJECTOR = "_ogpsa_full_parameter"

# What wrappers put into parameters' names, which must be the same on any number of processes.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


@dataclass
class FullParameterConfig(ProjectionConfig):
    """Configuration of OGPSA where a model's own weights are trained.

    Give it to `attach`, or to `OGPSACallback(..., config=...)`. The rows are `rows` times the size of the projected
    weights, so that a few must do: 4 by default, and each the gradient of a batch.

    Args:
        subspace (`str`): See [`OGPSAConfig`]; `"gradients"` by default. With `"activations"` the change of every
            linear layer's weight is projected; embeddings, norms and biases must be frozen or named in `exclude`.
        subspace_rank (`int`, *optional*): See [`OGPSAConfig`].
        subspace_energy (`float`): See [`OGPSAConfig`].
        tokens (`str`): See [`OGPSAConfig`].
        constraint (`str`): See [`OGPSAConfig`].
        projection (`str`): See [`OGPSAConfig`].
        scope (`str`): The parameters projected together: a slice of each tensor (where they are not sharded), each
            tensor, all of a module (weight and bias), or all.
        slices (`int`): See [`OGPSAConfig`].
        rows (`int`): Reference gradients held per block, over all reference sets. The newest replace the oldest.
        rows_from (`str`): What one row is the gradient of: a `"batch"` (of all processes together), the mean over a
            `"set"`, or an `"example"`.
        rows_dtype (`str`): `"float32"`, `"bfloat16"` for half the memory, or, where the weights are not sharded,
            `"int8"` for a quarter.
        refresh_steps (`int`): Optimizer steps from one refresh of the rows to the next, and once more after the first.
        reference_budget (`float`, *optional*): See [`OGPSAConfig`].
        refresh_samples (`int`, *optional*): See [`OGPSAConfig`].
        reference_weight (`float`, *optional*): See [`OGPSAConfig`]; 0 by default.
        missing_reference (`str`): What a first optimizer step without any reference rows does: `"error"`, `"warn"`,
            or `"ignore"`, which trains without projection silently.
        exclude (`Sequence[str]`): Modules whose parameters are trained but not projected, and of which no rows are
            held: names or parts of dotted names, with `*` as in file names, such as `"embed_tokens"`, `"lm_head"`,
            `"*norm*"`, `"layers.0"`.
        rows_device (`str`): `"model"` keeps the rows beside the parameters, `"cpu"` in the host's memory, whence they
            are copied twice in every step.

    Raises:
        ValueError: If a value is not allowed, or if two contradict each other.
    """

    subspace: Literal["activations", "gradients", "both"] = field(
        default="gradients",
        metadata={"help": "What updates are projected away from, as for adapters."},
    )
    rows: int = field(default=4, metadata={"help": "Reference gradients held per block, over all sets."})
    rows_from: Literal["example", "batch", "set"] = field(
        default="batch",
        metadata={"help": "What one row is the gradient of: an 'example', a 'batch', or the mean over a 'set'."},
    )
    reference_weight: float | None = field(
        default=0.0,
        metadata={"help": "How much of the mean fresh reference gradient is added to the training gradient (replay)."},
    )
    exclude: Sequence[str] = field(
        default=(),
        metadata={"help": "Modules that are trained but not projected: names or parts of them, with * as a wildcard."},
    )
    rows_device: Literal["model", "cpu"] = field(
        default="model",
        metadata={"help": "Where the rows are: beside the parameters ('model'), or in the host's memory ('cpu')."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.exclude, str) or not all(isinstance(name, str) and name for name in self.exclude):
            raise ValueError(f"exclude={self.exclude!r} is not allowed. Use a list of modules' names.")
        self.exclude = tuple(self.exclude)
        if self.rows_device not in ("model", "cpu"):
            raise ValueError(f"rows_device={self.rows_device!r} is not allowed. Use one of: 'model', 'cpu'.")

    @classmethod
    def paper(cls, stage: Literal["sft", "dpo"], **knobs: Any) -> FullParameterConfig:
        """The published rule and schedule (arXiv 2602.07892 and its code), which trains all weights.

        The gradient of each tensor loses its component in the span of one mean gradient per reference set (at most
        two sets, unless `rows` is raised), recomputed from all reference examples every 30 (SFT) or 5 (DPO) optimizer
        steps.

        Args:
            stage (`str`): `"sft"` or `"dpo"`.
            **knobs: Any field, which then overrides the paper's.

        Raises:
            ValueError: If `stage` is neither.
        """
        return cls(**{**cls._paper_rule(stage), **knobs})


class WholeTargets:
    """The trainable parameters of a model.

    Args:
        model (`nn.Module`): The model, not wrapped by DDP; FSDP2 may shard it before or afterwards.
        config (`FullParameterConfig`): The settings.
    """

    kind = "projected"
    what = "a model under OGPSA"
    settings = "FullParameterConfig"
    names_others = False  # the user has excluded them

    def __init__(self, model: nn.Module, config: FullParameterConfig) -> None:
        self.model = model
        self.config = config
        self.rows_on_host = config.rows_device == "cpu"
        self._known: list[tuple[str, str, nn.Parameter]] | None = None

    def trained(self) -> list[tuple[str, str, nn.Parameter]]:
        """Name, owner (the module that it belongs to) and parameter of what is in training and not left out."""
        known = self._known  # another thread may forget it meanwhile
        if known is None:
            found = []
            for name, parameter in self.model.named_parameters():
                for wrapper in _WRAPPERS:
                    name = name.replace(wrapper, "")
                found.append((name, name.rpartition(".")[0], parameter))
            for pattern in self.config.exclude:
                if not any(_matches(owner, pattern) for _, owner, _ in found):
                    raise ValueError(
                        f"exclude: {pattern!r} matches no module of this {type(self.model).__name__}. Its modules "
                        f"with parameters are named like {found[0][1]!r} and {found[-1][1]!r}."
                    )
            self._known = known = [
                item for item in found if not any(_matches(item[1], pattern) for pattern in self.config.exclude)
            ]
        return [item for item in known if item[2].requires_grad]

    def matrices(self) -> list[InputMatrix]:
        """The weights of linear layers in training.

        Raises:
            ValueError: If other parameters are in training, or two layers share a weight.
        """
        layers = {id(own.weight): own for own in self.model.modules() if isinstance(own, nn.Linear)}
        users = Counter(id(own.weight) for own in self.model.modules() if getattr(own, "weight", None) is not None)
        found, others = [], []
        for name, owner, parameter in self.trained():
            if id(parameter) in layers and users[id(parameter)] == 1:
                found.append(InputMatrix(name, owner, layers[id(parameter)], parameter))
            else:
                others.append(name)
        if others:
            raise ValueError(
                f"subspace='activations' projects the weights of linear layers, and {len(others)} other parameters "
                f"are in training: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} (embeddings, norms, "
                "biases, weights of several layers). Freeze them, or name their modules in exclude: then they are "
                "trained and not projected."
            )
        return found

    def original(self) -> AbstractContextManager:
        """The model as it is: its own weights are in training."""
        return nullcontext()

    def forget(self) -> None:
        """Sharding or loading may have replaced parameters."""
        self._known = None

    def check(self) -> None:
        """Nothing stands between a pass and a model's own weights."""


def _matches(owner: str, pattern: str) -> bool:
    return fnmatchcase(f".{owner}.", f"*.{pattern}.*")


class Held:
    """A model's hold on its projector, which copies of the model do not share: the rows belong to one training run."""

    def __init__(self, projector: Projector | None = None) -> None:
        self.projector = projector

    def __reduce__(self) -> tuple:
        return Held, ()


def attach(model: nn.Module, config: FullParameterConfig) -> Projector:
    """Projects the steps that optimizers make of a model's own weights.

    ```py
    projector = attach(model, FullParameterConfig(rows=4, exclude=["embed_tokens", "lm_head"]))
    for batch in training:
        while projector.due:
            projector.refresh({"general": [next(general)]}, loss_fn)
        loss_fn(model, batch).backward()
        optimizer.step()  # projected
        optimizer.zero_grad()
    ```

    The optimizer need not be named: its own step hooks find the projector of the parameters that it holds. Where the
    model is then wrapped in `DistributedDataParallel`, go on giving `attach` and `refresh` what is inside; where it
    is sharded with `fully_shard`, before or after this call, nothing changes. A second call replaces the first.

    Args:
        model (`nn.Module`): The model. Its trainable parameters are projected, apart from those that `config.exclude`
            names.
        config (`FullParameterConfig`): The settings.

    Returns:
        The projector, also to be had as `projector_of(model)`.

    Raises:
        ValueError: If `exclude` names something that is not in the model, or leaves nothing to project.
    """
    detach(model)
    targets = WholeTargets(model, config)
    if not targets.trained():
        raise ValueError(
            f"There is no parameter to project: exclude={config.exclude!r} leaves out all that is trained of this "
            f"{type(model).__name__}."
        )
    projector = Projector(targets)
    model.__dict__[PROJECTOR] = Held(projector)
    return projector


def detach(model: nn.Module) -> None:
    """Ends what `attach` began; the weights stay as they are."""
    held = model.__dict__.pop(PROJECTOR, None)
    if held is not None and held.projector is not None:
        held.projector.retire()
