# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Kill training runs, resume them, and compare their weights with those of a run that was never killed.

A run is killed in one of three ways: after a random time, at a random operation on a file (open, rename, delete), or
at a random byte of a file that is being written. The last two happen while a checkpoint is saved. A run may be killed
several times.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from peft_ogpsa.trainer.checkpoint import last_whole

from .processes import run
from .runs import KINDS, SAVE_STEPS, STEPS, parameters, trainer

WAYS = ("time", "operation", "byte")
_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
_counting: dict[str, Any] = {}  # read by the one audit hook, because hooks cannot be removed


class _LimitFiles(TrainerCallback):
    """End the process in the middle of a write, when a file becomes larger than `size` after step `step`."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def _audit(event: str, arguments: tuple) -> None:
    if not _counting or event not in _OPERATIONS or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        return
    if os.fsdecode(arguments[0]).startswith(_counting["folder"]):
        _counting["done"] += 1
        if _counting["done"] == _counting["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)


def _train(kind: str, folder: Path, kill_at: int | None = None, callbacks: list | None = None) -> None:
    """Train, or continue from the newest whole checkpoint. Save the weights and the count of file operations."""
    made = trainer(kind, folder / "run", callbacks or [])
    _counting.update(folder=str(folder / "run"), done=0, kill_at=kill_at)
    whole = last_whole(folder / "run")
    made.train(resume_from_checkpoint=None if whole is None else str(whole))
    operations = _counting["done"]
    _counting.clear()
    assert made.state.global_step >= STEPS
    save_file(parameters(made.model), folder / "end.safetensors", {"operations": str(operations)})


def _straight(kind: str, folder: Path) -> tuple[dict[str, torch.Tensor], int, float, int]:
    """Run without kills. Return weights, number of file operations, seconds, and size of the largest file."""
    begun = time.monotonic()
    if run(lambda: _train(kind, folder), folder / "log.txt"):
        raise RuntimeError((folder / "log.txt").read_text())
    seconds = time.monotonic() - begun
    files = [path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file()]
    with open(folder / "end.safetensors", "rb") as file:
        header = file.read(4096).decode("latin-1")
    operations = int(header.partition('"operations":"')[2].partition('"')[0])
    return load_file(folder / "end.safetensors"), operations, seconds, max(files)


def kills(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kill `count` times, and return what happened.

    Args:
        folder: Folder for the runs.
        count: How often to kill, spread over the kinds of runs.
        seed: Seed of the moments.
    """
    sys.addaudithook(_audit)
    torch.set_num_threads(1)  # a forked process has no other threads
    draw = random.Random(seed)
    tally: Counter[str] = Counter()
    differing: list[str] = []
    for place, kind in enumerate(KINDS):
        wanted = count // len(KINDS) + (place < count % len(KINDS))
        if not wanted:
            continue
        home = folder / kind.replace(" ", "-")
        (home / "straight").mkdir(parents=True)
        expected, operations, seconds, largest = _straight(kind, home / "straight")
        done = 0
        while done < wanted:
            own = home / f"killed-{done}"
            own.mkdir()
            for _ in range(draw.randint(1, min(3, wanted - done))):  # a run may be killed again while it resumes
                way = WAYS[done % len(WAYS)]
                ended = _kill(kind, own, way, draw, operations, seconds, largest)
                tally[f"{way}: {'killed' if ended < 0 else 'ended before'}"] += 1
                tally["killed within saving"] += ended < 0 and way != "time"
                done += 1
            if run(partial(_train, kind, own), own / "log.txt"):
                raise RuntimeError(f"{own}: " + (own / "log.txt").read_text())
            tally["checkpoints skipped"] += (own / "log.txt").read_text().count("is skipped, because it is not whole")
            tally["runs resumed"] += 1
            found = load_file(own / "end.safetensors")
            if found.keys() != expected.keys() or any(not torch.equal(found[n], expected[n]) for n in expected):
                differing.append(str(own))
        print(f"{kind}: {done} kills, {len(differing)} differences", flush=True)
    survived = sum(value for name, value in tally.items() if name.endswith(": killed"))
    return {"kills": survived, "differing": len(differing), **dict(sorted(tally.items()))}


def _kill(kind: str, own: Path, way: str, draw: random.Random, operations: int, seconds: float, largest: int) -> int:
    log = own / "log.txt"
    (own / "end.safetensors").unlink(missing_ok=True)
    if way == "time":
        moment = draw.uniform(0.15, 0.8) * seconds
        return run(lambda: _train(kind, own), log, kill_after=moment)
    if way == "operation":
        at = draw.randint(1, operations)
        return run(lambda: _train(kind, own, at), log)
    limit = _LimitFiles(draw.randrange(SAVE_STEPS, STEPS, SAVE_STEPS), draw.randint(1, largest - 1))
    return run(lambda: _train(kind, own, None, [limit]), log)
