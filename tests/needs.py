"""The tests that need newer libraries than the oldest that work, each with the reason. `conftest.py` skips them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement

NEEDS: list[tuple[str, str, str]] = []
"""(pattern in a test's name, requirement, reason)"""


def missing(nodeid: str) -> str | None:
    """Why a test cannot run beside the installed libraries, or `None`."""
    for pattern, needed, reason in NEEDS:
        if re.search(pattern, nodeid) and not _installed(Requirement(needed)):
            return f"needs {needed}: {reason}"
    return None


def _installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
