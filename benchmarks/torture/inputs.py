# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Random inputs: values of every kind, rows, and mutations of valid files."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

text = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=st.characters(codec=None, categories=["Cs", "Cc", "Lo", "So"]), max_size=6),  # lone surrogates
    st.sampled_from(
        ["", " ", "\0", "\n", "\u2028", "é" * 3, "x" * 3000, "<s>user: </s>", "{{ 1/0 }}", "../../etc/passwd"]
    ),
)
numbers = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([10**400, -(10**400), 2**63, 10**12]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
)
plain = st.one_of(st.none(), numbers, text)
anything = st.one_of(
    plain,
    st.binary(max_size=8),
    st.recursive(
        plain,
        lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=5), own, max_size=3),
        max_leaves=8,
    ),
    st.just(object()),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 10), st.just(10**12), st.floats(), st.text(max_size=6)),
    lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=5), own, max_size=3),
    max_leaves=6,
)

_COLUMNS = ["messages", "prompt", "completion", "text", "chosen", "rejected", "role", "content", "label"]
_message = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | anything, "content": text | anything}
    ),
    st.dictionaries(st.sampled_from(["role", "content", "name"]), anything, max_size=3),
    anything,
)
_turns = st.lists(_message, max_size=4)


@st.composite
def rows(draw: Any) -> Any:
    """Draw a row of a reference set: some columns, with text, messages, or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(anything)
    names = draw(
        st.sampled_from([["messages"], ["prompt", "completion"], ["text"], ["prompt", "chosen", "rejected"]])
        | st.lists(st.sampled_from(_COLUMNS), max_size=4, unique=True)
    )
    return {name: draw(st.one_of(text, _turns, _turns, anything)) for name in names}


@st.composite
def damaged(draw: Any, valid: bytes) -> bytes:
    """Draw a valid file with some bytes changed, cut off, repeated, or inserted."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["set", "cut", "insert", "repeat", "number"]))
        if kind == "set" and content:
            content[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, 64)) if draw(st.booleans()) else None]
        elif kind == "insert":
            content[place:place] = draw(
                st.binary(max_size=12) | st.sampled_from([b"[" * 3000, b'{"a":' * 3000, b"\n"])
            )
        elif kind == "repeat":
            content[place:place] = content[place : place + 40]
        else:  # the length of a safetensors header
            content[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(content)


@st.composite
def changed(draw: Any, valid: Any) -> Any:
    """Draw a valid JSON value with some entries replaced, removed or added."""
    found = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        inner, step = found, draw(st.integers(0, 4))
        while step and isinstance(inner, dict | list) and inner:
            key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))))
            if not isinstance(inner[key], dict | list) or step == 1:
                if draw(st.booleans()):
                    inner[key] = draw(json_values)
                else:
                    del inner[key]
                break
            inner, step = inner[key], step - 1
        else:
            if isinstance(inner, dict):
                inner[draw(st.text(max_size=5))] = draw(json_values)
    return found


def files(valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Return a strategy for files that should hold this JSON object, with changed entries or damaged bytes."""
    text = json.dumps(valid).encode()
    return st.one_of(
        changed(valid).map(lambda own: json.dumps(own).encode()), damaged(text), json_values.map(_encoded)
    )


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def parsed(content: bytes) -> Any:
    """Parse a JSON file. Return `None` if it is nested too deeply for Python's own parser."""
    try:
        return json.loads(content)
    except RecursionError:
        return None
