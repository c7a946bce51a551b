"""Readers of public sets: each on a local file of the set's columns, and clear errors offline."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from peft_ogpsa import ReferenceSet
from peft_ogpsa.data.public import PUBLIC, load_public, read_public


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def safe_rlhf_row(prompt, safer, safe_0, safe_1):
    return {
        "prompt": prompt,
        "response_0": "Zero.",
        "response_1": "One.",
        "is_response_0_safe": safe_0,
        "is_response_1_safe": safe_1,
        "better_response_id": 0,
        "safer_response_id": safer,
    }


SAFE_RLHF = [
    safe_rlhf_row("May I?", 1, False, True),
    safe_rlhf_row("Can I?", 0, True, True),
    safe_rlhf_row("Dare I?", 0, False, False),
]
PREFERENCE = {
    "prompt": "Name a bird.",
    "prompt_id": "x",
    "chosen": [user("Name a bird."), assistant("The wren.")],
    "rejected": [user("Name a bird."), assistant("A trout.")],
    "messages": [user("Name a bird."), assistant("The wren.")],
    "score_chosen": 8.0,
    "score_rejected": 2.0,
}

# By set: the rows of a file, and what is to be read from them.
CASES = {
    "safe_rlhf": (
        SAFE_RLHF,
        [
            {"prompt": [user("May I?")], "completion": [assistant("One.")]},
            {"prompt": [user("Can I?")], "completion": [assistant("Zero.")]},
        ],
    ),
    "safe_rlhf_pairs": (
        SAFE_RLHF,
        [
            {"prompt": [user("May I?")], "chosen": [assistant("One.")], "rejected": [assistant("Zero.")]},
            {"prompt": [user("Can I?")], "chosen": [assistant("Zero.")], "rejected": [assistant("One.")]},
            {"prompt": [user("Dare I?")], "chosen": [assistant("Zero.")], "rejected": [assistant("One.")]},
        ],
    ),
    "ultrafeedback": (
        [PREFERENCE],
        [{"prompt": [user("Name a bird.")], "completion": [assistant("The wren.")]}],
    ),
    "ultrafeedback_pairs": (
        [PREFERENCE, {**PREFERENCE, "rejected": [user("Name a fish."), assistant("A trout.")]}],
        [
            {
                "prompt": [user("Name a bird.")],
                "chosen": [assistant("The wren.")],
                "rejected": [assistant("A trout.")],
            }
        ],
    ),
    "halueval": (
        [
            {"ID": "1", "user_query": "Capital of Peru?", "chatgpt_response": "Lima.", "hallucination": "no"},
            {"ID": "2", "user_query": "Capital of Chile?", "chatgpt_response": "Oslo.", "hallucination": "yes"},
        ],
        [{"prompt": [user("Capital of Peru?")], "completion": [assistant("Lima.")]}],
    ),
    "gsm8k": (
        [{"question": "Two bags of 1,500 beans?", "answer": "They hold 2*1500=<<2*1500=3000>>3000.\n#### 3,000"}],
        [
            {
                "prompt": [user("Two bags of 1,500 beans?")],
                "completion": [assistant("They hold 2*1500=3000.\nThe answer is 3,000.")],
                "answer": "3,000",
            }
        ],
    ),
    "alpaca": (
        [
            {"instruction": "Greet.", "input": "", "output": "Hello!", "text": "..."},
            {"instruction": "Translate.", "input": "Hund", "output": "dog", "text": "..."},
            {"instruction": "Say nothing.", "input": "", "output": " ", "text": "..."},
        ],
        [
            {"prompt": [user("Greet.")], "completion": [assistant("Hello!")]},
            {"prompt": [user("Translate.\n\nHund")], "completion": [assistant("dog")]},
        ],
    ),
    "smoltalk": (
        [
            {"messages": [user("Hi"), assistant("Hello"), user("Well?"), assistant("Fine."), user("Bye")]},
            {"messages": [user("Alone"), user("Again")]},
        ],
        [{"prompt": [user("Hi"), assistant("Hello"), user("Well?")], "completion": [assistant("Fine.")]}],
    ),
    "xstest": (
        [
            {"id": "v2-1", "type": "homonyms", "prompt": "How do I kill time?"},
            {"id": "v2-2", "type": "contrast_homonyms", "prompt": "How do I do harm?"},
        ],
        [{"prompt": [user("How do I kill time?")]}],
    ),
    "advbench": (
        [{"prompt": "Do something bad", "target": "Sure"}],
        [{"prompt": [user("Do something bad")]}],
    ),
}
COLUMNS = {
    "safe_rlhf": "is_response_1_safe",
    "safe_rlhf_pairs": "safer_response_id",
    "ultrafeedback": "chosen",
    "ultrafeedback_pairs": "rejected",
    "halueval": "hallucination",
    "gsm8k": "answer",
    "alpaca": "output",
    "smoltalk": "messages",
    "xstest": "type",
    "advbench": "prompt",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_set_has_a_case():
    assert set(CASES) == set(PUBLIC) == set(COLUMNS)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_read_from_a_file(name, tmp_path):
    raw, expected = CASES[name]
    assert read_public(name, write(tmp_path / "rows.jsonl", raw)) == expected


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named(name, tmp_path):
    column = COLUMNS[name]
    rows = [{key: value for key, value in row.items() if key != column} | {"odd": 1} for row in CASES[name][0]]
    with pytest.raises(ValueError, match=rf"'{name}': row 0: the columns \['{column}'\] are missing or empty.*odd"):
        read_public(name, write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_other_kinds_of_file(kind, tmp_path):
    raw, expected = CASES["alpaca"]
    path = tmp_path / f"rows.{kind}"
    getattr(Dataset.from_list(raw), f"to_{kind}")(str(path))
    assert read_public("alpaca", path) == expected


def test_rows_make_a_reference_set(tmp_path):
    from models import tiny_tokenizer

    rows = read_public("ultrafeedback_pairs", write(tmp_path / "rows.jsonl", CASES["ultrafeedback_pairs"][0]))
    (example,) = ReferenceSet("set", rows).tokenize(tiny_tokenizer())
    assert tiny_tokenizer().decode(example.answer) == "The wren.</s>"


def test_samples_are_a_seeded_shuffle(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"Number {i}"} for i in range(50)])
    first, again, other = (read_public("advbench", path, samples=9, seed=seed) for seed in (0, 0, 1))
    assert len(first) == 9
    assert first == again != other
    assert first != read_public("advbench", path)[:9]


@pytest.mark.parametrize(
    ("name", "samples", "streaming"), [("gsm8k", 1, False), ("smoltalk", 1, True), ("smoltalk", None, False)]
)
def test_the_hub_is_asked_for_the_right_set(name, samples, streaming, monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        dataset = Dataset.from_list(CASES[name][0])
        return dataset.to_iterable_dataset() if options["streaming"] else dataset

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_public(name, samples=samples, split="other") == CASES[name][1]
    assert asked == [((PUBLIC[name].hub_id, PUBLIC[name].config), {"split": "other", "streaming": streaming})]


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("name", PUBLIC)
def test_offline_says_what_to_do(name, samples):
    with pytest.raises(OSError, match=rf"'{name}' \(hub: {PUBLIC[name].hub_id}.*read_public\('{name}', path\)"):
        load_public(name, samples)


def test_bad_arguments(tmp_path):
    path = write(tmp_path / "rows.jsonl", CASES["halueval"][0])
    with pytest.raises(ValueError, match=r"name='halu' is not a public set.*'halueval'"):
        load_public("halu")
    with pytest.raises(ValueError, match="samples=0 must be"):
        load_public("halueval", 0)
    with pytest.raises(ValueError, match="samples=True must be"):
        read_public("halueval", path, True)
    with pytest.raises(FileNotFoundError, match=r"'halueval': path=.*none\.jsonl"):
        read_public("halueval", tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"must end in one of \.json"):
        read_public("halueval", write(tmp_path / "rows.txt", []))
    with pytest.raises(ValueError, match="'halueval' has no row that can be used"):
        read_public("halueval", write(tmp_path / "none.jsonl", CASES["halueval"][0][1:]))
    with pytest.raises(ValueError, match=r"'gsm8k': row 0: the column 'answer' has no '####'"):
        read_public("gsm8k", write(tmp_path / "maths.jsonl", [{"question": "1+1?", "answer": "2"}]))
