# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps, seen from outside: each watcher is told of the outermost step over its parameters, once.

torch calls global hooks around the `step` of every optimizer class that it knows. Several such calls may be nested in
one step of the user's: a wrapper (Lookahead, SAM) calls the optimizer inside it, and a subclass calls
`super().step()`, whose class has hooks of its own. Only the outermost call sees all of the parameters' change.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from types import FrameType
from typing import Protocol, cast

import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Watcher(Protocol):
    """Something that acts around the steps of the optimizers that train its parameters."""

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether the step about to begin is one of the watcher's parameters."""

    def begin_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Acts before a step of its parameters; may return what replaces the step's arguments."""

    def end_step(self, optimizer: Optimizer) -> None:
        """Acts after the step; not called if the step raised an error."""


# A watcher that is no longer referenced drops out by itself.
_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
_lock = threading.Lock()  # of the set, in which another thread may put a watcher while we walk through it
# The call of `step` that each watcher acts around. An entry outlives its step if that raised an error.
_running: weakref.WeakKeyDictionary[Watcher, FrameType] = weakref.WeakKeyDictionary()
_handles: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


def watch(watcher: Watcher) -> None:
    """Tells the watcher of all steps from now on."""
    with _lock:
        _watchers.add(watcher)


def unwatch(watcher: Watcher) -> None:
    """Ends what `watch` began."""
    with _lock:
        _watchers.discard(watcher)
    _running.pop(watcher, None)


def _all_watchers() -> list[Watcher]:
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


def _pre_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    replaced = None
    with torch.no_grad():
        for watcher in _all_watchers():
            # This comes first: the entries of other threads' watchers are not ours to judge.
            if not watcher.trains(optimizer):
                continue
            around = _running.pop(watcher, None)
            if around is not None and _is_running(around):
                _running[watcher] = around
                continue  # this step is part of another
            result = watcher.begin_step(optimizer, args, kwargs)
            _running[watcher] = _step_frame()
            _call_back_first(optimizer)
            if result is not None:
                replaced = args, kwargs = result
    return replaced


def _call_back_first(optimizer: Optimizer) -> None:
    """Puts our post hook before the optimizer's own, such as an average of the weights, which then sees the result.

    torch runs global post hooks last.
    """
    hooks = cast(OrderedDict, optimizer._optimizer_step_post_hooks)
    handle = _handles.get(optimizer)
    if handle is None or handle.id not in hooks:
        handle = _handles[optimizer] = optimizer.register_step_post_hook(_post_hook)
    hooks.move_to_end(handle.id, last=False)


def _post_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    step = _step_frame()
    with torch.no_grad():
        for watcher in _all_watchers():
            if _running.get(watcher) is step:
                del _running[watcher]
                watcher.end_step(optimizer)


register_optimizer_step_pre_hook(_pre_hook)
