# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What others may read of the names of models, data and files."""

from __future__ import annotations

import os
import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def on_hub(name: str) -> bool:
    """Return whether a name has the form of one on the hub, and is no local file or folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def public(name: str) -> str:
    """Return what others may read of a name: a whole hub name, or a file or folder name without its path."""
    kind = re.match(r"(prompts:)?(public:\w+:)?", name)
    prefix = kind[0] if kind else ""
    source, bracket, split = name[len(prefix) :].partition("[")
    if re.search(r"[\\/]", split) or source.endswith(("/", "\\")):  # the bracket belongs to a path, and not to a split
        source, bracket, split = name[len(prefix) :], "", ""
    if not re.search(r"[\\]|^/|:.*/", source) and not os.path.exists(source) and on_hub(source.partition(":")[0]):
        return name
    return prefix + re.split(r"[\\/]", source.rstrip("\\/"))[-1] + bracket + split


def public_source(source: str) -> str:
    """Return what others may read of one part of `ogpsa eval --data`, such as NAME=FILE."""
    name, equals, path = source.strip().rpartition("=")
    return name + equals + public(path)


def public_judge(judge: str) -> str:
    """Return what others may read of the name of a judge, such as model:NAME=FOLDER or openai:MODEL."""
    scheme, colon, rest = judge.strip().partition(":")
    name, equals, folder = rest.partition("=")
    return scheme + colon + (name + equals + public(folder) if equals else public(rest))
