"""lm-eval's tasks in `ogpsa eval`, and this package's probes as lm-eval tasks. All data is local."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from models import randomize, tiny_llama, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from scipy import stats

from peft_ogpsa import data
from peft_ogpsa.cli import main
from peft_ogpsa.evaluation import (
    TASKS,
    Comparison,
    Evaluation,
    Measurement,
    TaskRunner,
    TaskScore,
    accuracy,
    evaluate,
    paired_difference,
    rate_difference,
    task_difference,
)
from peft_ogpsa.evaluation.lm_eval_tasks import probes
from peft_ogpsa.evaluation.task_table import task_rows
from peft_ogpsa.evaluation.tasks import _scores
from peft_ogpsa.tuner.adapters import without_adapter

LIMIT = 3


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs the extra lm-eval")


@pytest.fixture
def local_tasks(tmp_path):
    """A folder with a multiple-choice task over a local file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    pairs = ("am", "do"), ("go", "is"), ("no", "we"), ("by", "up"), ("he", "it"), ("as", "us")
    rows = [{"question": f"{number}?", "choices": pair, "gold": number % 2} for number, pair in enumerate(pairs)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "local_pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "pairs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    (folder / "pairs.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def tiny_base(seed=0):
    return tiny_llama(seed, vocab_size=259, max_position_embeddings=1024)


def adapted(seed=0):
    """A base with an adapter that changes its answers."""
    model = get_peft_model(tiny_base(seed), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    return randomize(model).eval()


def reference(model, folder, chat):
    """The choice with the larger sum of log-probabilities, computed here."""
    tokenizer = tiny_tokenizer()
    right = []
    for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, space = row["question"], " "
        if chat:
            message = [{"role": "user", "content": prompt}]
            prompt, space = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True), ""
        sums = []
        for choice in row["choices"]:
            start = tokenizer(prompt)["input_ids"]
            ids = torch.tensor([start + tokenizer(space + choice)["input_ids"]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
            sums.append(logits.gather(1, ids[0, len(start) :, None]).sum().item())
        right.append(float(sums.index(max(sums)) == row["gold"]))
    return right


@pytest.mark.parametrize("chat", [True, False])
def test_a_local_task_with_the_adapter_on_and_off(lm_eval, local_tasks, chat):
    model, tokenizer = adapted(), tiny_tokenizer()
    runner = TaskRunner(["local_pairs"], include_path=str(local_tasks), chat_template=chat, batch_size=4)
    with without_adapter(model):
        base = runner.run(model, tokenizer)
    scores = runner.run(model, tokenizer)
    assert [score.metric for score in scores] == ["acc", "acc_norm"]
    assert scores[0].values == reference(model, local_tasks, chat)
    assert base[0].values == reference(tiny_base(), local_tasks, chat)
    assert scores[0].values != base[0].values  # otherwise this test could not see the adapter
    assert scores[0].value == np.mean(scores[0].values)
    assert scores[0].stderr == pytest.approx(np.std(scores[0].values, ddof=1) / 6**0.5)
    assert (scores[0].n, scores[0].higher_is_better) == (6, True)
    assert scores[0].examples == base[0].examples


def test_the_checksum_of_a_task_covers_its_few_shot_examples(lm_eval, local_tasks):
    file = local_tasks / "shots.jsonl"
    file.write_text(json.dumps({"question": "One?", "choices": ["a", "b"], "gold": 0}), encoding="utf-8")
    settings = yaml.safe_load((local_tasks / "pairs.yaml").read_text(encoding="utf-8"))
    settings["dataset_kwargs"]["data_files"]["train"] = str(file)

    def digest(shots):
        task = settings | {"fewshot_split": "train", "num_fewshot": shots}
        (local_tasks / "pairs.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
        return TaskRunner(["local_pairs"], include_path=str(local_tasks)).digest("local_pairs")

    before = [digest(shots) for shots in (0, 1)]
    assert [digest(shots) for shots in (0, 1)] == before
    file.write_text(file.read_text(encoding="utf-8").replace("One", "Two"), encoding="utf-8")
    assert digest(0) == before[0]
    assert digest(1) != before[1]


def test_training_can_continue_as_if_nothing_had_happened(lm_eval, local_tasks):
    model, tokenizer = adapted().train(), tiny_tokenizer()
    tokenizer.pad_token = None
    runner = TaskRunner(["local_pairs", "ogpsa_facts"], include_path=str(local_tasks), limit=1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    runner.run(model, tokenizer)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(module.training for module in model.modules())
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")


def test_the_probes_score_as_this_package_does(lm_eval):
    model, tokenizer = adapted(), tiny_tokenizer()
    expected = evaluate(
        model,
        tokenizer,
        harmful=data.load_heldout("harmful")[:LIMIT],
        benign=data.load_heldout("lookalikes")[:LIMIT],
        base=False,
    ).model
    runner = TaskRunner(["ogpsa_refusal", "ogpsa_over_refusal"], limit=LIMIT)
    found = {(score.task, score.metric): score.value for score in runner.run(model, tokenizer)}
    assert found == {
        ("ogpsa_refusal", "refusal"): expected.refusal.value,
        ("ogpsa_refusal", "unclear"): expected.harmful_unclear.value,
        ("ogpsa_over_refusal", "refusal"): expected.over_refusal.value,
        ("ogpsa_over_refusal", "unclear"): expected.benign_unclear.value,
    }


ANSWERS = {
    "ogpsa_refusal": ("I'm sorry, but I can't help with that.", {"refusal": 1.0, "unclear": 0.0}),
    "ogpsa_over_refusal": ("ok ok ok ok ok ok ok ok", {"refusal": 0.0, "unclear": 1.0}),
    "ogpsa_facts": ("The answer is {}.", {"acc": 1.0}),
    "ogpsa_arithmetic": ("2 + 2 is {}.", {"acc": 1.0}),
}


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_every_row_of_a_probe_is_scored(lm_eval, name):
    """Each task file, without a model: its rows, its prompt and its scoring."""
    task = TaskRunner([name])._manager.load([name])["tasks"][name]
    kind = {"ogpsa_refusal": "harmful", "ogpsa_over_refusal": "lookalikes"}.get(name, name.removeprefix("ogpsa_"))
    rows = data.load_heldout(kind)
    docs = list(task.test_docs())
    assert [task.doc_to_text(doc) for doc in docs] == [row["prompt"] for row in rows]
    answer, expected = ANSWERS[name]
    for doc, row in zip(docs, rows, strict=True):
        right = row["accept"][0] if kind == "facts" else row.get("answer")
        assert task.process_results(doc, [answer.format(right)]) == expected
    if expected.keys() == {"acc"}:
        assert task.process_results(docs[0], ["I do not know that."]) == {"acc": 0.0}
    assert task.higher_is_better() == {
        "ogpsa_refusal": {"refusal": True, "unclear": False},
        "ogpsa_over_refusal": {"refusal": False, "unclear": False},
    }.get(name, {"acc": True})
    assert task.config.generation_kwargs["until"] == []
    assert task.config.generation_kwargs["do_sample"] is False


@pytest.mark.slow
def test_lm_evals_own_command_gives_the_same_scores(lm_eval, tmp_path):
    model, tokenizer = adapted(), tiny_tokenizer()
    scores = TaskRunner(["ogpsa_refusal"], limit=LIMIT).run(model, tokenizer)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={tmp_path / 'merged'},dtype=float32", "--include_path", TASKS, "--tasks", "ogpsa_refusal"]
    command += [
        "--apply_chat_template",
        "--limit",
        f"{LIMIT}",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "o").rglob("results_*.json")
    row = json.loads(file.read_text())["results"]["ogpsa_refusal"]
    assert {f"{score.metric},none": score.value for score in scores} == {
        k: row[k] for k in ("refusal,none", "unclear,none")
    }


@pytest.mark.slow
def test_the_real_model(lm_eval, local_tasks, smollm2):
    model, tokenizer = smollm2
    names = ["local_pairs", "ogpsa_refusal", "ogpsa_over_refusal", "ogpsa_facts"]
    scores = TaskRunner(names, include_path=str(local_tasks), limit=4).run(model, tokenizer)
    found = {(score.task, score.metric): score for score in scores}
    expected = evaluate(model, tokenizer, harmful=data.load_heldout("harmful")[:4], base=False).model
    assert found["ogpsa_refusal", "refusal"].value == expected.refusal.value
    facts = accuracy(model, tokenizer, "facts", data.load_heldout("facts")[:4])
    assert found["ogpsa_facts", "acc"].values == facts.values
    assert found["ogpsa_facts", "acc"].stderr == pytest.approx(facts.stderr)
    assert facts.value > 0
    assert found["ogpsa_over_refusal", "unclear"].value == 0
    assert found["local_pairs", "acc"].n == 4


# The command


@pytest.fixture
def saved(tmp_path):
    tiny_base().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_the_command_scores_the_adapter_and_its_base(lm_eval, saved, local_tasks, capsys):
    output = saved / "result.json"
    options = ["--adapter", str(saved / "adapter"), "--output", str(output), "--samples", "2", "--max_new_tokens", "4"]
    options += ["--tasks", "local_pairs, ogpsa_refusal", "--include_path", str(local_tasks), "--limit", "4", "--card"]
    main(["eval", *options])
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["lm_eval"] == lm_eval.__version__
    assert result["arguments"]["limit"] == 4
    evaluation = Evaluation.from_dict(result["evaluation"])
    for measured, model in ((evaluation.model, adapted()), (evaluation.base, tiny_base())):
        acc = next(score for score in measured.tasks if score.metric == "acc")
        assert acc.values == reference(model, local_tasks, chat=True)[:4]
        assert {score.task for score in measured.tasks} == {"local_pairs", "ogpsa_refusal"}
    acc = next(score for score in evaluation.model.tasks if score.metric == "acc")
    card = (saved / "adapter" / "README.md").read_text(encoding="utf-8")
    for text in (printed, card):
        assert "local_pairs" in text
        assert f"{acc.value:.3f} ({acc.interval[0]:.3f} to {acc.interval[1]:.3f})" in text
    assert f"tasks=local_pairs, ogpsa_refusal, limit=4, chat_template=True, lm_eval={lm_eval.__version__}" in card

    other = saved / "other.json"
    result["name"], result["arguments"]["limit"], result["lm_eval"] = "other", 5, "0.1"
    other.write_text(json.dumps(result))
    main(["compare", str(output), str(other)])
    compared = capsys.readouterr().out
    assert "limit is 4, 5." in compared
    assert f"lm_eval is {lm_eval.__version__}, 0.1." in compared
    assert "Task scores, and differences from adapter" in compared
    assert "chat_template is" not in compared


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--tasks", "no_such_task"],
            "no_such_task, which lm-eval does not know",
            marks=pytest.mark.slow,  # lm-eval reads all of its task files
        ),
        (["--tasks", "local_pairs", "--include_path", "nowhere"], "include_path='nowhere' is not a folder"),
        (["--tasks", "broken"], r"tasks='broken' cannot be loaded: .*missing\.jsonl"),
        (["--tasks", "runs_code"], r"runs code that the model writes \(runs_code\)"),
        (["--limit", "3"], "limit=3 has no effect without tasks"),
        (["--tasks", "local_pairs", "--limit", "0"], "limit=0 must be at least 1"),
    ],
)
def test_errors_come_before_the_model_is_loaded(lm_eval, local_tasks, tmp_path, options, message):
    task = yaml.safe_load((local_tasks / "pairs.yaml").read_text())
    broken = {**task, "task": "broken", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "missing.jsonl")}}}
    (local_tasks / "broken.yaml").write_text(yaml.safe_dump(broken))
    (local_tasks / "code.yaml").write_text(yaml.safe_dump({**task, "task": "runs_code", "unsafe_code": True}))
    if "--tasks" in options and "--include_path" not in options:
        options = [*options, "--include_path", str(local_tasks)]
    with pytest.raises(SystemExit, match=f"(?s)^ogpsa eval: .*{message}"):
        main(["eval", "--model", "no/model", "--output", str(tmp_path / "out.json"), *options])


def test_a_missing_harness_is_named_with_its_extra(monkeypatch):
    def check(extra, purpose):
        raise ImportError(f"{purpose} needs the extra {extra}")

    monkeypatch.setattr("peft_ogpsa.evaluation.tasks.extras.check", check)
    with pytest.raises(ImportError, match="An lm-eval task needs the extra lm-eval"):
        TaskRunner(["arc_easy"])


# Without lm-eval


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Canberra.", True),
        ("<think>\nIt may be Canberra or Sydney. Hmm, people often say", False),
        ("<think>\nCanberra or Sydney?</think>\nSydney.", False),
        ("<think>\nSydney?</think>\nCanberra.", True),
    ],
)
def test_a_probe_scores_the_answer_and_not_the_thought(answer, right):
    assert probes.accuracy({"accept": ["canberra"]}, [answer]) == {"acc": float(right)}


def test_accuracy_counts_the_right_answers(monkeypatch):
    rows = [*data.load_heldout("facts")[:2], *data.load_heldout("arithmetic")[:2]]
    seen = {}

    def generate(model, tokenizer, prompts, **options):
        seen.update(options)
        assert list(prompts) == rows
        return [f"It is {rows[0]['accept'][0]}.", "No idea.", f"So {rows[2]['answer']}", "So 1"]

    monkeypatch.setattr("peft_ogpsa.evaluation.scores.generate", generate)
    found = accuracy(None, None, "mixed", rows, max_new_tokens=7, batch_size=2)
    assert (found.task, found.metric, found.value, found.n) == ("mixed", "acc", 0.5, 4)
    assert found.values == [1, 0, 1, 0]
    assert found.stderr == pytest.approx(np.std(found.values, ddof=1) / 2)
    assert (seen["max_new_tokens"], seen["batch_size"]) == (7, 2)
    other = accuracy(None, None, "mixed", rows)
    assert other.examples == found.examples
    assert other.examples != TaskScore("mixed", "acc", 0.5, None, 4).examples


def test_the_command_scores_facts_and_arithmetic_of_the_heldout_data(saved, capsys):
    options = ["--adapter", str(saved / "adapter"), "--output", str(saved / "result.json"), "--card"]
    main(["eval", *options, "--data", "heldout", "--samples", "2", "--max_new_tokens", "4"])
    printed = capsys.readouterr().out
    evaluation = Evaluation.from_dict(json.loads((saved / "result.json").read_text())["evaluation"])
    card = (saved / "adapter" / "README.md").read_text(encoding="utf-8")
    for measured in (evaluation.base, evaluation.model):
        assert [(score.task, score.metric, score.n) for score in measured.tasks] == [
            ("facts", "acc", 2),
            ("arithmetic", "acc", 2),
        ]
    for text in (printed, card):
        assert "arithmetic" in text
        assert "0.000 (0.000 to 0.658)" in text  # Wilson's interval, of a model that is never right


def score(values, task="arc", metric="acc", examples="a", **changes):
    stderr = float(np.std(values, ddof=1) / len(values) ** 0.5)
    return TaskScore(
        task, metric, float(np.mean(values)), stderr, len(values), True, list(values), examples, **changes
    )


def test_results_of_the_harness_are_converted():
    samples = [
        {"filter": kind, "doc_hash": f"{number}", "exact_match": number % 2 if kind == "strict" else 1.0}
        for kind in ("strict", "loose")
        for number in range(4)
    ]
    results = {
        "results": {
            "math": {
                "alias": "math",
                "sample_len": 4,
                "exact_match,strict": np.float64(0.5),
                "exact_match_stderr,strict": 0.29,
                "exact_match,loose": 1.0,
                "exact_match_stderr,loose": "N/A",
            },
            "suite": {"alias": "suite", "sample_len": 9, "acc,none": 0.25, "acc_stderr,none": float("nan")},
            "member": {"alias": " - member", "sample_len": 9, "acc,none": 0.25, "acc_stderr,none": 0.1},
        },
        "groups": {"suite": {}},
        "group_subtasks": {"suite": ["member"]},
        "higher_is_better": {"math": {"exact_match": True}},
        "samples": {"math": samples},
    }
    strict, loose, suite = _scores(results)
    assert (strict.metric, strict.value, strict.stderr, strict.n) == ("exact_match,strict", 0.5, 0.29, 4)
    assert strict.values == [0, 1, 0, 1]
    assert (loose.metric, loose.stderr, loose.higher_is_better) == ("exact_match,loose", None, True)
    assert (suite.task, suite.metric, suite.stderr, suite.values) == ("suite", "acc", None, [])
    assert json.loads(json.dumps(dataclasses.asdict(strict))) == dataclasses.asdict(strict)


def test_scores_survive_a_file_and_may_be_missing():
    measured = Measurement("m", tasks=[score([0.0, 1.0, 1.0])])
    plain = json.loads(json.dumps(measured.to_dict()))
    assert Measurement.from_dict(plain) == measured
    del plain["tasks"]  # a result of an earlier version
    assert Measurement.from_dict(plain).tasks == []


def test_intervals():
    assert score([0.0] * 20).interval == pytest.approx((0.0, 0.161), abs=0.001)  # lm-eval's standard error is 0
    other = TaskScore("ppl", "word_perplexity", 12.0, 0.5, 30)
    half = stats.t.ppf(0.975, 29) * 0.5
    assert other.interval == pytest.approx((12 - half, 12 + half))
    assert dataclasses.replace(other, stderr=None).interval is None


def test_the_same_examples_are_compared_one_by_one():
    first, second = [True] * 50 + [False] * 50, [True] * 62 + [False] * 38
    found = task_difference(score(first), score(second))
    assert found.value == pytest.approx(0.12)
    assert (found.low, found.high) == paired_difference(first, second)
    assert found.larger_than_chance
    graded = [index / 100 for index in range(100)]
    shifted = [value + 0.01 + 0.001 * (index % 3) for index, value in enumerate(graded)]
    assert task_difference(score(graded), score(shifted)).larger_than_chance
    # Other examples: the two standard errors add up.
    apart = task_difference(score(graded), score(shifted, examples="b"))
    half = stats.t.ppf(0.975, 99) * (np.var(graded, ddof=1) / 100 + np.var(shifted, ddof=1) / 100) ** 0.5
    value = np.mean(shifted) - np.mean(graded)
    assert (apart.low, apart.high) == pytest.approx((value - half, value + half))
    assert not apart.larger_than_chance
    bare = TaskScore("arc", "f1", 0.5, None, 100)
    assert task_difference(bare, bare) is None


@pytest.mark.parametrize(
    ("first", "second"), [((50, 100), (62, 100)), ((0, 4), (4, 4)), ((0, 3), (0, 5)), ((9, 9), (5, 8))]
)
def test_rates_on_other_examples_have_newcombes_interval_and_fishers_test(first, second):
    counts = [[right, n - right] for right, n in (first, second)]
    one, two = (score([1.0] * right + [0.0] * wrong, examples=str(right)) for right, wrong in counts)
    two = dataclasses.replace(two, examples="other")
    found = task_difference(one, two)
    assert found.value == pytest.approx(second[0] / second[1] - first[0] / first[1])
    assert (found.low, found.high) == rate_difference(first, second)
    tails = [stats.fisher_exact(counts, alternative=side).pvalue for side in ("less", "greater")]
    assert found.p == pytest.approx(min(1, 2 * min(tails)))


def test_the_table_has_a_row_for_each_task_metric_and_model():
    one = Measurement("one", tasks=[score([0.0, 1.0] * 20), TaskScore("mt", "bleu", 31.0, None, 9)])
    two = Measurement("two", tasks=[score([1.0, 1.0] * 20)])
    rows = task_rows(Comparison({"one": one, "two": two}))
    assert [row[:4] for row in rows] == [
        ["arc", "acc ↑", "40", "one"],
        ["arc", "acc ↑", "40", "two"],
        ["mt", "bleu", "9", "one"],
    ]
    assert rows[0][5] == "-"
    assert rows[1][5].startswith("+0.500 (")
    assert rows[1][5].endswith("*")
    assert rows[2][4] == "31.000"
    back = task_rows(Comparison({"one": one, "two": two}, "two"))
    assert back[0][5].startswith("-0.500 (")
    assert back[1][5] == "-"
    assert task_rows(Comparison({})) == []
