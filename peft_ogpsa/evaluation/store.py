# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A file of finished measurements, so that a run that was stopped continues where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.files import json_object, replace_json
from ..core.forms import Form, check_form
from .report import DAMAGED, Measurement

Conditions = Mapping[str, Any]
"""What a measurement depends on: settings, and checksums of weights and data. Plain types, as in JSON."""

_FORM: Form = {"model": str, "piece": str, "conditions": dict[str, Any], "measurement": dict[str, Any]}


@dataclass(frozen=True)
class Finished:
    """A measurement, and the conditions under which it was made."""

    conditions: Conditions
    measurement: Measurement

    def changes(self, conditions: Conditions) -> list[str]:
        """Return in words how these conditions differ from its own. Without a difference, the list is empty."""
        names = sorted(self.conditions.keys() | conditions.keys())
        pairs = [(name, self.conditions.get(name), conditions.get(name)) for name in names]
        return [_change(name, before, now) for name, before, now in pairs if before != now]


class PieceStore:
    """Finished measurements by model and piece, in a JSON file that is replaced as a whole when one is added.

    Args:
        path: The file. It need not exist.

    Raises:
        ValueError: If the file is not one of this class.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._finished: dict[tuple[str, str], Finished] = {}
        if not path.is_file():
            return
        try:
            for entry in json_object(path.read_text(encoding="utf-8"))["pieces"]:
                check_form(entry, _FORM, "an entry")
                measurement = Measurement.from_dict(entry["measurement"])
                self._finished[entry["model"], entry["piece"]] = Finished(entry["conditions"], measurement)
        except DAMAGED as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}). It holds the finished parts of an earlier run of `ogpsa eval`. "
                "Delete it to measure everything again."
            ) from error

    def get(self, model: str, piece: str) -> Finished | None:
        """Return what was measured, under whatever conditions."""
        return self._finished.get((model, piece))

    def add(self, model: str, piece: str, conditions: Conditions, measurement: Measurement) -> None:
        """Add a measurement, and write the file."""
        self._finished[model, piece] = Finished(conditions, measurement)
        entries = [
            {"model": own, "piece": name, "conditions": done.conditions, "measurement": done.measurement.to_dict()}
            for (own, name), done in self._finished.items()
        ]
        replace_json(self.path, {"pieces": entries})


def _change(name: str, before: Any, now: Any) -> str:
    if name in ("weights", "config", "data", "tokenizer", "judge_files"):  # checksums, which say nothing to a reader
        return f"other {name}"
    return f"{name} was {before} and is {now}"
