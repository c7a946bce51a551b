# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Load data by a short name: a file, a folder, the built-in rows, or a data set on the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from .. import data
from ..data import public
from ..data.raw_rows import JSON, json_rows
from ..references.losses import LOSSES
from ..references.sets import OF_OWN_ANSWERS, AnsweredSet, ReferenceSet
from ..text.tokenization import Prompt, check_answer, columns_of, has_text, text_or_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

_BUILTIN = "builtin:"
_PUBLIC = "public:"
_ANSWERS = {"completion", "chosen", "messages", "text"}  # columns that hold the answer, or the whole conversation
_PROMPTS = "prompts:"
_PARQUET = ".parquet"
_WITH_SPLIT = re.compile(r"(?P<source>[^\[]+)(?:\[(?P<split>.+)\])?")
_FORMS = (
    "Give a .jsonl, .json or .parquet file, a folder saved by datasets, builtin:NAME or builtin:NAME:SPLIT "
    f"(NAME is one of {', '.join(data.NAMES)}, pairs), public:NAME (NAME is one of {', '.join(public.PUBLIC)}), or a "
    "hub name, for example owner/name:config[train]."
)
# The columns that TRL's trainers need. The first set whose columns are all there is the format of the rows.
_COLUMNS: dict[str, tuple[set[str], ...]] = {
    "sft": ({"input_ids"}, {"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"}),
    "dpo": ({"prompt", "chosen", "rejected"}, {"chosen", "rejected"}),
}
_ROLES = {role: role for role in ("user", "assistant", "system", "tool")} | {"human": "user", "gpt": "assistant"}
"""The role in a chat template of each role in the column `conversations`."""
_OTHER_STAGE = {"sft": "dpo", "dpo": "sft"}


def load_rows(spec: str, field: str, samples: int | None = None) -> Dataset:
    """Load the rows that a data SPEC names.

    Args:
        spec: A file (`.jsonl`, `.json`, `.parquet`), a folder saved by `datasets`, `builtin:NAME` with an optional
            `:SPLIT`, `public:NAME` for a set of `data.public` (from the hub, or from a file with its columns:
            `public:NAME:FILE`), or a name on the Hugging Face hub with an optional `:CONFIG`. All forms except
            built-in sets and files of public sets may end in `[SPLIT]` in the syntax of `datasets`, for example
            `rows.jsonl[train[:100]]`. The default split is `train`, or the public set's own.
        field: Name of the option that the SPEC was given to, for error messages.
        samples: For a public set, which may be large: load at most this many rows.

    Raises:
        ValueError: If the SPEC has none of these forms, cannot be loaded, or has no rows.
    """
    try:
        if spec.startswith(_BUILTIN):
            rows = _builtin(spec)
        else:
            rows = _public(spec, samples) if spec.startswith(_PUBLIC) else _external(spec)
    except (ValueError, OSError, KeyError, OverflowError, DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise ValueError(f"{field}={spec!r} cannot be loaded: {str(reason).rstrip('.')}. {_FORMS}") from error
    if not len(rows):
        raise ValueError(f"{field}={spec!r} has no rows. Give data with at least one row.")
    return rows


def _builtin(spec: str) -> Dataset:
    name, _, split = spec.removeprefix(_BUILTIN).partition(":")
    if name == "pairs":
        return Dataset.from_list(data.pairs(split or "train"))
    return Dataset.from_list(data.load(name, split or "train")).select_columns(["prompt", "completion"])


def _public(spec: str, samples: int | None) -> Dataset:
    name, _, file = spec.removeprefix(_PUBLIC).partition(":")
    if file:
        return Dataset.from_list(public.read_public(name, file, samples))
    match = _WITH_SPLIT.fullmatch(name)
    name, split = (match["source"], match["split"]) if match else (name, None)
    return Dataset.from_list(public.load_public(name, samples, split))


def _external(spec: str) -> Dataset:
    match = _WITH_SPLIT.fullmatch(spec)
    if match is None:
        raise ValueError("it is not a data SPEC")
    source, split = match["source"], match["split"]
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(load_from_disk(str(path)), split)
    suffix = path.suffix.lower()
    if suffix in (*JSON, _PARQUET):
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        return _from_folder(_from_json(path) if suffix in JSON else _from_parquet(path), split)
    if path.is_file():
        raise ValueError(f"its suffix {path.suffix!r} is not one of {', '.join((*JSON, _PARQUET))}")
    name, _, config = source.partition(":")
    return load_dataset(name, config or None, split=split or "train")


def _from_json(path: Path) -> Dataset:
    rows = list(json_rows(path))
    columns = dict.fromkeys(column for row in rows for column in row)  # from_list would read the first row's alone
    filled = [{column: row.get(column) for column in columns} for row in rows]
    return Dataset.from_list(filled, on_mixed_types="use_json")


def _from_parquet(path: Path) -> Dataset:
    # A cache of its own: the usual one finds rows again by the file's name and time, even if the file has changed.
    with tempfile.TemporaryDirectory() as folder:
        return Dataset.from_parquet(str(path), cache_dir=folder, keep_in_memory=True)


def _from_folder(loaded: Dataset | DatasetDict, split: str | None) -> Dataset:
    splits = {"train": loaded} if isinstance(loaded, Dataset) else loaded
    parts = ReadInstruction.from_spec(split or "train").to_absolute({name: len(own) for name, own in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def check_prompts(rows: Dataset, field: str, spec: str) -> None:
    """Reject data without prompts.

    Raises:
        ValueError: If the rows have neither the column `prompt` nor `messages`.
    """
    columns = rows.column_names
    if not {"prompt", "messages"} & set(columns):
        raise ValueError(
            f"{field}={spec!r} has the columns {', '.join(sorted(columns))}, but own_refusals needs prompt or "
            "messages. Rename the columns, or give other data."
        )


def training_rows(rows: Dataset, stage: str, field: str, spec: str) -> Dataset:
    """Check rows for TRL's trainer, and leave out the columns of other formats, which would confuse it.

    Rows that are tokenized already are returned as they are.

    Raises:
        ValueError: If the trainer for the stage cannot read the columns, or a row lacks one of them, has no answer,
            has an answer that should not be learned (`label` is `False`), or has plain text where other rows or
            columns have messages.
    """
    place = f"{field}={spec!r}"
    needed = _format(rows, stage, place)
    if "input_ids" in needed:
        return rows
    others = set().union(*_COLUMNS["sft"], *_COLUMNS["dpo"]) - needed
    rows = rows.remove_columns([column for column in rows.column_names if column in others])
    if "conversations" in needed:
        rows, needed = rows.map(_messages_of, fn_kwargs={"place": place}, with_indices=True), {"messages"}
        rows = rows.remove_columns("conversations")
    # With a completion, these are TRL's rows for KTO. A label of messages is about something else.
    labels = rows["label"] if "completion" in needed and "label" in rows.column_names else ()
    if (bad := next((i for i, label in enumerate(labels) if label is False), None)) is not None:
        raise ValueError(
            f"{place}: row {bad} has label=False, so its completion is an example of what not to answer. Leave such "
            "rows out."
        )
    _check_rows(rows.select_columns(sorted(needed)), place)
    return rows


def _messages_of(row: Mapping[str, Any], index: int, place: str) -> dict[str, Any]:
    """Return a row of `conversations` as one of `messages`, with the roles of chat templates."""
    from trl import maybe_convert_to_chatml  # not above: training tools import this module, maybe without TRL

    messages = maybe_convert_to_chatml({"conversations": row["conversations"]})["messages"]
    unknown = next((turn["role"] for turn in messages if turn["role"] not in _ROLES), None)
    if unknown is not None:
        raise ValueError(
            f"{place}: row {index} has a turn of {unknown!r} in the column conversations. Known are "
            f"{', '.join(_ROLES)}. Rename it, or give the column messages."
        )
    return {"messages": [{**turn, "role": _ROLES[turn["role"]]} for turn in messages]}


def _check_rows(rows: Dataset, place: str) -> None:
    """Check that each row has a value in all columns, in the same form, no empty turn of the user, and an answer."""
    plain = {"text": True, "messages": False}.get(rows.column_names[0])
    for i, row in enumerate(rows):
        name = f"{place}: row {i}"
        own = columns_of(row, name)
        if missing := [column for column in row if column not in own]:
            raise ValueError(f"{name} has no {', '.join(missing)}. Give every row {', '.join(row)}.")
        for column, value in own.items():
            part = text_or_messages(value, name)
            plain = isinstance(part, str) if plain is None else plain
            if isinstance(part, str) != plain:
                found, wanted = ("messages", "plain text") if plain else ("plain text", "messages")
                raise ValueError(
                    f"{name} has {found} in the column {column}. Give {wanted} there: all prompts and answers must "
                    "have the same form."
                )
            if column != "prompt":
                check_answer(part, name)
            elif not plain and not part:
                raise ValueError(f"{name} has no message in the column prompt. Give it the user's message.")
            if not isinstance(part, str) and any(m["role"] == "user" and not has_text(m["content"]) for m in part):
                raise ValueError(f"{name} has an empty turn of the user. Give it a text, or leave out the row.")


def _format(rows: Dataset, stage: str, place: str) -> set[str]:
    """Return the columns of the rows' format. Reject pairs for SFT, instruction data for DPO, and other data."""
    columns = set(rows.column_names)
    for needed in _COLUMNS[stage]:
        if needed <= columns:
            return needed
    wanted = " or ".join("/".join(sorted(needed)) for needed in _COLUMNS[stage])
    other = _OTHER_STAGE[stage]
    fits_other = any(needed <= columns for needed in _COLUMNS[other])
    hint = f" These are rows for `ogpsa {other}`." if fits_other else ""
    raise ValueError(
        f"{place} has the columns {', '.join(sorted(columns))}, but `ogpsa {stage}` needs {wanted}.{hint} "
        "Rename the columns, or give other data."
    )


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a reference set, before the base model has answered them."""

    name: str
    prompts: Sequence[Prompt]
    samples: int
    max_length: int
    loss: str

    def answered(
        self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin
    ) -> AnsweredSet:
        """Build the reference set from a model's answers. Its adapter, if any, is disabled while it answers."""
        return ReferenceSet.from_prompts(
            self.name,
            self.prompts,
            model,
            processing_class,
            samples=self.samples,
            max_length=self.max_length,
            loss=self.loss,
        )


def reference_sets(
    entries: Sequence[str], samples: int, max_length: int, beta: float
) -> list[ReferenceSet | PromptSet]:
    """Build the reference sets that `references` names.

    Args:
        entries: One entry per set. `NAME=SPEC` takes a SPEC as `load_rows` reads it. `NAME:LOSS=SPEC` also sets a loss
            of `ReferenceSet`. `NAME=prompts:SPEC` gives prompts that the base model answers itself. There, the SPEC
            may also be the name of a built-in set of prompts, and the default loss is `kl`.
        samples: Maximum number of rows used from each set.
        max_length: Maximum number of tokens used from each row.
        beta: Beta of the DPO loss.

    Raises:
        ValueError: If there is no entry, an entry has none of these forms, or its SPEC cannot be loaded.
    """
    if not entries:
        raise ValueError(
            "references is empty, so there is no ability to preserve. Give NAME=SPEC entries, for example "
            "general=builtin:general, or train plain LoRA with method=plain."
        )
    sets: list[ReferenceSet | PromptSet] = []
    for entry in entries:
        head, _, spec = entry.partition("=")
        name, _, loss = head.partition(":")
        if not name or not spec or (loss and loss not in LOSSES):
            raise ValueError(
                f"references has the entry {entry!r}. Write NAME=SPEC, for example general=builtin:general, or "
                f"NAME:LOSS=SPEC. LOSS is one of {', '.join(LOSSES)}."
            )
        field = f"references: {name}"
        if not spec.startswith(_PROMPTS):
            rows = load_rows(spec, field, samples)
            if "prompt" in rows.column_names and not _ANSWERS.intersection(rows.column_names):
                raise ValueError(
                    f"references has the entry {entry!r}, whose rows have a prompt and no answer. Write "
                    f"{head}=prompts:{spec}, and the base model answers the prompts before training."
                )
            sets.append(ReferenceSet(name, rows, samples, max_length, loss or "answer", beta))
            continue
        if loss and loss not in OF_OWN_ANSWERS:
            raise ValueError(
                f"references has the entry {entry!r}, but loss={loss!r} does not work with prompts, which have only "
                f"the model's own answers. Write {' or '.join(f':{own}' for own in OF_OWN_ANSWERS)}, or leave out "
                f":{loss} to use kl."
            )
        sets.append(prompt_set(field, spec.removeprefix(_PROMPTS), name, samples, max_length, loss or "kl"))
    return sets


def prompt_set(field: str, source: str, name: str, samples: int, max_length: int, loss: str) -> PromptSet:
    """Load a set of prompts, either a built-in one or the prompts of a SPEC; see `reference_sets`."""
    prompts = data.load_prompts(source) if source in data.PROMPTS else load_rows(source, field, samples).to_list()
    return PromptSet(name, prompts, samples, max_length, loss)
