# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The machine that the stages run on, as JSON: `python -m benchmarks.gpu.machine`.

The runner asks in a separate process, so that it holds no memory of the GPU itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets")


def describe() -> dict[str, Any]:
    """Return the device, its memory in bytes, and the versions of Python and the libraries."""
    import torch

    found: dict[str, Any] = {"device": f"CPU, {platform.machine()}, {os.cpu_count()} cores", "memory": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory": properties.total_memory}
        found |= {"capability": [properties.major, properties.minor], "cuda": torch.version.cuda}
    found["versions"] = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found["versions"][name] = version(name)
    return found


def ask() -> dict[str, Any]:
    """Run `describe` in another process.

    Raises:
        RuntimeError: If torch cannot be imported there.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.machine"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"torch does not start:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def code() -> str:
    """Return a digest of all code that a stage may run. Unlike a commit, it also works outside a clone."""
    digest = hashlib.sha256()
    files = [path for folder in ("peft_ogpsa", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    print(json.dumps(describe()))
