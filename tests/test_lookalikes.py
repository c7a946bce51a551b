"""Look-alikes with the model's own answers among safety rows."""

import importlib
import sys

import pytest
from datasets import Dataset
from models import chat

from peft_ogpsa.data import pairs
from peft_ogpsa.evaluation import Verdict, classify
from peft_ogpsa.references.lookalikes import with_contrast, with_lookalikes
from peft_ogpsa.references.self_answers import AnswerCounts
from peft_ogpsa.references.sets import AnsweredSet

COUNTS = AnswerCounts(2, 2, 0, 0, 0, 1)


def answered(*answers, unfinished=True):
    rows = [{**chat(f"look-alike {i}", answer), "unfinished": unfinished} for i, answer in enumerate(answers)]
    return AnsweredSet("lookalikes", rows, None, counts=COUNTS)


def content(row):
    return row["completion"][0]["content"]


SAFETY = [chat(f"harmful {i}", "No.") for i in range(12)]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.25, 0.5, 0.75])
def test_share_and_order(share):
    mixed = with_lookalikes(SAFETY, answered("One.", "Two."), share)
    assert [row for row in mixed if row in SAFETY] == SAFETY
    likes = [row for row in mixed if row not in SAFETY]
    assert len(likes) == int(len(SAFETY) * share / (1 - share) + 1e-6)
    assert [content(row) for row in likes] == (["One.", "Two."] * len(likes))[: len(likes)]
    # Spread evenly: every beginning has its share, to within a row.
    for end in range(1, len(mixed) + 1):
        assert abs(sum(row in likes for row in mixed[:end]) - share * end) <= 1
    assert all(row.keys() == {"prompt", "completion"} for row in mixed)


@pytest.mark.parametrize(
    ("answer", "ended"),
    [
        ("It is safe. You may go on and", "It is safe."),
        ("Why not? It costs 3.50 euros and", "Why not?"),
        ('He said "Stop!" and then', 'He said "Stop!"'),
        ("First.\n\nSecond (of two.) Third", "First.\n\nSecond (of two.)"),
        ("Whole. Sentences.", "Whole. Sentences."),
        ("可以。先关灯,再", "可以。"),
        ("他说“好！”然后", "他说“好！”"),
        ("大丈夫ですか？はい", "大丈夫ですか？"),
        ("यह सुरक्षित है। आप", "यह सुरक्षित है।"),
        ("1. Open it.\n2. Turn", "1. Open it."),
        ("Do this:\n\n- **1.** Open it.\n- **2.** Turn", "Do this:\n\n- **1.** Open it."),
        ("1. Open\n2. Close", None),
        ("<think>The user asks. Now", None),
        ("<think>The user asks.</think>It is safe. Now", "<think>The user asks.</think>It is safe."),
        ("e.g", None),
        ("No end", None),
    ],
)
def test_cut_answers_end_with_a_whole_sentence(answer, ended):
    mixed = with_lookalikes(SAFETY, answered(answer, "Other."), 0.25)
    answers = [content(row) for row in mixed if row not in SAFETY]
    assert answers[:2] == ([ended, "Other."] if ended else ["Other.", "Other."])
    finished = with_lookalikes(SAFETY, answered(answer, unfinished=False), 0.5)
    assert content(finished[1]) == answer


def test_answers_that_the_template_does_not_show_are_left_out():
    own = answered("One.", "Two.")
    own.dataset[0] |= {"ids": [1, 2], "answer_start": 1, "shown": False}
    assert [content(row) for row in with_lookalikes(SAFETY, own, 0.25) if row not in SAFETY] == ["Two."] * 4
    own.dataset = own.dataset[:1]
    with pytest.raises(ValueError, match=r"shows as the model wrote it.*enable_thinking"):
        with_lookalikes(SAFETY, own, 0.25)


def test_pairs_prefer_the_answer_to_a_refusal():
    """The refusal is that of the row before, or of the next row where the safe answer is one."""
    said = ["I can't help with 0.", "Here it is.", "Here, too.", "I can't help with 3.", "And here."]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"harmful {i}"}],
            "chosen": [{"role": "assistant", "content": text}],
            "rejected": "Sure.",
        }
        for i, text in enumerate(said)
    ]
    mixed = with_lookalikes(rows, answered("One.", "Two."), 0.5)
    assert mixed[::2] == rows
    assert [row["chosen"][0]["content"] for row in mixed[1::2]] == ["One.", "Two.", "One.", "Two.", "One."]
    assert [row["rejected"][0]["content"] for row in mixed[1::2]] == [said[i] for i in (0, 3, 3, 3, 0)]
    assert all(row["prompt"][0]["content"].startswith("look-alike") for row in mixed[1::2])
    with pytest.raises(ValueError, match="no chosen answer of the rows is one that the matcher knows"):
        with_lookalikes(rows[1:3], answered("One."), 0.5)


def test_the_built_in_pairs_reject_refusals_alone():
    mixed = with_lookalikes(pairs(), answered("One."))
    likes = [row for row in mixed if row["prompt"][0]["content"].startswith("look-alike")]
    assert len(likes) == 50
    assert {classify(row["rejected"][0]["content"]) for row in likes} == {Verdict.REFUSAL}


def test_columns_for_the_chat_template_are_kept():
    own = answered("One.")
    mixed = with_lookalikes([SAFETY[0] | {"tools": "[1]", "other": 1}, SAFETY[1]], own, 0.5)
    assert [row["tools"] for row in mixed] == ["[1]", None, None, None]
    assert Dataset.from_list(mixed)["tools"][0] == "[1]"
    assert mixed[0].keys() == mixed[1].keys() == {"prompt", "completion", "tools"}
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    rows = [row | thinking for row in SAFETY]
    with pytest.raises(
        ValueError, match=r"chat_template_kwargs has the keys \['enable_thinking'\] in one row and \[\]"
    ):
        with_lookalikes(rows, own, 0.5)
    with pytest.raises(ValueError, match="chat_template_kwargs has the keys"):
        with_lookalikes([rows[0], SAFETY[1]], own, 0.5)
    own.dataset[0] |= thinking
    mixed = with_lookalikes(rows, own, 0.5)
    assert all(row["chat_template_kwargs"] == {"enable_thinking": False} for row in mixed)


def test_messages():
    rows = [{"messages": row["prompt"] + row["completion"], "other": 1} for row in SAFETY]
    mixed = with_lookalikes(rows, answered("One."), 0.5)
    assert [message["role"] for message in mixed[1]["messages"]] == ["user", "assistant"]
    assert mixed[1]["messages"][1]["content"] == "One."
    assert mixed[0] == {"messages": rows[0]["messages"]}


def test_columns_without_a_value_are_no_columns():
    rows = [{"messages": row["prompt"] + row["completion"], "prompt": None, "completion": None} for row in SAFETY]
    mixed = with_lookalikes(rows, answered("One."), 0.5)
    assert mixed[0] == {"messages": rows[0]["messages"]}
    assert mixed[1].keys() == {"messages"}


@pytest.mark.parametrize("share", [0, 1, -0.1, "half"])
def test_shares_that_are_none(share):
    with pytest.raises(ValueError, match="share="):
        with_lookalikes(SAFETY, answered("One."), share)


def test_bad_rows():
    with pytest.raises(ValueError, match="rows is empty"):
        with_lookalikes([], answered("One."))
    with pytest.raises(ValueError, match=r"row 1 has the columns \['text'\]"):
        with_lookalikes([SAFETY[0], {"text": "x"}], answered("One."))
    with pytest.raises(ValueError, match="row 0 is plain text"):
        with_lookalikes([{"prompt": "Why?", "completion": "No."}], answered("One."), 0.5)
    mixed = [*SAFETY[:2], {"prompt": "Why?", "completion": "No."}]
    with pytest.raises(ValueError, match="row 2 is plain text, but the look-alikes are not"):
        with_lookalikes(mixed, answered("One."), 0.1)  # no look-alike is next to it
    with pytest.raises(ValueError, match="no answer in the reference set 'lookalikes' has a whole sentence"):
        with_lookalikes(SAFETY, answered("no end"))


def test_the_old_module_warns():
    import peft_ogpsa.references.lookalikes as lookalikes

    sys.modules.pop("peft_ogpsa.contrast", None)
    with pytest.warns(DeprecationWarning, match=r"moved to peft_ogpsa\.references\.lookalikes"):
        old = importlib.import_module("peft_ogpsa.contrast")
    assert old.with_contrast is lookalikes.with_contrast


def test_the_old_name_works_and_warns():
    with pytest.warns(DeprecationWarning, match="with_contrast is now with_lookalikes"):
        mixed = with_contrast(SAFETY, contrast=answered("One."), share=0.5)
    assert mixed == with_lookalikes(SAFETY, answered("One."), 0.5)
