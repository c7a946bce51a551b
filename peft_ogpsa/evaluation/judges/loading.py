# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Find judges by name."""

from __future__ import annotations

from collections.abc import Sequence

from .endpoint import EndpointJudge
from .format import Format
from .grading import GradingJudge
from .harmbench import HARMBENCH, HARMBENCH_MISTRAL
from .judge import Judge
from .llama_guard import LLAMA_GUARD_3_1B, LLAMA_GUARD_3_8B, LLAMA_GUARD_4
from .matcher import MatcherJudge
from .model import ModelJudge
from .strongreject import STRONGREJECT
from .wildguard import WILDGUARD

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        HARMBENCH,
        HARMBENCH_MISTRAL,
        WILDGUARD,
        LLAMA_GUARD_3_1B,
        LLAMA_GUARD_3_8B,
        LLAMA_GUARD_4,
        STRONGREJECT,
    )
}
"""Published formats of judge models, by the name after `model:`."""


def load_judges(
    names: str | Sequence[str], *, load_in_4bit: bool = False, batch_size: int = 8, progress: bool = False
) -> list[Judge]:
    """Create judges by name. Models are loaded later, when they are first used.

    Args:
        names: Names, or one text with commas between them: `"matcher"`, `"model:NAME"`, `"model:NAME=FOLDER"`,
            `"openai:MODEL"`. NAME is a key of `FORMATS`, or the model's name on the hub.
        load_in_4bit: Load models in 4 bits.
        batch_size: Answers per batch of a model.
        progress: Show progress bars.

    Raises:
        ValueError: If a name is unknown or occurs twice.
    """
    names = names.split(",") if isinstance(names, str) else list(names)
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"judges={','.join(names)!r} must name one judge or more, each once.")
    return [_judge(name, load_in_4bit, batch_size, progress) for name in names]


def _judge(name: str, load_in_4bit: bool, batch_size: int, progress: bool) -> Judge:
    scheme, _, rest = name.partition(":")
    if name == "matcher":
        return MatcherJudge()
    if scheme == "openai" and rest:
        return EndpointJudge(rest, progress=progress)
    model, _, folder = rest.partition("=")
    format = _format(model) if scheme == "model" else None
    if format is None:
        raise ValueError(
            f"The judge {name!r} is unknown. Known judges: matcher, openai:MODEL, and "
            f"{', '.join(f'model:{known}' for known in FORMATS)}. For a model in a local folder, name its format too, "
            "for example model:wildguard=/path/to/folder."
        )
    kind = GradingJudge if format.grades else ModelJudge
    return kind(format, folder or None, name=name, load_in_4bit=load_in_4bit, batch_size=batch_size, progress=progress)


def _format(name: str) -> Format | None:
    return next((f for f in FORMATS.values() if name.lower() in (f.name, f.model.lower())), None)
