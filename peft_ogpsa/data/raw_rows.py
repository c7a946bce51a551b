# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Read the raw rows of a data set from the Hugging Face hub or from a local file, and name missing columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .. import extras
from ..core.files import check_utf8, json_lines
from ..core.forms import is_count

RawRow = Mapping[str, Any]
_Row = TypeVar("_Row")

JSON = (".jsonl", ".json")
"""Suffixes of files that `json_rows` reads."""

_BUILDERS = {".csv": "csv", ".parquet": "parquet"}


def from_hub(hub_id: str, config: str | None, split: str, *, streaming: bool = False) -> Any:
    """Open a split of a data set on the hub.

    Returns:
        The data set of `datasets`. With `streaming`, its rows are downloaded while they are read.
    """
    from datasets import load_dataset

    return load_dataset(hub_id, config, split=split, streaming=streaming)


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file: one object per line, or one array of objects.

    The `json` builder of `datasets` is not used. It turns text that looks like a date into a date, and it finds rows
    again by the file's name and time alone, even if the file has changed.

    Raises:
        ValueError: If the file is not in UTF-8, or has something else. The message names the line.
        OSError: If it cannot be read.
    """
    check_utf8(path)
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from json_lines(text)
        return
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"item {number} of its array is not a JSON object")
        yield row


def from_file(name: str, path: Path) -> Any:
    """Open a local file.

    Args:
        name: Name of the set, for error messages.
        path: A `.jsonl`, `.json`, `.csv` or `.parquet` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"The set {name!r}: path={str(path)!r} is not a file. Give the path of a downloaded file."
        )
    suffix = path.suffix.lower()
    if suffix not in (*JSON, *_BUILDERS):
        raise ValueError(f"The set {name!r}: path={str(path)!r} must end in one of {', '.join((*JSON, *_BUILDERS))}.")
    extras.check("cli", "Reading public data sets")
    from datasets import IterableDataset, load_dataset

    if suffix in JSON:
        return IterableDataset.from_generator(json_rows, gen_kwargs={"path": path})
    try:
        if suffix != ".parquet":
            check_utf8(path)
        # Use streaming: a plain load would copy the file into the cache of `datasets`.
        return load_dataset(_BUILDERS[suffix], data_files=str(path), split="train", streaming=True)
    except Exception as error:  # each kind of file has its own errors
        raise ValueError(f"The set {name!r}: {path} cannot be read: {error}") from error


def readable(name: str, path: Path, rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """Yield the rows of a local file.

    Raises:
        ValueError: If one cannot be read. The message names the set and the file.
    """
    try:
        yield from rows
    except Exception as error:  # each kind of file has its own errors
        raise ValueError(f"The set {name!r}: {path} cannot be read: {error}") from error


def values(row: RawRow, *columns: str) -> list[Any]:
    """Return the values of columns that must be there.

    Raises:
        ValueError: If a column is missing or empty. The message names it.
    """
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise ValueError(f"the columns {missing} are missing or empty. The row has the columns {sorted(row)}")
    return [row[column] for column in columns]


def first_value(row: RawRow, *columns: str) -> Any:
    """Return the value of the first of these columns that is there: copies of a set name their columns differently.

    Raises:
        ValueError: If none of the columns is there.
    """
    for column in columns:
        if row.get(column) is not None:
            return row[column]
    raise ValueError(
        f"the column {' or '.join(map(repr, columns))} is missing or empty. The row has the columns {sorted(row)}"
    )


def check_samples(samples: int | None) -> None:
    """Check a maximum number of rows.

    Raises:
        ValueError: If it is not a positive integer or None.
    """
    if samples is not None and not is_count(samples):
        raise ValueError(f"samples={samples!r} must be an integer of at least 1, or None to use all rows.")


def converted(name: str, rows: Iterable[RawRow], read: Callable[[RawRow], _Row | None]) -> Iterator[_Row]:
    """Yield what `read` makes of each row, without `None`.

    Raises:
        ValueError: If a row cannot be read. The message names the set and the row.
    """
    for number, raw in enumerate(rows):
        try:
            row = read(raw)
        except ValueError as error:
            raise ValueError(f"The set {name!r}: row {number}: {error}.") from error
        except (TypeError, AttributeError, LookupError) as error:
            raise ValueError(
                f"The set {name!r}: row {number} has a value of another type than the set's rows have ({error})."
            ) from error
        if row is not None:
            yield row
