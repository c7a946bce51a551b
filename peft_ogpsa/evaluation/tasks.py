# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Run lm-eval's tasks on a model in memory, with its adapter or without."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import extras
from ..core.isolation import isolated_eval
from ..text.access import language_model
from .scores import TaskScore, checksum

TASKS = str(Path(__file__).with_name("lm_eval_tasks"))
"""The folder with this package's probes as lm-eval tasks. Give it to lm-eval as `--include_path`."""


class TaskRunner:
    """Run fixed lm-eval tasks on states of a model.

    The tasks and their data are loaded when the runner is created, so that a wrong name is an error before any model
    runs.

    Args:
        names: Names of lm-eval's tasks, groups or tags, or of this package's tasks (`ogpsa_refusal`,
            `ogpsa_over_refusal`, `ogpsa_facts`, `ogpsa_arithmetic`).
        include_path: A folder with more task files.
        limit: Maximum number of examples per task. The first ones are used.
        chat_template: Apply the tokenizer's chat template, if it has one.
        chat_template_kwargs: Arguments for the chat template.
        batch_size: Requests per batch.

    Raises:
        ImportError: If lm-eval is not installed, or too old.
        ValueError: If a task does not exist, its data cannot be loaded, or it runs code that the model writes.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | None = None,
        limit: int | None = None,
        chat_template: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 16,
    ):
        extras.check("lm-eval", "An lm-eval task")
        if include_path is not None and not Path(include_path).is_dir():
            raise ValueError(f"include_path={include_path!r} is not a folder. Give a folder with lm-eval task files.")
        self.names = list(names)
        self.limit = limit
        self.chat_template = chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.batch_size = batch_size
        self._manager = _manager(self.names, [TASKS, *([include_path] if include_path else [])])
        self._load()

    @property
    def version(self) -> str:
        """lm-eval's version."""
        import lm_eval

        return str(lm_eval.__version__)

    def run(
        self, model: torch.nn.Module, processing_class: PreTrainedTokenizerBase, names: Sequence[str] | None = None
    ) -> list[TaskScore]:
        """Score a model in its current state. Training can continue afterwards as if nothing had happened.

        Args:
            model: A causal language model, with or without adapter.
            processing_class: Its tokenizer.
            names: Some of the runner's names. Default: all.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with isolated_eval(model):  # restores the random states, which lm-eval seeds
            with _fewer_warnings():
                # HFLM may give the tokenizer a padding token.
                wrapped = HFLM(
                    pretrained=language_model(model),
                    tokenizer=copy.deepcopy(processing_class),
                    batch_size=self.batch_size,
                    chat_template_args=dict(self.chat_template_kwargs),
                )
            results = lm_eval.simple_evaluate(
                wrapped,
                tasks=list(names or self.names),
                task_manager=self._manager,
                limit=self.limit,
                apply_chat_template=self.chat_template and processing_class.chat_template is not None,
            )
        return _scores(results)

    def digest(self, name: str) -> str:
        """Return a checksum of a task, or of a group's tasks: of their settings, and of the examples that are used.

        Those are the examples that are scored, and those from which few-shot examples are drawn.
        """
        tasks = self._manager.load([name])["tasks"]
        return checksum(
            json.dumps(entry, sort_keys=True, default=str)
            for task_name, task in sorted(tasks.items())
            for entry in (
                task_name,
                task.dump_config(),
                *itertools.islice(task.eval_docs, self.limit),
                *((task.fewshot_docs() or ()) if task.get_config("num_fewshot") else ()),
            )
        )

    def _load(self) -> None:
        shown = ",".join(self.names)
        try:
            loaded = self._manager.load(self.names)["tasks"]
        except (OSError, ImportError, LookupError, ValueError) as error:
            raise ValueError(
                f"tasks={shown!r} cannot be loaded: {error} Check the task files. Offline, use tasks whose data is on "
                "this machine."
            ) from error
        unsafe = [name for name, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe:
            raise ValueError(
                f"tasks={shown!r} runs code that the model writes ({', '.join(unsafe)}). Leave it out, or run it with "
                "lm-eval's own command, which can allow this."
            )


def _manager(names: Sequence[str], folders: Sequence[str]) -> Any:
    """Return lm-eval's index of tasks: of the given folders if it is enough, otherwise of all tasks.

    Reading all of lm-eval's task files takes several seconds. Groups and tags may contain any of them.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=list(folders), include_defaults=False)
    if set(names) <= set(manager.all_subtasks):
        return manager
    manager = TaskManager(include_path=list(folders))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"tasks={','.join(names)!r} contains {', '.join(unknown)}, which lm-eval does not know. "
            "`lm_eval ls tasks` lists its tasks. Give your own task files as include_path."
        )
    return manager


def _scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """Convert lm-eval's results. Members of a group that has a score of its own are left out."""
    members = {
        name for group in results.get("groups", {}) for name in results.get("group_subtasks", {}).get(group, [])
    }
    scores = []
    for task, row in results["results"].items():
        if task in members:
            continue
        samples = results.get("samples", {}).get(task, [])
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            number = _number(value)
            if not comma or metric.endswith("_stderr") or number is None:
                continue
            mine = [sample for sample in samples if sample["filter"] == kind]
            scores.append(
                TaskScore(
                    task,
                    metric if kind == "none" else key,
                    number,
                    _number(row.get(f"{metric}_stderr,{kind}")),
                    n=int(row["sample_len"]),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    values=_by_example(mine, metric, number),
                    examples=checksum(sample["doc_hash"] for sample in mine),
                )
            )
    return scores


def _by_example(samples: Sequence[Mapping[str, Any]], metric: str, mean: float) -> list[float]:
    values = [_number(sample.get(metric)) for sample in samples]
    known = [value for value in values if value is not None]
    is_mean = len(known) == len(values) > 0 and math.isclose(sum(known) / len(known), mean, abs_tol=1e-9)
    return known if is_mean else []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None


@contextlib.contextmanager
def _fewer_warnings() -> Iterator[None]:
    """Hide HFLM's warnings about a model that is already in memory, which is intended here."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
