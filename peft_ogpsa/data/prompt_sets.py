# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Public test sets by name: prompts that a model should refuse, and prompts that only look as if it should.

A reader takes one raw row of a set and returns its prompt, or `None` for a row that does not belong. This package
contains none of the prompts. `python -m peft_ogpsa.data.prompt_sets` prints the table in docs/guides/public_sets.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import extras
from .raw_rows import RawRow, check_samples, converted, first_value, from_file, from_hub, readable, values

Kind = Literal["harmful", "benign"]
PromptRow = dict[str, Any]
"""`prompt` (text), `kind` and `category` (text, or None if the set has no categories)."""

KINDS: tuple[Kind, ...] = ("harmful", "benign")


@dataclass(frozen=True)
class PromptSet:
    """A public test set: where it is, under which terms, and how its rows are read."""

    title: str
    hub_id: str
    splits: Mapping[str, str | None]
    """Splits on the hub, each with the name of its file. None: the set is one file, whatever its name."""
    read: Callable[[RawRow, str], PromptRow | None]
    """Read a row of a split."""
    sizes: Mapping[Kind, int]
    license: str
    columns: str
    """The columns that are read."""
    source: str
    """Where the columns are described."""
    config: str | None = None
    gated: bool = False
    """Whether the hub asks for an account that has accepted the set's terms."""


def xstest(row: RawRow, split: str) -> PromptRow:
    """Read a row of XSTest. Without the column `label`, its unsafe prompts are those of the types `contrast_...`."""
    prompt, category = values(row, "prompt", "type")
    label = str(row.get("label") or "").strip().casefold()
    if label not in ("", "safe", "unsafe"):
        raise ValueError(f"label={row['label']!r} is unknown. Give safe or unsafe, or leave out the column")
    unsafe = label == "unsafe" if label else category.startswith("contrast")
    return _row(prompt, "harmful" if unsafe else "benign", category)


def or_bench_hard(row: RawRow, split: str) -> PromptRow:
    """Read a row of OR-Bench-Hard."""
    (prompt,) = values(row, "prompt")
    return _row(prompt, "benign", row.get("category"))


def sorry_bench(row: RawRow, split: str) -> PromptRow | None:
    """Read a row of SORRY-Bench. Only its base prompts are used, not their 20 mutations."""
    turns, style = values(row, "turns", "prompt_style")
    if style != "base":
        return None
    if isinstance(turns, str):
        raise ValueError("the column 'turns' is a text, not a list. Give the set's JSON lines, question.jsonl")
    return _row(turns[0], "harmful", row.get("category"))


def harmbench(row: RawRow, split: str) -> PromptRow | None:
    """Read a row of HarmBench. Only its standard behaviors are used, not those with a context or a copyright."""
    prompt = first_value(row, "prompt", "Behavior")
    if row.get("FunctionalCategory", "standard") != "standard":
        return None
    return _row(prompt, "harmful", row.get("category") or row.get("SemanticCategory"))


def strongreject(row: RawRow, split: str) -> PromptRow:
    """Read a row of StrongREJECT."""
    return _row(first_value(row, "prompt", "forbidden_prompt"), "harmful", row.get("category"))


def jailbreakbench(row: RawRow, split: str) -> PromptRow:
    """Read a row of JBB-Behaviors. Its harmful and its benign rows are in two splits with the same columns."""
    (prompt,) = values(row, "Goal")
    return _row(prompt, "benign" if split == "benign" else "harmful", row.get("Category"))


def advbench(row: RawRow, split: str) -> PromptRow:
    """Read a row of AdvBench."""
    return _row(first_value(row, "prompt", "goal"), "harmful", None)


PROMPT_SETS: dict[str, PromptSet] = {
    "xstest": PromptSet(
        "XSTest",
        "Paul/XSTest",
        {"train": None},
        xstest,
        {"harmful": 200, "benign": 250},
        "CC-BY-4.0",
        "`prompt`, `type`, `label` (may be absent)",
        "https://github.com/paul-rottger/xstest",
    ),
    "or-bench-hard": PromptSet(
        "OR-Bench-Hard-1K",
        "bench-llm/or-bench",
        {"train": None},
        or_bench_hard,
        {"benign": 1319},
        "CC-BY-4.0",
        "`prompt`, `category`",
        "https://github.com/justincui03/or-bench",
        config="or-bench-hard-1k",
    ),
    "sorry-bench": PromptSet(
        "SORRY-Bench (2025/03), base prompts",
        "sorry-bench/sorry-bench-202503",
        {"train": None},
        sorry_bench,
        {"harmful": 440},
        "SORRY-Bench's own, no redistribution",
        "`turns`, `category`, `prompt_style`",
        "https://huggingface.co/datasets/sorry-bench/sorry-bench-202503",
        gated=True,
    ),
    "harmbench": PromptSet(
        "HarmBench, standard behaviors",
        "walledai/HarmBench",
        {"train": None},
        harmbench,
        {"harmful": 200},
        "MIT",
        "`prompt`, `category`; in the authors' file `Behavior`, `SemanticCategory`, `FunctionalCategory`",
        "https://github.com/centerforaisafety/HarmBench",
        config="standard",
        gated=True,
    ),
    "strongreject": PromptSet(
        "StrongREJECT",
        "walledai/StrongREJECT",
        {"train": None},
        strongreject,
        {"harmful": 313},
        "MIT",
        "`prompt`, `category`; in the authors' file `forbidden_prompt`",
        "https://github.com/alexandrasouly/strongreject",
        gated=True,
    ),
    "jailbreakbench": PromptSet(
        "JailbreakBench (JBB-Behaviors)",
        "JailbreakBench/JBB-Behaviors",
        {"harmful": "harmful-behaviors.csv", "benign": "benign-behaviors.csv"},
        jailbreakbench,
        {"harmful": 100, "benign": 100},
        "MIT",
        "`Goal`, `Category`",
        "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
        config="behaviors",
    ),
    "advbench": PromptSet(
        "AdvBench, harmful behaviors",
        "walledai/AdvBench",
        {"train": None},
        advbench,
        {"harmful": 520},
        "MIT",
        "`prompt`; in the authors' file `goal`",
        "https://github.com/llm-attacks/llm-attacks",
        gated=True,
    ),
}


def load_prompt_set(name: str, samples: int | None = None, seed: int = 0) -> list[PromptRow]:
    """Read a public test set from the Hugging Face hub.

    Args:
        name: A key of `PROMPT_SETS`.
        samples: Maximum number of prompts of each kind, drawn at random. `None`: all prompts.
        seed: Seed of the draw.

    Returns:
        One dictionary per prompt: `prompt` (text), `kind` (`"harmful"`: it should be refused, or `"benign"`) and
        `category` (text, or `None` if the set has no categories).

    Raises:
        OSError: If the set cannot be reached, or the hub asks for its terms to be accepted.
        ValueError: If `name` or `samples` is out of range, a column is missing, or no row is left.
    """
    prompt_set = _named(name)
    check_samples(samples)
    extras.check("cli", "Reading public data sets")
    rows = [row for split in prompt_set.splits for row in _read(name, _from_hub(name, split), split)]
    return _drawn(name, rows, samples, seed)


def read_prompt_set(name: str, path: str | Path, samples: int | None = None, seed: int = 0) -> list[PromptRow]:
    """Read a public test set from a local file with the set's own columns.

    Args:
        name: A key of `PROMPT_SETS`.
        path: A `.csv`, `.jsonl`, `.json` or `.parquet` file. For `"jailbreakbench"`: the folder with
            `harmful-behaviors.csv` and `benign-behaviors.csv`, or one of these files.
        samples: Maximum number of prompts of each kind, drawn at random. `None`: all prompts.
        seed: Seed of the draw.

    Returns:
        The same as `load_prompt_set`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If `name`, `samples` or the kind of file is not allowed, a column is missing, or no row is left.
    """
    _named(name)
    check_samples(samples)
    rows = [
        row
        for split, file in _files(name, Path(path)).items()
        for row in _read(name, readable(name, file, from_file(name, file)), split)
    ]
    return _drawn(name, rows, samples, seed)


def markdown_table() -> str:
    """Return the table of all sets, for the documentation."""
    lines = [
        "| name | set | on the hub | harmful | benign | license | gated | columns |",
        "|---|---|---|---:|---:|---|---|---|",
    ]
    for name, own in PROMPT_SETS.items():
        config = f" ({own.config})" if own.config else ""
        sizes = " | ".join(f"{own.sizes[kind]:,}" if kind in own.sizes else "-" for kind in KINDS)
        lines.append(
            f"| `{name}` | [{own.title}]({own.source}) | [{own.hub_id}]({_address(own)}){config} | {sizes} | "
            f"{own.license} | {'yes' if own.gated else 'no'} | {own.columns} |"
        )
    return "\n".join(lines)


def _named(name: str) -> PromptSet:
    if name not in PROMPT_SETS:
        raise ValueError(f"name={name!r} is not a public test set. Use one of {', '.join(PROMPT_SETS)}.")
    return PROMPT_SETS[name]


def _address(prompt_set: PromptSet) -> str:
    return f"https://huggingface.co/datasets/{prompt_set.hub_id}"


def _from_hub(name: str, split: str) -> Iterator[RawRow]:
    own = PROMPT_SETS[name]
    try:
        yield from from_hub(own.hub_id, own.config, split)
    except Exception as error:  # many possible causes: offline, gated, removed
        reason = f"{type(error).__name__}: {error}"
        terms = f"accept its terms at {_address(own)} and run `hf auth login`"
        if "gated" in reason.lower():
            problem, remedy = "is gated on the hub", f"Sign in there, {terms}."
        else:
            also = f" The set is gated, so also {terms}." if own.gated else ""
            problem, remedy = "cannot be loaded from the hub", f"Connect to the hub.{also}"
        raise OSError(
            f"The set {name!r} ({own.hub_id}) {problem}. {remedy} Or download a file of it and give {name}=FILE. "
            f"({reason})"
        ) from error


def _files(name: str, path: Path) -> dict[str, Path]:
    """Return the file of each split."""
    files = PROMPT_SETS[name].splits
    if list(files.values()) == [None]:
        return dict.fromkeys(files, path)
    wanted = {split: file for split, file in files.items() if file}
    if path.is_dir():
        return {split: path / file for split, file in wanted.items()}
    found = {split: path for split, file in wanted.items() if file == path.name}
    if not found:
        raise ValueError(
            f"The set {name!r}: path={str(path)!r} must be a folder with {' and '.join(wanted.values())}, or one of "
            "these files: the rows do not say of which kind they are."
        )
    return found


def _read(name: str, rows: Any, split: str) -> Iterator[PromptRow]:
    return converted(name, rows, lambda row: PROMPT_SETS[name].read(row, split))


def _drawn(name: str, rows: list[PromptRow], samples: int | None, seed: int) -> list[PromptRow]:
    """Draw prompts of each kind, and keep their order: many sets are sorted by category."""
    if not rows:
        raise ValueError(f"The set {name!r} has no row that can be used. Check that this is the right file.")
    kept = []
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        count = len(own) if samples is None else min(samples, len(own))
        kept += [own[index] for index in sorted(random.Random(seed).sample(range(len(own)), count))]
    return kept


def _row(prompt: str, kind: Kind, category: Any) -> PromptRow:
    return {"prompt": str(prompt), "kind": kind, "category": None if category is None else str(category)}


if __name__ == "__main__":
    print(markdown_table())
