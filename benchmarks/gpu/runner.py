# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Run stages one after the other or side by side, and write each result as soon as it is there."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_ogpsa.core.files import replacing

from . import plan, process
from .machine import ROOT
from .stages import Place, Stage

LOG_END = 40
"""How many lines of a failed stage's log its result contains."""


@dataclass
class Runner:
    """A runner of stages in one folder.

    Attributes:
        place: Where the stages run.
        machine: The result of `machine.ask`.
        code: The result of `machine.code`.
        commit: The commit, only for readers of the results.
        workers: How many stages run side by side, if they may.
        any_code: Whether to keep results from other versions of the code.
        deadline: Time of `time.monotonic` after which no stage starts or runs.
    """

    place: Place
    machine: dict[str, Any]
    code: str
    commit: str
    workers: int = 1
    any_code: bool = False
    deadline: float = field(default=float("inf"))

    def path(self, stage: Stage) -> Path:
        """Return the file of a stage's result."""
        return self.place.folder / f"{stage.name}.json"

    def finished(self, stage: Stage) -> bool:
        """Return whether the stage was done with the same command and code."""
        try:
            found = json.loads(self.path(stage).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        same = found["key"] == stage.key(self.code) or (self.any_code and found["command"] == list(stage.command))
        return found["status"] == "done" and same

    def run(self, stages: Sequence[Stage]) -> Iterator[dict[str, Any]]:
        """Run the stages and yield the result of each. A stage for which no time is left has no result."""
        self.place.folder.mkdir(parents=True, exist_ok=True)
        for group in plan.groups(stages):
            with ThreadPoolExecutor(max(1, min(self.workers, len(group)))) as pool:
                for future in as_completed([pool.submit(self._one, stage) for stage in group]):
                    if (result := future.result()) is not None:
                        yield result

    def _one(self, stage: Stage) -> dict[str, Any] | None:
        left = self.deadline - time.monotonic()
        if left < 60 * stage.minutes and left != float("inf"):
            return None
        files, log = self.place.files(stage.name), self.place.folder / f"{stage.name}.log"
        self._clear(stage)
        started, start = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
        status = process.run(stage.argv, ROOT, self._environment(), log, min(60 * stage.limit, left))
        result = {
            "stage": stage.name,
            "settles": stage.settles,
            "status": "out of time" if status is None else "failed" if status else "done",
            "exit_code": status,
            "seconds": round(time.monotonic() - start, 1),
            "estimated_seconds": 60 * stage.minutes,
            "started": started.isoformat(timespec="seconds"),
            "toy": self.place.toy,
            "command": list(stage.command),
            "key": stage.key(self.code),
            "commit": self.commit,
            "code": self.code,
            "machine": self.machine,
            "figures": _figures(files),
            "log_end": [] if status == 0 else log.read_text(errors="replace").splitlines()[-LOG_END:],
        }
        with replacing(self.path(stage)) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _clear(self, stage: Stage) -> None:
        """Remove what an earlier run wrote, which would pass for this one's.

        A shared folder stays if it was filled by the same code and, apart from the seed, the same command.
        """
        own = self.place.files(stage.name)
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        if not stage.shared:
            return
        shared = self.place.files(stage.shared)
        key, mark = stage.shared_key(self.code), shared / "key"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir(parents=True)
            mark.write_text(key, encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        own |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.place.toy:
            # The cache finds the base's answers by the model's name. A toy model may have changed, so use a new cache.
            own |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(self.place.folder / "cache")}
        if self.place.device == "cuda":  # with several, a trainer would multiply the batch
            own |= {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        if self.place.device == "cpu":
            own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return os.environ | own


def _figures(files: Path) -> dict[str, Any]:
    """Read the JSON files that a stage wrote, by file name. Files in subfolders are left out."""
    found = {}
    for path in sorted(files.glob("*.json")):
        try:
            found[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found[path.name] = None  # a killed stage may leave half a file
    return found
