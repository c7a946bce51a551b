"""The anatomy of a step: its figures against what numpy and scipy say of the same small cases."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import chat, tiny_llama, tiny_tokenizer, tokens
from peft import get_peft_model
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.anatomy import angles, tables
from benchmarks.anatomy.ages import Ages
from benchmarks.anatomy.figures import FIGURES
from benchmarks.anatomy.places import Place, place
from benchmarks.anatomy.probe import Probe
from benchmarks.anatomy.rules import OPTIMIZERS, RULES, Rules
from benchmarks.anatomy.shares import Shares
from benchmarks.anatomy.watch import CLIP, watch
from benchmarks.tax.training import Settings
from benchmarks.why import observe, rounded
from peft_ogpsa import OGPSAConfig, ReferenceSet
from peft_ogpsa.core.layout import Blocks
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.losses import answer_loss, collate
from peft_ogpsa.text.tokenization import Example

RATE = 5e-4


def examples(count, seed):
    return [Example(row.tolist(), 3) for row in tokens(count, 9, seed)]


def adapter():
    torch.manual_seed(0)
    config = OGPSAConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        subspace="gradients",
        reference_weight=0.0,
        rows=24,
        refresh_samples=4,
    )
    return get_peft_model(tiny_llama(), config)


SETS = {"first": examples(6, 1), "second": examples(6, 2)}
TRAINING = [examples(8, 10 + step) for step in range(4)]


def watched(steps):
    model = adapter()
    found = watch(model, TRAINING[:steps], SETS, probed=2, rate=RATE, pad=0, anchors=(0, 1))
    return model, json.loads(json.dumps(rounded(found)))


@pytest.fixture(scope="module")
def run():
    return watched(4)


def gradients_of(model, batch):
    """Of the loss by name, float64."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(answer_loss(model, collate(batch, 0, "cpu")), list(weights.values()))
    return {name: own.double().numpy().ravel() for name, own in zip(weights, found, strict=True)}


def mean_of(gradients):
    return {name: np.mean([own[name] for own in gradients], 0) for name in gradients[0]}


def joined(vectors):
    return np.concatenate([vectors[name] for name in sorted(vectors)])


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_places():
    name = "base_model.model.model.layers.11.mlp.gate_proj.lora_B.default.weight"
    assert place(name) == Place(11, "gate", "B")
    assert place("model.layers.2.self_attn.q_proj.lora_A.default.weight") == Place(2, "q", "A")
    with pytest.raises(ValueError, match="lm_head"):
        place("lm_head.lora_A.default.weight")


def test_cosines_over_all_tensors_and_the_worst_of_one():
    rows = [torch.randn(2, 3, 5), torch.randn(1, 3, 7)]
    change = [torch.randn(2, 5), torch.randn(1, 7)]
    change[0][1] = 0  # a tensor that did not move
    flat = np.concatenate([part.double().numpy().reshape(-1) for part in change])
    whole = angles.whole(rows, change)
    for row in range(3):
        own = np.concatenate([part[:, row].double().numpy().reshape(-1) for part in rows])
        assert whole[row].item() == pytest.approx(cosine(own, flat), rel=1e-12)
    each = [
        cosine(rows[part][0, row].double().numpy(), change[part][0].double().numpy())
        for part in (0, 1)
        for row in range(3)
    ]
    assert angles.worst(rows, change) == pytest.approx(max(each), rel=1e-12)
    assert angles.plain(angles.whole(rows, [part * 0 for part in change])) == [None] * 3


def test_shares_are_of_summed_squares():
    shares = Shares([Place(0, "q", "A"), Place(0, "q", "B"), Place(1, "up", "A")])
    shares.add(torch.tensor([9.0, 16.0, 0.0]), {"cone": torch.tensor([1.0, 4.0, 0.0])})
    shares.add(torch.tensor([16.0, 9.0, 4.0]), {"cone": torch.tensor([0.0, 0.0, 4.0])})
    assert shares.by(lambda where: where.kind)["cone"] == pytest.approx({"q": math.sqrt(5 / 50), "up": 1.0})
    assert shares.by(lambda where: where.matrix)["cone"] == pytest.approx({"A": math.sqrt(5 / 29), "B": 0.4})
    assert shares.along("A")["cone"] == pytest.approx([1 / 3, math.sqrt(4 / 20)])
    assert shares.along("AB")["cone"] == pytest.approx([math.sqrt(5 / 25), math.sqrt(4 / 29)])


def test_ages_compare_an_example_with_itself_and_others():
    then, now = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    then[0] = 0  # as A where B is zero
    ages = Ages([Place(0, "q", "A"), Place(0, "q", "B")], ["a", "a", "b"], (0,))
    ages.add(0, [then])
    ages.add(1, [now])
    old, new = then[1].double().numpy(), now[1].double().numpy()
    (found,) = ages.cosines["B"][0]
    assert found.tolist() == pytest.approx([cosine(old[i], new[i]) for i in range(3)])
    assert ages.others["B"][1].item() == pytest.approx(cosine(new[0], new[1]))
    assert ages.lengths["B"][1] == pytest.approx(np.linalg.norm(new, axis=1).mean())
    assert ages.lengths["A"][0] == 0
    assert angles.plain(ages.cosines["A"][0][0]) == [None] * 3


def test_the_probe_gives_every_example_its_own_gradient():
    model = adapter()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = Blocks(trained, dict.fromkeys(trained, ""), "tensor")
    longer = [Example(tokens(1, 12, 3)[0].tolist(), 3), *SETS["second"][:2]]
    probe = Probe({"first": SETS["first"][:1], "second": longer}, 0, 3)
    assert probe.owners == ["first", "second", "second", "second"]  # the longest is the last
    found = probe.gradients(model, blocks)
    expected = [gradients_of(model, [own]) for own in (SETS["first"][0], *longer[1:], longer[0])]
    for name, view in zip(blocks.names(), blocks.views(found), strict=True):
        for i, own in enumerate(expected):
            np.testing.assert_allclose(view[i].numpy().ravel(), own[name], rtol=1e-3, atol=1e-7)
    means = blocks.views(probe.means(found))
    for i, own in enumerate((mean_of(expected[:1]), mean_of(expected[1:]))):
        for name, view in zip(blocks.names(), means, strict=True):
            np.testing.assert_allclose(view[i].numpy().ravel(), own[name], rtol=1e-3, atol=1e-7)


def optimizer_by_hand(name, gradients):
    """The last of the steps that follow from float64 gradients."""
    if name == "SGD":
        return -RATE * gradients[-1]
    if name == "SGD with momentum":
        return -RATE * sum(0.9 ** (len(gradients) - 1 - i) * own for i, own in enumerate(gradients))
    first, second = 0.0, 0.0
    for own in gradients:
        first, second = 0.9 * first + 0.1 * own, 0.999 * second + 0.001 * own**2
    count = len(gradients)
    return -RATE * (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)


def projected_by_hand(rule, descent, rows):
    if rule.constraint == "orthogonal":
        basis, _ = np.linalg.qr(rows.T)
        return descent - basis @ (basis.T @ descent)
    weights, _ = nnls(rows.T, -descent)
    return descent + rows.T @ weights


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rules_step_as_by_hand(optimizer):
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    blocks = Blocks({"w": parameter}, {"w": ""}, "tensor")
    rules = Rules(blocks, 2, RATE)
    histories = {"": [], "orthogonal": [], "cone": []}
    for _ in range(3):
        gradient, rows = torch.randn(1, 12), torch.randn(1, 2, 12)
        at = [torch.randn(1, 12)]  # the run may be anywhere
        found = {rule: own for name, rule, own in rules.changes(at, [gradient], [rows]) if name == optimizer}
        own, of_rows = gradient[0].double().numpy(), rows[0].double().numpy()
        for constraint, history in histories.items():
            projected = projected_by_hand(RULES[f"{constraint}, gradient"], own, of_rows) if constraint else own
            history.append(projected)
    plain = optimizer_by_hand(optimizer, histories[""])
    for name, rule in RULES.items():
        expected = optimizer_by_hand(optimizer, histories[rule.constraint])
        if rule.projection == "update":
            expected = -projected_by_hand(rule, -plain, of_rows)
        np.testing.assert_allclose(found[name][0][0].numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_only_projected_updates_keep_the_promise_under_every_optimizer(run):
    rules = run[1]["rules"]
    for name in OPTIMIZERS:
        for kept in ("orthogonal, update", "cone, update"):
            assert max(rules[name][kept]["worst"]) < 1e-6
        assert all(value < 1e-6 for own in rules[name]["cone, update"]["whole"] for value in own)
        assert max(rules[name]["no projection"]["worst"]) > 1e-2
    assert max(rules["SGD"]["orthogonal, gradient"]["worst"]) < 1e-6
    assert rules["SGD with momentum"]["orthogonal, gradient"]["worst"][0] < 1e-6  # before there is a past
    assert max(rules["SGD with momentum"]["orthogonal, gradient"]["worst"]) > 1e-4
    assert min(rules["AdamW"]["orthogonal, gradient"]["worst"]) > 1e-2  # from the first step on


def test_the_first_step_is_as_by_hand():
    model, found = watched(1)
    fresh = adapter()
    gradient = gradients_of(fresh, TRAINING[0])
    length = np.linalg.norm(joined(gradient))
    gradient = {name: own * min(1.0, CLIP / (length + 1e-6)) for name, own in gradient.items()}
    proposed = {name: optimizer_by_hand("AdamW", [own]) for name, own in gradient.items()}

    references = [joined(mean_of([gradients_of(fresh, [example]) for example in own[:2]])) for own in SETS.values()]
    for i, reference in enumerate(references):
        assert found["cosines"]["gradient"][0][i] == pytest.approx(-cosine(joined(gradient), reference), abs=1e-3)
        assert found["cosines"]["proposed"][0][i] == pytest.approx(cosine(joined(proposed), reference), abs=1e-3)

    subspace = model.projector.subspace
    rows = dict(zip(subspace.blocks.names(), subspace.blocks.views(subspace.rows.stack), strict=True))
    for constraint in ("cone", "orthogonal"):
        removed, total = {"A": 0.0, "B": 0.0}, {"A": 0.0, "B": 0.0}
        made = dict(proposed)
        for name, change in proposed.items():
            own = rows[name.removeprefix("base_model.")].flatten(1).double().numpy()
            own = own[np.linalg.norm(own, axis=1) > 0]
            matrix = place(name).matrix
            total[matrix] += change @ change
            if len(own):
                made[name] = -projected_by_hand(RULES[f"{constraint}, update"], -change, own)
                removed[matrix] += (change - made[name]) @ (change - made[name])
        assert total["A"] == 0
        assert removed["B"] > 0
        expected = math.sqrt(removed["B"] / total["B"])
        assert found["shares"]["matrix"][constraint]["B"] == pytest.approx(expected, rel=5e-3)
        assert found["shares"]["matrix"][constraint]["A"] == 0
        if constraint == "cone":
            expected = [cosine(joined(made), reference) for reference in references]
            assert found["cosines"]["made"][0] == pytest.approx(expected, abs=1e-3)
            assert found["cosines"]["made"][0] != pytest.approx(found["cosines"]["proposed"][0], abs=5e-3)


def test_watching_changes_nothing(monkeypatch):
    monkeypatch.setattr("benchmarks.anatomy.watch.CLIP", 0.05)
    rate = 0.02
    looked_at, alone = adapter(), adapter()
    watch(looked_at, TRAINING, SETS, probed=2, rate=rate, pad=0)
    weights = [parameter for parameter in alone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    loader = ReferenceLoader({name: own[2:] for name, own in SETS.items()}, 4, 8)
    for batch in TRAINING:
        if alone.projector.due:
            drawn = {name: [collate(part, 0, "cpu") for part in own] for name, own in loader.draw().items()}
            alone.projector.refresh(drawn, answer_loss)
        answer_loss(alone, collate(batch, 0, "cpu")).backward()
        assert torch.nn.utils.clip_grad_norm_(weights, 0.05) > 0.06
        optimizer.step()
        optimizer.zero_grad()
    others = [parameter for parameter in looked_at.parameters() if parameter.requires_grad]
    for own, other in zip(weights, others, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_shares_are_those_of_the_projector(run):
    model, found = run
    logged = model.projector.diagnostics.collect()["ogpsa/removed"]
    assert np.mean(found["shares"]["step"]["AB"]["cone"]) == pytest.approx(logged, rel=1e-3)
    pairs = zip(found["shares"]["step"]["AB"]["cone"], found["shares"]["step"]["AB"]["orthogonal"], strict=True)
    assert all(0 < cone < orthogonal for cone, orthogonal in pairs)
    assert found["shares"]["all"]["cone"]["all"] < 1


def test_a_has_no_gradient_at_the_start_and_ages(run):
    ages = run[1]["ages"]
    assert ages["lengths"]["A"][0] == 0
    assert min(ages["lengths"]["A"][1:] + ages["lengths"]["B"]) > 0
    assert [len(ages["cosines"][matrix]["0"]) for matrix in "AB"] == [4, 4]
    assert [len(ages["cosines"][matrix]["1"]) for matrix in "AB"] == [3, 3]
    assert all(value is None for later in ages["cosines"]["A"]["0"] for value in later)
    assert all(value < 0.999 for value in ages["cosines"]["A"]["1"][-1])
    assert all(value is not None for later in ages["cosines"]["B"]["0"] for value in later)


def test_the_command_trains_on_the_rows_of_the_bench():
    bench = SimpleNamespace(
        settings=Settings("tiny", "cpu", steps=2, batch=3),
        base=tiny_llama(vocab_size=300),
        tokenizer=tiny_tokenizer(),
        references=lambda answers: [ReferenceSet(answers, [chat(f"{i}?", "yes" * (i + 1)) for i in range(5)])],
        rows=lambda method, seed: [chat(f"{seed} {i}?", "no" * (i + 1)) for i in range(6)],
    )
    found = observe(bench, probed=2, seed=0)
    assert found["cosines"]["sets"] == ["own"]
    assert len(found["losses"]) == 2
    assert len(found["ages"]["cosines"]["B"]["0"][0]) == 2


def test_figures_and_tables_show_the_report(run, tmp_path):
    found = run[1]
    for name, draw in FIGURES.items():
        figure = draw(found)
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert 2 <= len(figure.axes) <= 4
    table = tables.rules(found)
    mean = np.mean(found["rules"]["AdamW"]["cone, update"]["whole"])
    assert f"| AdamW | cone, update | {mean:+.3f} |" in table
    assert table.count("\n") == 2 + len(OPTIMIZERS) * len(RULES)
    assert tables.cosines(found).count("of 4 |") == 6
    steps = {"gradient": [[0.2], [0.4], [-0.3]], "proposed": [[-0.1]] * 3, "made": [[0.0]] * 3}
    few = tables.cosines({"cosines": {"sets": ["a"], **steps}})
    assert "| gradient | +0.100, rises in 2 of 3 |\n| proposed | -0.100, rises in 0 of 3 |" in few
    assert f"| cone | {found['shares']['all']['cone']['all']:.0%} |" in tables.shares(found)
    assert f"| A, 1 | {np.mean(found['ages']['cosines']['A']['1'][0]):.2f} |" in tables.ages(found)
