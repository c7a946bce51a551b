# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Join the pieces of `pack`, check them, and install the wheels beside the packages that the machine has.

This needs only the standard library and pip.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path

MANIFEST = "manifest.json"


class Damaged(Exception):
    """What arrived is not what was sent."""


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def unpack(folder: Path, target: Path) -> list[Path]:
    """Check and join the pieces, and extract their files.

    Args:
        folder: Folder with the pieces and their manifest.
        target: Folder for the files.

    Returns:
        The extracted files.

    Raises:
        Damaged: If the manifest or a piece is missing or damaged. The message names every piece to send again.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{folder / MANIFEST} is missing or damaged ({error}). Send it again.") from None
    bad = [f"{own['name']} ({why})" for own in manifest["pieces"] if (why := _wrong(folder / own["name"], own))]
    if bad:
        raise Damaged(f"These pieces did not arrive whole: {', '.join(bad)}. Send them again.")
    target.mkdir(parents=True, exist_ok=True)
    archive = target / ".carried.tar"
    with archive.open("wb") as joined:
        for own in manifest["pieces"]:
            with (folder / own["name"]).open("rb") as piece:
                shutil.copyfileobj(piece, joined)
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    archive.unlink()
    for own in manifest["files"]:
        if why := _wrong(target / own["name"], own):
            raise Damaged(f"{own['name']} is not what was packed ({why}). Unpack again into an empty folder.")
    return [target / own["name"] for own in manifest["files"]]


def _wrong(path: Path, entry: dict) -> str:
    """Return how a file differs from its entry in the manifest, or an empty string."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size} bytes instead of {entry['bytes']}"
    return "" if digest_of(path) == entry["sha256"] else "other contents"


def install(files: Sequence[Path], environment: Path) -> Path:
    """Install the wheels among the files into a virtual environment that also sees the packages of this Python.

    Returns:
        The Python of the virtual environment.
    """
    venv.create(environment, system_site_packages=True, with_pip=False)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    query = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    # If this Python is itself in a virtual environment, the new one would see only the packages of the system.
    lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    (own / "outer.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    wheels = [str(path) for path in files if path.suffix == ".whl"]
    if wheels:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
        ]
        subprocess.run([*command, "--ignore-installed", *wheels], check=True)
    return python
