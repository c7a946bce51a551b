# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps, observed from outside: each watcher is notified once of the outermost step of its parameters.

torch calls global hooks around the `step` of every optimizer class that it knows. One step of the user's loop may
contain several such calls: a wrapper (Lookahead, SAM) calls the optimizer inside it, and a subclass calls
`super().step()`, whose class has its own hooks. Only the outermost call sees the full change of the parameters. The
innermost one is the step that an optimizer takes along the gradient.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class StepWatcher(Protocol):
    """An object that acts around the steps of the optimizers that train its parameters."""

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether the step that is about to begin is a step of the watcher's parameters."""

    def skips(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer will skip this step. Called once for each."""

    def begin_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Act before a step of its parameters; may return replacements for the step's arguments."""

    def end_step(self) -> None:
        """Act after the step; not called if the step raised an error."""

    def begin_inner_step(self) -> None:
        """Act before a step within the step that has begun."""

    def end_inner_step(self) -> None:
        """Act after the innermost of the steps within the step; not called if it raised an error."""


# A watcher that is no longer referenced disappears from the set.
_watchers: weakref.WeakSet[StepWatcher] = weakref.WeakSet()
_lock = threading.Lock()  # protects the set: another thread may add a watcher while we iterate over it
# The call of `step` that each watcher acts around. If the step raises an error, its entry stays.
_running: weakref.WeakKeyDictionary[StepWatcher, FrameType] = weakref.WeakKeyDictionary()
# The call of an inner `step` that has begun last. Calls around it do not end an inner step of their own.
_inner: weakref.WeakKeyDictionary[StepWatcher, FrameType] = weakref.WeakKeyDictionary()
# Watchers in a step whose optimizer gives each process only some of the parameters.
_divided: weakref.WeakSet[StepWatcher] = weakref.WeakSet()
_pre_handles: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()
_post_handles: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


def watch(watcher: StepWatcher) -> None:
    """Notify the watcher of all steps from now on."""
    with _lock:
        _watchers.add(watcher)


def unwatch(watcher: StepWatcher) -> None:
    """Undo `watch`."""
    with _lock:
        _watchers.discard(watcher)
    _running.pop(watcher, None)
    _inner.pop(watcher, None)
    _divided.discard(watcher)


def closure_of(args: tuple, kwargs: dict) -> Callable[[], Any] | None:
    """The closure among the arguments of a step, whose first argument is the optimizer.

    A first argument of another kind is the optimizer's own, such as the norm that clipping has computed.
    """
    found = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return found if callable(found) else None


def with_closure(args: tuple, kwargs: dict, closure: Callable[[], Any]) -> tuple[tuple, dict]:
    """The arguments of a step with another closure in place of theirs."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def watchers() -> list[StepWatcher]:
    """All objects that are notified of steps."""
    with _lock:
        return list(_watchers)


def _step_frame() -> FrameType:
    """The frame in which torch calls the hooks: one per call of `step`."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename != torch_optimizer.__file__:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


def _is_running(step: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not step:
        frame = frame.f_back
    return frame is step


def _divides(optimizer: Optimizer) -> bool:
    """Whether an optimizer makes other steps in every process, and then sends the parameters around."""
    return any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__)


def _global_pre_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Run our pre hook after the optimizer's own, such as one that clips, which would see the reference gradient.

    torch runs global pre hooks first.
    """
    if any(watcher.trains(optimizer) for watcher in watchers()):
        _hook_parents(type(optimizer))
        hooks = cast(OrderedDict, optimizer._optimizer_step_pre_hooks)
        handle = _pre_handles.get(optimizer)
        if handle is None or handle.id not in hooks:
            handle = _pre_handles[optimizer] = optimizer.register_step_pre_hook(_pre_hook)
        hooks.move_to_end(handle.id)


def _hook_parents(kind: type) -> None:
    """Have torch call its hooks around the `step` of the classes that an optimizer's class extends, too.

    torch does this for a class when its first optimizer is made. Without this, what counts as the innermost step would
    depend on which other optimizers the process has made before.
    """
    for base in kind.__mro__[1:]:
        if issubclass(base, Optimizer) and base is not Optimizer and "step" in vars(base):
            step: Any = vars(base)["step"]
            if not hasattr(step, "hooked"):
                step = Optimizer.profile_hook_step(step)
                step.hooked = True
                cast(Any, base).step = step


def _pre_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    replaced = None
    with torch.no_grad():
        for watcher in watchers():
            # Check this first, so that the entries of other threads' watchers are not touched.
            if not watcher.trains(optimizer) or watcher.skips(optimizer):
                continue
            around = _running.pop(watcher, None)
            if around is not None and _is_running(around):
                _running[watcher] = around  # this step is part of an outer one
                if watcher in _divided:
                    continue
                _inner[watcher] = _step_frame()
                watcher.begin_inner_step()
                _call_back_first(optimizer)
                continue
            result = watcher.begin_step(optimizer, args, kwargs)
            _running[watcher] = _step_frame()
            (_divided.add if _divides(optimizer) else _divided.discard)(watcher)
            _call_back_first(optimizer)
            if result is not None:
                replaced = args, kwargs = result
    return replaced


def _call_back_first(optimizer: Optimizer) -> None:
    """Run our post hook before the optimizer's own, such as an average of the weights, which then sees the result.

    torch runs global post hooks last.
    """
    hooks = cast(OrderedDict, optimizer._optimizer_step_post_hooks)
    handle = _post_handles.get(optimizer)
    if handle is None or handle.id not in hooks:
        handle = _post_handles[optimizer] = optimizer.register_step_post_hook(_post_hook)
    hooks.move_to_end(handle.id, last=False)


def _post_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    step = _step_frame()
    with torch.no_grad():
        for watcher in watchers():
            if _inner.get(watcher) is step:
                del _inner[watcher]
                watcher.end_inner_step()
            elif _running.get(watcher) is step:
                del _running[watcher]
                _inner.pop(watcher, None)
                watcher.end_step()


register_optimizer_step_pre_hook(_global_pre_hook)
