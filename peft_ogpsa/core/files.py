# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Write files so that a failure leaves the old file, and nothing half-written. Read JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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
            yield dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number}, is not a JSON object: {error}") from error
