# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Libraries that only a part of this package needs, and that are installed as an extra."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

_NAME = "peft-ogpsa"


def check(extra: str, purpose: str) -> None:
    """Check that the libraries of an extra are installed, in versions that work.

    The bounds are those of the installed `peft-ogpsa`. If the package is not installed, but only its folder is on the
    path, nothing is checked.

    Args:
        extra (`str`): Name of the extra, for example `"cli"`.
        purpose (`str`): What needs it, for the error message.

    Raises:
        ImportError: If a library is missing or too old.
    """
    try:
        lines = requires(_NAME) or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            continue  # of every installation
        if not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            continue
        state = "is not installed" if found is None else f"{found} is installed"
        raise ImportError(
            f"{purpose} needs {requirement.name}{requirement.specifier}, and {requirement.name} {state}. "
            f'Run: pip install "{_NAME}[{extra}]"'
        )
