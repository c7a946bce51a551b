# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The built-in conversations: format, size, no leak from train to test, and refusals where they belong."""

import itertools
import re

import pytest

from peft_ogpsa.data import NAMES, SPLITS, load

MINIMUM_ROWS = {"harmful": 120, "benign": 80, "general": 150}  # over both splits
COMPLETION_WORDS = {"harmful": (20, 45), "benign": (25, 60), "general": (25, 70)}
FILES = list(itertools.product(NAMES, SPLITS))

REFUSAL = re.compile(
    r"I'm sorry|I'm unable|I'm not (able|going|willing) to|I'd rather not|(isn't|is not) something I"
    r"|\bI (can't|cannot|won't|will not|will never|refuse|(must|have to) (decline|refuse))\b"
)


def prompt(row):
    return row["prompt"][0]["content"]


def completion(row):
    return row["completion"][0]["content"]


def words(text):
    return re.findall(r"[^\W_]+", text.lower().replace("'", ""))


def jaccard(a, b):
    return len(a & b) / len(a | b)


def trigrams(text):
    w = words(text)
    return {tuple(w[i : i + 3]) for i in range(len(w) - 2)} or {tuple(w)}


def all_rows():
    return [row for name, split in FILES for row in load(name, split)]


@pytest.mark.parametrize("name", NAMES)
def test_there_are_enough_rows(name):
    assert sum(len(load(name, split)) for split in SPLITS) >= MINIMUM_ROWS[name]
    assert len(load(name, "test")) >= 40


@pytest.mark.parametrize(("name", "split"), FILES)
def test_rows_are_conversational_prompt_completion(name, split):
    for row in load(name, split):
        assert set(row) - {"answer"} == {"prompt", "completion", "category"}
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert [message["role"] for message in row["completion"]] == ["assistant"]
        for message in row["prompt"] + row["completion"]:
            assert set(message) == {"role", "content"}
            assert message["content"]
            assert message["content"] == message["content"].strip()
        assert re.fullmatch(r"[a-z_]+", row["category"])


@pytest.mark.parametrize(("name", "split"), FILES)
def test_lengths_are_within_bounds(name, split):
    low, high = COMPLETION_WORDS[name]
    for row in load(name, split):
        assert len(prompt(row).split()) <= (70 if row["category"] == "summary" else 39), prompt(row)
        assert low <= len(completion(row).split()) <= high, completion(row)


@pytest.mark.parametrize("name", NAMES)
def test_both_splits_cover_the_same_categories(name):
    train, test = ({row["category"] for row in load(name, split)} for split in SPLITS)
    assert train == test
    assert len(train) >= 6


@pytest.mark.parametrize(("name", "split"), FILES)
def test_the_first_rows_are_a_sample_of_all_categories(name, split):
    rows = load(name, split)
    first = {row["category"] for row in rows[: len(rows) // 2]}
    assert first == {row["category"] for row in rows}


def test_no_prompt_and_no_completion_is_repeated_anywhere():
    for text in (prompt, completion):
        seen = [" ".join(words(text(row))) for row in all_rows()]
        assert len(seen) == len(set(seen))


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_do_not_overlap(name):
    for train, test in itertools.product(load(name, "train"), load(name, "test")):
        for text in (prompt, completion):
            pair = f"{text(train)!r} / {text(test)!r}"
            assert jaccard(trigrams(text(train)), trigrams(text(test))) < 0.5, pair
            assert jaccard(set(words(text(train))), set(words(text(test)))) < 0.7, pair


@pytest.mark.parametrize("split", SPLITS)
def test_harmful_requests_are_refused_and_nothing_else_is(split):
    for name in NAMES:
        for row in load(name, split):
            assert bool(REFUSAL.search(completion(row))) == (name == "harmful"), completion(row)


def test_refusals_vary_in_wording():
    rows = load("harmful", "train")
    assert len({tuple(words(completion(row))[:4]) for row in rows}) >= len(rows) / 2


def test_arithmetic_rows_carry_their_answer():
    rows = [row for row in all_rows() if "answer" in row]
    assert rows == [row for row in all_rows() if row["category"] == "arithmetic"]
    assert len(rows) >= 20
    for row in rows:
        # The last sentences state the answer; the number must stand alone, not inside a longer one.
        assert re.search(rf"(?<![\d.]){re.escape(row['answer'])}(?!\d)", completion(row)[-100:]), completion(row)


def test_arithmetic_is_correct():
    equation = re.compile(r"(?<![\w/.])(\d[\d.]*(?: [-+x/] \d[\d.]*)+) = (\d+(?:\.\d+)?)")
    checked = 0
    for row in all_rows():
        if row["category"] == "arithmetic":
            for left, right in equation.findall(completion(row)):
                assert eval(left.replace("x", "*")) == pytest.approx(float(right)), f"{left} = {right}"
                checked += 1
    assert checked >= 50


def test_load_reads_the_train_split_by_default():
    assert load("benign") == load("benign", "train") != load("benign", "test")


def test_errors_name_the_value_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"name='harmless'.*'harmful', 'benign', 'general'"):
        load("harmless")
    with pytest.raises(ValueError, match=r"split='validation'.*'train', 'test'"):
        load("general", "validation")
