# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Train on a disk that gets full, and into a folder that cannot be written to.

The disk is a small file system in memory, which needs the right to mount one (root, or `unshare -rm`).
"""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peft_ogpsa.trainer.checkpoint import last_whole

from .processes import run
from .runs import KINDS, parameters, trainer

_ERRORS = ("No space left on device", "cannot be written", "file write failed", "PytorchStreamWriter failed")
_TORCH = "unexpected pos"  # the message of torch.save, which the trainer calls


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    """Mount a file system in memory, and unmount it at the end.

    Raises:
        OSError: If this is not allowed.
    """
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"No file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def disk(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Fill the disk during `count` runs. Then make space, continue, and compare the weights.

    Args:
        folder: Folder for the runs.
        count: Number of runs, spread over the kinds of runs.
        seed: Seed of the disks' sizes.
    """
    torch.set_num_threads(1)
    draw = random.Random(seed)
    tally: Counter[str] = Counter()
    failures: list[str] = []
    for place, kind in enumerate(KINDS):
        wanted = count // len(KINDS) + (place < count % len(KINDS))
        home = folder / kind.replace(" ", "-")
        home.mkdir()
        if run(partial(_train, kind, home / "run", home), home / "log.txt"):
            raise RuntimeError((home / "log.txt").read_text())
        expected = load_file(home / "end.safetensors")
        size = sum(file.stat().st_size for file in (home / "run").rglob("*") if file.is_file())
        for number in range(wanted):
            failures += _filled(kind, home / f"full-{number}", round(size * draw.uniform(0.2, 0.95)), expected, tally)
    failures += _read_only(folder / "read-only", tally)
    return {"runs": count, **dict(sorted(tally.items())), "failures": failures}


def _train(kind: str, output: Path, home: Path) -> None:
    made = trainer(kind, output, [])
    whole = last_whole(output) if output.is_dir() else None
    made.train(resume_from_checkpoint=None if whole is None else str(whole))
    save_file(parameters(made.model), home / "end.safetensors")


def _filled(kind: str, home: Path, size: int, expected: dict[str, torch.Tensor], tally: Counter[str]) -> list[str]:
    """Fill a disk of this size, make it larger, and continue."""
    with mounted(home / "disk", f"size={size}") as place:
        log = home / "log.txt"
        ended = run(partial(_train, kind, place / "run", home), log)
        if ended == 0:
            tally["had space enough"] += 1
            return []
        tally["filled"] += 1
        said = log.read_text()
        tally["torch's own error, which does not name the disk"] += _TORCH in said
        clear = any(text in said for text in (*_ERRORS, _TORCH))
        problems = [] if clear else [f"{kind}: no clear error: {said[-400:]}"]
        kept = last_whole(place / "run")
        tally["kept a whole checkpoint"] += kept is not None
        if list(place.rglob("*.part")):
            problems.append(f"{kind}: a file half-written")
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        if run(partial(_train, kind, place / "run", home), log):
            return [*problems, f"{kind}: it did not continue: {log.read_text()[-500:]}"]
        found = load_file(home / "end.safetensors")
        if any(not torch.equal(found[name], expected[name]) for name in expected):
            problems.append(f"{kind}: other weights")
        tally["continued to the same weights"] += not problems
        return problems


def _read_only(home: Path, tally: Counter[str]) -> list[str]:
    """Train with the command into a folder that cannot be written to. It must say so before it loads a model."""
    from peft_ogpsa.cli import main

    home.mkdir()
    words = ["sft", "--model_name_or_path", "no/model", "--dataset", "builtin:harmful"]
    words += ["--references", "general=builtin:general", "--output_dir"]
    problems = []
    with mounted(home / "disk", "size=1m") as place:
        (place / "kept.txt").write_text("kept")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        (home / "file").write_text("kept")
        for number, output in enumerate((place, place / "new", home / "file", home / "file" / "new")):
            log = home / f"log-{number}.txt"
            ended = run(partial(main, [*words, str(output)]), log)
            said = log.read_text()
            tally["read-only folders refused"] += 1
            if ended != 1 or "output_dir=" not in said or "cannot be written to" not in said:
                problems.append(f"{output}: {said[-300:]}")
        if (place / "kept.txt").read_text() != "kept" or (home / "file").read_text() != "kept":
            problems.append("a file is lost")
    return problems
