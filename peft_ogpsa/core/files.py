# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Write files so that a failure leaves the old file, and nothing half-written. Read JSON and JSON lines."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which replaces `path` at the end. If an error is raised, `path` stays as it was.

    Args:
        path: The file to replace; it need not exist.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(folder: str | os.PathLike[str], name: str) -> None:
    """Check that files can be written to a folder, before the work whose result it gets. Nothing is left there.

    Args:
        folder: The folder. If it does not exist yet, the check is of the nearest folder above it that does.
        name: The name of the setting, for messages.

    Raises:
        OSError: If no file can be written there.
    """
    place = Path(folder).absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"{name}={os.fspath(folder)!r} cannot be written to ({error.strerror or error}). Give another folder, or "
            "change its permissions."
        ) from error


def check_suffix(path: str, suffix: str, name: str) -> None:
    """Check that the name of a file to write ends with a suffix.

    Args:
        path: The file.
        suffix: The suffix, such as `.json`.
        name: The name of the setting, for messages.

    Raises:
        ValueError: If it has another suffix.
    """
    if Path(path).suffix != suffix:
        raise ValueError(f"{name}={path!r} must be a {suffix} file. Change the end of its name to {suffix}.")


def check_utf8(path: Path) -> None:
    """Check the encoding of a text file. Some readers of data notice a wrong one only when a row is used.

    Raises:
        ValueError: If a line is not in UTF-8. The message names the line.
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not in UTF-8. Save the file as UTF-8") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object. An old file is replaced only when the new one is complete.

    Raises:
        ValueError: If a number is not finite, which JSON does not allow.
    """
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8", newline="")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: If it holds anything else. The message names the file.
        OSError: If it cannot be read.
    """
    try:
        return json_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def json_object(text: str) -> dict[str, Any]:
    """Parse a text that is one JSON object.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a text that has one per line. Empty lines are skipped.

    Raises:
        ValueError: If a line is not a JSON object. The message names the line.
    """
    # Do not use splitlines(): it also splits at rare Unicode line breaks, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json_object(line)
        except ValueError as error:
            raise ValueError(f"line {number}, is not a JSON object: {error}") from error
