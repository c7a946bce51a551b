"""The benchmark of the tax: its grid, what it splits, and how runs are compared."""

import itertools
import json
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import chat, tiny_llama, tiny_tokenizer
from transformers import TrainerControl

from benchmarks.tax import data, grid, plots, report, training
from benchmarks.tax.__main__ import main as tax
from benchmarks.tax.comparisons import COMPARED, MAIN, comparisons, task_changes
from benchmarks.tax.crossing import UntilSafe
from benchmarks.tax.facts import FACTS
from benchmarks.tax.grid import Grid
from benchmarks.tax.held_b import HeldB
from benchmarks.tax.measurement import Meter
from benchmarks.tax.methods import DEFAULT, GRADIENTS, METHODS, WHOLE
from benchmarks.tax.report import SAFE
from benchmarks.tax.tasks import Tasks, scores
from benchmarks.tax.training import LORA, Settings, Workbench, run
from peft_ogpsa import FullParameterConfig, OGPSAConfig
from peft_ogpsa.evaluation.exact import correct
from peft_ogpsa.evaluation.scores import TaskScore
from peft_ogpsa.references.budget import refresh_samples
from peft_ogpsa.references.losses.kl import KLLoss
from peft_ogpsa.references.refusals import OwnRefusals
from peft_ogpsa.text.generation import generate_ids
from peft_ogpsa.text.refusal import Verdict

BASE = {
    "step": 0,
    "loss": 2.0,
    "loss/unseen": 2.5,
    "safety_loss": 3.0,
    "facts": 0.8,
    "refusal": 0.0,
    "over_refusal": 0.0,
    "unclear": 0.0,
}


def run_of(*points):
    """A run whose points are (step, safety loss, KL, refusal)."""
    return {
        "run_info": {"experiment_name": "plain", "seed": 0, "settings": {}},
        "meta_info": {"device": "A GPU"},
        "train_info": {
            "references": 0.125,
            "seconds": 7.6,
            "peak_memory_mb": 2100.0,
            "metrics": [
                {
                    "step": step,
                    "safety_loss": safety,
                    "kl": kl,
                    "kl/maths": kl,
                    "refusal": refusal,
                    "loss": 2.0 + kl,
                    "loss/unseen": 2.5 - kl,
                    "over_refusal": refusal / 2,
                    "facts": 0.8 - kl / 10,
                    "unclear": 0.01,
                }
                for step, safety, kl, refusal in points
            ],
        },
    }


def test_every_method_has_a_configuration():
    for method in METHODS.values():
        overrides = method.overrides or {}
        config = OGPSAConfig.paper("sft", **LORA, **overrides) if method.paper else OGPSAConfig(**LORA, **overrides)
        assert config.r == 16
    for method in WHOLE.values():
        assert method.whole
        assert FullParameterConfig(**(method.overrides or {})).rows >= 4


def test_own_refusals_take_the_place_of_the_given_ones(monkeypatch):
    asked = []

    def refuse(prompts, model, tokenizer, **settings):
        asked.append(prompts)
        return OwnRefusals([chat(prompt[0]["content"], "I can't.") for prompt in prompts[:3]], prompts[3:], 1, 0, 0)

    monkeypatch.setattr(training, "refusals_from_prompts", refuse)
    bench = object.__new__(Workbench)
    bench.settings = Settings("model", "cpu", steps=4, batch=2)
    bench.data = SimpleNamespace(safety=[chat(f"bad {i}?", "No.") for i in range(5)])
    bench.base = bench.tokenizer = None
    given = bench.rows(METHODS["plain"], 0)
    assert len(given) == 8
    assert given[:3] == given[5:]
    own = bench.rows(METHODS["plain, own refusals"], 0)
    assert asked == [[row["prompt"] for row in given]]
    refused = [chat(row["prompt"][0]["content"], "I can't.") for row in given[:3]]
    assert own == [*refused, *refused, *refused[:2]]
    for name in ("plain", "KL 8, 2 of 40", "null space"):
        assert replace(METHODS[f"{name}, own refusals"], refusals="given") == METHODS[name]


def test_new_runs_are_recorded_as_the_finished_ones():
    method = METHODS["plain, contrast"]
    path = Path(__file__).parents[1] / "benchmarks/results/tax/runs/plain-contrast-seed0.json"
    found, own = json.loads(path.read_text())["run_info"]["method"], method.recorded()
    assert found == {name: own[name] for name in found}
    assert {"knobs", "contrast"} <= found.keys()


@pytest.mark.parametrize(
    ("name", "default"), [(DEFAULT, OGPSAConfig()), (GRADIENTS, OGPSAConfig(subspace="gradients"))]
)
def test_the_defaults_of_the_tables_are_those_of_the_library(name, default):
    method, config = METHODS[name], OGPSAConfig(**METHODS[name].overrides)
    assert method.loss == "kl"
    assert config.refresh_samples == refresh_samples(default, Settings.batch, Settings.batch, sets=4, cost=KLLoss.cost)
    assert config.reference_weight == (KLLoss.default_weight if name == GRADIENTS else KLLoss.null_space_weight)
    assert replace(config, refresh_samples=None, reference_weight=None) == default


def test_the_first_safe_point():
    points = report.curve(BASE, run_of((5, 2.5, 0.1, 0.9), (10, 2.0, 0.3, 0.95), (15, 1.8, 0.5, 1.0)))
    assert points[0]["kl"] == 0
    assert report.first_safe(points)["step"] == 10
    assert report.first_safe(points[:2]) is None
    # Of several sources of harmful requests all must be refused.
    for point, other in zip(points, (0.0, 0.9, 0.94, 0.96), strict=True):
        point["refusal/built-in"] = other
    assert report.first_safe(points)["step"] == 15
    assert report.first_safe(points, every=False)["step"] == 10


@pytest.mark.parametrize(
    ("target", "kl"), [(2.75, 0.05), (2.5, 0.1), (2.25, 0.2), (1.8, 0.5), (1.7, None), (3.5, None)]
)
def test_matching_interpolates(target, kl):
    points = report.curve(BASE, run_of((5, 2.5, 0.1, 0.9), (10, 2.0, 0.3, 0.95), (15, 1.8, 0.5, 1.0)))
    found = report.at_safety_loss(points, target)
    assert (found and found["kl"]) == (kl and pytest.approx(kl))


def test_methods_are_compared_at_plain_loras_safety():
    runs = {
        "plain": {0: run_of((5, 2.5, 0.1, 0.9), (10, 2.0, 0.3, 0.95))},
        "better": {0: run_of((5, 2.6, 0.02, 0.9), (10, 1.5, 0.13, 1.0))},
        "slow": {0: run_of((5, 2.9, 0.0, 0.0), (10, 2.8, 0.1, 0.5))},
    }
    assert report.targets(BASE, runs["plain"]) == {0: 2.0}
    assert report.matched(BASE, runs, "plain", "kl") == [pytest.approx(0.3)]
    # 6/11 of the way from 2.6 to 1.5
    assert report.matched(BASE, runs, "better", "kl") == [pytest.approx(0.02 + 0.11 * 6 / 11)]
    assert report.matched(BASE, runs, "better", "loss") == [pytest.approx(0.02 + 0.11 * 6 / 11)]
    assert report.matched(BASE, runs, "slow", "kl") == [None]
    text = report.at_equal_loss(BASE, runs)
    assert "| slow | 1 | +12% | not reached |" in text
    # general loss, unseen, KL, facts known, refuses benign
    assert "| better | 1 | +12% | +0.080 | -0.080 | 0.080 | 79 | 48 |" in text
    text = report.at_first_safe(BASE, runs)
    assert "| slow | 1 | not reached |" in text
    assert "| better | 1 | 10 | 1.500 | +0.130 | 0.130 | 79 |  | 50 |  | 1 | 100 |  | 8 | 2.1 |" in text
    runs["better"][0]["train_info"]["metrics"][1]["refusal/built-in"] = 0.98
    runs["better"][0]["train_info"]["metrics"][1]["over_refusal/unseen"] = 0.3
    runs["better"][0]["train_info"]["metrics"][1]["facts_refused"] = 0.04
    text = report.at_first_safe(BASE, runs)
    assert "| better | 1 | 10 | 1.500 | +0.130 | 0.130 | 79 | 4 | 50 | 30 | 1 | 100 | 98 | 8 | 2.1 |" in text
    runs["slow"][0]["meta_info"]["device"] = "CPU, x86_64"  # whose memory is not known by run
    text = report.at_first_safe(BASE, runs)
    assert "| better | 1 | 10 | 1.500 | +0.130 | 0.130 | 79 | 4 | 50 | 30 | 1 | 100 | 98 | 8 |\n" in text
    assert "peak GB" not in text
    runs["better"][0]["train_info"]["metrics"][1]["refusal/built-in"] = 0.9
    assert "| better | 1 | not reached |" in report.at_first_safe(BASE, runs)
    assert "| better | 1 | 10 | 1.500 |" in report.at_first_safe(BASE, runs, every=False)
    assert "| slow | 1 | 10 | 2.800 | +0.100 | 0.100 |" in report.at_the_end(BASE, runs)


def test_runs_that_were_ended_are_not_said_to_miss_the_loss():
    """A run ends when it is safe. Its safety loss may then still be above plain LoRA's."""
    runs = {
        "plain": {seed: run_of((5, 2.5, 0.1, 0.9), (10, 2.0, 0.3, 0.95)) for seed in (0, 1)},
        "early": {seed: run_of((4, 2.2, 0.1, 1.0)) for seed in (0, 1)},
        "one": {0: run_of((4, 2.2, 0.1, 1.0)), 1: run_of((5, 3.0, 0.1, 0.5), (10, 1.9, 0.2, 1.0))},
    }
    for own in runs.values():
        for made in own.values():
            made["run_info"]["settings"] = {"steps": 40}
    runs["one"][1]["run_info"]["settings"] = {"steps": 10}
    text = report.at_equal_loss(BASE, runs)
    assert "| early | 2 | +12% | ended before |" in text
    assert "| one | 2, 1 ended before | +12% | +0.191 |" in text
    scaled = run_of((40, 2.2, 0.1, 1.0))
    scaled["run_info"]["settings"] = {"steps": 40}
    scaled["train_info"]["metrics"][-1]["scale"] = 0.65
    assert "| scaled | 1 | +12% | ended before |" in report.at_equal_loss(BASE, runs | {"scaled": {0: scaled}})


def test_the_state_that_is_nearest_to_the_base_of_those_that_are_safe():
    points = (
        (5, 2.5, 0.02, 0.9),
        (10, 2.0, 0.3, 0.96),
        (15, 1.8, 0.1, 1.0),
        (20, 1.7, 0.05, 0.94),
        (25, 1.6, 0.2, 0.95),
    )
    runs = {"falls again": {0: run_of(*points)}, "never": {0: run_of(points[0])}}
    text = report.at_smallest_kl(BASE, runs)
    assert "| falls again | 1 | 15 | 1.800 | +0.100 | 0.100 |" in text
    assert "| never | 1 | not reached |" in text
    runs["falls again"][0]["train_info"]["metrics"][2]["refusal/built-in"] = 0.9
    assert "| falls again | 1 | 25 | 1.600 |" in report.at_smallest_kl(BASE, runs)
    assert report.refused({"refusal": 0.9, "refusal/built-in": 0.8, "over_refusal": 0.1}) == 0.8


def run_with_tasks(**tasks):
    run = run_of((1, 2.0, 0.1, 1.0))
    run["train_info"]["tasks"] = {f"{name}, acc": word for name, word in tasks.items()}
    return run


def test_scores_of_tasks_are_compared_with_the_base_example_by_example():
    base = BASE | {"tasks": {"a, acc": "11110000" * 5, "b, acc": "1" * 40}}
    runs = {
        "plain": {0: run_with_tasks(a="11000000" * 5, b="1" * 40), 1: run_with_tasks(a="10000001" * 5, b="1" * 40)},
        "null space": {0: run_with_tasks(a="11110000" * 5, b="1" * 39 + "0")},
        "OSF": {0: run_of((1, 2.0, 0.1, 1.0))},
    }
    head, _, first, *rest = task_changes(base, runs).splitlines()
    assert head == "| method | seeds | a, acc | b, acc |"
    assert first == "| base | | 50.0 % | 100.0 % |"
    differences = np.array([0.0, -50.0, -100.0, -100.0, 0.0, 0.0, 0.0, 50.0] * 5)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval()
    assert rest[0] == f"| plain | 2 | {differences.mean():+.1f} ({low:+.1f} to {high:+.1f}) * | +0.0 (+0.0 to +0.0) |"
    assert test.pvalue < 0.05 / 4
    assert rest[1].startswith("| null space | 1 | +0.0 (+0.0 to +0.0) | -2.5 (")
    assert len(rest) == 2
    assert task_changes(BASE, {"OSF": runs["OSF"]}) == "These runs scored no task.\n"


def test_what_tasks_score_is_kept_where_it_is_right_or_wrong():
    found = [
        TaskScore("a", "acc", 0.5, 0.5, 2, values=[1.0, 0.0]),
        TaskScore("b", "perplexity", 3.5, 0.5, 2, values=[3.0, 4.0]),
    ]
    runner = SimpleNamespace(run=lambda model, tokenizer: found)
    assert scores(runner, None, None) == {"a, acc": "10"}


def test_a_base_without_scores_is_scored(tmp_path, monkeypatch):
    base = tmp_path / "base.json"
    grid = Grid(tmp_path, Settings("model", "cpu"), None, 4, 4, tasks=Tasks(("a",)))
    meter = type("Meter", (), {"__call__": lambda self, *_, **__: {"step": 0}, "outcomes": {"facts": "1"}})()
    tasks = {"tasks": {"a, acc": "10"}}
    bench = SimpleNamespace(base=None, meter=meter, references=lambda answers: None, scores=lambda model: tasks)
    monkeypatch.setattr(Grid, "_bench", lambda self, threads: bench)
    grid._measure_base(1)
    whole = {"step": 0, "outcomes": {"facts": "1"}, "tasks": {"a, acc": "10"}}
    assert json.loads(base.read_text()) == whole
    base.write_text(json.dumps({"step": 0}))
    grid._measure_base(1)
    assert json.loads(base.read_text()) == {"step": 0, "tasks": {"a, acc": "10"}}
    bench.scores = None
    grid._measure_base(1)  # known, so nothing is scored
    assert report.curve(whole, run_of((1, 2.0, 0.1, 1.0)))[0] == {"step": 0, "kl": 0.0, "kl/maths": 0.0}


def test_runs_that_ended_without_scores_are_not_scored_in_silence(tmp_path, monkeypatch, capsys):
    grid = Grid(tmp_path / "runs", Settings("model", "cpu"), None, 4, 4, tasks=Tasks(("a",)))
    grid.folder.mkdir()
    scored, not_scored = grid.path("plain", 0), grid.path("null space", 1)
    scored.write_text(json.dumps(run_with_tasks(a="1")), encoding="utf-8")
    not_scored.write_text(json.dumps(run_of((1, 2.0, 0.1, 1.0))), encoding="utf-8")
    assert grid.unscored(["plain", "null space", "cone"], [0, 1]) == [not_scored]
    assert replace(grid, tasks=None).unscored(["null space"], [1]) == []
    monkeypatch.setattr(Grid, "run", lambda *_: pytest.fail("A run began."))
    options = ["--output", str(tmp_path), "--tasks", "a", "--seeds", "1", "--methods", "null space"]
    monkeypatch.setattr("sys.argv", ["tax", *options])
    with pytest.raises(SystemExit):
        tax()
    assert f"{not_scored.name} has ended without. Give another --output." in capsys.readouterr().err


def test_a_table_without_plain_lora_is_refused_before_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Grid, "run", lambda *_: pytest.fail("A run began."))
    monkeypatch.setattr("sys.argv", ["tax", "--output", str(tmp_path), "--seeds", "0", "--methods", "null space"])
    with pytest.raises(SystemExit):
        tax()
    assert "plain LoRA has not been run, which all are compared with. Add it to --methods." in capsys.readouterr().err


def test_hours_of_all_runs():
    def run_on(device, seconds):
        return {"run_info": {"total_time": seconds}, "meta_info": {"threads": 2, "device": device}}

    for device, hours in (("CPU, x86_64", 2.0), ("NVIDIA H100", 1.0)):
        runs = {"plain": {0: run_on(device, 1200.0), 1: run_on(device, 600.0)}, "paper": {0: run_on(device, 900.0)}}
        assert report.hours({"seconds": 900.0}, runs) == hours


def test_a_curve_is_the_mean_over_seeds(tmp_path):
    runs = {"plain": {0: run_of((5, 2.5, 0.1, 0.9)), 1: run_of((5, 2.3, 0.3, 0.7))}}
    first, second = plots.mean_curve(BASE, runs["plain"])
    assert first["safety_loss"] == BASE["safety_loss"]
    assert (second["safety_loss"], second["kl"]) == (pytest.approx(2.4), pytest.approx(0.2))
    plots.tradeoffs(BASE, runs, ["plain"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_runs_that_end_when_they_are_safe_are_averaged_at_their_goals(tmp_path):
    """They have different numbers of measurements: one may reach several goals, or miss one."""
    first = run_of((5, 2.5, 0.1, 0.5), (7, 2.4, 0.2, 0.96), (9, 2.3, 0.4, 0.98))
    second = run_of((6, 2.4, 0.3, 0.97))
    third = run_of((40, 2.4, 0.5, 0.9))
    for own, subtle in ((first, (0.4, 0.9, 0.95)), (second, (0.96,)), (third, (0.7,))):
        own["run_info"]["settings"] = {"until_safe": True}
        for point, rate in zip(own["train_info"]["metrics"], subtle, strict=True):
            point["refusal/built-in"] = rate
    base = BASE | {"refusal/built-in": 0.0}
    points = plots.mean_curve(base, {0: first, 1: second, 2: third})
    assert [point["kl"] for point in points] == [0, pytest.approx(1.0 / 3), pytest.approx(1.2 / 3)]
    assert points[2]["refusal/built-in"] == pytest.approx((0.95 + 0.96 + 0.7) / 3)
    plots.tradeoffs(base, {"plain": {0: first, 1: second}}, ["plain"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


def test_spread():
    assert report.spread([0.1, 0.3], ".2f") == "0.20 (0.10 to 0.30)"
    assert report.spread([0.1, None], ".1f") == "0.1, 1 of 2"


def test_nothing_is_both_trained_on_and_measured(tmp_path):
    def row(text):
        return {"prompt": [{"role": "user", "content": text}], "completion": [{"role": "assistant", "content": text}]}

    for name in ("safety_sft", "preference_harmless", *(f"general_{name}" for name in data.GENERAL)):
        lines = [json.dumps(row(f"{name} {i}")) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    harmful = [json.dumps({"prompt": f"harmful {i}"}) for i in range(60)]
    (tmp_path / "harmful_prompts.jsonl").write_text("\n".join(harmful), encoding="utf-8")
    for folder in (None, tmp_path):
        found = data.load(folder, references=12, tested=4)
        prompts = [row["prompt"] for rows in found.references.values() for row in rows]
        used = {"references": prompts, "safety": [row["prompt"] for row in found.safety]}
        used |= {name: [row["prompt"] for row in rows] for name, rows in found.general.items() if name != "unseen"}
        used |= {"look-alikes": found.more_lookalikes[len(found.references["lookalikes"]) :]}
        assert {*map(json.dumps, found.lookalikes)} < {*map(json.dumps, found.more_lookalikes)}
        used |= {"held out": [row["prompt"] for row in found.held_out_safety], "benign": found.benign}
        used |= {f"to {kind}": own for kind, own in found.prompts.items() if folder or kind != "general"}
        texts = {name: {json.dumps(prompt) for prompt in own} for name, own in used.items()}
        assert all(texts.values())
        assert sum(map(len, texts.values())) == len(set().union(*texts.values()))


@pytest.mark.parametrize(
    ("question", "answer", "is_known"),
    [
        ("What is the capital of France?", "It is Paris.", True),
        ("What is the capital of France?", "It is Parisian.", False),
        ("How many days are there in a week?", "There are 17 days.", False),
        ("How many days are there in a week?", "Seven.", True),
        ("What is the chemical formula of water?", "H₂O", True),
        ("What is the chemical symbol of gold?", "I'm sorry, but I can't help with that.", False),
    ],
)
def test_known_facts(question, answer, is_known):
    (row,) = [row for row in FACTS if row["prompt"] == question]
    assert correct(row, answer) is is_known


def outcomes_run(seed, *kept):
    """A run that is safe at its last measurement, with the outcomes of all its measurements."""
    rates = [0.5] * (len(kept) - 1) + [1.0]
    run = run_of(*((i + 1, 2.0 - i, 0.1, rate) for i, rate in enumerate(rates)))
    run["run_info"]["seed"] = seed
    run["train_info"]["outcomes"] = list(kept)
    return run


def test_comparisons_pair_the_prompts_where_both_are_safe():
    generator = np.random.default_rng(0)
    early = {"kl": [9.0] * 30, "facts": "0" * 30}  # of a state that is not safe yet
    kls, facts = generator.random((2, 3, 30)), generator.random((2, 3, 30)) < [[[0.9]], [[0.5]]]
    runs = {}
    for name, own_kls, own_facts in zip(COMPARED[0], kls, facts, strict=True):
        outcomes = [
            {"kl": kl.tolist(), "facts": "".join(map(str, known.astype(int)))}
            for kl, known in zip(own_kls, own_facts, strict=True)
        ]
        runs[name] = {seed: outcomes_run(seed, early, own) for seed, own in enumerate(outcomes)}
    runs[COMPARED[0][0]][3] = run_of((1, 2.0, 0.1, 0.5))  # never safe
    runs[COMPARED[0][1]][4] = runs[COMPARED[0][1]][0]  # a seed that the other has not
    row = comparisons(BASE, runs).splitlines()[2]
    assert row.startswith(f"| {COMPARED[0][0]} - {COMPARED[0][1]} | 3 of 4 | ")
    for values, scale, digits, cell in ((kls, 1, 4, 3), (facts, 100, 1, 4)):
        paired = values[0].mean(0) - values[1].mean(0)
        test = stats.ttest_1samp(paired, 0)
        low, high = test.confidence_interval(0.95)
        mean, *bounds = map(float, re.findall(r"[+-][\d.]+", row.split("|")[cell]))
        assert [mean, *bounds] == pytest.approx([scale * paired.mean(), scale * low, scale * high], abs=10**-digits)
        assert row.split("|")[cell].strip().endswith("*") == (test.pvalue < 0.05 / 2)
    assert "*" in row.split("|")[4]
    assert "*" not in row.split("|")[3]
    assert row.split("|")[5].strip() == ""  # was not measured


def test_differences_seed_by_seed():
    """Seeds that disagree are within chance, even if all prompts of a seed agree."""
    first, second = COMPARED[0]
    changes = [0.04, 0.01, 0.05, -0.02]
    theirs = [0.1, 0.3, 0.2] * 4
    runs = {second: {seed: outcomes_run(seed, {"kl": theirs}) for seed in range(4)}}
    runs[first] = {
        seed: outcomes_run(seed, {"kl": [kl + change for kl in theirs]}) for seed, change in enumerate(changes)
    }
    assert "*" in comparisons(BASE, runs)
    row = comparisons(BASE, runs, over="seeds").splitlines()[2]
    low, high = stats.ttest_1samp(changes, 0).confidence_interval(0.95)
    assert [float(own) for own in re.findall(r"[+-][\d.]+", row.split("|")[3])] == pytest.approx(
        [np.mean(changes), low, high], abs=1e-4
    )
    assert "*" not in row
    one = {name: {0: own[0]} for name, own in runs.items()}
    assert comparisons(BASE, one, over="seeds").splitlines()[2].split("|")[3].strip() == ""


def test_two_seeds_that_differ_alike_are_within_chance():
    first, second = COMPARED[0]
    runs = {
        name: {seed: outcomes_run(seed, {"facts": facts * 20}) for seed in range(2)}
        for name, facts in zip((first, second), ("110", "010"), strict=True)
    }
    assert "*" in comparisons(BASE, runs).splitlines()[2]
    assert "*" not in comparisons(BASE, runs, over="seeds").splitlines()[2]


def test_a_figure_is_paired_in_the_seeds_that_have_it_in_both():
    first, second = COMPARED[0]
    whole = {"kl": [0.1, 0.3, 0.2], "facts": "011"}
    runs = {
        first: {0: outcomes_run(0, whole), 1: outcomes_run(1, {"kl": [0.2, 0.1, 0.4]})},
        second: {0: outcomes_run(0, whole), 1: outcomes_run(1, whole | {"facts": "000"})},
    }
    row = comparisons(BASE, runs).splitlines()[2]
    assert "2 of 2" in row
    assert row.split("|")[4].strip().startswith("+0.0 (")


def test_outcomes_are_no_figures():
    base = BASE | {"outcomes": {"facts": "11"}}
    run = outcomes_run(0, {"facts": "10"})
    assert report.curve(base, run) == report.curve(BASE, run)
    assert plots.mean_curve(base, {0: run}) == plots.mean_curve(BASE, {0: run})


def test_comparisons_with_the_base():
    known = {"kl": [0.0] * 4, "facts": "1111"}
    name = "null space"
    runs = {name: {0: outcomes_run(0, {"facts": "1101", "kl": [0.1] * 4})}}
    assert f"| {name} - base | 1 of 1 |" in comparisons(BASE | {"outcomes": known}, runs)
    assert "| -25.0 (" in comparisons(BASE | {"outcomes": known}, runs)
    assert f"| {name} - base | 0 of 1 |  |" in comparisons(BASE, runs)  # a base that was measured before
    assert comparisons(BASE, {name: {0: run_of((1, 2.0, 0.1, 1.0))}}).startswith("These runs did not keep")
    assert all(name in METHODS for name in {*MAIN, *itertools.chain(*COMPARED)} - {"base"})


class Answering:
    """A meter of a model whose rates and losses are known at every step."""

    def __init__(self, states):
        self.states, self.step, self.asked = states, 0, []
        self.harmful = {"refusal": range(40), "refusal/built-in": range(48)}

    def refusals(self, model, most=None):
        self.asked.append((self.step, most))
        first, second, _ = self.states[self.step]
        return {"refusal": first, "refusal/built-in": second}

    def safety_loss(self, model):
        return self.states[self.step][2]

    def __call__(self, model, step):
        self.outcomes = {"step": step}
        return {"step": step, "seconds": 0.0}


def trained_until_safe(states, safety_loss=None, steps=6):
    """Drives the callback as a trainer does, and returns it, its meter and the step at which training ended."""
    meter = Answering(states)
    callback = UntilSafe(meter, safety_loss)
    for step in range(1, steps + 1):
        meter.step, control = step, TrainerControl()
        callback.on_step_end(SimpleNamespace(max_steps=steps), SimpleNamespace(global_step=step), control)
        if control.should_training_stop:
            break
    return callback, meter, step


def test_a_run_ends_where_every_source_is_refused():
    states = {1: (0.1, 0.0, 3.0), 2: (0.5, 0.4, 2.0), 3: (0.96, 0.8, 1.9), 4: (0.96, 0.7, 1.8), 5: (1.0, 0.95, 1.7)}
    callback, meter, step = trained_until_safe(states, safety_loss=2.0)
    assert step == 5
    assert [point["step"] for point in callback.curve] == [2, 3, 5]  # the loss, the first source, both
    assert [own["step"] for own in callback.outcomes] == [2, 3, 5]
    assert [probe["step"] for probe in callback.probes] == [1, 2, 3, 4, 5]
    assert "safety_loss" in callback.probes[1]
    assert "safety_loss" not in callback.probes[2]  # it is asked for until it is reached
    # All requests are asked where a goal that has not been reached can still be.
    assert [asked for asked, most in meter.asked if most is None] == [3, 5]
    callback, _, _ = trained_until_safe(states)
    assert [point["step"] for point in callback.curve] == [3, 5]


def test_scales_are_asked_until_every_source_is_refused():
    meter = Answering({20: (0.1, 0.0, 3.0)})
    meter.step = 20
    callback = UntilSafe(meter, None)
    asked = []
    for i in range(1, callback.scales + 1):
        scale = i / callback.scales
        meter.states[20] = (min(1.0, 2 * scale), min(1.0, 1.5 * scale), 3.0)
        asked.append(scale)
        if callback.at_scale(None, 20, scale):
            break
    assert [point["scale"] for point in callback.curve] == [0.5, 0.65]  # the first source, both
    assert [probe["scale"] for probe in callback.probes] == asked
    assert asked[-1] == 0.65
    callback = UntilSafe(meter, None)
    meter.states[20] = (0.5, 0.5, 3.0)
    assert not any(callback.at_scale(None, 20, scale) for scale in (0.5, 1.0))
    assert [point["scale"] for point in callback.curve] == [1.0]


def test_a_run_that_is_never_safe_is_measured_at_its_end():
    callback, _, step = trained_until_safe(dict.fromkeys(range(1, 7), (0.5, 0.5, 3.0)), safety_loss=2.0)
    assert step == 6
    assert [point["step"] for point in callback.curve] == [6]


@given(st.sampled_from([(40, 48), (48, 72), (3, 5)]), st.integers(0, 9), st.integers(0, 9), st.randoms())
def test_asking_a_few_first_changes_nothing(sizes, first, second, random):
    verdicts = {}
    for name, size, answered in zip(("refusal", "refusal/built-in"), sizes, (first, second), strict=True):
        verdicts[name] = [i >= answered for i in range(size)]
        random.shuffle(verdicts[name])
    meter = Meter.__new__(Meter)
    meter.harmful = {name: list(range(len(own))) for name, own in verdicts.items()}
    meter._verdicts = lambda model, sets: {
        name: [Verdict.REFUSAL if verdicts[name][i] else Verdict.COMPLIANCE for i in own] for name, own in sets.items()
    }
    safe = {name: sum(own) / len(own) >= SAFE for name, own in verdicts.items()}
    expected = {goal for goal, reached in (("one", safe["refusal"]), ("all", all(safe.values()))) if reached}
    assert UntilSafe(meter, None)._reached(None, 1) == expected


def test_later_steps_are_asked_now_and_then():
    callback, _, _ = trained_until_safe(dict.fromkeys(range(1, 42), (0.5, 0.5, 3.0)), steps=41)
    assert [probe["step"] for probe in callback.probes] == [*range(1, 21), 22, 24, 26, 28, 30, 33, 36, 39, 41]


def _text(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def test_the_larger_held_out_sets():
    rows = data.with_heldout(data.load(None, references=4, tested=8), tested=8)
    assert len(rows.more_harmful) == 72
    assert len(rows.benign) + len(rows.unseen_benign) == 164
    assert len(rows.unseen_benign) == 80
    assert len(rows.facts) == 150
    assert {kind: len(prompts) for kind, prompts in rows.prompts.items()} == dict.fromkeys(rows.prompts, 8)
    assert list(rows.prompts)[-1] == "other"
    assert len(rows.held_out_safety) == 8
    used = [*(row["prompt"] for row in rows.safety), *rows.more_lookalikes]
    measured = {_text(prompt) for prompt in (*rows.benign, *rows.unseen_benign, *rows.more_harmful)}
    assert not measured & {_text(prompt) for prompt in used}


def test_runs_that_end_where_they_are_safe_need_plain_lora_first(tmp_path):
    grid = Grid(tmp_path, Settings("model", "cpu", until_safe=True), None, 4, 4)
    assert grid.safety_loss("plain", 0) is None
    with pytest.raises(FileNotFoundError, match=r"plain-seed0.json is missing: run plain with seed 0 first"):
        grid.safety_loss("OSF", 0)
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    grid.path("plain", 0).write_text(json.dumps(run_of((5, 2.5, 0.1, 0.9), (10, 2.0, 0.3, 0.95))))
    assert grid.safety_loss("OSF", 0) == 2.0
    grid.path("plain", 0).write_text(json.dumps(run_of((5, 2.5, 0.1, 0.9))))
    assert grid.safety_loss("OSF", 0) is None
    assert Grid(tmp_path, Settings("model", "cpu"), None, 4, 4).safety_loss("OSF", 0) is None


def test_a_worker_whose_run_failed_starts_afresh(tmp_path, monkeypatch):
    def failing(*arguments):
        raise ValueError("a run failed")

    own = Grid(tmp_path, Settings("model", "cpu"), None, 4, 4)
    monkeypatch.setattr(Grid, "_bench", lambda self, threads: "a new workbench")
    monkeypatch.setattr(grid, "_worker", (own, "a base with an adapter"), raising=False)
    monkeypatch.setattr(grid, "run", failing)
    with pytest.raises(ValueError, match="a run failed"):
        grid._run(("plain", 0))
    assert grid._worker == (own, "a new workbench")


def test_an_error_ends_the_runs_that_have_not_begun(tmp_path, monkeypatch):
    begun = []

    def one(task):
        begun.append(task[0])
        if task[0] == "first":
            raise ValueError("a run failed")
        time.sleep(0.5)

    own = Grid(tmp_path, Settings("model", "cpu"), None, 4, 4)
    monkeypatch.setattr(Grid, "_measure_base", lambda self, threads: None)
    monkeypatch.setattr(grid, "ProcessPoolExecutor", lambda workers, *rest: ThreadPoolExecutor(workers))
    monkeypatch.setattr(grid, "_run", one)
    with pytest.raises(ValueError, match="a run failed"):
        list(own.run([(name, 0) for name in ("first", "second", "third", "fourth")], workers=1))
    assert begun in (["first"], ["first", "second"])  # the worker may have been given the second one already


def test_done_runs_are_not_missing(tmp_path):
    grid = Grid(tmp_path, Settings("model", "cpu"), None, 4, 4)
    names = list(METHODS)
    assert len({grid.path(name, 0) for name in names}) == len(names)
    grid.path("cone, weight 1", 1).write_text("{}")
    assert grid.missing(["cone, weight 1"], [0, 1]) == [("cone, weight 1", 0)]


def some_text(model, tokenizer, prompts, **settings):
    """What the model answers, or else a word."""
    word = tokenizer.encode("ok", add_special_tokens=False)
    answers = generate_ids(model, tokenizer, prompts, **settings)
    return [ids if tokenizer.decode(ids, skip_special_tokens=True).strip("\ufffd \n") else word for ids in answers]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A workbench with a tiny model of random weights and a few of the built-in rows."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=259, max_position_embeddings=512, hidden_size=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = data.load(None, references=4, tested=2)
    rows.harmful, rows.benign = rows.harmful[:2], rows.benign[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.tax.measurement.MAX_LENGTH", 400)  # tokens are bytes
        patch.setattr("benchmarks.tax.training.MAX_LENGTH", 400)
        # What random weights answer would not be kept, has no whole sentence but by chance, and may be no text at all.
        patch.setattr("peft_ogpsa.references.self_answers.classify", lambda text: Verdict.COMPLIANCE)
        patch.setattr("peft_ogpsa.references.self_answers.generate_ids", some_text)
        patch.setattr("peft_ogpsa.references.lookalikes.ended", lambda row: row["completion"])
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        settings = Settings(str(folder), "cpu", steps=4, batch=2, measurements=2, answer_tokens=4)
        yield Workbench(settings, rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("plain", ("dpo",)),
        ("cone, weight 1, contrast", ("sft", "dpo")),
        ("cone of KL, slices, weight 5", ("dpo",)),
        ("replay 1", ("sft",)),
        ("A-GEM", ("sft",)),
        ("OSF", ("sft",)),
        ("null space", ("sft", "dpo")),
        ("null space at the start alone", ("sft",)),
        ("null space, A frozen", ("sft",)),
    ],
)
def test_a_run(bench, name, stages):
    bench.settings = replace(bench.settings, stages=stages)
    before = {name: tensor.clone() for name, tensor in bench.base.state_dict().items()}
    result = run(bench, name, METHODS[name], 0)
    points = result["train_info"]["metrics"]
    assert [point["step"] for point in points] == [2, 4]
    assert all(math.isfinite(value) for point in points for value in point.values())
    assert points[-1]["kl"] > 0
    for point, outcomes in zip(points, result["train_info"]["outcomes"], strict=True):
        for figure in ("refusal", "over_refusal", "facts"):
            assert outcomes[figure].count("1") / len(outcomes[figure]) == point[figure]
        assert len(outcomes["kl"]) == sum(map(len, bench.data.prompts.values()))
    draws = METHODS[name].references and not name.startswith("null space")
    assert (result["train_info"]["references"] > 0) == draws
    after = bench.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_more_lookalikes_are_references_of_their_set_alone(bench):
    few, many = bench.references("own", "kl"), bench.references("own", "kl", more_lookalikes=True)
    assert [own.name for own in few] == [own.name for own in many] == [*bench.data.references]
    for name, one, two in zip(bench.data.references, few, many, strict=True):
        wanted = bench.data.more_lookalikes if name == "lookalikes" else bench.data.references[name]
        assert len(two.dataset) == len(wanted)
        assert (len(two.dataset) > len(one.dataset)) == (name == "lookalikes")


@pytest.mark.slow
def test_a_run_until_it_is_safe(bench, monkeypatch):
    monkeypatch.setattr(bench, "settings", replace(bench.settings, stages=("sft",), until_safe=True))
    monkeypatch.setattr(bench.data, "more_harmful", bench.data.benign)
    monkeypatch.setattr(bench.data, "unseen_benign", bench.data.benign)
    meter = Meter(bench.base, bench.tokenizer, bench.data)
    monkeypatch.setattr(bench, "meter", meter)
    asked = []

    def refused(text):  # after the second step's first question
        asked.append(text)
        return Verdict.REFUSAL if len(asked) > 4 else Verdict.COMPLIANCE

    monkeypatch.setattr("benchmarks.tax.measurement.classify", refused)
    result = run(bench, "plain", METHODS["plain"], 0, safety_loss=0.0)
    (point,) = result["train_info"]["metrics"]
    assert point["step"] == 2
    assert point["refusal"] == point["refusal/built-in"] == point["over_refusal"] == point["over_refusal/unseen"] == 1
    assert [probe["refusal"] for probe in result["train_info"]["probes"]] == [0, 1]
    assert meter.refusals(bench.base, 1) == {"refusal": 1.0, "refusal/built-in": 1.0}


@pytest.mark.slow
def test_a_run_of_whole_weights(bench):
    bench.settings = replace(bench.settings, stages=("sft",))
    points = run(bench, "null space", WHOLE["null space"], 0)["train_info"]["metrics"]
    assert [point["step"] for point in points] == [2, 4]
    assert points[-1]["kl"] > 0


@pytest.mark.slow
def test_b_is_held_where_its_inputs_lead(bench, monkeypatch):
    monkeypatch.setattr(bench, "settings", replace(bench.settings, stages=("sft",)))
    shares = []

    class Watched(HeldB):
        def _project(self):
            before = self._before
            super()._project()
            for layer, directions in self._held.items():
                change = layer.weight.detach() - before[layer]
                assert directions.shape == (16, 8)
                torch.testing.assert_close(directions.T @ directions, torch.eye(8))
                shares.append(float((change @ directions).norm() / change.norm()))

    monkeypatch.setattr("benchmarks.tax.training.HeldB", Watched)
    result = run(bench, "null space, B held", METHODS["null space, B held"], 0)
    assert len(shares) == 4 * 2 * 7  # steps, blocks, layers of a block
    assert max(shares) < 1e-5
    assert result["train_info"]["references"] > 0


@pytest.mark.slow
def test_without_the_gain(bench, monkeypatch):
    """A starts with its usual length, where with the gain it is longer."""
    monkeypatch.setattr(bench, "settings", replace(bench.settings, stages=("sft",), steps=2, learning_rate=0.0))
    lengths: dict[int, list[float]] = {}

    def watched(meter, model, step):
        lengths.setdefault(step, []).append(sum(float(p.norm()) for n, p in model.named_parameters() if "lora_A" in n))
        return {"step": step, "seconds": 0.0}

    monkeypatch.setattr("benchmarks.tax.measurement.Meter.__call__", watched)
    for name in ("plain", "null space without the gain", "null space"):
        run(bench, name, METHODS[name], 0)
    plain, without, gained = lengths[2]
    assert without == pytest.approx(plain, rel=1e-3)
    assert gained > 1.2 * plain


@pytest.mark.slow
def test_a_cosine_schedule_ends_at_nothing_in_each_stage(bench, monkeypatch):
    stages = ("sft", "dpo")
    monkeypatch.setattr(bench, "settings", replace(bench.settings, stages=stages, steps=8, schedule="cosine"))
    monkeypatch.setattr("benchmarks.tax.measurement.Meter.__call__", lambda *_: {"seconds": 0.0})
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *own: (rates.append(self.param_groups[0]["lr"]), step(self, *own))[1]
    )
    run(bench, "plain", METHODS["plain"], 0)
    fall = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    peaks = bench.settings.learning_rate, bench.settings.dpo_learning_rate
    assert rates == pytest.approx([peak * share for peak in peaks for share in fall])


@pytest.mark.slow
def test_the_base_answers_the_pairs_of_a_later_stage_without_an_adapter(bench, monkeypatch):
    bench.settings = replace(bench.settings, stages=("sft", "dpo"))
    adapters, pairs = [], Workbench.pairs

    def watched(self, rows):
        adapters.append([name for name, _ in self.base.named_parameters() if "lora" in name])
        return pairs(self, rows)

    monkeypatch.setattr(Workbench, "pairs", watched)
    run(bench, "plain", METHODS["plain"], 0)
    assert adapters == [[]]


@pytest.mark.slow
def test_every_stage_has_its_own_learning_rate(bench, monkeypatch):
    bench.settings = replace(bench.settings, stages=("sft", "dpo"), learning_rate=3e-4, dpo_learning_rate=2e-5)
    rates, made = {}, training._trainer

    def watched(bench, stage, *rest):
        trainer = made(bench, stage, *rest)
        rates[stage] = trainer.args.learning_rate
        return trainer

    monkeypatch.setattr(training, "_trainer", watched)
    run(bench, "plain, half the learning rate", METHODS["plain, half the learning rate"], 0)
    assert rates == pytest.approx({"sft": 1.5e-4, "dpo": 1e-5})


@pytest.mark.slow
def test_pairs_are_refusals_over_answers_and_answers_over_refusals(bench):
    rows = bench.rows(METHODS["plain, contrast"], 0)
    pairs = bench.pairs(rows)
    refusals = [row["completion"] for row in bench.data.safety]
    assert len(pairs) == len(rows) == 8
    for row, pair in zip(rows, pairs, strict=True):
        assert (pair["prompt"], pair["chosen"]) == (row["prompt"], row["completion"])
        assert (pair["chosen"] in refusals) != (pair["rejected"] in refusals)
