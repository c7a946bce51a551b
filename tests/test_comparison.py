"""Differences between two models on the same prompts: intervals against exact tests, and what `ogpsa compare` says."""

import dataclasses
import functools
import json
import random
from math import comb

import numpy as np
import pytest
from scipy import stats

from peft_ogpsa.cli import main
from peft_ogpsa.evaluation import (
    Comparison,
    Estimate,
    Evaluation,
    Judgment,
    LossResult,
    MatcherJudge,
    Measurement,
    Sample,
    TaskScore,
    Verdict,
    differences,
    paired_difference,
    rate_difference,
)


def outcomes(n, only_first, only_second):
    same = [False] * (n - only_first - only_second)
    return [True] * only_first + [False] * only_second + same, [False] * only_first + [True] * only_second + same


@functools.cache
def excludes_zero(n, only_first, only_second):
    low, high = paired_difference(*outcomes(n, only_first, only_second))
    return not low <= 0 <= high


@pytest.mark.parametrize(("n", "only_first", "only_second"), [(48, 3, 12), (150, 20, 21), (30, 0, 9), (200, 90, 10)])
def test_the_paired_interval_is_scipys_bootstrap_with_two_more_prompts(n, only_first, only_second):
    first, second = (np.array(values, float) for values in outcomes(n + 2, only_first + 1, only_second + 1))
    expected = stats.bootstrap((second - first,), np.mean, method="percentile", rng=0).confidence_interval
    assert paired_difference(*outcomes(n, only_first, only_second)) == pytest.approx(expected, abs=1.5 / n)


def test_the_paired_interval_is_that_of_all_bootstrap_samples():
    n, only_first, only_second = 9, 2, 5
    share = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    counts = [(up, down, n + 2 - up - down) for up in range(n + 3) for down in range(n + 3 - up)]
    weights = stats.multinomial(n + 2, [share[1], share[0], 1 - sum(share)]).pmf(counts)
    for level in (0.5, 0.95, 0.999):
        ordered = sorted(
            ((up - down) / (n + 2), weight) for (up, down, _), weight in zip(counts, weights, strict=True)
        )
        below = np.cumsum([weight for _, weight in ordered])
        expected = [ordered[int(np.argmax(below >= (1 + sign * level) / 2))][0] for sign in (-1, 1)]
        assert paired_difference(*outcomes(n, only_first, only_second), level) == pytest.approx(expected)


@pytest.mark.parametrize("n", [48, 150])
def test_the_mark_agrees_with_the_exact_test(n):
    for different in range(1, 25):
        for only_first in range(different // 2 + 1):
            p = stats.binomtest(only_first, different).pvalue  # McNemar's exact test
            marked = excludes_zero(n, only_first, different - only_first)
            if not 0.045 < p < 0.06:  # the interval depends on n too, which the test does not
                assert marked == (p < 0.05), (only_first, different, p)


@pytest.mark.parametrize(("n", "share"), [(41, 0.05), (41, 0.5), (150, 0.05), (150, 0.2)])
def test_chance_is_marked_in_less_than_one_of_twenty_cases(n, share):
    marked = 0.0
    for different in range(n + 1):
        weight = stats.binom.pmf(different, n, share)
        if weight > 1e-4:
            cases = [b for b in range(different // 2 + 1) if excludes_zero(n, b, different - b)]
            marked += weight * 2 * sum(comb(different, b) for b in cases) / 2**different
    assert marked < 0.05


def test_the_paired_interval_turns_around():
    first, second = outcomes(60, 4, 14)
    low, high = paired_difference(first, second)
    assert paired_difference(second, first) == (-high, -low)
    assert low < 10 / 60 < high
    wide = paired_difference(first, second, level=0.99)
    assert wide[0] < low < high < wide[1]
    assert paired_difference([True], [True])[0] < 0 < paired_difference([True], [True])[1]


@pytest.mark.parametrize(
    ("second", "first", "expected"),  # Newcombe (1998), table II, method 10
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
    ],
)
def test_the_unpaired_interval_is_newcombes(second, first, expected):
    assert rate_difference(first, second) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_outcomes_must_pair(first, second):
    with pytest.raises(ValueError, match="Give the same number of both"):
        paired_difference(first, second)


@functools.cache
def sample(prompt, refused):
    return Sample(prompt, "...", Verdict.REFUSAL if refused else Verdict.COMPLIANCE)


def measurement(name, refused, over=(False,) * 4, losses=(1.0, 2.0, 3.0), kl=None):
    """A measurement as `evaluate` builds it, from outcomes and from losses by example."""
    tokens = [5 + i for i in range(len(losses))]
    loss = LossResult.from_sums([mean * count for mean, count in zip(losses, tokens, strict=True)], tokens)
    return Measurement(
        name,
        general={"general": Estimate.from_loss(loss)},
        general_mean=Estimate.from_loss(loss),
        refusal=Estimate.from_count(sum(refused), len(refused)),
        over_refusal=Estimate.from_count(sum(over), len(over)),
        harmful_samples=[sample(f"harmful {i}", bool(value)) for i, value in enumerate(refused)],
        benign_samples=[sample(f"benign {i}", bool(value)) for i, value in enumerate(over)],
        losses={"general": loss},
        kl=None if kl is None else Estimate.from_loss(kl),
        kl_loss=kl,
    )


def without_outcomes(measured):
    return dataclasses.replace(measured, harmful_samples=[], benign_samples=[], losses={}, kl_loss=None)


def test_rates_and_losses_are_compared_pair_by_pair():
    rng = random.Random(0)
    base = [rng.uniform(1, 4) for _ in range(40)]
    worse = [loss + 0.05 + rng.gauss(0, 0.02) for loss in base]
    one = measurement("one", [True] * 30 + [False] * 30, losses=base)
    two = measurement("two", [True] * 28 + [False] * 2 + [True] * 16 + [False] * 14, losses=worse)
    found = differences(one, two)
    assert found.keys() == {"general", "refusal", "over_refusal"}
    assert found["refusal"].value == pytest.approx(14 / 60)
    assert found["refusal"].larger_than_chance
    assert not found["over_refusal"].larger_than_chance
    assert found["general"].value == pytest.approx(0.05, abs=0.01)
    assert found["general"].larger_than_chance
    # Without what is stored by prompt, the intervals are wider.
    plain = differences(without_outcomes(one), without_outcomes(two))
    for name in ("refusal", "general"):
        assert plain[name].value == pytest.approx(found[name].value, rel=1e-12)
        assert plain[name].high - plain[name].low > found[name].high - found[name].low
    assert not plain["general"].larger_than_chance


def test_kl_is_compared_pair_by_pair_and_only_if_both_have_it():
    kl = [LossResult.from_sums([x * 4 for x in means], [4, 4, 4, 4]) for means in ([1, 2, 3, 4], [2, 3, 4, 5.1])]
    one, two = (measurement("m", [True, False], kl=own) for own in kl)
    assert differences(one, two)["kl"].larger_than_chance
    assert "kl" not in differences(one, measurement("m", [True, False]))
    assert not differences(without_outcomes(one), without_outcomes(two))["kl"].larger_than_chance


def test_losses_on_other_examples_are_not_paired():
    """Other base answers may have as many tokens as these."""
    first, second = (LossResult.from_sums([4 * x for x in means], [4] * 4) for means in ([1, 2, 3, 4], [2, 3, 4, 5.1]))
    for digests, paired in ((("a", "a"), True), (("a", "b"), False), (("a", ""), False)):
        losses = [
            dataclasses.replace(own, examples=digest) for own, digest in zip((first, second), digests, strict=True)
        ]
        kl = [measurement("m", [True], kl=own) for own in losses]
        general = [dataclasses.replace(measurement("m", [True], losses=[2.0] * 4), losses={"general": losses[0]})]
        general.append(dataclasses.replace(general[0], losses={"general": losses[1]}))
        assert differences(*kl)["kl"].larger_than_chance == paired
        assert differences(*general)["general"].larger_than_chance == paired


def test_other_prompts_are_compared_as_independent_samples():
    first, second = outcomes(60, 3, 12)
    one, two = measurement("one", first), measurement("two", second)
    renamed = [dataclasses.replace(sample, prompt=f"other {sample.prompt}") for sample in two.harmful_samples]
    other = dataclasses.replace(two, harmful_samples=renamed)
    found = differences(one, other)["refusal"]
    assert (found.low, found.high) == rate_difference((3, 60), (12, 60))


def whole_measurement(sure, losses, rng, better=0.0):
    """One run of a model with everything that `ogpsa eval` measures, in the sizes of its data.

    Args:
        sure: For each place, how likely each prompt or example has a true outcome. Both runs of a pair share it.
        losses: The loss of each general row, and its number of tokens.
        rng: Where this run's chance comes from.
        better: How much more often harmful prompts are refused.
    """

    def outcomes(place, shift=0.0):
        return list(rng.uniform(size=len(sure[place])) < sure[place] + shift)

    def of_prompts(place):
        return measurement(place, outcomes(f"{place} harmful", better), outcomes(f"{place} benign"), losses=[1.0, 1.0])

    def score(task):
        values = [float(value) for value in outcomes(task)]
        rate = sum(values) / len(values)
        return TaskScore(task, "acc", rate, (rate * (1 - rate) / len(values)) ** 0.5, len(values), True, values, task)

    means, tokens = losses
    changed = [mean + rng.normal(0, 0.3 / count**0.5) for mean, count in zip(means, tokens, strict=True)]
    loss = LossResult.from_sums([mean * count for mean, count in zip(changed, tokens, strict=True)], tokens)
    kl = rng.gamma(2, 0.02, size=len(tokens))
    kl = LossResult.from_sums([float(mean) * count for mean, count in zip(kl, tokens, strict=True)], tokens)
    own = of_prompts("own")
    judgments = []
    for kind, samples in (("harmful", own.harmful_samples), ("benign", own.benign_samples)):
        # A judge that mostly agrees with the matcher.
        other = rng.uniform(size=len(samples)) < 0.1
        refusals = [(s.verdict is Verdict.REFUSAL) != differs for s, differs in zip(samples, other, strict=True)]
        verdicts = ["refusal" if refusal else "partial" for refusal in refusals]
        judgments.append(Judgment.from_verdicts(MatcherJudge(), kind, verdicts))
    return dataclasses.replace(
        own,
        general={"general": Estimate.from_loss(loss)},
        general_mean=Estimate.from_loss(loss),
        losses={"general": loss},
        kl=Estimate.from_loss(kl),
        kl_loss=kl,
        sets={name: dataclasses.replace(of_prompts(name), general={}, losses={}) for name in ("xstest", "advbench")},
        tasks=[score("facts"), score("arithmetic"), score("gsm8k")],
        judgments=judgments,
    )


SIZES = {"own harmful": 150, "own benign": 150, "xstest harmful": 200, "xstest benign": 250}
SIZES |= {"advbench harmful": 520, "advbench benign": 100, "facts": 150, "arithmetic": 100, "gsm8k": 400}


def whole_pair(rng, better=0.0):
    sure = {place: rng.beta(0.6, 0.6, size=n) for place, n in SIZES.items()}
    tokens = [int(count) + 5 for count in rng.lognormal(4, 0.8, size=65)]
    losses = [float(loss) for loss in rng.gamma(2, size=65)], tokens
    return whole_measurement(sure, losses, rng), whole_measurement(sure, losses, rng, better)


def test_two_runs_that_differ_by_chance_alone_have_no_star():
    rng = np.random.default_rng(0)
    stars, alone, pairs = 0, 0, 1000
    for _ in range(pairs):
        comparison = Comparison(dict(zip("ab", whole_pair(rng), strict=True)))
        assert len(comparison.differences) == 13
        stars += bool(comparison.marked)
        alone += any(difference.larger_than_chance for difference in comparison.differences.values())
    assert stars <= 0.05 * pairs
    assert stars > 0  # and it is not that nothing is ever marked
    assert alone > 0.2 * pairs  # each difference by itself would be marked too often


def test_a_real_difference_has_a_star():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(40):
        marked = Comparison(dict(zip("ab", whole_pair(rng, better=0.25), strict=True))).marked
        found += ("b", "own", "refusal") in marked and ("b", "set", "advbench", "refusal") in marked
        assert ("b", "task", "gsm8k", "acc") not in marked
    assert found >= 38


def test_three_models_are_tested_together():
    """What is larger than chance among two models need not be so among many."""
    first, second = outcomes(100, 4, 15)  # p = 0.019
    models = {name: measurement(name, own) for name, own in (("a", first), ("b", second), ("c", first), ("d", first))}
    models = {name: dataclasses.replace(own, general={}, over_refusal=None) for name, own in models.items()}
    two = Comparison({name: models[name] for name in "ab"})
    assert two.marked == {("b", "own", "refusal")}
    assert "by Holm's test of this one difference:" in two.note
    four = Comparison(models)
    assert list(four.differences) == [(name, "own", "refusal") for name in "bcd"]
    assert four.differences["b", "own", "refusal"] == two.differences["b", "own", "refusal"]
    assert not four.marked
    assert "by Holm's test of all 3 differences from a together:" in four.note
    assert Comparison({"a": models["a"]}).note == Comparison({}).note == ""


def write(path, measured, base=None, arguments=None, **entries):
    evaluation = Evaluation(measured, base, {}).to_dict()
    saved = {"name": measured.name, "arguments": arguments or {}, "evaluation": evaluation, **entries}
    path.write_text(json.dumps(saved))
    return str(path)


def cells(printed):
    return {row[1]: row for row in ([c.strip() for c in line.split("│")] for line in printed.splitlines()) if row[1:]}


def test_compare_marks_differences_from_the_first_model(tmp_path, capsys):
    first, second = outcomes(100, 5, 40)
    plain, other = measurement("plain", first), measurement("ogpsa", second)
    results = [write(tmp_path / f"{m.name}.json", m) for m in (plain, other)]
    main(["compare", *results])
    table, _, rest = capsys.readouterr().out.partition("Differences from plain")
    assert set(cells(table)) == {"plain", "ogpsa"}
    row = cells(rest)["ogpsa"]
    assert "plain" not in cells(rest)
    assert row[2].startswith("+0.000 (+0.000 to +0.000)")
    low, high = paired_difference(first, second)
    assert row[4] == f"+35% ({low:+.0%} to {high:+.0%}) *"
    assert row[5].startswith("+0% (")
    assert not row[5].endswith("*")
    assert "by Holm's test of all 3 differences from plain together" in " ".join(rest.split())
    main(["compare", results[0]])
    assert "Differences" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sft[r8]", "sft[/x]"])
def test_names_are_printed_as_they_are(name, tmp_path, capsys):
    """And not as rich's markup, in every table and in captions."""
    folder = tmp_path / "run[r8]"
    folder.mkdir()
    first = write(folder / "a.json", measurement(name, [True, False]), weights="1")
    second = write(folder / "b.json", measurement("dpo", [True, True]), started_from="1")
    main(["compare", first, second, "--plot", str(folder / "plot.png")])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"│ {name} │ +0.000 │" in printed  # the previous stage, and the change from it
    assert f"Differences from {name}" in printed
    assert f"differences from {name} together" in printed
    assert f"Saved the plot: {(folder / 'plot.png').resolve()}" in printed


def test_a_plot_that_is_no_png_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(SystemExit, match=r"^ogpsa compare: plot='a\.pdf' must be a \.png file\. Change the end"):
        main(["compare", str(tmp_path / "nowhere.json"), "--plot", "a.pdf"])


def test_results_of_earlier_versions_are_read(tmp_path, capsys):
    first, second = outcomes(100, 5, 40)
    results = []
    for measured in (measurement("plain", first), measurement("ogpsa", second)):
        results.append(write(tmp_path / f"{measured.name}.json", measured))
        saved = json.loads((tmp_path / f"{measured.name}.json").read_text())
        for name in ("losses", "kl_loss"):
            del saved["evaluation"]["model"][name]
        (tmp_path / f"{measured.name}.json").write_text(json.dumps(saved))
    main(["compare", *results])
    row = cells(capsys.readouterr().out.partition("Differences from plain")[2])["ogpsa"]
    assert row[4].endswith("*")
    assert not row[2].endswith("*")
    again = Evaluation.from_dict(json.loads(json.dumps(Evaluation(measurement("a", first), None, {}).to_dict())))
    assert again.model == measurement("a", first)


def test_compare_never_loses_the_base(tmp_path, capsys):
    base, adapter = measurement("base", [False] * 9), measurement("base", [True] * 9, losses=(2.0, 3.0, 4.0))
    path = write(tmp_path / "b.json", adapter, base)
    main(["compare", path])
    table = capsys.readouterr().out.partition("Differences from base")[0]
    rows = cells(table)
    assert [row[5][:3] for row in rows.values()] == ["0% ", "100"]
    assert rows["base"][3] == "+0.000"
    assert "".join(rows)[:8] == "base" + path[:4]  # as with two equal names, its file is its name
    # A model by itself may be the base of others.
    main(
        [
            "compare",
            write(tmp_path / "b.json", base),
            write(tmp_path / "c.json", dataclasses.replace(adapter, name="c")),
        ]
    )
    assert list(cells(capsys.readouterr().out.partition("Differences from base")[0])) == ["base", "c"]


def test_each_change_is_from_the_results_own_base(tmp_path, capsys):
    bases = [measurement("base", [False], losses=[loss] * 3) for loss in (1.0, 5.0)]
    models = [measurement(name, [True], losses=[loss] * 3) for name, loss in (("a", 1.25), ("b", 5.5), ("c", 1.5))]
    evaluations = [*zip(models, [*bases, None], strict=True)]
    main(["compare", *(write(tmp_path / f"{model.name}.json", model, base) for model, base in evaluations)])
    rows = cells(capsys.readouterr().out.partition("Differences from a")[0])
    changes = {name: row[3] for name, row in rows.items()}
    assert changes == {"base": "+0.000", "a": "+0.250", "b": "+0.500", "c": "+0.500"}


def test_compare_says_what_was_measured_differently(tmp_path, capsys):
    def told(*files):
        main(
            [
                "compare",
                *(write(tmp_path / f"{name}.json", *own[:2], **own[2]) for name, own in zip("ab", files, strict=True)),
            ]
        )
        out = capsys.readouterr().out
        return [line.partition("differently: ")[2] for line in out.splitlines() if "measured differently" in line]

    def file(name, data, rows=None, digest="x", **arguments):
        kl = dataclasses.replace(LossResult.from_sums([1.0, 2.0], [4, 4]), examples=digest)
        entries = {"arguments": {"data": data, **arguments}} | ({"data": rows} if rows else {})
        return measurement(name, [True], kl=kl), None, entries

    assert told(file("a", "one", {"general": "1"}), file("b", "two", {"general": "1", "xstest": "2"})) == []
    one = {"general": "1", "benign": "1", "xstest": "1"}
    assert told(file("a", "x", one), file("b", "x", one | {"general": "2", "xstest": "2"})) == [
        "the general and xstest rows are not the same."
    ]
    # A result of an earlier version has no checksums.
    assert told(file("a", "one", one), file("b", "two")) == ["data is one, two."]
    assert told(file("a", "x", one, batch_size=8), file("b", "x", one, batch_size=16)) == ["batch_size is 8, 16."]
    assert told(file("a", "x", one), file("b", "x", one, "y")) == ["KL from base is on other answers of the base."]
    assert told(file("a", "x", one), file("b", "x", one, "")) == []
    # Results of an earlier version have no revision, checksum of the tokenizer, judges, or versions.
    now = {"base_revision": "main", "asked_as": "1", "judges": {"openai:m": {"judge_address": "https://a"}}}
    old, new = file("a", "x", one), file("b", "x", one)
    new[2].update(now)
    assert told(old, new) == []
    old[2].update(now | {"base_revision": "v1", "asked_as": "2"})
    assert told(old, new) == [
        "base_revision is v1, main.",
        "the chat template or the end token is not the same.",
    ]
    old[2].update(now | {"versions": {"peft": "1.0", "torch": "2.0"}})
    assert told(old, new) == []
    new[2].update(versions={"torch": "2.1", "peft": "1.0", "transformers": "5.0"})
    assert told(old, new) == ["the version of torch is 2.0, 2.1."]
    files = {"judge_files": [["a", 1, 2]], "judges_in_4bit": True}
    del new[2]["versions"]
    old[2].update(now | {"judges": {"openai:m": {"judge_address": "https://b"}, "model:x": files, "model:y": files}})
    new[2]["judges"] = now["judges"] | {"model:x": {**files, "judge_files": [["a", 1, 3]]}}
    assert told(old, new) == [
        "judge_address of openai:m is https://b, https://a.",
        "the files of model:x are not the same.",
    ]
