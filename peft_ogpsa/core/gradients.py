# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference gradient pass: from a batch and a loss to gradients of the projected parameters.

Run it under `isolation.isolated_eval(model, gradients=True)`: with dropout on, a gradient is mostly noise. `.grad`
does not change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import distributed
from .layout import Blocks

LossFn = Callable[[Any, Any], Tensor]

# Keeps gradients of float16 models from underflowing. It is a power of two, so it is exact for every other dtype.
_LOSS_SCALE = 2.0**10


class Sink(Protocol):
    """A receiver of gradients."""

    def add(self, index: int, gradients: Tensor, first: int = 0) -> None:
        """Add the `(examples, *shape)` gradients of one parameter. The first of them belongs to example `first`.

        `index` is the parameter's place in the list of all, here and in `add_products`.
        """

    def add_products(self, index: int, outputs: Tensor, inputs: Tensor, factor: float) -> None:
        """Add `factor` times the gradients `outputs^T inputs` of a matrix, `(examples, tokens, features)` each."""

    def clear(self) -> None:
        """Discard everything that was added."""


class _NotPerExampleError(Exception):
    """The hooks did not see the full gradient of every weight, example by example."""


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes `x W^T`, plus a bias. A subclass with its own `forward` may do something else."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def refuse_inference_mode() -> None:
    """Reject `torch.inference_mode()`, whose tensors can be used in no later training step.

    Raises:
        RuntimeError: If it is on.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "refresh() was called under torch.inference_mode(), whose tensors can be used in no later training step. "
            "Call it outside of this context. A refresh turns gradients off by itself where it needs none."
        )


def batch_size(batch: Any) -> int:
    """The number of examples in a batch: the length of its first tensor.

    Raises:
        ValueError: If the batch holds no tensor with a first axis.
    """
    return first_tensor(batch).shape[0]


def first_tensor(batch: Any) -> Tensor:
    """The first tensor of a batch. Arguments and errors are those of `batch_size`."""
    return tensors_of(batch)[0]


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, except for scalars. Arguments and errors are those of `batch_size`."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    found = [value for value in values if isinstance(value, Tensor) and value.dim() > 0]
    if found:
        return found
    raise ValueError(
        f"A reference batch of type {type(batch).__name__} has no tensor with one entry per example in its first "
        "dimension. Give a tensor, or a mapping, list or tuple with tensors."
    )


def batch_gradient(model: Any, batch: Any, loss_fn: LossFn, blocks: Blocks, sink: Sink, first: int = 0) -> Tensor:
    """Pass the gradient of `loss_fn(model, batch)` to `sink`, `(1, *shape)` per parameter, and return the loss.

    Raises:
        RuntimeError: If no gradient arrived.
    """
    loss = _scalar(loss_fn(model, batch))
    gradients = torch.autograd.grad(loss * _LOSS_SCALE, blocks.flat_parameters(), allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise RuntimeError(
            "The backward pass of a reference batch computed no gradient for any projected parameter. Either the loss "
            "does not depend on them, or something cuts the graph, as the gradient checkpointing of some tools does. "
            "Set gradient_checkpointing_kwargs={'use_reentrant': False}, or turn gradient checkpointing off."
        )
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            sink.add(index, gradient.unsqueeze(0).float() / _LOSS_SCALE, first)
    return loss.detach()


def sharded_gradient(model: Any, batch: Any, loss_fn: LossFn, blocks: Blocks, sink: Sink, weight: float) -> Tensor:
    """Pass to `sink` this process's shard of the sum over processes of `weight` times the gradients of their losses.

    FSDP2 gathers and scatters in backward hooks, and `autograd.grad` does not run these hooks. This function therefore
    runs a backward pass as for the optimizer, and then takes the gradients from `.grad`. Every process must call it
    the same number of times.

    Args:
        model: Passed to `loss_fn`.
        batch: This process's examples.
        loss_fn: `loss_fn(model, batch)` returns a scalar.
        blocks: The projected parameters, sharded.
        sink: Receives the gradients.
        weight: Weight of this process's loss; 0 for a pass that only keeps the other processes from waiting.

    Returns:
        The loss, detached, without its weight.

    Raises:
        RuntimeError: If no gradient arrived.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        loss = _scalar(loss_fn(model, batch))
        # FSDP2 takes the mean over processes.
        (loss * (weight * distributed.count() * _LOSS_SCALE)).backward()
        own = blocks.flat_parameters()
        if all(parameter.grad is None for parameter in own):
            raise RuntimeError(
                "The backward pass of a reference batch computed no gradient for any projected shard. Call refresh() "
                "between optimizer steps and with set_requires_gradient_sync(True). As its `model`, give the module "
                "that you passed to the outermost fully_shard."
            )
        for index, parameter in enumerate(own):
            if parameter.grad is not None:
                sink.add(index, distributed.local(parameter.grad).unsqueeze(0).float() / _LOSS_SCALE)
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    return loss.detach()


def example_gradients(
    model: Any, batch: Any, loss_fn: LossFn, blocks: Blocks, sink: Sink, linears: Sequence[nn.Linear | None]
) -> Tensor:
    """Pass the gradient of every example to `sink`, `(examples, *shape)` per parameter, from one backward pass.

    For a linear map with inputs `x[i, t]` and output gradients `u[i, t]` (example i, token t), example i's weight
    gradient is the sum over t of the outer products `u[i, t] x[i, t]^T`. Hooks on `lora_A` and `lora_B` see both. The
    loss must be a mean over examples of terms that depend on one example each. A token mean gives the same directions.

    The examples are passed one at a time instead if hooks would not see the full gradient. This is so if a layer is
    not a plain linear map (convolutions, embeddings, a subclass of `nn.Linear` with its own `forward`) or mixes the
    examples' axis (routed experts), if it may do so (a sequence as long as the number of examples), or if a weight is
    used outside a call of its module (`target_parameters`, `nn.MultiheadAttention`, fused kernels, the decoder of an
    autoencoder with tied weights).

    Args:
        model: Passed to `loss_fn`.
        batch: Tensors (or a mapping, list or tuple of tensors) with the examples along the first axis. See
            `examples_of` for other values.
        loss_fn: `loss_fn(model, batch)` returns a scalar.
        blocks: The projected parameters.
        sink: Receives the gradients.
        linears: For each parameter the plain linear module that has it as its weight, or `None` if there is none.

    Returns:
        The loss of the batch, detached.
    """
    count = batch_size(batch)
    if count == 1:
        return batch_gradient(model, batch, loss_fn, blocks, sink)
    plain = [linear for linear in linears if linear is not None]
    if len(plain) == len(linears):
        with contextlib.suppress(_NotPerExampleError):
            return _hooked_gradients(model, batch, loss_fn, blocks, sink, plain, count)
        sink.clear()
    losses = [batch_gradient(model, examples_of(batch, [i]), loss_fn, blocks, sink, first=i) for i in range(count)]
    return torch.stack(losses).mean()


class _Watch(torch.autograd.Function):
    """Return a layer's output unchanged, and call `tell` with its input and output gradient in the backward pass.

    The input is saved in the way autograd saves tensors. Gradient checkpointing therefore recomputes it and does not
    keep it. `anchor` is a leaf of the graph at every layer. A backward pass that asks only for the gradient of
    `anchor` still reaches every layer, and computes none of the weights' own gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, tell: Callable[[Tensor, Tensor], None], anchor: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.tell = tell
        return output.clone()  # not a view: autograd refuses to change it in place, as F.relu(..., inplace=True) does

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.tell(ctx.saved_tensors[0], gradient)
        return gradient, None, None, None


def _hooked_gradients(
    model: Any,
    batch: Any,
    loss_fn: LossFn,
    blocks: Blocks,
    sink: Sink,
    linears: Sequence[nn.Linear],
    count: int,
) -> Tensor:
    # A loss may flatten batches of (examples, sequences, tokens). The sequences of an example are then adjacent.
    flattened = first_tensor(batch).shape[:2].numel()
    inputs_ok, told = True, False
    anchor = torch.zeros((), device=blocks.device, requires_grad=True)
    weights = [linear.weight for linear in linears]

    def watch(linear: nn.Linear, index: int) -> list[RemovableHandle]:
        def tell(x: Tensor, u: Tensor) -> None:
            nonlocal inputs_ok, told
            told = True
            # If the second axis could also be the examples' axis, it is unknown which of the two is.
            per_example = x.dim() >= 3 and x.shape[0] in (count, flattened) and x.shape[1] not in (count, flattened)
            inputs_ok = inputs_ok and per_example
            if inputs_ok:
                outputs, inputs = (part.reshape(count, -1, part.shape[-1]).float() for part in (u, x))
                sink.add_products(index, outputs, inputs, count / _LOSS_SCALE)

        def before(module: nn.Linear, args: tuple) -> None:
            module.weight = nn.Parameter(module.weight.detach(), requires_grad=False)

        def after(module: nn.Linear, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            module.weight = weights[index]
            if not torch.is_grad_enabled():
                return None
            inputs = args[0] if args else next(iter(kwargs.values()))
            return _Watch.apply(output, inputs.detach(), tell, anchor)

        # Last before the call and first after it: the model's own hooks may change the inputs and the output.
        return [
            linear.register_forward_pre_hook(before),
            linear.register_forward_hook(after, prepend=True, with_kwargs=True),
        ]

    handles = [handle for index, linear in enumerate(linears) for handle in watch(linear, index)]
    try:
        loss = _scalar(loss_fn(model, batch))
        # During the calls of their modules the weights are detached. A gradient that they get is of another use.
        _, *others = torch.autograd.grad(loss * _LOSS_SCALE, [anchor, *weights], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = weight  # a call that raised an error has left it detached
    if not told or not inputs_ok or any(gradient is not None for gradient in others):
        raise _NotPerExampleError
    return loss.detach()


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn must return a scalar tensor, but it returned {got}. Return the mean loss of the batch."
        )
    if not loss.requires_grad:
        raise ValueError(
            "The reference loss does not depend on the parameters in training: loss_fn returned a tensor without a "
            "graph. Compute the loss with the model that loss_fn receives, outside torch.no_grad()."
        )
    return loss


def examples_of(batch: Any, indices: Sequence[int]) -> Any:
    """Select some examples of a batch.

    They are the given entries of the first axis of every tensor, and of every list or tuple that has one entry per
    example and no such tensor inside. Everything else is kept whole.
    """
    return _selected(batch, indices, batch_size(batch))


def _selected(value: Any, indices: Sequence[int], size: int) -> Any:
    if isinstance(value, Tensor):
        return value[list(indices)] if value.dim() else value
    if isinstance(value, Mapping):
        return {key: _selected(own, indices, size) for key, own in value.items()}
    if isinstance(value, list | tuple):
        named = hasattr(value, "_fields")  # a named tuple has fields, and not one entry per example
        if len(value) == size and not named and not _has_axis(value):
            return type(value)(value[i] for i in indices)
        parts = [_selected(own, indices, size) for own in value]
        return type(value)(*parts) if named else type(value)(parts)
    return value


def _has_axis(value: Any) -> bool:
    """Whether there is a tensor with a first axis inside."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_has_axis, value))
    return isinstance(value, Tensor) and value.dim() > 0
