# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Sentences that say that something was never run on a GPU, and the stages whose results replace them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figures import summary

PLACES = (
    "README.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "notebooks/README.md",
    "peft_ogpsa/**/*.py",
    "benchmarks/*.py",
)
"""The files that are searched for sentences. In code, only docstrings are searched."""

_NEVER = r"\b(not?|none|nothing|never|neither|nor)\b"
_RUN = r"\b(run|ran|tried|measured|tested|timed|executed)\b"
_DEVICE = r"(\bGPUs?\b|\bCUDA\b|\bT4\b|\bH100\b)"

PATTERNS = {
    "never run on a GPU": rf"(?is)(?=.*{_NEVER}[^.]*?{_RUN}|.*{_RUN}[^.]*?{_NEVER})(?=.*{_DEVICE})",
    "computed": r"(?is)\bcomputed\b.*\bnot measured\b|\b(is|are|everything about)\b[^.]*\bcomputed, and\b"
    r"|\b(memory|figures)\b[^.]*\b(is|are) computed\b|^Computed, not\b",
    "supposed": rf"(?is)(?=.*{_DEVICE})(?=.*\b(should cost|unknown time|may hold more or less)\b)",
}
"""Patterns of claims, by kind. Check every sentence that matches. It is not always wrong."""

TOPICS = {
    r"^README": ("tests", "quickstart", "train-sft-bf16", "ratios-8b-qlora", "memory-8b", "tax-100-seed0"),
    r"unsloth|vLLM": (),
    r"FSDP2|several GPUs|process|axolotl|swift|LLaMA": (),
    r"(?i)notebook": ("notebook-1", "notebook-2", "notebook-3"),
    r"(?i)kernel|triton|launch": ("projection-8b-gradients", "ratios-8b-qlora", "tests"),
    r"T4|(?i:float16|fp16|scaler)": ("train-sft-fp16", "train-dpo-fp16"),
    r"(?i)memory|MiB|GiB|allocator|peak|\b[78] B\b": ("memory-8b", "building-8b"),
    r"(?i)\btimes?\b|speed|tokens/s|passes|figures?": ("ratios-135m-lora", "ratios-8b-qlora"),
    r"": ("tests", "quickstart", "train-sft-bf16", "tax-100-seed0"),
}
"""Patterns for a sentence or its file's name, and the stages that settle it. The first match counts."""


@dataclass(frozen=True)
class Claim:
    """A sentence that matches one of `PATTERNS`.

    Attributes:
        file: File of the sentence, relative to the repository.
        line: Line where the sentence begins.
        kind: A key of `PATTERNS`.
        text: The sentence, in one line.
    """

    file: str
    line: int
    kind: str
    text: str

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose results replace the sentence. Empty if no stage does."""
        words = f"{self.file} {self.text}"
        return next(own for pattern, own in TOPICS.items() if re.search(pattern, words))


def claims(root: Path) -> list[Claim]:
    """Find all claims in a checkout."""
    found = []
    for place in PLACES:
        for path in sorted(root.glob(place)):
            text = path.read_text(encoding="utf-8")
            for line, sentence in sentences(docstrings(text) if path.suffix == ".py" else text):
                kind = next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, sentence)), None)
                if kind is not None:
                    found.append(Claim(path.relative_to(root).as_posix(), line, kind, sentence))
    return found


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield each sentence with its first line. It ends at the latest with its paragraph, list item or table row."""
    start, words = 1, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        own = re.sub(r"^\s*((#+|[-*>]|\d+\.)\s+)?", "", line)
        if not own or line.lstrip().startswith(("|", "- ", "* ", "#")):
            yield from _split(start, words)
            words = ""
        if own:
            start = start if words else number
            words += ("\n" if words else "") + own


def docstrings(source: str) -> str:
    """Remove everything but the docstrings from a source file. Line numbers stay the same."""
    lines = source.splitlines()
    kept = [""] * len(lines)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            assert first.end_lineno is not None
            for number in range(first.lineno - 1, first.end_lineno):
                kept[number] = lines[number].replace('"""', "")
    return "\n".join(kept)


def _split(start: int, paragraph: str) -> Iterator[tuple[int, str]]:
    position = 0
    for part in re.split(r"(?<=[.!?]\s)|(?<=[.!?]\*\*\s)", paragraph):
        line = start + paragraph[:position].count("\n")
        position += len(part)
        if own := " ".join(part.split()):
            yield line, own


def listed(found: list[Claim], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the claims as Markdown, each with the results that replace it. Results of a rehearsal do not count."""
    results = {name: own for name, own in results.items() if own["machine"]["memory"] and not own["toy"]}
    lines = ["## Sentences to replace", ""]
    for claim in found:
        lines += [f"- `{claim.file}:{claim.line}` ({claim.kind}): {claim.text}"]
        known = [f"`{name}`: {summary(results[name])}" for name in claim.stages if name in results]
        waiting = [f"`{name}`" for name in claim.stages if name not in results]
        lines += [f"  - {own}" for own in known]
        if waiting:
            lines.append(f"  - Still to run: {', '.join(waiting)}")
        if not claim.stages:
            lines.append("  - No stage settles this. It stays.")
    return "\n".join(lines) + "\n"
