# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Give random input to everything that reads input. It must work, or raise a documented error.

These are failures: an error of another type (such as KeyError), a message that does not name the file or the field,
more than `SECONDS` for one input, and more than `MEMORY` of allocations.
"""

from __future__ import annotations

import logging
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

SECONDS = 10
MEMORY = 2 * 2**30
"""Bytes that an input may add to the address space of the process."""


@dataclass
class Target:
    """A function that reads input.

    Attributes:
        function: Takes an input. It works, or raises one of `errors`.
        inputs: The strategy of its inputs.
        names: One of these must be in the message of an error. Empty: any message.
        errors: The documented types of errors.
        share: Its share of inputs. Slow functions have a smaller one.
    """

    function: Callable[[Any], object]
    inputs: st.SearchStrategy
    names: tuple[str, ...] = ()
    errors: tuple[type[Exception], ...] = (ValueError, OSError)
    share: float = 1.0


@dataclass
class Found:
    """The results of a target's inputs."""

    inputs: int = 0
    accepted: int = 0
    rejected: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """The first input of each kind of failure."""


class _Hang(BaseException):
    """An input took too long. Not an `Exception`, so that no handler takes it for an error of the input."""


def _ring(*_: Any) -> None:
    raise _Hang


def probe(target: Target, count: int, seed: int = 0) -> Found:
    """Give `count` inputs to a target."""
    found = Found()

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def each(value: Any) -> None:
        found.inputs += 1
        failure = _failure(target, value, found)
        if failure is not None:
            found.failures.setdefault(failure, repr(value)[:300])

    before = signal.signal(signal.SIGALRM, _ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        each()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
    return found


def _failure(target: Target, value: Any, found: Found) -> str | None:
    """Run one input. Return what is wrong, or None."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    begun = time.monotonic()
    try:
        target.function(value)
        found.accepted += 1
    except target.errors as error:
        if target.names and not any(name in str(error) for name in target.names):
            return f"{type(error).__name__} names nothing: {error}"[:300]
        found.rejected += 1
    except _Hang:
        return f"took {time.monotonic() - begun:.0f} seconds"
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        own = [place for place in places if "peft_ogpsa" in place.filename] or places
        return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno} {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def fuzz(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Probe all targets, with `count` inputs each, and return the counts.

    Args:
        folder: Folder for files.
        count: Inputs of a target whose share is 1.
        seed: Seed of the inputs.
    """
    from .targets import targets

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {"inputs": 0, "failures": 0, "targets": {}}
    for name, target in targets(folder).items():
        found = probe(target, max(5, round(count * target.share)), seed)
        report["inputs"] += found.inputs
        report["failures"] += len(found.failures)
        own: dict[str, Any] = {"inputs": found.inputs, "accepted": found.accepted, "rejected": found.rejected}
        if found.failures:
            own["failures"] = found.failures
        report["targets"][name] = own
        print(name, own, flush=True)
    return report
