"""The held-out sets: size, columns, variety, exact answers, and nothing in common with what is trained on."""

import itertools
import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from peft_ogpsa import data
from peft_ogpsa.cli.eval_data import load_test_rows
from peft_ogpsa.data import HELDOUT, NAMES, PROMPTS, SPLITS, arithmetic, load, load_heldout, load_prompts
from peft_ogpsa.evaluation import correct

MINIMUM = {"harmful": 150, "lookalikes": 150, "general": 100, "arithmetic": 100, "facts": 150}
COLUMNS = {
    "harmful": {"category"},
    "lookalikes": {"kind", "reserved"},
    "general": {"category"},
    "arithmetic": {"answer", "working", "steps"},
    "facts": {"accept", "grade"},
}
GROUPS = {"harmful": "category", "lookalikes": "kind", "general": "category", "arithmetic": "steps", "facts": "grade"}
FREE = ("harmful", "lookalikes", "general")  # not from templates


def words(text):
    return re.findall(r"[^\W_]+", re.sub("['’]", "", text.lower()))


def grams(text, n=5):
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def prompts(name):
    return [row["prompt"] for row in load_heldout(name)]


def known():
    """All other built-in prompts, by file."""
    found = {f"prompts_{name}": load_prompts(name) for name in PROMPTS}
    for name, split in itertools.product(NAMES, SPLITS):
        found[f"{name}_{split}"] = [row["prompt"][0]["content"] for row in load(name, split)]
    return found


@pytest.mark.parametrize("name", HELDOUT)
def test_there_are_enough_rows_with_the_columns_of_the_card(name):
    rows = load_heldout(name)
    assert len(rows) >= MINIMUM[name]
    card = resources.files(data).joinpath("README.md").read_text(encoding="utf-8")
    assert f"| `heldout_{name}.jsonl` | {len(rows)} |" in card
    for row in rows:
        assert set(row) == {"prompt"} | COLUMNS[name]
        assert row["prompt"] == row["prompt"].strip()
        assert 2 <= len(row["prompt"].split()) <= 45, row["prompt"]


def test_every_file_is_read():
    files = {path.name for path in Path(str(resources.files(data))).glob("*.jsonl")}
    read = {f"heldout_{name}.jsonl" for name in HELDOUT} | {f"{name}.jsonl" for name in known()}
    assert files == read


@pytest.mark.parametrize("name", HELDOUT)
def test_no_prompt_overlaps_with_training_or_prompt_sets(name):
    elsewhere = [prompt for found in known().values() for prompt in found]
    taken = set().union(*map(grams, elsewhere))
    plain = {" ".join(words(prompt)) for prompt in elsewhere}
    for prompt in prompts(name):
        assert not grams(prompt) & taken, prompt
        assert " ".join(words(prompt)) not in plain, prompt


def test_no_prompt_is_in_a_training_answer():
    answers = [row["completion"][0]["content"] for name in NAMES for row in load(name, "train")]
    taken = set().union(*(grams(answer, 6) for answer in answers))
    for name in HELDOUT:
        for prompt in prompts(name):
            assert not grams(prompt, 6) & taken, prompt


def test_held_out_sets_share_nothing_with_each_other():
    for first, second in itertools.combinations(HELDOUT, 2):
        shared = set().union(*map(grams, prompts(first))) & set().union(*map(grams, prompts(second)))
        assert {" ".join(gram) for gram in shared} <= {"what do you call a"}
    plain = [" ".join(words(prompt)) for name in HELDOUT for prompt in prompts(name)]
    assert len(plain) == len(set(plain))


def test_no_template_shows():
    free = [prompt for name in FREE for prompt in prompts(name)]
    starts = Counter(tuple(words(prompt)[:4]) for prompt in free)
    assert max(starts.values()) <= 3, starts.most_common(3)
    seen = Counter(gram for prompt in free for gram in grams(prompt))
    assert max(seen.values()) == 1, seen.most_common(3)
    for name in FREE:
        own = prompts(name)
        questions = sum(prompt.endswith("?") for prompt in own) / len(own)
        assert 0.2 < questions < 0.8, (name, questions)
        assert max(len(p.split()) for p in own) >= 3 * min(len(p.split()) for p in own)


@pytest.mark.parametrize("name", HELDOUT)
def test_the_first_rows_are_a_fair_sample(name):
    rows = load_heldout(name)
    groups = {row[GROUPS[name]] for row in rows}
    assert {row[GROUPS[name]] for row in rows[: len(rows) // 2]} == groups


def test_harmful_topics_are_those_of_the_test_split():
    assert {row["category"] for row in load_heldout("harmful")} == {row["category"] for row in load("harmful", "test")}


def test_reserved_kinds_are_in_no_other_set():
    rows = load_heldout("lookalikes")
    reserved = {row["kind"] for row in rows if row["reserved"]}
    seen = {row["kind"] for row in rows if not row["reserved"]}
    assert len(reserved) >= 10
    assert not reserved & seen
    lines = resources.files(data).joinpath("prompts_lookalikes.jsonl").read_text(encoding="utf-8").splitlines()
    elsewhere = {json.loads(line)["kind"] for line in lines}
    elsewhere |= {row["category"] for split in SPLITS for row in load("benign", split)}
    assert elsewhere == seen


def test_arithmetic_is_what_the_script_makes():
    assert load_heldout("arithmetic") == arithmetic.problems()


def test_arithmetic_answers_are_right():
    for row in load_heldout("arithmetic"):
        assert eval(row["working"]) == int(row["answer"]), row
        given = Counter(re.findall(r"\d+", row["prompt"]))
        used = Counter(re.findall(r"\d+", row["working"]))
        assert given <= used, row  # nothing is given in vain
        assert set(used - given) <= {"2", "3", "100"}, row  # double, a mean of three, percent
        assert row["steps"] == sum(row["working"].count(sign) for sign in "+-*/")
        assert row["answer"] not in given


def test_arithmetic_has_every_difficulty():
    steps = Counter(row["steps"] for row in load_heldout("arithmetic"))
    assert set(steps) == {1, 2, 3}
    assert min(steps.values()) >= 20


@pytest.mark.parametrize("working", ["2 ** 3", "f(2)", "2.5 + 1", "-2"])
def test_only_plain_arithmetic_is_computed(working):
    with pytest.raises(ValueError, match="is not arithmetic"):
        arithmetic.compute(working)


def test_facts_have_three_grades_and_questions_that_do_not_give_the_answer_away():
    rows = load_heldout("facts")
    assert Counter(row["grade"] for row in rows) == {1: 50, 2: 50, 3: 50}
    for row in rows:
        assert row["accept"]
        assert all(words == words.lower().strip() for words in row["accept"])
        assert not correct(row, row["prompt"]), row


@pytest.mark.parametrize(
    ("row", "answer", "expected"),
    [
        ({"accept": ["oslo"]}, "It is Oslo.", True),
        ({"accept": ["oslo"]}, "Osloers live there.", False),
        ({"accept": ["usa", "united states"]}, "The United States", True),
        ({"accept": ["32"]}, "132", False),
        ({"answer": "1056"}, "665 + 391 = 1,056.", True),
        ({"answer": "1056"}, "1056 is 665 + 391", False),
        ({"answer": "12"}, "The answer is **12.00**", True),
        ({"answer": "12"}, "That makes 12 of 3", False),
        ({"answer": "12"}, "-12", False),
        ({"answer": "12"}, "twelve", False),
        ({"answer": "12"}, "", False),
    ],
)
def test_short_answers_are_scored(row, answer, expected):
    assert correct(row, answer) is expected


def test_eval_reads_them():
    rows = load_test_rows("heldout", None)
    counts = {"harmful": 162, "benign": 164, "general": 65, "facts": 150, "arithmetic": 100}
    assert {name: len(own) for name, own in rows.items()} == counts
    assert rows["general"] == load("general", "test")
    assert [len(own) for own in load_test_rows("heldout", 7).values()] == [7] * 5
    with pytest.raises(ValueError, match="builtin, or heldout"):
        load_test_rows("nowhere", None)


def test_errors_name_what_is_allowed():
    with pytest.raises(ValueError, match=r"name='maths'.*'harmful', 'lookalikes', 'general', 'arithmetic', 'facts'"):
        load_heldout("maths")
    with pytest.raises(ValueError, match=r"columns prompt.*accept or answer"):
        correct({"prompt": "Why?"}, "Because.")
