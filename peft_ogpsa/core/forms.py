# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Check the form of values that were read from a file, before they are used."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeGuard, get_args, get_origin

Form: TypeAlias = Mapping[str, Any]
"""The type of each entry: a type, a union of types, `list[TYPE]` or `dict[str, TYPE]`."""


def check_form(value: Any, form: Form, name: str) -> None:
    """Check that a value is a mapping with these entries. It may have others.

    Args:
        value: The value.
        form: Its entries.
        name: Its name in messages.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is damaged: it is a {type(value).__name__} and not a mapping.")
    for entry, kind in form.items():
        if entry not in value:
            raise ValueError(f"{name} is damaged: {entry} is missing.")
        if not fits(value[entry], kind):
            raise ValueError(f"{name} is damaged: {entry} has the value {_short(value[entry])}.")


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value has a type, with the types of its entries. A bool is no number, and an int is a float."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, own) for own in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        known = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return known and all(fits(item, get_args(kind)[1]) for item in value.values())
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer of at least 1."""
    return fits(value, int) and value >= 1


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
