# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Find the missing runs and do them side by side. Every run is saved as soon as it is done."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_ogpsa.core.files import replacing

from .data import load, with_heldout
from .methods import METHODS, WHOLE, Method
from .report import curve, first_safe
from .tasks import Tasks
from .training import Settings, Workbench, run

Task = tuple[str, int]
"""A method's name and a seed."""


@dataclass(frozen=True)
class Grid:
    """A folder of runs.

    Attributes:
        folder: Folder of the runs' files.
        settings: Settings that all runs share.
        data: Folder of rows, or `None` for the built-in rows.
        references: Number of rows of each reference set.
        tested: Number of held-out rows of each set.
        whole: Whether to train whole weights instead of adapters.
        heldout: Whether to measure on the package's larger held-out sets.
        tasks: lm-eval's tasks to score at the end of every run.
    """

    folder: Path
    settings: Settings
    data: Path | None
    references: int
    tested: int
    whole: bool = False
    heldout: bool = False
    tasks: Tasks | None = None

    @property
    def methods(self) -> dict[str, Method]:
        """The methods that can be run, by name."""
        return WHOLE if self.whole else METHODS

    def path(self, name: str, seed: int) -> Path:
        """Return the file of a run."""
        return self.folder / f"{name.replace(', ', '-').replace(' ', '_')}-seed{seed}.json"

    def missing(self, names: Sequence[str], seeds: Sequence[int]) -> list[Task]:
        """List the runs that are missing, seed by seed."""
        return [(name, seed) for seed in seeds for name in names if not self.path(name, seed).is_file()]

    def unscored(self, names: Sequence[str], seeds: Sequence[int]) -> list[Path]:
        """List the files of finished runs that lack scores of the tasks. Their adapters are gone."""
        if self.tasks is None:
            return []
        found = [path for seed in seeds for name in names if (path := self.path(name, seed)).is_file()]
        return [path for path in found if "tasks" not in json.loads(path.read_text(encoding="utf-8"))["train_info"]]

    def run(self, tasks: Sequence[Task], workers: int) -> Iterator[str]:
        """Do the runs, and yield one line per run with its last figures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        threads = max(1, torch.get_num_threads() // workers)
        self._measure_base(threads)
        context = multiprocessing.get_context("spawn")
        plain = [task for task in tasks if task[0] == "plain"]  # first: its safety loss is needed for the others
        with ProcessPoolExecutor(workers, context, _start, (self, threads)) as pool:
            try:
                for part in (plain, [task for task in tasks if task not in plain]):
                    for done in as_completed([pool.submit(_run, task) for task in part]):
                        yield done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # show the error now, and not after all other runs
                raise

    def safety_loss(self, name: str, seed: int) -> float | None:
        """Return the held-out safety loss at which plain LoRA first was safe.

        It is `None` for plain LoRA itself, if plain LoRA never was safe, and if runs do not end when they are safe.
        """
        if name == "plain" or not self.settings.until_safe:
            return None
        path = self.path("plain", seed)
        if not path.is_file():
            raise FileNotFoundError(f"{path.name} is missing: run plain with seed {seed} first.")
        base = json.loads((self.folder / "base.json").read_text(encoding="utf-8"))
        point = first_safe(curve(base, json.loads(path.read_text(encoding="utf-8"))))
        return None if point is None else point["safety_loss"]

    def _measure_base(self, threads: int) -> None:
        """Measure the base, if this folder has no measurement of it, and score the tasks, if it has no scores."""
        path = self.folder / "base.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found and (self.tasks is None or "tasks" in found):
            return
        bench = self._bench(threads)
        if not found:
            bench.references("own")  # answered once, before the workers need them
            found = bench.meter(bench.base, 0, diverges=False) | {"outcomes": bench.meter.outcomes}
        _write(path, found | bench.scores(bench.base))

    def _bench(self, threads: int) -> Workbench:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        torch.set_num_threads(threads)
        data = load(self.data, self.references, self.tested)
        return Workbench(self.settings, with_heldout(data, self.tested) if self.heldout else data, self.tasks)


_worker: tuple[Grid, Workbench]
"""The grid and the workbench of a worker process."""


def _start(grid: Grid, threads: int) -> None:
    global _worker
    _worker = grid, grid._bench(threads)


def _run(task: Task) -> str:
    global _worker
    grid, bench = _worker
    name, seed = task
    try:
        result = run(bench, name, grid.methods[name], seed, grid.safety_loss(name, seed))
    except BaseException:
        # The base may hold the adapter of this run, and the worker may have been given another run already.
        _worker = grid, grid._bench(torch.get_num_threads())
        raise
    _write(grid.path(name, seed), result)
    last = result["train_info"]["metrics"][-1]
    return f"{name} #{seed}: " + ", ".join(
        f"{key} {last[key]:.3f}" for key in ("loss", "kl", "facts", "refusal", "over_refusal")
    )


def _write(path: Path, content: object) -> None:
    """Write JSON so that the file is either complete or not there: what is there counts as done."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
