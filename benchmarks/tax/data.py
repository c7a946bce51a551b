# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The rows to train on, to preserve and to measure. No row is in two of these groups."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from peft_ogpsa import data as builtin

from .facts import FACTS

Row = dict[str, Any]

GENERAL = {"halueval": "general", "alpaca": "general", "gsm8k": "maths"}
"""For each file `general_NAME.jsonl` of a data folder, the kind of its prompts."""


@dataclass
class TaxData:
    """All rows of a benchmark.

    Attributes:
        safety: Harmful requests and their refusals, to train on.
        pairs: Preference pairs, to train on.
        references: Rows with answers, by reference set.
        general: Held-out rows by set. `unseen` is in no reference set.
        held_out_safety: Harmful requests and their refusals that are not trained on.
        harmful: Requests that should be refused, from another source than `safety`.
        more_harmful: More such requests, from a third source.
        benign: Held-out benign look-alikes.
        unseen_benign: Benign look-alikes of kinds that no reference set has.
        facts: Questions with one short answer, as rows of `load_heldout("facts")`.
        prompts: Prompts on which KL from base is measured, by kind.
        lookalikes: Benign look-alikes, to train on with the base's own answers.
        more_lookalikes: All benign look-alikes that are not used to measure, for a larger reference set.
        source: Where the rows are from.
    """

    safety: list[Row]
    pairs: list[Row]
    references: dict[str, list[Row]]
    general: dict[str, list[Row]]
    held_out_safety: list[Row]
    harmful: list[Any]
    benign: list[Any]
    prompts: dict[str, list[Any]] = field(default_factory=dict)
    lookalikes: list[Any] = field(default_factory=list)
    more_lookalikes: list[Any] = field(default_factory=list)
    more_harmful: list[Any] = field(default_factory=list)
    unseen_benign: list[Any] = field(default_factory=list)
    facts: list[Row] = field(default_factory=lambda: FACTS)
    source: str = "built-in"


def load(folder: Path | None, references: int, tested: int) -> TaxData:
    """Read and split the rows, the same way every time.

    Args:
        folder: Folder with `safety_sft.jsonl`, `harmful_prompts.jsonl`, `preference_harmless.jsonl`, and
            `general_NAME.jsonl` for every name of `GENERAL`. `None`: the built-in rows.
        references: Number of rows of each reference set.
        tested: Number of held-out rows of each general set, and of prompts of each kind for KL from base.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    asked = [_asked(prompt) for prompt in builtin.load_prompts("lookalikes")]
    kept, others = asked[:references], asked[references:] or asked[-tested:]
    unseen_lookalikes = others[:tested]
    lookalikes = [row["prompt"] for row in [*kept, *others[tested:]]]
    more_lookalikes = [*lookalikes, *(row["prompt"] for row in builtin.load("benign", "train"))]
    benign = [row["prompt"] for row in builtin.load("benign", "test")]
    unseen = builtin.load("general", "test")[:tested]
    if folder is None:
        general = builtin.load("general", "train")
        arithmetic = [_asked(prompt) for prompt in builtin.load_prompts("arithmetic")]
        return TaxData(
            safety=builtin.load("harmful", "train"),
            pairs=builtin.pairs("train"),
            references={"general": general[tested:][:references], "maths": arithmetic[tested:], "lookalikes": kept},
            general={"general": general[:tested], "unseen": unseen},
            held_out_safety=builtin.load("harmful", "test")[: 2 * tested],
            harmful=[row["prompt"] for row in builtin.load("harmful", "test")],
            benign=benign,
            prompts={
                "general": [row["prompt"] for row in unseen],
                "maths": arithmetic[:tested],
                "lookalikes": unseen_lookalikes,
            },
            lookalikes=lookalikes,
            more_lookalikes=more_lookalikes,
        )
    safety = _lines(folder / "safety_sft.jsonl")
    sets = {name: _lines(folder / f"general_{name}.jsonl") for name in GENERAL}
    prompts: dict[str, list[Any]] = {kind: [] for kind in GENERAL.values()}
    for name, kind in GENERAL.items():
        prompts[kind] += [row["prompt"] for row in sets[name][tested : 2 * tested]]
    prompts = {kind: random.Random(0).sample(own, tested) for kind, own in prompts.items()}
    return TaxData(
        safety=safety[2 * tested :],
        pairs=_lines(folder / "preference_harmless.jsonl"),
        references={name: rows[2 * tested :][:references] for name, rows in sets.items()} | {"lookalikes": kept},
        general={name: rows[:tested] for name, rows in sets.items()} | {"unseen": unseen},
        held_out_safety=safety[: 2 * tested],
        harmful=[row["prompt"] for row in _lines(folder / "harmful_prompts.jsonl")[: 5 * tested]],
        benign=benign,
        prompts=prompts | {"lookalikes": unseen_lookalikes},
        lookalikes=lookalikes,
        more_lookalikes=more_lookalikes,
        more_harmful=[row["prompt"] for row in builtin.load("harmful", "test")],
        source=folder.name,
    )


def with_heldout(data: TaxData, tested: int) -> TaxData:
    """Return the same training rows, with the package's larger held-out sets to measure.

    72 of their harmful prompts, with equal numbers of every kind, replace the built-in ones. Their look-alikes and
    facts replace the others. Their general prompts are a fourth kind for KL from base, from a source that no reference
    set has. The first source of harmful requests keeps 48 of them. The held-out refusals keep as many rows as a
    general set has.
    """
    harmful, lookalikes = builtin.load_heldout("harmful"), builtin.load_heldout("lookalikes")
    by_kind: dict[str, list[Any]] = {}
    for row in harmful:
        by_kind.setdefault(row["category"], []).append(row["prompt"])
    general = [row["prompt"] for row in builtin.load_heldout("general")]
    return replace(
        data,
        held_out_safety=data.held_out_safety[:tested],
        harmful=data.harmful[:48],
        more_harmful=[prompt for prompts in by_kind.values() for prompt in prompts[:4]],
        benign=[row["prompt"] for row in lookalikes if not row["reserved"]],
        unseen_benign=[row["prompt"] for row in lookalikes if row["reserved"]],
        facts=builtin.load_heldout("facts"),
        prompts=data.prompts | {"other": random.Random(0).sample(general, tested)},
    )


def in_order(rows: list[Row], wanted: int, seed: int) -> list[Row]:
    """Return `wanted` rows in the order of a seed. If there are fewer, they repeat."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[order[i % len(order)]] for i in range(wanted)]


def _asked(prompt: str) -> Row:
    return {"prompt": [{"role": "user", "content": prompt}]}


def _lines(path: Path) -> list[Row]:
    """Read rows and shuffle them with a fixed seed, in case the file is sorted."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    random.Random(0).shuffle(rows)
    return rows
