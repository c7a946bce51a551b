# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Pack wheels and data into pieces of a limited size, with a manifest of their contents."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import wheels
from .machine import ROOT
from .unpack import MANIFEST, digest_of


def pack(folder: Path, requirements: Sequence[str], data: Sequence[Path], python: str, piece: int) -> dict[str, Any]:
    """Download the requirements, build this package's wheel, and write these and the data as pieces.

    Args:
        folder: Folder for the pieces.
        requirements: Requirements from `wheels.missing`.
        data: Files or folders to pack as well.
        python: Python version on the other machine.
        piece: Largest size of a piece, in bytes.

    Returns:
        The manifest.

    Raises:
        RuntimeError: If a wheel cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as scratch:
        downloads = Path(scratch)
        if requirements:
            wheels.download(requirements, python, downloads)
        wheels.build_project(ROOT, downloads)
        return split([*sorted(downloads.glob("*.whl")), *data], folder, piece)


def split(paths: Sequence[Path], folder: Path, piece: int) -> dict[str, Any]:
    """Write files and folders as pieces. Pieces of an earlier call in the same folder are replaced.

    Raises:
        ValueError: If two paths have the same name.
    """
    names = [path.name for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"Two of the files are called {twice}.")
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("piece-*"), *folder.glob(MANIFEST)]:
        old.unlink()
    manifest: dict[str, Any] = {"files": [], "pieces": []}
    for path in paths:
        inner = sorted(own for own in path.rglob("*") if own.is_file()) if path.is_dir() else [path]
        for own in inner:
            name = own.relative_to(path.parent).as_posix()
            manifest["files"].append({"name": name, "bytes": own.stat().st_size, "sha256": digest_of(own)})
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "carried.tar"
        with tarfile.open(archive, "w") as tar:
            for path in paths:
                tar.add(path, path.name)
        with archive.open("rb") as file:
            while part := file.read(piece):
                target = folder / f"piece-{len(manifest['pieces']):03}"
                target.write_bytes(part)
                entry = {"name": target.name, "bytes": len(part), "sha256": digest_of(target)}
                manifest["pieces"].append(entry)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest
