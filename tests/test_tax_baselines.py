"""The baselines of the tax benchmark: each against a direct computation, and each as a run."""

import copy
import json
import math
from dataclasses import replace

import pytest
import test_tax
import torch
from models import randomize, tiny_llama, tokens
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import TrainingArguments

from benchmarks.tax import report, training
from benchmarks.tax.baselines import corda, lora_null, mica
from benchmarks.tax.baselines.asft import AnchoredTrainer, anchored_loss
from benchmarks.tax.baselines.ewc import EWC
from benchmarks.tax.baselines.fisher import fisher
from benchmarks.tax.baselines.placement import linear_layers, lora_knobs
from benchmarks.tax.baselines.scaling import along_scales
from benchmarks.tax.methods import METHODS, SEARCH
from benchmarks.tax.training import LORA, run
from peft_ogpsa.text.tokenization import Example

bench = test_tax.bench

KNOBS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SEQUENCES = [tokens(1, 12, seed) for seed in range(8)]


def adapted_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def change(layer):
    """What the adapter adds to a layer's weight."""
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def perturbed(model, seed=0):
    """LoRA in float64 whose A and B are both random."""
    return randomize(get_peft_model(model, LoraConfig(**KNOBS)), seed).double()


# The grid


def differences(first, second):
    """The settings in which two methods differ, those of `overrides` one by one."""
    flat = [
        {**method.recorded(), "knobs": None, **(method.overrides or {})}
        for method in (METHODS[first], METHODS[second])
    ]
    return {name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name)}


@pytest.mark.parametrize("family", SEARCH)
def test_the_rows_of_a_search_differ_in_one_knob(family):
    first, *others = SEARCH[family]
    found = [differences(first, other) for other in others]
    assert all(len(own) == 1 for own in found)
    assert len(set().union(*found)) <= 1
    assert len({json.dumps(METHODS[name].recorded()) for name in SEARCH[family]}) == len(SEARCH[family])


def test_the_learning_rates():
    rates = {name: METHODS[name].learning_rate for name in (*SEARCH["plain"], *SEARCH["OSF"], *SEARCH["MLP"])}
    assert list(rates.values()) == [1.0, 0.5, 0.25, 0.1, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0, 1 / 3, 1.0, 3.0]
    assert METHODS["plain, half the learning rate"].learning_rate == 0.5


def test_the_searched_weights_are_at_one_compute():
    for name in (*SEARCH["KL penalty"], *SEARCH["replay"]):
        assert METHODS[name].budget == 0.05
        assert METHODS[name].replay == float(name.removeprefix("KL").removeprefix("replay").split(",")[0])


@pytest.mark.parametrize(
    ("layers", "kinds", "blocks"),
    [
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, set(range(6))),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}, set(range(6))),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}, set(range(6))),
        ("up_proj", {"up_proj"}, {2, 3}),
    ],
)
def test_where_lora_sits(layers, kinds, blocks):
    model = get_peft_model(tiny_llama(num_hidden_layers=6), LoraConfig(**LORA | lora_knobs(layers, 6)))
    names = [name.split(".") for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert {name[-1] for name in names} == kinds
    assert {int(name[-3]) for name in names} == blocks
    assert len(names) == len(kinds) * len(blocks)
    for layer in adapted_layers(model):
        assert layer.scaling["default"] == 2
        assert layer.r["default"] == (1 if layers == "up_proj" else 16)


def test_all_linear_layers_are_those_of_peft():
    model = tiny_llama()
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**KNOBS))
    own = {name for name, module in wrapped.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    assert set(linear_layers(model)) == own


# Scaling


def test_scaled_adapters_are_weights_between():
    model = perturbed(tiny_llama())
    ids, seen, scales = tokens(), [], []
    for scale in along_scales(model, 4):
        scales.append(scale)
        seen.append(model(input_ids=ids).logits)
    assert scales == [0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(seen[-1], model(input_ids=ids).logits, rtol=0, atol=0)
    changes = [change(layer) for layer in adapted_layers(model)]
    base = model.unload()
    for scale, logits in zip((0.25, 0.5, 0.75, 1.0), seen, strict=True):
        between = copy.deepcopy(base)
        with torch.no_grad():
            for layer, delta in zip(linear_layers(between).values(), changes, strict=True):
                layer.weight += scale * delta
        torch.testing.assert_close(logits, between(input_ids=ids).logits)


def test_a_curve_of_scales_starts_at_the_base():
    scaled = test_tax.run_of((20, 2.5, 0.1, 0.5), (20, 2.0, 0.3, 0.97), (20, 1.5, 0.5, 1.0))
    for point, scale in zip(scaled["train_info"]["metrics"], (1 / 3, 2 / 3, 1.0), strict=True):
        point["scale"] = scale
    points = report.curve(test_tax.BASE, scaled)
    assert [point["scale"] for point in points] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert report.first_safe(points)["scale"] == pytest.approx(2 / 3)
    assert report.at_safety_loss(points, 2.25)["scale"] == pytest.approx(1 / 2)
    assert "scale" not in report.curve(test_tax.BASE, test_tax.run_of((5, 2.5, 0.1, 0.9)))[0]


# ASFT


@pytest.mark.parametrize("reweighted", [True, False])
def test_asfts_loss_is_that_of_its_paper(reweighted):
    generator = torch.Generator().manual_seed(0)
    logits, base = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64).requires_grad_(True).unbind(0)
    base = base.detach()
    labels = torch.tensor([3, 0, 6, 6, 1])
    expected = 0.0
    for model_row, base_row, label in zip(logits, base, labels, strict=True):
        p, q = model_row.softmax(0), base_row.softmax(0)
        factor = p[label].item() if reweighted else 1.0
        divergence = sum(q[v] * (q[v] / p[v]).log() for v in range(7))  # KL(base || model)
        expected = expected + (-factor * p[label].log() + 0.3 * divergence) / 5
    own = anchored_loss(logits, base, labels, 0.3, reweighted)
    torch.testing.assert_close(own, expected)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (own, expected)]
    torch.testing.assert_close(*gradients)


def test_asfts_trainer_compares_with_the_base(tmp_path):
    model = perturbed(tiny_llama())
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = AnchoredTrainer(model, arguments, weight=0.3, reweighted=True)
    ids = tokens(2, 8)
    labels = ids.masked_fill(torch.arange(8) < 5, -100)
    labels[1, -1] = -100  # padding
    loss = trainer.compute_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    logits = model(input_ids=ids).logits
    rows, places = [0, 0, 0, 1, 1], [4, 5, 6, 4, 5]  # that predict the tokens 5 to 7, and 5 to 6
    expected = anchored_loss(logits[rows, places], base[rows, places], ids[rows, [p + 1 for p in places]], 0.3, True)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert loss.requires_grad
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


# EWC


def test_ewcs_gradient_is_that_of_the_dense_penalty():
    model = perturbed(tiny_llama())
    generator = torch.Generator().manual_seed(1)
    layers = adapted_layers(model)
    importance = {
        layer.get_base_layer().weight: torch.rand(layer.get_base_layer().weight.shape, generator=generator).double()
        for layer in layers
    }
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter) if "lora" in name else None
    EWC(importance, 7.0).on_pre_optimizer_step(None, None, None, model=model)
    for layer in layers:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        dense = 7.0 * importance[layer.get_base_layer().weight] * change(layer).detach() * 2  # scaling
        torch.testing.assert_close(a.grad - 1, b.detach().T @ dense)
        torch.testing.assert_close(b.grad - 1, dense @ a.detach().T)
    total = sum(7.0 / 2 * (f * change(own).square()).sum() for own, f in zip(layers, importance.values(), strict=True))
    parameters = [own.lora_A["default"].weight for own in layers]
    for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(parameter.grad - 1, gradient)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_the_fisher_information_is_that_of_the_models_own_distribution():
    """Many draws against the sum over all labels, in a model of one block and a few tokens."""
    model = tiny_llama(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5 if parameter.dim() == 2 else 1  # unlike tokens
    sets = {"one": [Example([3, 4, 5, 6, 7], 2), Example([4, 4, 3], 2)], "two": [Example([5, 3, 6], 1)]}
    layers = list(linear_layers(model).values())
    before = copy.deepcopy(model.state_dict())
    expected = [torch.zeros_like(layer.weight) for layer in layers]
    for own in sets.values():
        for example in own:
            log_p = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
            for place in range(example.answer_start - 1, len(example.ids) - 1):
                for label in range(8):
                    gradients = torch.autograd.grad(
                        log_p[place, label], [layer.weight for layer in layers], retain_graph=True
                    )
                    share = log_p[place, label].exp().item() / (len(example.answer) * len(own) * len(sets))
                    for total, gradient in zip(expected, gradients, strict=True):
                        total += share * gradient**2
    many = {name: own * 400 for name, own in sets.items()}
    found = fisher(model, [layer.weight for layer in layers], many, seed=0, batch_size=3)
    for layer, total in zip(layers, expected, strict=True):
        assert found[layer.weight].sum() == pytest.approx(float(total.sum()), rel=0.1)
        assert (found[layer.weight] - total).norm() < 0.2 * total.norm()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_fisher_information_depends_on_nothing_but_its_seed():
    model = tiny_llama()
    weights = [layer.weight for layer in linear_layers(model).values()]
    sets = {"one": [Example(ids[0].tolist(), 4) for ids in SEQUENCES[:2]]}
    state = torch.get_rng_state()
    first, again, other = (fisher(model, weights, sets, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[weight], again[weight]) for weight in weights)
    assert not all(torch.equal(first[weight], other[weight]) for weight in weights)
    assert all(own.dtype == torch.float32 and not own.requires_grad for own in first.values())


# Starts


@pytest.mark.parametrize("start", [corda, lora_null, mica])
def test_training_starts_at_the_base(start):
    base = tiny_llama()
    ids = tokens(3, 10, seed=9)
    expected = base(input_ids=ids).logits
    before = copy.deepcopy(base.state_dict())
    model = start.adapted(copy.deepcopy(base), KNOBS, SEQUENCES)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(adapted_layers(model)) == len(linear_layers(base))
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    trained = {name.rsplit(".", 3)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"lora_A"} if start is mica else {"lora_A", "lora_B"})
    moved = [bool(change(layer).norm() > 1e-6) for layer in adapted_layers(model)]
    assert all(moved) if start is not mica else not any(moved)
    # As TRL does for its reference policy.
    weights = [layer.get_base_layer().weight.clone() for layer in adapted_layers(model)]
    model.add_adapter("ref", model.peft_config["default"])
    for layer, weight in zip(adapted_layers(model), weights, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)


def test_lora_null_starts_where_the_inputs_have_the_least_energy():
    base = tiny_llama().double()
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, layer in linear_layers(base).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
    for ids in SEQUENCES:
        base(input_ids=ids)
    model = lora_null.adapted(copy.deepcopy(base), KNOBS, SEQUENCES)
    for (name, plain), layer in zip(linear_layers(base).items(), adapted_layers(model), strict=True):
        rows = torch.cat(inputs[name])
        null = torch.linalg.svd(rows).Vh[-4:]
        expected = plain.weight @ null.T @ null
        torch.testing.assert_close(change(layer).double(), expected, rtol=1e-4, atol=1e-7)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-4, atol=1e-7)  # split evenly


def test_corda_preserves_what_the_references_use():
    """The adapter starts as what matters least to the references: less than random directions of its rank do."""
    base = tiny_llama()
    model = corda.adapted(copy.deepcopy(base), KNOBS, SEQUENCES)
    moments = lora_null.second_moments(base, list(linear_layers(base).values()), SEQUENCES)
    generator = torch.Generator().manual_seed(0)
    for plain, layer in zip(linear_layers(base).values(), adapted_layers(model), strict=True):
        directions = torch.linalg.qr(torch.randn(plain.in_features, 4, generator=generator)).Q
        random = plain.weight @ directions @ directions.T
        used = [(part.double() @ moments[plain] @ part.T.double()).trace().item() for part in (change(layer), random)]
        assert used[0] < used[1]
    assert model.peft_config["default"].corda_config is None


# Runs

RUNS = [
    ("plain, scaled", ("sft",)),
    ("null space, KL 2, scaled", ("sft",)),
    ("plain, quarter of the learning rate", ("sft",)),
    ("MLP", ("sft",)),
    ("attention", ("dpo",)),
    ("up_proj, rank 1", ("sft",)),
    ("LoRA-Null", ("sft",)),
    ("LoRA-Null", ("sft", "dpo")),
    ("LoRA-Null, A frozen", ("sft", "dpo")),
    ("CorDA", ("sft",)),
    ("CorDA", ("sft", "dpo")),
    ("MiCA", ("sft", "dpo")),
    ("OSF at 0.05", ("sft",)),
    ("ASFT 0.05", ("sft",)),
    ("KL 0.25 on training rows", ("sft",)),
    ("EWC 1000", ("sft", "dpo")),
    ("replay 3, 2 of 40", ("sft",)),
    ("KL 64, 2 of 40", ("sft",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stages"), RUNS)
def test_a_run_trains_and_leaves_the_base(bench, name, stages, monkeypatch):
    batch = 4 if METHODS[name].budget == 0.05 else 2  # of which a draw of 5 steps has a whole example
    monkeypatch.setattr(bench, "settings", replace(bench.settings, stages=stages, batch=batch))
    before = {name: tensor.clone() for name, tensor in bench.base.state_dict().items()}
    trainers, starts, made = [], [], training._trainer

    def adapter(model):
        return {own: p for own, p in model.named_parameters() if ".default." in own}

    def watched(*arguments):
        trainers.append(made(*arguments))
        starts.append({own: p.detach().clone() for own, p in adapter(trainers[-1].model).items()})
        return trainers[-1]

    monkeypatch.setattr(training, "_trainer", watched)
    result = run(bench, name, METHODS[name], 0)
    points = result["train_info"]["metrics"]
    scaled = METHODS[name].scaled
    assert [point["step"] for point in points] == ([4, 4] if scaled else [2, 4])
    assert [point.get("scale") for point in points] == ([0.5, 1.0] if scaled else [None, None])
    assert all(math.isfinite(value) for point in points for value in point.values())
    assert points[-1]["kl"] > points[0]["kl"] / 2 > 0
    assert points[0]["kl"] < 0.1  # from the real base, and not from what CorDA and LoRA-Null leave of it
    assert isinstance(trainers[0], AnchoredTrainer) == (METHODS[name].anchor > 0)
    weight = METHODS[name].replay or (METHODS[name].overrides or {}).get("reference_weight", 0)
    assert (result["train_info"]["references"] > 0) == (weight > 0)
    if name.startswith("LoRA-Null"):
        moved = {
            own.rsplit(".", 3)[1] for own, p in adapter(trainers[-1].model).items() if not p.equal(starts[0][own])
        }
        assert moved == ({"lora_B"} if "frozen" in name else {"lora_A", "lora_B"})
    after = bench.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plain", "kept"), [("plain", "EWC 10000"), ("plain", "KL 1 on training rows"), ("plain", "KL 64, 2 of 40")]
)
def test_a_penalty_keeps_the_model_nearer(bench, plain, kept, monkeypatch):
    monkeypatch.setattr(bench, "settings", replace(bench.settings, stages=("sft",), steps=8, batch=4, measurements=1))
    first, second = (run(bench, name, METHODS[name], 0)["train_info"]["metrics"][-1]["kl"] for name in (plain, kept))
    assert second < first


def test_what_cannot_be_measured_is_refused(bench, monkeypatch):
    monkeypatch.setattr(bench.meter, "answers", replace(bench.meter.answers, log_probs=None))
    for name in ("CorDA", "LoRA-Null", "OSF"):
        with pytest.raises(ValueError, match="changes its base"):
            run(bench, name, METHODS[name], 0)


def test_asft_has_no_dpo_stage(bench, monkeypatch):
    monkeypatch.setattr(bench, "settings", replace(bench.settings, stages=("dpo",)))
    with pytest.raises(ValueError, match="Leave out the DPO stage"):
        run(bench, "ASFT 0.05", METHODS["ASFT 0.05"], 0)
