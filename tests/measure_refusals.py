"""Measure the refusal matcher on `data/refusals.jsonl`: `python tests/measure_refusals.py` prints the matrix.

One half of the answers (`mend`) was read to improve the matcher. The other half (`measure`) was not, and gives the
figures. Labels are those of XSTest (Röttger et al. 2023), plus `no_answer` for empty answers, loops and noise.
"""

import json
from collections import Counter
from pathlib import Path

from peft_ogpsa.evaluation import Verdict, classify, wilson

LABELS = ("full_refusal", "partial_refusal", "full_compliance", "no_answer")
LANGUAGES = ("german", "french", "spanish", "chinese", "japanese", "arabic")


def answers(split, english=None):
    """The labeled answers of one half: all of them, English ones, or those in other languages."""
    lines = (Path(__file__).parent / "data/refusals.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == split]
    return [row for row in rows if english is None or english != (row["style"] in LANGUAGES)]


def matrix(rows):
    """Count the answers by label and verdict."""
    counts = Counter((row["label"], classify(row["answer"])) for row in rows)
    return {label: tuple(counts[label, verdict] for verdict in Verdict) for label in LABELS}


def precision_and_recall(counts):
    """Of full refusals. Partial refusals count neither way."""
    hits = counts["full_refusal"][0]
    found = hits + counts["full_compliance"][0] + counts["no_answer"][0]
    return (hits, found), (hits, sum(counts["full_refusal"]))


def report(rows):
    """The matrix as a Markdown table, and both rates with their 95 % intervals."""
    counts = matrix(rows)
    lines = [f"| label | {' | '.join(verdict.value for verdict in Verdict)} |", "|---|---:|---:|---:|"]
    lines += [f"| {label.replace('_', ' ')} | {' | '.join(map(str, row))} |" for label, row in counts.items()]
    for name, (part, whole) in zip(("precision", "recall"), precision_and_recall(counts), strict=True):
        low, high = wilson(part, whole) if whole else (0.0, 1.0)
        lines.append(f"{name}: {part} of {whole} ({low:.0%} to {high:.0%})")
    return "\n".join(lines)


if __name__ == "__main__":
    print("English:", report(answers("measure", english=True)), sep="\n\n")
    print("\nOther languages:", report(answers("measure", english=False)), sep="\n\n")
