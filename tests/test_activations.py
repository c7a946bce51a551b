"""The activation subspace: what is exact whatever the optimizer, where training starts, and what is refused."""

from __future__ import annotations

import copy
import gc
import json
import logging
import re
import weakref
from contextlib import nullcontext

import bitsandbytes
import pytest
import torch
import transformers
from loops import batch, loss_of, parameters_of, step_violations
from models import randomize, tiny_llama, tiny_t5
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import LoraLayer
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from peft_ogpsa import FullParameterConfig, OGPSAConfig, attach, projector_of
from peft_ogpsa.core.copy_check import CopyCheck
from peft_ogpsa.trainer import checkpoint

TOLERANCE = 1e-6
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NOT_LINEAR = ["embed_tokens", "*norm*", "lm_head"]

# The step sizes are small: what is measured is the constraint, which a diverged model would meet for nothing.
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers-adafactor": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    # 8-bit states are for tensors of some size alone, unless told otherwise.
    "bnb-adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=1),
    "bnb-paged-adamw8bit": lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=1e-2, min_8bit_size=1),
    "bnb-paged-adamw": lambda p: bitsandbytes.optim.PagedAdamW(p, lr=1e-2),
}


def lora(base=None, **overrides):
    """A model with an adapter, and its projector. Unless told otherwise, it needs references only once."""
    settings = {**LORA, "subspace": "activations", "subspace_rank": 8, "reference_weight": 0.0, **overrides}
    model = get_peft_model(tiny_llama() if base is None else base, OGPSAConfig(**settings))
    return model, model.base_model.projector


def examples(seed=100, rows=4, length=7):
    inputs = batch(seed, rows, length)
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def few():
    """Six tokens: fewer than there are directions, so that these span all of the inputs."""
    return {"set": [examples(rows=1, length=6)]}


def many(seed=100):
    return {"set": [examples(seed), examples(seed + 1, rows=3)]}


def train(model, optimizer, steps=range(5), clip=None, accumulation=1, sets=None):
    for number in steps:
        while sets is not None and projector_of(model).due:
            projector_of(model).refresh(sets, loss_of)
        for micro in range(accumulation):
            (loss_of(model, batch(10 * number + micro)) / accumulation).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(parameters_of(model), lr=lr)


def layers_of(model) -> dict[str, LoraLayer]:
    """The adapted layers by the names that they have in the base."""
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}


def held(projector) -> dict[str, torch.Tensor]:
    """The subspace's own directions by layer, float64."""
    tensors, rest = projector.activations.state_dict()
    found = {}
    for entry in rest:
        for layer in entry["layers"]:
            # PEFT's tuner is one module around the base.
            found[re.sub(r"^model\.model\.", "model.", layer)] = tensors[f"directions.{entry['place']}"].double()
    return found


def watched(base, layers, sets, where="attention_mask") -> dict[str, list[list[torch.Tensor]]]:
    """By layer, for each set, its tokens' inputs in float64, by hooks of our own."""
    base = copy.deepcopy(base).double()
    now: dict[str, torch.Tensor] = {}
    handles = [
        base.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: now.update({name: args[0]}))
        for name in layers
    ]
    found: dict[str, list[list[torch.Tensor]]] = {name: [] for name in layers}
    with torch.no_grad():
        for batches in sets.values():
            for own in found.values():
                own.append([])
            for inputs in batches:
                base(**inputs)
                kept = inputs["labels"] != -100 if where == "labels" else inputs[where].bool()
                for name in layers:
                    found[name][-1].append(now[name][kept])
    for handle in handles:
        handle.remove()
    return {name: [torch.cat(parts) for parts in own] for name, own in found.items()}


def independent(base, layers, sets, rank, where="attention_mask") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Energies and leading directions of every layer's input, from the second moment of its vectors in float64."""
    found = {}
    for name, own in watched(base, layers, sets, where).items():
        moment = sum(x.T @ x / len(x) for x in own) / len(own)
        values, vectors = torch.linalg.eigh(moment)
        found[name] = values.flip(0), vectors.flip(1)[:, :rank]
    return found


def a_of(layer, adapter="default") -> torch.Tensor:
    return layer.lora_A[adapter].weight.detach().double()


def b_of(layer, adapter="default") -> torch.Tensor:
    return layer.lora_B[adapter].weight.detach().double()


def gain_of(projector, layer) -> float:
    """What brings what is left of a reference input outside of the subspace back to its length, at most tenfold."""
    for entry in projector.activations.state_dict()[1]:
        if any(name.endswith(layer) for name in entry["layers"]):
            left = 1 - sum(entry["energies"]) / entry["energy"]
            return 10.0 if left <= 0.01 else left**-0.5
    raise AssertionError(layer)


def leak(model, directions, adapter="default") -> float:
    """The largest `||A U|| / ||A||` of any layer."""
    worst = 0.0
    for name, layer in layers_of(model).items():
        a = a_of(layer, adapter)
        assert a.norm() > 0, name
        worst = max(worst, float((a @ directions[name]).norm() / a.norm()))
    return worst


def output_leak(model, directions) -> float:
    """The largest change of any layer's output in the subspace, relative to that on a random input of this length."""
    worst = 0.0
    generator = torch.Generator().manual_seed(7)
    for name, layer in layers_of(model).items():
        layer = copy.deepcopy(layer).double()
        u = directions[name]
        inside = torch.randn(16, u.shape[1], generator=generator, dtype=torch.float64) @ u.T
        anywhere = torch.randn(16, u.shape[0], generator=generator, dtype=torch.float64)
        anywhere *= inside.norm() / anywhere.norm()
        with torch.no_grad():
            changes = [(layer(x) - layer.base_layer(x)).norm() for x in (inside, anywhere)]
        assert changes[1] > 0, name
        worst = max(worst, float(changes[0] / changes[1]))
    return worst


def copies(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters_of(model)]


def unchanged(model, before) -> bool:
    return all(torch.equal(p, q) for p, q in zip(parameters_of(model), before, strict=True))


@torch.no_grad()
def logits(model, inputs):
    return model(input_ids=inputs["input_ids"]).logits


# What it is


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_directions_are_those_of_the_inputs_second_moment(tokens):
    # Two sets of other sizes, which count the same, with padding and prompts, which do not count.
    first, second = examples(rows=5), examples(101, rows=2)
    first["attention_mask"][:3, 5:] = 0
    for inputs in (first, second):
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
        inputs["labels"][:, :3] = -100
    sets = {"first": [first], "second": [second]}
    model, projector = lora(tokens=tokens)
    projector.refresh(sets, loss_of)
    where = "labels" if tokens == "answer" else "attention_mask"
    ours = held(projector)
    assert ours.keys() == layers_of(model).keys()
    entries = {re.sub(r"^model\.model\.", "model.", e["layers"][0]): e for e in projector.activations.state_dict()[1]}
    for name, (values, vectors) in independent(tiny_llama(), ours, sets, 8, where).items():
        u = ours[name]
        torch.testing.assert_close(u.T @ u, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
        if len(u) == 64:  # wide enough for the range finder, which is not exact
            assert float((vectors.T @ u).square().sum()) > 0.5 * 8
            continue
        torch.testing.assert_close((vectors.T @ u).square().sum(0)[:4], torch.ones(4).double(), rtol=0, atol=1e-3)
        if values[8] < 0.9 * values[7]:  # else the last directions are hardly told apart
            torch.testing.assert_close(u @ u.T, vectors @ vectors.T, rtol=0, atol=1e-4)
        if name in entries:
            energies = torch.tensor(entries[name]["energies"], dtype=torch.float64)
            torch.testing.assert_close(energies, values[:8], rtol=1e-4, atol=0)
            assert entries[name]["energy"] == pytest.approx(float(values.sum()), rel=1e-5)


def test_energy_decides_how_many_directions_there_are():
    model, projector = lora(subspace_rank=None, subspace_energy=0.7)
    projector.refresh(many(), loss_of)
    for name, (values, _) in independent(tiny_llama(), layers_of(model), many(), 1).items():
        shares = values.cumsum(0) / values.sum()
        assert held(projector)[name].shape[1] == min(int((shares < 0.7).sum()) + 1, len(values) // 2)


def test_layers_of_one_input_share_their_directions():
    _, projector = lora()
    projector.refresh(many(), loss_of)
    kinds = {kind.name: kind for kind in projector.activations.kinds()}
    assert list(kinds) == ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
    assert all(kind.inputs == 2 and kind.directions == (8, 8) for kind in kinds.values())
    assert kinds["down_proj"].width == (64, 64)


# Exactness


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stays_in_the_complement_for_optimizer(name):
    # Few tokens, so that every reference input lies in the subspace, and none is needed to tell how it was found.
    model, projector = lora(tiny_llama(num_hidden_layers=1))
    sets = few()
    optimizer = OPTIMIZERS[name](parameters_of(model))
    train(model, optimizer, range(1), sets=sets)
    own = held(projector)
    first = leak(model, own)
    start = {n: a_of(layer) for n, layer in layers_of(model).items()}
    train(model, optimizer, range(1, 200))
    assert all(float((a_of(layer) - start[n]).norm()) > 1e-2 for n, layer in layers_of(model).items())
    assert leak(model, own) <= TOLERANCE
    assert leak(model, own) <= 3 * first + 1e-8  # no drift
    assert output_leak(model, own) <= 1e-5
    inputs = watched(tiny_llama(num_hidden_layers=1), own, sets)
    scaled = {n: x[0].T / torch.linalg.matrix_norm(x[0], 2) for n, x in inputs.items()}
    assert leak(model, scaled) <= TOLERANCE
    assert projector.steps == 200


class OwnCopy(torch.optim.AdamW):
    """Steps a copy of the parameters and writes it over them, as CPU offload and float32 master weights do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.held = [torch.nn.Parameter(p.detach().clone()) for p in self.param_groups[0]["params"]]
        self.inner = torch.optim.AdamW(self.held, lr=lr)

    @torch.no_grad()
    def step(self, closure=None):
        for held, p in zip(self.held, self.param_groups[0]["params"], strict=True):
            held.grad = p.grad
        self.inner.step()
        for held, p in zip(self.held, self.param_groups[0]["params"], strict=True):
            p.copy_(held)


@pytest.mark.parametrize("rank", [16, 24])
def test_an_optimizer_that_steps_its_own_copy_is_an_error(rank):
    model, projector = lora(subspace_rank=rank)
    projector.refresh(many(), loss_of)
    with pytest.raises(RuntimeError, match=r"a copy of the weights that it keeps itself.*Use an optimizer"):
        train(model, OwnCopy(parameters_of(model), lr=1e-3), range(33))
    assert 1 < projector.steps < 32


@pytest.mark.parametrize("lr", [1e-3, 1.0])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Rprop", "Adagrad"])
def test_no_other_optimizer_is_taken_for_one(name, lr):
    model, projector = lora()
    # The same batch again and again, with steps that are much too long: the weights swing.
    for _ in range(40):
        while projector.due:
            projector.refresh(many(), loss_of)
            optimizer = getattr(torch.optim, name)(parameters_of(model), lr=lr)
        loss_of(model, batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert projector.steps == 40


def test_a_line_search_is_not_taken_for_one():
    model = get_peft_model(
        tiny_llama(),
        OGPSAConfig(r=4, lora_alpha=8, target_modules=["q_proj"], reference_weight=0, task_type="CAUSAL_LM"),
    )
    model.projector.refresh(many(), loss_of)
    optimizer = torch.optim.LBFGS(parameters_of(model), max_iter=4, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    for _ in range(33):
        optimizer.step(closure)
    assert model.projector.steps == 33


def test_one_reversal_may_be_chance_and_two_are_not():
    torch.manual_seed(0)
    steps = [torch.randn(5, dtype=torch.float64) for _ in range(5)]
    correction = torch.randn(5, dtype=torch.float64)
    for reversals, raises in ((1, False), (2, True)):
        check = CopyCheck()
        with pytest.raises(RuntimeError, match="writes it over") if raises else nullcontext():
            for i, step in enumerate(steps[:4]):
                own = -correction if 0 < i <= reversals else step
                check.before(own)
                check.after(own + correction)


@pytest.mark.parametrize("options", [{"clip": 1e-2}, {"accumulation": 3}, {"clip": 1.0, "accumulation": 2}])
def test_clipping_and_accumulation(options):
    model, projector = lora(tiny_llama(num_hidden_layers=1))
    train(model, OPTIMIZERS["adamw"](parameters_of(model)), range(60), sets=many(), **options)
    assert leak(model, held(projector)) <= TOLERANCE
    assert output_leak(model, held(projector)) <= 1e-5


def test_the_gradient_that_the_optimizer_sees_is_in_the_complement():
    model, projector = lora()
    projector.refresh(many(), loss_of)
    for layer in layers_of(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight.data, std=0.1)
    loss_of(model, batch(0)).backward()
    before = {n: layer.lora_A["default"].weight.grad.double() for n, layer in layers_of(model).items()}
    kept = [layer.lora_B["default"].weight.grad.clone() for layer in layers_of(model).values()]
    torch.optim.SGD(parameters_of(model), lr=0.0).step()
    for name, layer in layers_of(model).items():
        u = held(projector)[name]
        expected = before[name] - before[name] @ u @ u.T
        assert float(expected.norm()) < 0.99 * float(before[name].norm())
        torch.testing.assert_close(layer.lora_A["default"].weight.grad.double(), expected, rtol=1e-4, atol=1e-8)
    now = [layer.lora_B["default"].weight.grad for layer in layers_of(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_steps_are_enlarged_by_the_gain():
    ends = []
    model, projector = lora()
    projector.refresh(many(), loss_of)
    randomize_b(model)
    loss_of(model, batch(0)).backward()
    start = {n: (a_of(layer), b_of(layer)) for n, layer in layers_of(model).items()}
    torch.optim.SGD(parameters_of(model), lr=1e-1).step()
    for name, layer in layers_of(model).items():
        a, b = (own.weight.grad.double() for own in (layer.lora_A["default"], layer.lora_B["default"]))
        gain = gain_of(projector, name)
        ends.append(gain)
        torch.testing.assert_close(a_of(layer), start[name][0] - 0.1 * gain * a, rtol=0, atol=1e-6)
        torch.testing.assert_close(b_of(layer), start[name][1] - 0.1 * b, rtol=0, atol=1e-6)
    assert max(ends) > 1.5
    for name, (values, vectors) in independent(tiny_llama(), layers_of(model), many(), 8).items():
        if len(vectors) == 32:
            share = float(values[:8].sum() / values.sum())
            assert gain_of(projector, name) == pytest.approx(min(10.0, (1 - share) ** -0.5), rel=1e-3)


def test_reference_outputs_stay_where_the_subspace_holds_them():
    # Small steps: an adapter that does more than the base enlarges what rounding leaves, from layer to layer.
    some = {"set": [examples(rows=2, length=8)]}
    plain = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    train(plain, adamw(plain, lr=1e-4), range(30))
    part, _ = lora(subspace_rank=12)
    train(part, adamw(part, lr=1e-4), range(30), sets=some)
    whole, _ = lora()
    train(whole, adamw(whole, lr=1e-4), range(30), sets=few())
    base = tiny_llama()

    def moved(model, sets):
        told = []
        for inputs in sets["set"]:
            ours, theirs = logits(model, inputs).log_softmax(-1), logits(base, inputs).log_softmax(-1)
            told.append((float((theirs.exp() * (theirs - ours)).sum(-1).mean()), float((ours - theirs).abs().max())))
        return tuple(max(values) for values in zip(*told, strict=True))

    # The gain makes the adapter do more elsewhere, so what it does to the references is compared with that.
    learned = {"set": [batch(0)]}
    shares = [moved(model, some)[0] / moved(model, learned)[0] for model in (plain, part)]
    assert shares[1] < 0.1 * shares[0]
    kl, difference = moved(whole, few())
    assert kl <= 1e-5
    assert difference <= 1e-5
    assert moved(plain, few())[1] > 1e-3
    assert moved(whole, learned)[1] > 1e-2


def test_several_sets_of_which_one_is_small_are_all_held():
    sets = {"small": [examples(1, rows=1, length=3)], "large": [examples(2, rows=1, length=4)]}
    model, _ = lora()
    train(model, adamw(model, lr=1e-4), range(10), sets=sets)
    for inputs in (sets["small"][0], sets["large"][0]):
        torch.testing.assert_close(logits(model, inputs), logits(tiny_llama(), inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 200])
def test_stacks_are_divided_and_nothing_changes(count, monkeypatch):
    ends = []
    for size in (2**26, count):
        monkeypatch.setattr("peft_ogpsa.core.activation_subspace.LARGEST_GROUP", size)
        model, projector = lora()
        train(model, torch.optim.SGD(parameters_of(model), lr=0.1), range(4), sets=many())
        ends.append((copies(model), len(projector.activations._stacks)))
        assert leak(model, held(projector)) <= TOLERANCE
    assert ends[1][1] > ends[0][1]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(ends[0][0], ends[1][0], strict=True))


def test_adapters_of_float64():
    model, projector = lora()
    model.double()
    train(model, adamw(model), sets=many())
    assert leak(model, held(projector)) <= TOLERANCE


# Optimizers that do not step as others do


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_learning_rate_of_0(lr):
    model, projector = lora()
    projector.refresh(many(), loss_of)
    before = copies(model)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=lr)
    train(model, optimizer, range(3))
    for parameter, was in zip(parameters_of(model), before, strict=True):
        # The projection rounds A.
        assert float((parameter.detach() - was).norm()) <= torch.finfo(torch.float32).eps * float(was.norm())
    optimizer.param_groups[0]["lr"] = 1e-2
    train(model, optimizer, range(3, 6))
    assert leak(model, held(projector)) <= TOLERANCE


class Twice(torch.optim.Optimizer):
    """Calls its closure twice, as SAM does, and writes to the parameters in between."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
        return loss


@pytest.mark.parametrize("make", [Twice, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)])
def test_closures(make):
    model, projector = lora()
    projector.refresh(many(), loss_of)
    randomize_b(model)
    optimizer = make(parameters_of(model))
    start = {n: a_of(layer) for n, layer in layers_of(model).items()}
    for number in range(3):

        def closure(number=number):
            optimizer.zero_grad()
            loss = loss_of(model, batch(number))
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    assert leak(model, held(projector)) <= TOLERANCE
    assert all(float((a_of(layer) - start[n]).norm()) > 1e-4 for n, layer in layers_of(model).items())


def randomize_b(model, std=0.1):
    for i, layer in enumerate(layers_of(model).values()):
        own = layer.lora_B["default"].weight
        torch.nn.init.normal_(own.data, std=std, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_a_step(fused):
    model, projector = lora()
    projector.refresh(many(), loss_of)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for number in range(6):
        scaler.scale(loss_of(model, batch(number))).backward()
        before = copies(model)
        if number in (0, 3):
            parameters_of(model)[1].grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert unchanged(model, before) == (number in (0, 3))
        assert leak(model, held(projector)) <= TOLERANCE
    assert projector.steps == 4


def test_some_matrices_without_a_gradient():
    model, projector = lora()
    projector.refresh(many(), loss_of)
    randomize_b(model)
    optimizer = adamw(model)
    for number in range(3):
        loss_of(model, batch(number)).backward()
        for layer in list(layers_of(model).values())[number::3]:
            layer.lora_A["default"].weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert leak(model, held(projector)) <= TOLERANCE


# Types


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model in a folder: only what is loaded from one can be quantized."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64).save_pretrained(folder)
    return folder


def four_bit(folder):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    return prepare_model_for_kbit_training(model)


@pytest.mark.filterwarnings("ignore")
def test_four_bit_base(saved):
    model, projector = lora(four_bit(saved))
    for parameter in parameters_of(model):  # as TRL casts the adapter of a quantized model
        parameter.data = parameter.data.to(torch.bfloat16)
    projector.upcast()
    model.train()
    packed = [p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n]
    optimizer = adamw(model, lr=1e-4)
    projector.refresh(few(), loss_of)
    for number in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert leak(model, held(projector)) <= TOLERANCE
    now = [p.detach() for n, p in model.named_parameters() if "base_layer" in n]
    assert all(torch.equal(p, q) for p, q in zip(packed, now, strict=True))

    def moved(inputs):
        with torch.autocast("cpu", torch.bfloat16):
            ours = logits(model, inputs).float()
            with model.disable_adapter():
                return float((ours - logits(model, inputs).float()).square().mean().sqrt())

    # The base computes in 16 bits: what the adapter does on reference inputs is rounding of that.
    assert moved(few()["set"][0]) < 0.2 * moved(batch(0))


@pytest.mark.parametrize("width", [32, 64], ids=["whole second moment", "range finder"])
def test_a_refresh_under_autocast_is_as_exact(width):
    # As where a loop, or the trainer's wrapper around the model's forward, computes in 16 bits.
    model, projector = lora(tiny_llama(hidden_size=width, intermediate_size=width))
    with torch.autocast("cpu", torch.bfloat16):
        projector.refresh({"set": [examples(rows=9)]}, loss_of)
    assert leak(model, held(projector)) <= TOLERANCE
    for own in held(projector).values():
        torch.testing.assert_close(own.T @ own, torch.eye(8).double(), rtol=0, atol=1e-6)


def test_autocast_inside_the_forward_alone():
    def forward(model, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, inputs)

    model, projector = lora(tiny_llama(hidden_size=64))
    projector.refresh({"set": [examples(rows=9)]}, forward)
    train(model, adamw(model))
    assert leak(model, held(projector)) <= TOLERANCE


def test_directions_in_bfloat16_are_held_as_exactly():
    model, projector = lora(rows_dtype="bfloat16")
    train(model, adamw(model), range(20), sets=many())
    stored = projector.activations.state_dict()[0]
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert leak(model, held(projector)) <= TOLERANCE
    # They are those of float32 but for rounding.
    _, exact = lora()
    exact.refresh(many(), loss_of)
    for name, u in held(exact).items():
        assert float((held(projector)[name] - u).abs().max()) < 2**-8
    assert projector.activations.bytes() < exact.activations.bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_low_precision_is_refused_until_it_is_widened(dtype):
    model, projector = lora()
    for parameter in parameters_of(model):
        parameter.data = parameter.data.to(dtype)
    before = copies(model)
    with pytest.raises(
        ValueError, match=r"has the dtype .*float16.*model\.projector\.upcast\(\) before you create the optimizer"
    ):
        projector.refresh(many(), loss_of)
    assert projector.activations is None
    assert unchanged(model, before)
    projector.upcast()
    train(model, adamw(model), sets=many())
    assert leak(model, held(projector)) <= TOLERANCE


# The start


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_a_keeps_its_length_times_the_gain_and_the_function_stays(start):
    model, projector = lora(init_lora_weights=start)
    lengths = {n: float(a_of(layer).norm()) for n, layer in layers_of(model).items()}
    own = copies(model)
    projector.refresh(many(), loss_of)
    assert not unchanged(model, own)
    assert leak(model, held(projector)) <= TOLERANCE
    for name, layer in layers_of(model).items():
        assert float(a_of(layer).norm()) == pytest.approx(gain_of(projector, name) * lengths[name], rel=1e-5)
        assert not layer.lora_B["default"].weight.any()
    assert torch.equal(logits(model, batch(0)), logits(tiny_llama(), batch(0)))


def again_with_its_references(model, projector, folder):
    """Build the subspace again, from the same references."""
    projector.reset()
    projector.refresh(many(), loss_of)
    return model, projector


def again_with_others(model, projector, folder):
    projector.reset()
    projector.refresh(many(200), loss_of)
    return model, projector


def again_with_another_rank(model, projector, folder):
    model.peft_config["default"].subspace_rank = 4
    projector.refresh(many(), loss_of)
    return model, projector


def attached_again(model, projector, folder):
    projector = attach(model, OGPSAConfig(subspace_rank=8))
    projector.refresh(many(200), loss_of)
    return model, projector


def another_adapter_and_back(model, projector, folder):
    if "other" not in model.peft_config:
        model.add_adapter("other", OGPSAConfig(**LORA, subspace_rank=8))
    for name in ("other", "default"):
        model.set_adapter(name)
        projector.refresh(many(), loss_of)
    return model, projector


def saved_and_loaded(model, projector, folder):
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    projector_of(model).refresh(many(), loss_of)
    return model, projector_of(model)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    "again",
    [
        again_with_its_references,
        again_with_others,
        again_with_another_rank,
        attached_again,
        another_adapter_and_back,
        saved_and_loaded,
    ],
)
def test_a_is_stretched_once_however_often_the_subspace_is_built_before_it_learns(again, times, tmp_path):
    model, projector = lora()
    if again is attached_again:
        model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
        projector = attach(model, OGPSAConfig(subspace_rank=8))
    lengths = {n: float(a_of(layer).norm()) for n, layer in layers_of(model).items()}
    projector.refresh(many(), loss_of)
    for _ in range(times):
        model, projector = again(model, projector, tmp_path)
    for name, layer in layers_of(model).items():
        assert float(a_of(layer).norm()) == pytest.approx(gain_of(projector, name) * lengths[name], rel=1e-3)


def test_a_that_was_made_anew_is_stretched_like_any_other():
    model, projector = lora()
    projector.refresh(many(), loss_of)
    for layer in layers_of(model).values():
        layer.reset_lora_parameters("default", init_lora_weights="gaussian")
    lengths = {n: float(a_of(layer).norm()) for n, layer in layers_of(model).items()}
    again_with_its_references(model, projector, None)
    for name, layer in layers_of(model).items():
        assert float(a_of(layer).norm()) == pytest.approx(gain_of(projector, name) * lengths[name], rel=1e-5)


class Wide(torch.nn.Module):
    """One layer of a wide input, most of whose energy is in one direction."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2**16, 4, bias=False)

    def forward(self, x):
        return self.head(x)

    @staticmethod
    def references():
        generator = torch.Generator().manual_seed(0)
        mean = torch.randn(2**16, generator=generator)
        return {"set": [mean + 0.1 * torch.randn(8, 4, 2**16, generator=generator)]}


def wide(rank, matrix=None):
    """The adapter's matrix A, its length before its subspace was built, and the gain."""
    model, projector = lora(Wide(), r=rank, target_modules=["head"], task_type=None, subspace_rank=1)
    a = model.base_model.model.head.lora_A["default"].weight
    if matrix is not None:
        a.data.copy_(matrix)
    before = float(a.detach().norm())
    projector.refresh(Wide.references(), lambda m, b: m(b).square().mean())
    return a.detach(), before, gain_of(projector, "head")


@pytest.mark.parametrize("rank", [2, 16])
def test_a_random_a_is_stretched_where_a_wide_input_has_few_directions(rank):
    # By chance, less of it lies in the subspace than rounding explains: 1 / 256 of its length.
    torch.manual_seed(1)
    a, before, gain = wide(rank)
    assert gain > 5
    assert float(a.norm()) == pytest.approx(gain * before, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_a_that_was_saved_in_few_bits_is_not_stretched_again(dtype):
    torch.manual_seed(1)
    saved, _, _ = wide(16)
    a, before, _ = wide(16, saved.to(dtype))
    assert float(a.norm()) == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_a_is_stretched_for_every_start_that_has_no_effect_yet(start):
    # "orthogonal": B is not zero, and B A is.
    model, projector = lora(init_lora_weights=start)
    before = {name: float(a_of(layer).norm()) for name, layer in layers_of(model).items()}
    projector.refresh(many(), loss_of)
    for name, layer in layers_of(model).items():
        assert float(a_of(layer).norm()) == pytest.approx(gain_of(projector, name) * before[name], rel=1e-3)


@pytest.mark.parametrize("start", [True, "orthogonal"])
def test_the_build_leaves_the_model_alone(start):
    # "orthogonal": neither A nor B is zero, and B A is.
    model, projector = lora(init_lora_weights=start)
    before = logits(model, batch(0))
    model.train()
    modes = [module.training for module in model.modules()]
    loss_of(model, batch(1)).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters_of(model)]
    state = torch.get_rng_state()
    assert projector.refresh(many(), loss_of) == {}
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(
        layer.active_adapters == ["default"] and not layer.disable_adapters for layer in layers_of(model).values()
    )
    for parameter, gradient in zip(parameters_of(model), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    torch.testing.assert_close(logits(model.eval(), batch(0)), before, rtol=0, atol=1e-5)


def test_an_adapter_that_was_not_born_in_the_complement_is_refused():
    model, projector = lora()
    randomize(model)
    before = copies(model)
    with pytest.raises(ValueError, match=r"not trained in the null space.*merge_adapter.*subspace='gradients'"):
        projector.refresh(many(), loss_of)
    assert unchanged(model, before)
    assert projector.activations is None
    assert projector.due


@pytest.mark.parametrize("rank", [32, 40])
def test_a_subspace_that_leaves_no_complement_is_refused(rank):
    # Else A would be rounding errors, stretched to its old length, and nothing would be kept.
    model, projector = lora(subspace_rank=rank)
    sets = {"set": [examples(rows=7, length=12)]}
    before = copies(model)
    with pytest.raises(ValueError, match=r"directions|null space|subspace_rank"):
        projector.refresh(sets, loss_of)
    assert unchanged(model, before)


def test_a_small_complement_is_held_as_exactly():
    model, projector = lora(subspace_rank=31)
    train(model, adamw(model), range(5), sets={"set": [examples(rows=7, length=12)]})
    assert leak(model, held(projector)) <= 1e-5


def test_frozen_matrices_are_refused_where_b_trains_on():
    # Nothing would keep B A from acting on reference inputs.
    model, projector = lora()
    for layer in layers_of(model).values():
        layer.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="A"):
        projector.refresh(many(), loss_of)


def test_one_frozen_matrix_is_refused_where_b_trains_on():
    model, projector = lora()
    layers_of(model)["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="A"):
        projector.refresh(many(), loss_of)


def test_frozen_b_is_no_matter():
    model, projector = lora()
    projector.refresh(many(), loss_of)
    randomize_b(model)
    for layer in layers_of(model).values():
        layer.lora_B["default"].weight.requires_grad_(False)
    projector.refresh(many(), loss_of)
    train(model, adamw(model))
    assert leak(model, held(projector)) <= TOLERANCE


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an adapter that was trained in a subspace of `many()`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = lora()
    train(model, adamw(model), range(10), sets=many())
    model.save_pretrained(folder)
    return folder


def loaded(folder):
    model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    return model, projector_of(model)


def test_a_trained_adapter_is_accepted_with_its_references(trained, caplog):
    model, projector = loaded(trained)
    assert projector.config.subspace == "activations"
    before = copies(model)
    projector.refresh(many(), loss_of)
    assert not caplog.records
    for parameter, was in zip(parameters_of(model), before, strict=True):
        torch.testing.assert_close(parameter.detach(), was, rtol=0, atol=1e-5)
    train(model, adamw(model))
    assert leak(model, held(projector)) <= TOLERANCE


def test_what_rounding_leaves_is_removed_and_logged(trained, caplog):
    model, projector = loaded(trained)
    with caplog.at_level(logging.INFO, logger="peft_ogpsa"):
        projector.refresh(many(), loss_of)
    assert "of the adapter's effect in a layer was in the activation subspace. This part was removed." in caplog.text
    assert leak(model, held(projector)) <= TOLERANCE


def test_a_trained_adapter_with_almost_its_references_is_accepted_with_a_warning(trained, caplog):
    changed = many()
    changed["set"][1]["input_ids"][0, -1] = 99  # one token, which no other one sees
    model, projector = loaded(trained)
    before = copies(model)
    projector.refresh(changed, loss_of)
    assert "Not all of the adapter was in the null space of the reference sets" in caplog.text
    assert leak(model, held(projector)) <= TOLERANCE
    # Of an adapter in use what is inside is removed, and nothing is stretched.
    for parameter, was in zip(parameters_of(model), before, strict=True):
        assert float(parameter.norm()) <= float(was.norm()) * (1 + 1e-6)


def test_a_trained_adapter_with_other_references_is_refused(trained):
    model, projector = loaded(trained)
    before = copies(model)
    other = {"set": [examples(5000, rows=1, length=3)]}
    with pytest.raises(ValueError, match="not trained in the null space"):
        projector.refresh(other, loss_of)
    assert unchanged(model, before)
    assert projector.activations is None


# Several adapters, and merging


def test_another_adapter_makes_a_refresh_due():
    model, projector = lora()
    train(model, adamw(model), sets=many())
    first = {n: a_of(layer) for n, layer in layers_of(model).items()}
    u = held(projector)
    model.add_adapter("other", OGPSAConfig(**LORA, subspace="activations", subspace_rank=8))
    assert not projector.due
    model.set_adapter("other")
    assert projector.due
    optimizer = adamw(model)
    loss_of(model, batch(0)).backward()
    with pytest.raises(RuntimeError, match="only the activation subspace of other parameters"):
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, sets=many())
    assert leak(model, held(projector), "other") <= TOLERANCE
    assert all(torch.equal(a_of(layer), first[n]) for n, layer in layers_of(model).items())
    # One base and one set of references: one subspace.
    for name, own in held(projector).items():
        torch.testing.assert_close(own @ own.T, u[name] @ u[name].T, rtol=0, atol=1e-6)
    model.set_adapter("default")
    assert projector.due
    projector.refresh(many(), loss_of)
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(a_of(layer), first[name], rtol=0, atol=1e-6)


def test_two_adapters_in_training_at_once_are_refused():
    model, projector = lora()
    model.add_adapter("other", OGPSAConfig(**LORA, subspace_rank=8, reference_weight=0))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"'default' and 'other' are in training at once.*set_adapter"):
        projector.refresh(many(), loss_of)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_a_combination_of_adapters_stays_in_the_complement(combination):
    model, projector = lora()
    train(model, adamw(model), sets=many())
    model.add_adapter("other", OGPSAConfig(**LORA, subspace="activations", subspace_rank=8))
    model.set_adapter("other")
    train(model, adamw(model), range(5, 10), sets=many())
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=combination)
    model.set_adapter("sum")
    u = held(projector)
    assert leak(model, u, "sum") <= 1e-5
    projector.refresh(many(), loss_of)
    assert leak(model, u, "sum") <= 1e-5


def test_merging_gives_the_same_outputs():
    model, _ = lora()
    train(model, adamw(model, lr=1e-4), range(20), sets=few())
    other, own = logits(model, batch(0)), logits(model, few()["set"][0])
    assert float((other - logits(tiny_llama(), batch(0))).abs().max()) > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch(0)), other, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch(0)), other, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(merged, few()["set"][0]), own, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(merged, few()["set"][0]), logits(tiny_llama(), few()["set"][0]), rtol=0, atol=1e-5
    )


def test_a_merged_adapter_is_refused():
    model, projector = lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        projector.refresh(many(), loss_of)


# Configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"subspace": "inputs"}, "Use one of: 'activations', 'gradients', 'both'"),
        ({"subspace": None}, "Use one of: 'activations', 'gradients', 'both'"),
        *[
            ({"subspace_energy": value}, "above 0 and at most 1")
            for value in (0, -0.5, 1.01, float("nan"), "0.9", True)
        ],
        ({"tokens": "prompt"}, "Use one of: 'all', 'answer'"),
        *[({"subspace_rank": value}, "integer of at least 1, or None") for value in (0, -1, 2.0, "8", True)],
        ({"rows_dtype": "int8"}, "Use rows_dtype='bfloat16', or subspace='gradients'"),
        ({"subspace": "both", "rows_dtype": "int8"}, "Use rows_dtype='bfloat16', or subspace='gradients'"),
    ],
)
@pytest.mark.parametrize("cls", [OGPSAConfig, FullParameterConfig])
def test_bad_values_are_refused(cls, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(**{"subspace": "activations", **overrides})


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        *[{"init_lora_weights": start} for start in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "mica")],
    ],
)
@pytest.mark.parametrize("subspace", ["activations", "both"])
def test_what_is_more_than_b_a_x_is_refused(subspace, overrides):
    name = list(overrides)[-1]
    with pytest.raises(ValueError, match=rf"{name}=.*subspace='gradients'"):
        OGPSAConfig(subspace=subspace, **overrides)
    OGPSAConfig(subspace="gradients", **overrides)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(100, 12)
        self.conv = torch.nn.Conv1d(12, 8, 3)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, ids):
        return self.head(self.conv(self.embed(ids).mT).mT).mean(1)


@pytest.mark.parametrize("other", ["embed", "conv"])
def test_layers_that_are_not_linear_are_refused(other):
    model = get_peft_model(Net(), OGPSAConfig(r=3, target_modules=[other, "head"], subspace="activations"))
    before = copies(model)
    with pytest.raises(ValueError, match=rf"{other}.*target_modules.*subspace='gradients'"):
        projector_of(model).refresh({"set": [batch(0)["input_ids"]]}, lambda m, b: m(b).square().mean())
    assert unchanged(model, before)


def test_the_linear_layers_of_such_a_model_are_taken():
    model = get_peft_model(Net(), OGPSAConfig(r=3, target_modules=["head"], subspace="activations", subspace_rank=2))
    projector_of(model).refresh({"set": [batch(0)["input_ids"]]}, lambda m, b: m(b).square().mean())
    tensors, (entry,) = projector_of(model).activations.state_dict()
    (layer,) = layers_of(model).values()
    assert [name.rpartition(".")[2] for name in entry["layers"]] == ["head"]
    assert float((a_of(layer) @ tensors["directions.0"].double()).norm() / a_of(layer).norm()) <= TOLERANCE
    (kind,) = projector_of(model).activations.kinds()
    assert (kind.name, kind.width) == ("head", (8, 8))


def test_layers_of_one_name_and_two_widths_show_both():
    base = torch.nn.Sequential()
    base.encoder = torch.nn.ModuleDict({"fc": torch.nn.Linear(16, 8)})
    base.decoder = torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 16)})
    _, projector = lora(base, target_modules=["fc"], task_type=None, subspace_rank=2)
    projector.refresh(
        {"set": [torch.randn(8, 9, 16)]}, lambda model, x: model.decoder.fc(model.encoder.fc(x)).square().mean()
    )
    (kind,) = projector.activations.kinds()
    assert str(kind).startswith("fc: 2 inputs of width 8 to 16. 2 directions hold")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_base_whose_biases_are_trained_is_refused(bias):
    model, projector = lora(tiny_llama(attention_bias=True), bias=bias)
    before = copies(model)
    with pytest.raises(ValueError, match=r"bias=.*Set bias='none', or use subspace='gradients'"):
        projector.refresh(many(), loss_of)
    assert unchanged(model, before)


def test_batches_that_do_not_say_which_tokens_are_the_answer_are_refused():
    _, projector = lora(tokens="answer")
    with pytest.raises(ValueError, match=r"needs `labels`.*use tokens='all'"):
        projector.refresh({"set": [{"input_ids": batch(0)["input_ids"]}]}, lambda m, b: m(**b).logits.mean())


def test_a_set_without_tokens_is_refused():
    inputs = examples()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    _, projector = lora(tokens="answer")
    with pytest.raises(ValueError, match="'set' has no token"):
        projector.refresh({"set": [inputs]}, lambda m, b: m(**b).logits.mean())


def test_a_loss_that_shifts_the_ids_is_told_to_shift_the_logits():
    _, projector = lora()

    def shifted(model, inputs):
        logits = model(inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.mT, inputs["input_ids"][:, 1:])

    with pytest.raises(ValueError, match=r"6 vectors, but the batch has 7 positions\. .*loss_fn.*shift the logits"):
        projector.refresh(many(), shifted)

    def whole_ids(model, inputs):
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.mT, inputs["input_ids"][:, 1:])

    projector.refresh(many(), whole_ids)
    assert projector.activations is not None


@pytest.mark.parametrize("subspace", ["activations", "gradients", "both"])
def test_a_refresh_under_inference_mode_is_refused(subspace):
    model, projector = lora(subspace=subspace, subspace_rank=None)
    before = copies(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"refresh\(\) .*under torch\.inference_mode\(\)"):
        projector.refresh(many(), loss_of)
    assert unchanged(model, before)
    while projector.due:
        projector.refresh(many(), loss_of)
    loss_of(model, examples()).backward()
    torch.optim.SGD(parameters_of(model), lr=1e-2).step()
    assert not unchanged(model, before)


# Before it is built


def test_a_step_before_the_build_is_an_error_that_says_what_to_add():
    model, projector = lora()
    before = copies(model)
    loss_of(model, batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"no activation subspace.*OGPSACallback.*projector\.refresh.*missing_ref"):
        adamw(model).step()
    assert unchanged(model, before)
    assert projector.due
    assert projector.unbuilt
    with pytest.raises(RuntimeError, match="refresh"):
        projector.state_dict()


@pytest.mark.parametrize(("mode", "warnings"), [("warn", 1), ("ignore", 0)])
def test_a_missing_build_can_warn_once_or_be_ignored(mode, warnings, caplog):
    model, _ = lora(missing_reference=mode)
    plain = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    for one in (model, plain):
        train(one, adamw(one), range(2))
    assert len(caplog.records) == warnings
    assert unchanged(model, copies(plain))


@pytest.mark.parametrize(("mode", "warnings"), [("error", 0), ("warn", 1), ("ignore", 0)])
def test_without_reference_gradients_only_their_weight_is_not_applied(mode, warnings, caplog):
    model, projector = lora(missing_reference=mode, reference_weight=8.0)
    other, _ = lora()
    for own in (model, other):
        own.projector.refresh(many(), loss_of)  # builds the activation subspace alone
    caplog.clear()
    if mode == "error":
        with pytest.raises(RuntimeError, match=r"no reference gradients, so the reference weight.*reference_weight=0"):
            train(model, adamw(model))
        return
    for own in (model, other):
        train(own, adamw(own))
    assert len(caplog.records) == warnings
    assert unchanged(model, copies(other))  # both are projected
    assert leak(model, held(projector)) <= TOLERANCE
    projector.refresh(many(), loss_of)
    train(model, adamw(model), range(1))
    assert not unchanged(model, copies(other))


def test_layers_that_the_weighted_gradients_do_not_reach_are_no_cause_for_a_warning(caplog):
    def of_the_first_layer(model, inputs):
        return model(**inputs, output_hidden_states=True).hidden_states[1].square().mean()

    model, projector = lora(reference_weight=1.0, refresh_steps=1)
    optimizer = adamw(model)
    projector.refresh(many(), of_the_first_layer)  # builds the activation subspace
    caplog.clear()
    for number in range(5):
        projector.refresh(many(), of_the_first_layer)
        train(model, optimizer, range(number, number + 1))
    assert projector.diagnostics.refreshes == 5
    assert not caplog.records


@pytest.mark.parametrize(("constraint", "rank"), [("cone", 4), ("orthogonal", 4), ("orthogonal", None)])
def test_with_both_subspaces_the_rank_is_that_of_the_inputs(constraint, rank):
    model, projector = lora(subspace="both", subspace_rank=rank, constraint=constraint, rows=8)
    sets = {"set": [examples(seed, rows=4) for seed in range(2)]}
    projector.refresh(sets, loss_of)
    randomize_b(model)
    projector.refresh(sets, loss_of)
    if rank is not None:
        assert all(u.shape[1] == rank for u in held(projector).values())
    assert projector.subspace.rows.filled == 8
    if constraint == "orthogonal":  # every row constrains the step
        spans = [torch.linalg.matrix_rank(part.flatten(2), rtol=1e-4) for part in projector.subspace.directions]
        assert {int(rank) for span in spans for rank in span} == {8}


def test_it_is_due_once():
    model, projector = lora()
    optimizer = adamw(model)
    due = []
    for number in range(8):
        due.append(projector.due)
        if projector.due:
            projector.refresh(many(), loss_of)
        assert not projector.unbuilt
        train(model, optimizer, range(number, number + 1))
    assert due == [True] + [False] * 7
    assert projector.refresh(many(), loss_of) == {}  # nothing is to be done
    assert projector.subspace is None


def test_training_without_projection_for_a_while(caplog):
    model, projector = lora()
    projector.refresh(many(), loss_of)
    projector.enabled = False
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    assert leak(model, held(projector)) > 100 * TOLERANCE
    assert not caplog.records
    projector.enabled = True
    assert "Not all of the adapter was in the null space" in caplog.text
    assert leak(model, held(projector)) <= TOLERANCE
    caplog.clear()
    projector.enabled = True
    train(model, optimizer, range(3, 4))
    assert leak(model, held(projector)) <= TOLERANCE
    assert not caplog.records


def other_weights(model, projector, share):
    """Put weights into the adapter whose matrices A have this share in the subspace."""
    u = held(projector)
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            inside = torch.randn(a_of(layer).shape, generator=torch.Generator().manual_seed(3)).to(u[name].dtype)
            inside = inside @ u[name] @ u[name].T
            a = layer.lora_A["default"].weight
            a.add_(inside * a.norm() / inside.norm() * share)


def test_other_weights_are_moved_into_the_null_space_at_a_reset(caplog):
    model, projector = lora()
    train(model, adamw(model), sets=many())
    before = copies(model)
    projector.reset()  # nothing has left it
    assert unchanged(model, before)
    assert not caplog.records
    other_weights(model, projector, 0.1)
    assert 0.05 < leak(model, held(projector)) < 0.2
    projector.reset()
    assert "Not all of the adapter was in the null space" in caplog.text
    assert leak(model, held(projector)) <= TOLERANCE
    for parameter, was in zip(parameters_of(model), before, strict=True):
        torch.testing.assert_close(parameter.detach(), was, rtol=0, atol=1e-5)


def test_other_weights_that_are_not_from_the_null_space_are_refused_at_a_reset():
    model, projector = lora()
    train(model, adamw(model), sets=many())
    other_weights(model, projector, 1.0)
    before = copies(model)
    with pytest.raises(ValueError, match="not trained in the null space"):
        projector.reset()
    projector.enabled = False
    projector.reset()  # the next steps are not projected
    with pytest.raises(ValueError, match="not trained in the null space"):
        projector.enabled = True
    assert not projector.enabled
    assert unchanged(model, before)
    projector.reset(rebuild=True)
    assert projector.unbuilt


def test_an_encoder_decoder_takes_examples_without_padding():
    model = get_peft_model(
        tiny_t5(), OGPSAConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", reference_weight=0.0)
    )
    ids = torch.randint(0, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    own = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model.projector.refresh({"set": [own]}, loss_of)
    assert model.projector.activations is not None
    shorter = get_peft_model(tiny_t5(), model.peft_config["default"]).projector
    shorter.refresh({"set": [{**own, "labels": ids[:, :3].clone()}]}, loss_of)
    assert shorter.activations is not None
    padded = {**own, "attention_mask": (torch.arange(8) < 5).long().expand(2, -1)}
    projector = get_peft_model(tiny_t5(), model.peft_config["default"]).projector
    with pytest.raises(ValueError, match=r"is an encoder-decoder, .* batches without padding"):
        projector.refresh({"set": [padded]}, loss_of)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    model, projector = lora(subspace_rank=2)
    projector.refresh(many(), loss_of)
    u, a = held(projector), [copy.double() for copy in copies(model)]
    model, projector = lora(subspace_rank=2)
    torch.set_default_dtype(dtype)
    try:
        projector.refresh(many(), loss_of)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(u[name], other) for name, other in held(projector).items())
    assert all(torch.equal(was, copy.double()) for was, copy in zip(a, copies(model), strict=True))


# With reference gradients


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"constraint": "orthogonal"},
        {"scope": "model"},
        {"scope": "slice", "slices": 2},
        {"rows_from": "batch"},
        {"rows": 12},
    ],
)
def test_both_constraints_hold(overrides):
    settings = {"subspace": "both", "rows": 8, "refresh_steps": 2, "reference_weight": 0.0}
    model, projector = lora(**{**settings, **overrides})
    sets = {"set": [examples(rows=4)]}
    assert projector.unbuilt
    projector.refresh(sets, loss_of)
    assert not projector.unbuilt
    assert projector.due
    projector.refresh(sets, loss_of)
    assert not projector.due
    randomize_b(model)  # with B = 0, steps of A are too small for float32 to hold exactly
    projector.refresh(sets, loss_of)
    given = []

    def step():
        optimizer.step()
        given.append(leak(model, held(projector)))

    optimizer = adamw(model)
    # Of references of their own: the rows need not be of the examples that the directions are of.
    assert max(step_violations(model, optimizer, steps=6, step=step)) <= 1e-5
    assert max(given) <= TOLERANCE


@pytest.mark.parametrize("rows", [8, 16, 12])
def test_rows_of_a_lie_in_the_complement(rows):
    # Of 12 rows the second refresh takes the last four and the first four, which are no neighbors.
    model, projector = lora(subspace="both", rows=rows, reference_weight=0.0)
    projector.refresh(many(), loss_of)
    randomize_b(model)
    for seed in range(2):
        projector.refresh({"set": [examples(seed, rows=8)]}, loss_of)
    subspace = projector.subspace
    found = dict(zip(subspace.blocks.names(), subspace.blocks.views(subspace.rows.stack), strict=True))
    u = held(projector)
    assert len(found) == 28
    for name, own in found.items():
        layer = re.sub(r"^model\.model\.(.*)\.lora_[AB].*", r"model.\1", name)
        assert own.norm() > 0
        if "lora_A" in name:
            assert float((own.double() @ u[layer]).norm() / own.double().norm()) <= 1e-6, name


@pytest.mark.parametrize("limit", [None, 1e-2])
@pytest.mark.parametrize("weight", [0.7, None])
def test_the_reference_weight_adds_the_projected_mean_gradient(weight, limit):
    sets = {"first": [{**batch(1), "reference_weight": 8.0}, batch(2)], "second": [batch(3)]}
    first, second = (8.0, 1.0) if weight is None else (weight, weight)  # a set without a weight has 1
    model, projector = lora(reference_weight=weight)
    projector.max_grad_norm = limit
    projector.refresh(sets, loss_of)
    assert projector.due
    randomize_b(model)
    losses = projector.refresh(sets, loss_of)
    assert losses.keys() == sets.keys()
    assert not projector.due
    own = torch.autograd.grad(loss_of(model, batch(0)), parameters_of(model))
    means = [
        torch.autograd.grad(sum(loss_of(model, b) for b in batches) / len(batches), parameters_of(model))
        for batches in sets.values()
    ]
    directions = {
        id(layer.lora_A["default"].weight): held(projector)[name] for name, layer in layers_of(model).items()
    }

    def outside(parameter, gradient):
        u = directions.get(id(parameter))
        return gradient.double() if u is None else gradient.double() - gradient.double() @ u @ u.T

    pairs = list(zip(parameters_of(model), *means, strict=True))
    mean = [outside(p, (a + b) / 2) for p, a, b in pairs]
    added = [outside(p, (first * a + second * b) / 2) for p, a, b in pairs]
    norm = float(torch.cat([m.flatten() for m in mean]).norm())
    factor = 1.0 if limit is None else min(1.0, limit / norm)
    optimizer = torch.optim.SGD(parameters_of(model), lr=0.0)
    for fresh in (True, False):
        loss_of(model, batch(0)).backward()
        optimizer.step()
        for p, g, m in zip(parameters_of(model), own, added, strict=True):
            expected = outside(p, g) + (factor * m if fresh else 0)
            torch.testing.assert_close(p.grad.double(), expected, rtol=1e-3, atol=1e-7)
        optimizer.zero_grad()
    # Nothing but the subspace constrains the step.
    assert "ogpsa/removed" not in projector.diagnostics.collect()


def test_sets_can_take_turns_where_their_gradients_are_only_added():
    model, projector = lora(reference_weight=1.0)
    sets = {f"set {i}": [batch(i)] for i in range(5)}
    projector.refresh(sets, loss_of)
    randomize_b(model)
    optimizer = torch.optim.SGD(parameters_of(model), lr=0.0)
    for name, batches in sets.items():
        own = torch.autograd.grad(loss_of(model, batches[0]), parameters_of(model))
        assert projector.refresh({name: batches}, loss_of).keys() == {name}
        for parameter in parameters_of(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # at a rate of 0; adds the gradient of this set, and of no other
        for layer in layers_of(model).values():
            b = layer.lora_B["default"].weight
            place = next(i for i, p in enumerate(parameters_of(model)) if p is b)
            torch.testing.assert_close(b.grad, own[place], rtol=1e-4, atol=1e-7)
        assert projector.subspace.rows.capacity == 1
    many_sets = {f"set {i}": [batch(i)] for i in range(9)}
    assert projector.refresh(many_sets, loss_of).keys() == many_sets.keys()


def test_reference_weight_and_many_steps():
    model, projector = lora(reference_weight=1.0, refresh_steps=2)
    refreshes = projector.diagnostics.refreshes
    train(model, adamw(model), range(8), sets=many())
    assert projector.diagnostics.refreshes > refreshes + 3
    assert leak(model, held(projector)) <= TOLERANCE


# State


KINDS = {
    "activations": {},
    "bfloat16": {"rows_dtype": "bfloat16"},
    "the default weight": {"reference_weight": None},
    "reference weight": {"reference_weight": 0.5, "refresh_steps": 2},
    "both": {"subspace": "both", "rows": 8, "refresh_steps": 2, "reference_weight": None},
}


def resumed(stopped, optimizer, state, **overrides):
    model, projector = lora(**overrides)
    model.load_state_dict(stopped.state_dict())
    again = adamw(model)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    projector.load_state_dict(state)
    return model, again


@pytest.mark.parametrize("kind", KINDS)
def test_state_restores_to_the_bit(kind, tmp_path):
    straight, stopped = lora(**KINDS[kind])[0], lora(**KINDS[kind])[0]
    optimizers = [adamw(straight), adamw(stopped)]
    train(straight, optimizers[0], range(6), sets=many())
    train(stopped, optimizers[1], range(3), sets=many())
    state = projector_of(stopped).state_dict()
    json.dumps(state["rest"])
    checkpoint.save(tmp_path, state)
    for given in (state, checkpoint.load(tmp_path)):
        model, optimizer = resumed(stopped, optimizers[1], given, **KINDS[kind])
        assert not projector_of(model).unbuilt
        assert projector_of(model).due == projector_of(stopped).due
        train(model, optimizer, range(3, 6), sets=many())
        assert unchanged(model, copies(straight))
        assert projector_of(model).steps == 6
        assert projector_of(model).activations.kinds() == projector_of(straight).activations.kinds()


def test_state_that_was_restored_is_that_which_was_saved():
    model, projector = lora()
    train(model, adamw(model), range(3), sets={"set": [examples(rows=9)]})
    state = projector.state_dict()
    other, _ = resumed(model, adamw(model), state)
    again = projector_of(other).state_dict()
    assert again["rest"] == state["rest"]
    assert again["tensors"].keys() == state["tensors"].keys()
    assert all(torch.equal(again["tensors"][name], tensor) for name, tensor in state["tensors"].items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"subspace": "both"}, "subspace='both' .saved: 'activations'"),
        ({"subspace": "gradients", "subspace_rank": None}, "subspace='gradients' .saved: 'activations'"),
        ({"subspace_rank": 7}, "subspace_rank=7 .saved: 8"),
        ({"subspace_energy": 0.5, "subspace_rank": None}, "subspace_energy=0.5"),
        ({"tokens": "answer"}, "tokens='answer' .saved: 'all'"),
        ({"rows_dtype": "bfloat16"}, "rows_dtype='bfloat16'"),
        ({"target_modules": ["q_proj"]}, "not the layers in training"),
    ],
)
def test_state_of_other_settings_is_refused(overrides, message):
    model, projector = lora()
    train(model, adamw(model), range(2), sets=many())
    state = projector.state_dict()
    other, own = lora(**overrides)
    before = copies(other)
    with pytest.raises(ValueError, match=message):
        own.load_state_dict(state)
    assert own.activations is None
    assert own.steps == 0
    assert unchanged(other, before)


def _without_tensor(state):
    del state["tensors"]["directions.2"]


def _without_entry(state):
    del state["rest"]["inputs"][1]


def _without_inputs(state):
    del state["rest"]["inputs"]


def _entry_twice(state):
    state["rest"]["inputs"].append(state["rest"]["inputs"][0])


def _narrow(state):
    state["tensors"]["directions.1"] = state["tensors"]["directions.1"][:16]


def _flat(state):
    state["tensors"]["directions.1"] = state["tensors"]["directions.1"].flatten()


def _fewer_columns(state):
    state["tensors"]["directions.1"] = state["tensors"]["directions.1"][:, :5]


def _not_finite(state):
    state["tensors"]["directions.1"] = torch.full_like(state["tensors"]["directions.1"], torch.nan)


def _not_orthonormal(state):
    state["tensors"]["directions.1"] = 2 * state["tensors"]["directions.1"]


DAMAGES = (
    _without_tensor,
    _without_entry,
    _without_inputs,
    _entry_twice,
    _narrow,
    _flat,
    _fewer_columns,
    _not_finite,
    _not_orthonormal,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damaged_state_is_refused_and_nothing_is_changed(damage):
    model, projector = lora()
    optimizer = adamw(model)
    train(model, optimizer, range(2), sets=many())
    good = projector.state_dict()
    state = {"tensors": {n: t.clone() for n, t in good["tensors"].items()}, "rest": copy.deepcopy(good["rest"])}
    damage(state)
    own, before = projector.activations, copies(model)
    with pytest.raises(ValueError):
        projector.load_state_dict(state)
    assert projector.activations is own
    assert unchanged(model, before)
    train(model, optimizer, range(2, 4))
    assert leak(model, held(projector)) <= TOLERANCE


def test_state_of_other_weights_is_refused():
    model, projector = lora()
    train(model, adamw(model), range(2), sets=many())
    _, own = lora()
    with pytest.raises(ValueError, match="other weights"):
        own.load_state_dict(projector.state_dict())
    assert own.activations is None


class Around(torch.optim.Optimizer):
    """Steps another optimizer. With `back`, it then goes half of the way back to where it was two steps ago."""

    def __init__(self, inner, back):
        self.inner, self.back, self.count = inner, back, 0
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.count += 1
        if self.back and self.count % 2 == 0:
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                p.copy_(slow.lerp_(p, 0.5))


def test_a_wrapper_that_does_nothing_more_changes_nothing():
    models = [lora(subspace_rank=28)[0] for _ in range(2)]
    train(models[0], adamw(models[0], lr=1e-3), range(6), sets=many())
    train(models[1], Around(adamw(models[1], lr=1e-3), back=False), range(6), sets=many())
    for one, other in zip(*map(parameters_of, models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_way_back_of_lookahead_is_not_enlarged():
    model, projector = lora(subspace_rank=30)
    projector.refresh(many(), loss_of)
    assert max(float(stack.gain.max()) for stack in projector.activations._stacks) > 4  # else it comes to rest anyway
    before = copies(model)
    train(model, Around(adamw(model, lr=1e-3), back=True), range(40), sets=many())
    for parameter, old in zip(parameters_of(model), before, strict=True):
        assert (parameter - old).norm() < 2 * old.norm().clamp(min=1)  # B was zero
    assert leak(model, held(projector)) <= TOLERANCE


def test_weights_loaded_without_a_reset_are_refused_at_the_next_step():
    other, _ = lora()
    randomize(other)
    model, projector = lora()
    projector.refresh(many(), loss_of)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    before = copies(model)
    loss_of(model, batch(0)).backward()
    for _ in range(2):  # also if the first error was caught
        with pytest.raises(ValueError, match="not trained in the null space"):
            adamw(model).step()
    assert unchanged(model, before)


def test_an_adapter_that_became_low_precision_is_refused():
    model, projector = lora()
    projector.refresh(many(), loss_of)
    model.half()
    for parameter in parameters_of(model):
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"has the dtype float16.*projector.upcast"):
        adamw(model).step()


@pytest.mark.parametrize("learned", [True, False])
def test_a_frozen_part_that_has_learned_is_named(learned, caplog):
    model, projector = lora()
    for name, parameter in model.named_parameters():
        if "layers.0." in name and "lora_" in name:
            parameter.requires_grad_(False)
            if learned:
                torch.nn.init.normal_(parameter)
    projector.refresh(many(), loss_of)
    assert ("7 matrices B of the adapter in training are frozen and not zero" in caplog.text) == learned


def test_a_first_example_without_an_answer_does_not_lift_the_limit_on_long_inputs():
    """A few long inputs count at most ten times the median length, which is that of an example with tokens."""

    def longest(first_is_empty):
        sets = {"set": [examples(100 + i) for i in range(4)]}
        for own in sets["set"]:
            own["labels"] = own["labels"].clone()
            own["labels"][:, :2] = -100
        if first_is_empty:
            sets["set"][0]["labels"][0] = -100
        base = tiny_llama()
        long = torch.where(torch.arange(7) == 4, 300.0, 1.0)[:, None]
        base.model.layers[0].mlp.up_proj.register_forward_hook(lambda *call: call[-1] * long)
        _, projector = lora(base, tokens="answer", target_modules=["down_proj"])
        projector.refresh(sets, loss_of)
        return projector.activations.inputs[0].energy

    assert longest(True) < 1.5 * longest(False)


def test_whole_weights_without_a_dimension_left_are_refused():
    model = tiny_llama()
    config = FullParameterConfig(subspace="activations", subspace_rank=32, exclude=["*norm*", "embed_tokens"])
    with pytest.raises(ValueError, match=r"takes all 32 dimensions of the input of .*Set a smaller subspace_rank"):
        attach(model, config).refresh(many(), loss_of)


def test_settings_travel_with_the_adapter(tmp_path):
    model, _ = lora(subspace_energy=0.7, tokens="answer", subspace_rank=None)
    model.save_pretrained(tmp_path)
    config = loaded(tmp_path)[1].config
    assert (config.subspace, config.subspace_rank, config.subspace_energy, config.tokens) == (
        "activations",
        None,
        0.7,
        "answer",
    )


# Whole weights


def whole(**overrides):
    model = tiny_llama()
    settings = {"subspace": "activations", "subspace_rank": 8, "exclude": NOT_LINEAR, **overrides}
    return model, attach(model, FullParameterConfig(**settings))


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens"])
def test_either_name_of_a_tied_weight_excludes_it(pattern):
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    targets = attach(model, FullParameterConfig(exclude=[pattern]))._parameters.targets
    names = [name for name, _, _ in targets.trained()]
    assert "model.norm.weight" in names
    assert not [name for name in names if "embed_tokens" in name or "lm_head" in name]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_whole_weights_change_outside_the_subspace_alone(name):
    # What is excluded is trained freely here, so the layers' inputs move; what the layers do to the old ones does not.
    model, projector = whole()
    optimizer = OPTIMIZERS[name](parameters_of(model)) if name != "adamw" else adamw(model, lr=1e-3)
    start = {n: p.detach().double() for n, p in tiny_llama().named_parameters()}
    sets = few()
    train(model, optimizer, range(50), sets=sets)
    inputs = watched(tiny_llama(), held(projector), sets)
    for own, parameter in model.named_parameters():
        change = parameter.detach().double() - start[own]
        layer = own.removesuffix(".weight")
        assert change.norm() > 1e-3, own
        assert (layer in inputs) == (own.endswith("_proj.weight"))
        if layer in inputs:
            u = held(projector)[layer]
            assert float((change @ u).norm() / change.norm()) <= 1e-5, own
            x = inputs[layer][0]
            assert float((change @ x.T).norm() / (change.norm() * torch.linalg.matrix_norm(x, 2))) <= 1e-5, own


def test_reference_outputs_of_whole_weights_stay_where_all_else_is_frozen():
    model, _ = whole(exclude=())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_proj.weight"))
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-3, weight_decay=0.1)
    train(model, optimizer, range(20), sets=few())
    base, inputs = tiny_llama(), few()["set"][0]
    torch.testing.assert_close(logits(model, inputs), logits(base, inputs), rtol=0, atol=1e-5)
    assert float((logits(model, batch(0)) - logits(base, batch(0))).abs().max()) > 1e-2


def test_whole_weights_that_are_not_of_linear_layers_are_named():
    model, projector = whole(exclude=())
    before = copies(model)
    with pytest.raises(ValueError, match=r"6 other parameters.*model\.embed_tokens\.weight.*exclude"):
        projector.refresh(few(), loss_of)
    assert unchanged(model, before)


class Masked(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * (self.weight > 0))


def test_whole_weights_of_layers_with_a_forward_of_their_own_are_refused():
    model = torch.nn.Sequential(Masked(12, 12, bias=False), torch.nn.Linear(12, 3, bias=False))
    before = copies(model)
    given = {"set": [torch.randn(8, 3, 12)]}
    projector = attach(model, FullParameterConfig(subspace="activations", subspace_rank=4))
    with pytest.raises(ValueError, match=r"1 other parameters.*0\.weight.*exclude.*a Masked, .*subspace='gradients'"):
        projector.refresh(given, lambda net, x: net(x).mean())
    assert unchanged(model, before)
    assert projector.activations is None
    excluded = attach(model, FullParameterConfig(subspace="activations", subspace_rank=4, exclude=["0"]))
    excluded.refresh(given, lambda net, x: net(x).mean())
    assert [item.layers for item in excluded.activations.inputs] == [("1",)]


def test_weights_of_several_layers_are_refused():
    tied = tiny_llama(tie_word_embeddings=True)
    twice = tiny_llama()
    twice.model.layers[1].mlp.up_proj.weight = twice.model.layers[0].mlp.up_proj.weight
    for model, exclude, name in (
        (tied, ["*norm*"], "embed_tokens.weight"),
        (twice, NOT_LINEAR, r"layers\.0\.mlp\.up_proj\.weight"),
    ):
        projector = attach(model, FullParameterConfig(subspace="activations", exclude=exclude))
        with pytest.raises(ValueError, match=name):
            projector.refresh(few(), loss_of)
        assert projector.activations is None


def test_whole_weights_of_low_precision_are_refused():
    model, projector = whole()
    model.bfloat16()
    with pytest.raises(ValueError, match=r"has the dtype bfloat16.*dtype=torch\.float32"):
        projector.refresh(few(), loss_of)


def test_state_of_whole_weights_restores_to_the_bit():
    (straight, _), (stopped, second), (again, third) = whole(), whole(), whole()
    optimizers = [adamw(model, lr=1e-3) for model in (straight, stopped, again)]
    train(straight, optimizers[0], range(6), sets=many())
    train(stopped, optimizers[1], range(3), sets=many())
    again.load_state_dict(stopped.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    third.load_state_dict(second.state_dict())
    train(again, optimizers[2], range(3, 6))
    assert unchanged(again, copies(straight))


# A new stage, and figures


def test_reset_keeps_a_subspace_in_use_and_drops_another():
    model, projector = lora()
    projector.refresh(many(), loss_of)
    projector.reset()
    assert projector.activations is None
    assert projector.due
    optimizer = adamw(model)
    train(model, optimizer, sets=many())
    own = projector.activations
    projector.reset()
    assert projector.activations is own
    assert not projector.due
    assert projector.steps == 0
    train(model, optimizer, range(5, 8))
    assert leak(model, held(projector)) <= TOLERANCE


def test_reset_keeps_the_subspace_of_whole_weights():
    model, projector = whole()
    train(model, adamw(model, lr=1e-3), range(2), sets=many())
    own = projector.activations
    projector.reset()
    assert projector.activations is own


@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_dropped_subspace_is_freed(end):
    _, projector = lora()
    projector.refresh(many(), loss_of)
    own = weakref.ref(projector.activations)
    getattr(projector, end)()
    gc.collect()
    assert own() is None
    assert projector.diagnostics.collect().keys() <= {"ogpsa/seconds_build", "ogpsa/seconds_projection"}


class Sign(torch.optim.Optimizer):
    """A step that the gradient's projection does not keep in the complement."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize("make", [Sign, lambda p: torch.optim.SGD(p, lr=1e-2)], ids=["sign", "sgd"])
def test_removed_is_the_share_of_the_step(make):
    model, projector = lora()
    projector.refresh(many(), loss_of)
    randomize_b(model)
    optimizer = make(parameters_of(model))
    loss_of(model, batch(0)).backward()
    sums: dict[str, list[float]] = {}
    names = ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
    kinds = {layer: kind for kind in names for layer in kind.split("+")}
    for name, layer in layers_of(model).items():
        u = held(projector)[name]
        g = layer.lora_A["default"].weight.grad.double()
        g = g - g @ u @ u.T  # the optimizer is given what is left of the gradient
        step = g.sign() if make is Sign else g
        own = sums.setdefault(kinds[name.rpartition(".")[2]], [0.0, 0.0])
        own[0] += float((step @ u).square().sum())
        own[1] += float(step.square().sum())
    optimizer.step()
    figures = projector.diagnostics.collect()
    for kind, (inside, total) in sums.items():
        removed = figures[f"ogpsa/removed/{kind}"]
        assert 0 <= removed <= 1
        assert removed == pytest.approx((inside / total) ** 0.5, rel=1e-3, abs=1e-3)
    assert not any("ogpsa/removed" in name for name in projector.diagnostics.collect())  # since the last call


def test_energies_of_held_out_examples_are_reported_once():
    sets = {"set": [examples(rows=8), examples(101, rows=9)]}
    model, projector = lora()
    projector.refresh(sets, loss_of)
    figures = projector.diagnostics.collect()
    energies = {name.removeprefix("ogpsa/energy/"): value for name, value in figures.items() if "energy" in name}
    assert list(energies) == ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
    # Every eighth example is not among those that the directions are of.
    out = {"set": [{n: t[7:8] for n, t in inputs.items()} for inputs in sets["set"]]}
    inputs = watched(tiny_llama(), layers_of(model), out)
    for kind, value in energies.items():
        names = [name for name in inputs if name.endswith(kind.split("+")[0])]
        shares = [
            float((inputs[n][0] @ held(projector)[n]).square().sum() / inputs[n][0].square().sum()) for n in names
        ]
        assert value == pytest.approx(sum(shares) / len(shares), rel=1e-4)
        assert 0 < value < 1
    train(model, adamw(model), range(2))
    assert not any("energy" in name for name in projector.diagnostics.collect())


def test_without_held_out_examples_there_is_no_such_figure():
    _, projector = lora()
    projector.refresh(few(), loss_of)
    assert not any("energy" in name for name in projector.diagnostics.collect())


def test_memory_counts_the_directions():
    _, projector = lora()
    projector.refresh(many(), loss_of)
    held_bytes, step_bytes = projector.memory(1)
    # Two layers, three inputs of width 32 and one of 64, eight directions of four bytes.
    assert held_bytes == 2 * (3 * 32 + 64) * 8 * 4
    assert step_bytes > 0
    # Nothing else holds them: a view would keep all of its storage.
    assert all(own.directions.untyped_storage().nbytes() == 0 for own in projector.activations.inputs)


def test_memory_of_a_step_counts_directions_that_are_converted():
    steps = []
    for dtype in ("float32", "bfloat16"):
        _, projector = lora(rows_dtype=dtype)
        projector.refresh(many(), loss_of)
        steps.append(projector.memory(1)[1])
    stacks = [stack.basis.numel() for stack in projector.activations._stacks]
    assert 4 * min(stacks) <= steps[1] - steps[0] <= 4 * max(stacks)


# Models that are changed after the build


def test_a_model_can_be_converted_by_swapping_its_tensors():
    """As `model.to` does with parameters that FSDP2 shards. torch swaps no tensor with weak references."""
    model, projector = lora()
    projector.refresh(many(), loss_of)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())


def test_a_subspace_that_stayed_on_another_device_is_built_again():
    _, projector = lora()
    projector.refresh(many(), loss_of)
    assert not projector.due
    stack = projector.activations._stacks[-1]
    object.__setattr__(stack, "basis", stack.basis.to("meta"))  # as if the model alone had been moved
    assert projector.unbuilt
    assert projector.due


def test_an_adapter_may_have_a_colon_in_its_name():
    settings = {**LORA, "subspace": "activations", "subspace_rank": 8, "reference_weight": 0.0}
    model = get_peft_model(tiny_llama(), OGPSAConfig(**settings), adapter_name="a:b")
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    train(model, optimizer, sets=many())
    assert model.base_model.projector.steps == 5
