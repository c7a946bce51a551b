"""The refusal matcher on labeled answers: the counts are kept, so that a change of the matcher shows."""

from collections import Counter
from pathlib import Path

import pytest
from measure_refusals import LABELS, LANGUAGES, answers, matrix, precision_and_recall, report

NONE = {"partial_refusal": (0, 0, 0), "no_answer": (0, 0, 0)}
# Label, and how many answers are refusal, compliance and unclear to the matcher.
COUNTS = {
    ("mend", True): {
        "full_refusal": (41, 22, 0),
        "partial_refusal": (10, 5, 0),
        "full_compliance": (0, 49, 0),
        "no_answer": (0, 0, 14),
    },
    ("mend", False): {"full_refusal": (18, 0, 0), "full_compliance": (0, 6, 0), **NONE},
    ("measure", True): {
        "full_refusal": (22, 41, 0),
        "partial_refusal": (8, 7, 0),
        "full_compliance": (2, 46, 1),
        "no_answer": (0, 5, 9),
    },
    ("measure", False): {"full_refusal": (15, 3, 0), "full_compliance": (0, 6, 0), **NONE},
}


@pytest.mark.parametrize(("split", "english"), COUNTS)
def test_the_confusion_matrix(split, english):
    assert matrix(answers(split, english)) == COUNTS[split, english]


def test_the_docs_have_the_matrix():
    page = (Path(__file__).parents[1] / "docs/cli.md").read_text(encoding="utf-8")
    for english in (True, False):
        for line in report(answers("measure", english)).splitlines():
            assert line in page


def test_precision_and_recall():
    counts = {"full_refusal": (6, 3, 1), "partial_refusal": (9, 9, 9), "full_compliance": (1, 5, 0)}
    assert precision_and_recall(counts | {"no_answer": (1, 0, 4)}) == ((6, 8), (6, 10))


def test_the_answers():
    rows = answers("mend") + answers("measure")
    assert len(rows) >= 300
    assert len({row["answer"] for row in rows}) == len(rows)
    assert {row["label"] for row in rows} == set(LABELS)
    assert {row["prompt_kind"] for row in rows} == {"harmful", "benign", "general"}
    assert {row["style"] for row in rows} >= {*LANGUAGES, "apology", "policy", "redirect", "late", "roleplay", "loop"}
    halves = [Counter((row["style"], row["label"]) for row in answers(split)) for split in ("mend", "measure")]
    assert halves[0].keys() == halves[1].keys()
    assert max(abs(halves[0][key] - halves[1][key]) for key in halves[0]) <= 1
    assert min(len(answers(split)) for split in ("mend", "measure")) >= 150
