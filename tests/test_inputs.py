"""The inputs' directions against the eigenvectors of second moments that hooks of this file collect in float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import VOCABULARY, tiny_llama, tokens
from torch import nn

from peft_ogpsa.core import inputs, watcher
from peft_ogpsa.core.examples import HELD_OUT
from peft_ogpsa.core.inputs import Input

RANK = 24  # with it, widths 32 and 64 are held whole


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def pass_batch(model, batch):
    """What a loop's loss function does, without the loss."""
    if isinstance(batch, dict):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch)


def find(model, batches, layers=None, forward=pass_batch, **overrides) -> list[Input]:
    settings = {"most": lambda width: width // 2, **overrides}
    with torch.no_grad():
        return inputs.find(linear_layers(model) if layers is None else layers, forward, model, batches, **settings)


def one(model, batches, **overrides) -> Input:
    (found,) = find(model, batches, **overrides)
    return found


def by_layer(found: list[Input]) -> dict[str, Input]:
    return {layer: item for item in found for layer in item.layers}


@dataclass
class Moment:
    """Second moments of what a layer is given: of the examples that are used, and of those held out."""

    used: torch.Tensor | float = 0.0
    held: torch.Tensor | float = 0.0
    vectors: list = field(default_factory=list)  # of the current batch

    def values(self) -> np.ndarray:
        return np.linalg.eigvalsh(self.used.numpy())[::-1].copy()

    def share_held(self, directions: torch.Tensor) -> float:
        return float(torch.trace(directions.T @ self.held @ directions) / torch.trace(self.held))


def chosen(batch, which: str) -> torch.Tensor | None:
    if not isinstance(batch, dict):
        return None
    if which == "answer":
        return batch["labels"] != -100
    return batch["attention_mask"].bool() if "attention_mask" in batch else None


def moments(model, batches, which="all", layers=None, forward=pass_batch) -> dict[str, Moment]:
    """By layer. Inputs must be `(examples, ..., width)`, or flat with as many vectors for each example."""
    layers = linear_layers(model) if layers is None else layers
    found = {name: Moment() for name in layers}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found[name].vectors.append(args[0]))
        for name, module in layers.items()
    ]
    for own in batches.values():
        parts = {name: {"used": [], "held": []} for name in layers}
        seen = 0
        for batch in own:
            with torch.no_grad():
                forward(model, batch)
            where = chosen(batch, which)
            size = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
            for name, moment in found.items():
                for vectors in moment.vectors:
                    examples = vectors.double().reshape(size, -1, vectors.shape[-1])
                    for i in range(size):
                        kept = examples[i] if where is None else examples[i][where[i]]
                        parts[name]["held" if (seen + i) % 8 == 7 else "used"].append(kept)
                moment.vectors = []
            seen += size
        for name, moment in found.items():
            for kind, pieces in parts[name].items():
                if pieces and len(flat := torch.cat(pieces)):
                    setattr(moment, kind, getattr(moment, kind) + flat.T @ flat / len(flat) / len(batches))
    for handle in handles:
        handle.remove()
    return found


def assert_leading(item: Input, moment: Moment, tolerance=1e-5):
    """The directions are eigenvectors, and those with the largest eigenvalues."""
    directions = item.directions.double()
    values, k = moment.values(), len(item.energies)
    np.testing.assert_allclose(item.energies.numpy(), values[:k], atol=tolerance * values[0])
    assert (moment.used @ directions - directions * item.energies).norm(dim=0).max() < tolerance * values[0]
    assert (directions.T @ directions - torch.eye(k).double()).abs().max() < 1e-6
    assert item.energy == pytest.approx(values.sum(), rel=1e-5)


def assert_captured(item: Input, moment: Moment, least=0.99):
    best = moment.values()[: len(item.energies)].sum()
    directions = item.directions.double()
    share = float(torch.trace(directions.T @ moment.used @ directions)) / best
    assert share >= least
    assert item.energy == pytest.approx(moment.values().sum(), rel=1e-5)


def padded(rows: int, length: int = 9, side: str = "right", seed: int = 0, low: int = 3) -> dict:
    """Rows of different lengths. Padding is a token like any other, whose vectors would count if they were taken."""
    ids = tokens(rows, length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = torch.randint(low, length + 1, (rows,), generator=generator)
    lengths[0] = low
    mask = torch.arange(length) < lengths.unsqueeze(1)
    labels = torch.where(mask & (torch.arange(length) >= 2), ids, -100)  # a prompt of two tokens, then the answer
    if side == "left":
        ids, mask, labels = ids.flip(1), mask.flip(1), labels.flip(1)
    return {"input_ids": ids.masked_fill(~mask, 7), "attention_mask": mask.long(), "labels": labels}


def power_law(rows: int, length: int, width: int, exponent: float) -> torch.Tensor:
    """Vectors whose energies fall slowly, `(rows, length, width)`."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scales = torch.arange(1, width + 1).float() ** (-exponent / 2)
    return torch.randn(rows, length, width, generator=generator) * scales @ axes


def wide_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8))


class Net(nn.Module):
    """Embeds ids and then does what `body(net, hidden, mask)` says with two layers."""

    def __init__(self, body, width=16):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.body, self.calls = body, 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        return self.body(self, self.embed(input_ids), input_ids)


# Which layers share an input


def test_layers_of_llama_that_share():
    found = find(tiny_llama(), {"set": [padded(7)]}, rank=RANK)
    expected = []
    for i in range(2):
        layer = f"model.layers.{i}"
        expected += [
            tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
            (f"{layer}.self_attn.o_proj",),
            (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
            (f"{layer}.mlp.down_proj",),
        ]
    assert [item.layers for item in found] == expected
    assert [item.width for item in found] == [32, 32, 32, 64] * 2
    assert all(item.directions.shape == (item.width, RANK) for item in found)


def test_equal_tensors_are_not_shared():
    found = find(Net(lambda net, x, _: net.a(x) + net.b(x.clone())), {"set": [{"input_ids": tokens()}]})
    assert [item.layers for item in found] == [("a",), ("b",)]


def test_tensors_whose_ids_are_used_again():
    # Each is freed after its layer's call, and before long another one has its id.
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(50))

    def forward(model, batch):
        for i, layer in enumerate(model):
            layer(batch * i + 1)

    found = find(model, {"set": [torch.randn(3, 4)]}, forward=forward)
    assert [item.layers for item in found] == [(str(i),) for i in range(50)]


def test_tensor_changed_in_place():
    # One tensor, but not one input: b is given something else than a was.
    def body(net, x, _):
        net.a(x)
        x[..., 0] += 5
        return net.b(x)

    model, batches = Net(body), {"set": [{"input_ids": tokens(4)}]}
    layers = {"a": model.a, "b": model.b}
    # The oracle copies: what a was given is changed afterwards.
    copies = {"a": [], "b": []}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: copies[name].append(args[0].detach().clone()))
    with torch.no_grad():
        pass_batch(model, batches["set"][0])
    exact = {name: float(own[0].double().square().sum(-1).mean()) for name, own in copies.items()}
    assert exact["b"] > 2 * exact["a"]
    for name, item in by_layer(find(model, batches)).items():
        assert item.energy == pytest.approx(exact[name], rel=1e-5)


# Directions


@pytest.mark.parametrize("which", ["all", "answer"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_directions_of_llama(side, which):
    model = tiny_llama()
    batches = {"one": [padded(4, side=side), padded(6, 11, side, seed=2)], "two": [padded(2, side=side, seed=4)]}
    found, exact = by_layer(find(model, batches, rank=RANK, tokens=which)), moments(model, batches, which)
    assert len(found) == 14
    for name, item in found.items():
        assert_leading(item, exact[name])


def test_directions_of_a_model_in_bfloat16():
    model, batches = tiny_llama().bfloat16(), {"set": [padded(4)]}
    exact = moments(model, batches)
    for name, item in by_layer(find(model, batches, rank=RANK)).items():
        assert item.directions.dtype == torch.float32
        # Splitting the batch in examples changes how bfloat16 rounds, so this is not as close as in float32.
        assert_captured(item, exact[name], 0.999)


def test_sets_count_the_same():
    # By hand: six rows along one axis, and one along another, of twice the length.
    axes = torch.eye(4)
    item = one(nn.Linear(4, 2), {"many": [axes[[1] * 5], axes[[1]]], "few": [2 * axes[[3]]]}, layers=None, rank=4)
    assert item.energies.tolist() == pytest.approx([2, 0.5])
    assert item.energy == pytest.approx(2.5)
    assert torch.allclose(item.directions.abs(), axes[:, [3, 1]])


@pytest.mark.parametrize("first", ["x", "classes"])
@pytest.mark.parametrize("key", ["x", "inputs_embeds", "input_ids"])
def test_sets_count_the_same_in_any_order_of_a_batchs_keys(key, first):
    # Without a mask, tokens are counted from the tensor that has them, and not from one class for each example.
    axes = torch.eye(4)
    if key == "input_ids":
        model = Net(lambda net, x, _: net.a(x), width=4)
        model.embed.weight.data = axes.repeat(25, 1)
        one_set, other = torch.full((5, 3), 1), torch.full((5, 3), 3)
        layers = {"a": model.a}
    else:
        model, layers = nn.Linear(4, 2), None
        one_set, other = axes[1].expand(5, 3, 4), axes[3].expand(5, 3, 4)
    classes = torch.zeros(5, dtype=torch.long)
    second = {key: other, "classes": classes} if first == "x" else {"classes": classes, key: other}
    batches = {"one": [{key: one_set, "classes": classes}], "two": [second]}
    item = one(model, batches, layers=layers, forward=lambda model, batch: model(batch[key]), rank=4)
    assert item.energies.tolist() == pytest.approx([0.5, 0.5])
    assert item.energy == pytest.approx(1)


def test_tokens_of_a_set_count_the_same():
    # By hand: one example of a single token along an axis, and another of three along the other.
    model = Net(lambda net, x, _: net.a(x), width=4)
    model.embed.weight.data = torch.eye(4).repeat(25, 1)
    ids = torch.tensor([[0, 2, 2], [1, 1, 1]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    other = {"input_ids": torch.full((5, 3), 3), "attention_mask": torch.ones(5, 3)}
    for batches in ([batch], [{key: value[[i]] for key, value in batch.items()} for i in range(2)]):
        item = one(model, {"set": batches, "other": [other]}, layers={"a": model.a}, rank=4)
        assert item.energies.tolist() == pytest.approx([0.5, 0.375, 0.125])
        assert torch.allclose(item.directions.abs(), torch.eye(4)[:, [3, 1, 0]])


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 12)])
def test_batches_that_are_tensors(shape):
    first, second, third = torch.randn(3, *shape)
    model, batches = nn.Linear(12, 3), {"one": [first, second[:1]], "two": [third]}
    item = one(model, batches, rank=12)
    assert item.layers == ("",)
    assert_leading(item, moments(model, batches)[""])


def test_batches_that_are_lists():
    model, vectors = nn.Linear(12, 3), torch.randn(5, 12)
    forward = lambda model, batch: model(batch[0])  # noqa: E731
    item = one(model, {"set": [[vectors, "a note", torch.ones(5)]]}, forward=forward, rank=12)
    assert_leading(item, moments(model, {"set": [vectors]})[""])


def test_mapping_without_a_mask():
    # Every position is a token then.
    model, batches = tiny_llama(), {"set": [{"input_ids": tokens(3)}], "other": [{"input_ids": tokens(2, 5)}]}
    exact = moments(model, batches)
    for name, item in by_layer(find(model, batches, rank=RANK)).items():
        assert_leading(item, exact[name])


def test_answers_need_no_mask():
    model, batch = tiny_llama(), padded(3)
    del batch["attention_mask"]
    exact = moments(model, {"set": [batch]}, "answer")
    for name, item in by_layer(find(model, {"set": [batch]}, tokens="answer", rank=RANK)).items():
        assert_leading(item, exact[name])


@pytest.mark.parametrize("which", ["all", "answer"])
def test_flattened_inputs(which):
    # OPT's layers are given (examples * tokens, width).
    model = Net(lambda net, x, _: net.b(net.a(x.view(-1, 16)).relu()))
    batches = {"set": [padded(4), padded(3, side="left", seed=5)]}
    found = by_layer(find(model, batches, tokens=which, rank=16))
    exact = moments(model, batches, which)
    for name in ("a", "b"):
        assert_leading(found[name], exact[name])


def test_values_at_padding_may_be_anything():
    def body(net, x, ids):
        return net.a(x.masked_fill((ids == 7).unsqueeze(-1), float("nan")))

    model, batch = Net(body), padded(5)
    batch["input_ids"].masked_fill_(batch["attention_mask"].bool() & (batch["input_ids"] == 7), 8)
    layers = {"a": model.a}
    item = one(model, {"set": [batch]}, layers=layers, rank=16)
    assert_leading(item, moments(model, {"set": [batch]}, layers=layers)["a"])


def test_keyword_argument():
    model = Net(lambda net, x, _: net.a(input=x))
    batches = {"set": [padded(4)]}
    positional = Net(lambda net, x, _: net.a(x))
    positional.load_state_dict(model.state_dict())
    item = one(model, batches, layers={"a": model.a}, rank=16)
    assert_leading(item, moments(positional, batches, layers={"a": positional.a})["a"])


def test_layer_used_twice():
    model = Net(lambda net, x, _: net.a(net.a(x).relu()))
    batches, layers = {"set": [padded(4)]}, {"a": model.a}
    exact = moments(model, batches, layers=layers)["a"]
    exact.used = 2 * exact.used  # the sum of both, where this file's oracle is their mean
    item = one(model, batches, layers=layers, rank=16)
    assert_leading(item, exact)


# Held-out examples


def test_held_out():
    # Counted through a set's batches: indices 7 and 15 of 16, 7 of 9 and none of 3.
    model = tiny_llama()
    batches = {
        "sixteen": [padded(5, seed=i) for i in range(3)] + [padded(1, seed=8)],
        "nine": [padded(7, 6, seed=5), padded(2, 12, seed=6)],
        "three": [padded(3, seed=7)],
    }
    exact = moments(model, batches)
    shares = {}
    for name, item in by_layer(find(model, batches, rank=RANK)).items():
        assert_leading(item, exact[name])  # none of the held-out examples is in them
        assert item.held_out == pytest.approx(exact[name].share_held(item.directions.double()), rel=1e-5)
        shares[name] = item.held_out
    few = by_layer(find(model, batches, rank=2))
    assert all(few[name].held_out < shares[name] for name in few)  # it is that of the directions that are kept


def test_held_out_of_answers():
    model = tiny_llama()
    batches = {"set": [padded(6, seed=1), padded(5, seed=2)]}
    exact = moments(model, batches, "answer")
    for name, item in by_layer(find(model, batches, rank=RANK, tokens="answer")).items():
        assert_leading(item, exact[name])
        assert item.held_out == pytest.approx(exact[name].share_held(item.directions.double()), rel=1e-5)


def test_nothing_held_out():
    batches = {"seven": [padded(4), padded(3)], "two": [padded(2)]}
    assert all(item.held_out is None for item in find(tiny_llama(), batches, rank=4))


def test_batch_that_is_held_out_altogether():
    model = tiny_llama()
    batches = {"set": [padded(7), padded(1, seed=3), padded(2, seed=4)]}
    exact = moments(model, batches)
    for name, item in by_layer(find(model, batches, rank=RANK)).items():
        assert_leading(item, exact[name])
        assert item.held_out == pytest.approx(exact[name].share_held(item.directions.double()), rel=1e-5)


def test_held_out_examples_without_a_token():
    # The set has answers. That the one example that is held out has none is no reason to stop.
    batch = padded(9)
    batch["labels"][HELD_OUT - 1] = -100
    model = tiny_llama()
    exact = moments(model, {"set": [batch]}, "answer")
    for name, item in by_layer(find(model, {"set": [batch]}, rank=RANK, tokens="answer")).items():
        assert_leading(item, exact[name])
        assert item.held_out is None


# How many directions


@pytest.mark.parametrize("rank", [1, 3, 24])
def test_rank(rank):
    found = find(tiny_llama(), {"set": [padded(7, 20)]}, rank=rank, energy=0.1, most=lambda _: 2)
    assert all(item.directions.shape == (item.width, rank) and item.energies.shape == (rank,) for item in found)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_energy(energy):
    model, batches = tiny_llama(), {"set": [padded(7, 20)]}
    exact = moments(model, batches)
    for name, item in by_layer(find(model, batches, energy=energy, most=lambda width: width)).items():
        reached = exact[name].values().cumsum() / exact[name].values().sum()
        assert len(item.energies) == item.directions.shape[1] == 1 + (reached < energy).sum()
        assert item.share >= energy
        assert item.share == pytest.approx(reached[len(item.energies) - 1], rel=1e-5)


def test_most_directions():
    widths = []

    def most(width):
        widths.append(width)
        return width // 8

    found = find(tiny_llama(), {"set": [padded(7, 20)]}, energy=0.9999, most=most)
    assert [len(item.energies) for item in found] == [4, 4, 4, 8] * 2
    assert set(widths) == {32, 64}
    few = find(tiny_llama(), {"set": [padded(7, 20)]}, energy=0.01, most=lambda _: 5)
    assert all(len(item.energies) == 1 for item in few)


def test_fewer_vectors_than_rank():
    vectors = torch.randn(3, 12)
    for overrides in ({"rank": 8}, {"energy": 1.0}):
        item = one(nn.Linear(12, 2), {"set": [vectors]}, most=lambda _: 8, **overrides)
        assert item.directions.shape == (12, 3)
        assert item.share == pytest.approx(1, abs=1e-5)


def test_inputs_of_zeros():
    # No energy, hence no direction: nothing is divided by it.
    item = one(nn.Linear(12, 2), {"set": [torch.zeros(9, 12)]}, energy=0.9)
    assert item.directions.shape == (12, 0)
    assert (item.energy, item.share, item.held_out) == (0, 0, None)


# Wide inputs


def test_wide_layers_of_an_mlp():
    model = wide_mlp()
    batches = {"one": [power_law(8, 16, 32, 0.5) for _ in range(4)], "two": [power_law(6, 16, 32, 1.0)]}
    exact = moments(model, batches)
    found = by_layer(find(model, batches, rank=8))
    assert set(found) == {"0", "2", "4"}
    for name, item in found.items():
        assert item.directions.shape == (item.width, 8)
        assert_captured(item, exact[name])
        assert item.held_out == pytest.approx(exact[name].share_held(item.directions.double()), rel=1e-5)


def words(rows: int, length: int, seed: int, side: str = "right") -> dict:
    """As `padded`, and of tokens that are as unequally common as words."""
    batch = padded(rows, length, side, seed, low=length // 2)
    common = torch.arange(1, VOCABULARY + 1).double().reciprocal()
    drawn = torch.multinomial(common, rows * length, True, generator=torch.Generator().manual_seed(seed))
    ids = drawn.view(rows, length)
    return {**batch, "input_ids": ids, "labels": ids.masked_fill(batch["labels"] == -100, -100)}


@pytest.mark.parametrize("which", ["all", "answer"])
def test_wide_layers_of_llama(which):
    model = tiny_llama(intermediate_size=256)
    batches = {"one": [words(12, 48, i) for i in range(3)], "two": [words(10, 60, 4, "left")]}
    exact = moments(model, batches, which)
    for name, item in by_layer(find(model, batches, rank=8, tokens=which)).items():
        assert_captured(item, exact[name], 0.99 if item.width == 256 else 0.99999)


@pytest.mark.parametrize("size", [28, 7, 2, 1])
def test_wide_layers_at_any_batch_size(size):
    # The turns share the examples among them, however these are cut into batches.
    model, vectors = nn.Linear(256, 4), power_law(28, 40, 256, 0.5)
    batches = {"set": list(vectors.split(size))}
    assert_captured(one(model, batches, rank=8), moments(model, batches)[""])


def test_wide_layers_with_few_examples():
    # Some turns have nothing then.
    model, batches = nn.Linear(256, 4), {"set": [power_law(2, 200, 256, 1.0)]}
    assert_captured(one(model, batches, rank=8), moments(model, batches)[""])


@pytest.mark.parametrize("width", [32, 256])
def test_examples_are_passed_twice_where_layers_are_wide(width):
    sizes = []

    def forward(model, batch):
        sizes.append(len(batch))
        return model(batch)

    kept = []

    def progress(parts):
        kept.extend(parts)
        return iter(parts)

    batches = {"set": [torch.randn(9, width), torch.randn(5, width)]}
    one(nn.Linear(width, 2), batches, rank=8, forward=forward, progress=progress)
    first, used, held = 1, 13, 1
    assert sum(sizes) == first + (2 if width == 256 else 1) * used + held
    assert max(sizes) <= 9  # no more at once than the batches have
    assert len(kept) == 2


@pytest.mark.parametrize("width", [32, 256])
def test_under_autocast(width):
    # Accelerate runs the model's forward pass under autocast, and so what the hooks do.
    model, batches = nn.Linear(width, 4), {"set": [power_law(12, 30, width, 1.0)]}

    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    item, exact = one(model, batches, rank=8, forward=forward), moments(model, batches)[""]
    assert_captured(item, exact)
    assert item.held_out == pytest.approx(exact.share_held(item.directions.double()), rel=1e-5)


# Refusals


def routed(net, x, ids):
    return net.a(x[ids % 2 == 0])


def test_routed_inputs_with_padding():
    model = Net(routed)
    with pytest.raises(ValueError, match=r"layer a receives \d+ vectors.*9 positions.*batch_size=1"):
        find(model, {"set": [padded(4)]}, layers={"a": model.a}, rank=4)


def test_routed_inputs_without_padding():
    model, ids = Net(routed), tokens(4, 9)
    batches = {"set": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]}
    item = one(model, batches, layers={"a": model.a}, rank=16)
    vectors = model.embed(ids[ids % 2 == 0]).double().detach()
    assert_leading(item, Moment(vectors.T @ vectors / ids.numel()))


def test_layer_that_is_never_called():
    model = Net(lambda net, x, _: net.a(x))
    with pytest.raises(ValueError, match=r"1 adapted layers.*One of them is b\."):
        find(model, {"set": [padded(4)]})


@pytest.mark.parametrize("first", [True, False])
def test_layers_that_do_not_always_share(first):
    def body(net, x, _):
        return net.a(x) + net.b(x if (net.calls == 1) == first else x.relu())

    with pytest.raises(ValueError, match="layer b first received the input of"):
        find(Net(body), {"set": [padded(4), padded(3)]})


def test_layer_with_an_input_of_its_own_besides_a_shared_one():
    with pytest.raises(ValueError, match="layer b first received the input of a and then the input of b"):
        find(Net(lambda net, x, _: net.a(x) + net.b(net.b(x))), {"set": [padded(4)]})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("width", [16, 256])
@pytest.mark.parametrize("example", [0, 5, HELD_OUT - 1])
def test_inputs_that_are_not_finite(example, width, value):
    vectors = torch.randn(9, 4, width)
    vectors[example, 2, 3] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        find(nn.Linear(width, 2), {"set": [vectors]}, rank=4)


@pytest.mark.parametrize("batch", [{"input_ids": tokens(2)}, tokens(2)])
def test_answers_without_labels(batch):
    model = Net(lambda net, x, _: net.a(x))
    with pytest.raises(ValueError, match=r"'second'.*use tokens='all'"):
        find(model, {"first": [padded(2)], "second": [batch]}, layers={"a": model.a}, tokens="answer")


@pytest.mark.parametrize("key", ["input_ids", "attention_mask"])
def test_labels_that_are_not_one_per_token(key):
    # Labels of classes. None of them is -100, so padding would count, too.
    model = Net(lambda net, x, _: net.a(x))
    batch = {key: padded(4)[key], "labels": torch.tensor([0, 2, 1, 0])}
    with pytest.raises(ValueError, match=rf"'second' `labels` .*\(4,\) and `{key}` .*\(4, 9\).*use tokens='all'"):
        find(
            model,
            {"first": [padded(2)], "second": [batch]},
            layers={"a": model.a},
            forward=lambda net, own: net(own.get("input_ids", tokens(4, 9))),
            tokens="answer",
        )


@pytest.mark.parametrize("which", ["all", "answer"])
def test_set_without_a_token(which):
    empty = padded(2)
    empty["labels" if which == "answer" else "attention_mask"].fill_(-100 if which == "answer" else 0)
    with pytest.raises(ValueError, match="'second' has no token"):
        find(tiny_llama(), {"first": [padded(2)], "second": [empty, empty]}, tokens=which)


def test_example_without_a_token():
    # Not every example needs one.
    model, batch = tiny_llama(), padded(4)
    batch["labels"][0] = -100
    exact = moments(model, {"set": [batch]}, "answer")
    for name, item in by_layer(find(model, {"set": [batch]}, tokens="answer", rank=RANK)).items():
        assert_leading(item, exact[name])


# The same again


def whole(item: Input) -> torch.Tensor:
    directions = item.directions.double()
    return directions * item.energies @ directions.T


def test_order_and_size_of_batches():
    model, batch, other = tiny_llama(), padded(7), padded(3, seed=9)
    rows = [{key: value[[i]] for key, value in batch.items()} for i in range(7)]
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(4, 7), slice(0, 4))]
    settings = {"most": lambda width: width, "energy": 1.0}
    found = find(model, {"set": [batch], "other": [other]}, **settings)
    for again in (rows, rows[::-1], halves):
        same = by_layer(find(model, {"other": [other], "set": again}, **settings))
        for item in found:
            twin = same[item.layers[0]]
            assert (whole(item) - whole(twin)).norm() < 1e-5 * whole(item).norm()
            assert item.energy == pytest.approx(twin.energy, rel=1e-5)


def test_deterministic():
    batches = {"one": [words(12, 48, i) for i in range(3)], "two": [words(10, 60, 4, "left")]}
    model = tiny_llama(intermediate_size=256)
    first = find(model, batches, rank=8)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, other = find(model, batches, rank=8), find(model, batches, rank=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for item, twin, cousin in zip(first, again, other, strict=True):
        assert torch.equal(item.directions, twin.directions)
        assert torch.equal(item.energies, twin.energies)
        assert (item.energy, item.held_out) == (twin.energy, twin.held_out)
        assert torch.equal(item.directions, cousin.directions) == (item.width != 256)
        assert float(cousin.energies.sum()) == pytest.approx(float(item.energies.sum()), rel=0.01)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_removed(fails):
    model = tiny_llama()

    def forward(model, batch):
        pass_batch(model, batch)
        if fails:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        find(model, {"set": [padded(9)]}, forward=forward, rank=4)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_nothing_is_kept_for_autograd():
    model = tiny_llama()
    for item in inputs.find(linear_layers(model), pass_batch, model, {"set": [padded(9)]}, most=lambda _: 4):
        assert not item.directions.requires_grad
        assert not item.energies.requires_grad


# Massive activations


@pytest.mark.parametrize("factor", [0.5, 9.0, 11.0, 1e3, 1e6])
@pytest.mark.parametrize("width", [32, 256])
def test_long_inputs_count_up_to_a_limit(width, factor):
    # Of every example's 12 tokens one is long, in another direction; all others have the length 1.
    vectors = power_law(40, 12, width, 1.0)
    vectors /= vectors.norm(dim=-1, keepdim=True)
    long = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(1)), dim=0)
    vectors[:, 3] = long * factor
    layer = nn.Linear(width, width)
    item = one(layer, {"set": list(vectors.split(10))}, layers={"a": layer}, rank=16)
    vectors[:, 3] = long * min(factor, watcher.LONGEST)
    expected = moments(layer, {"set": list(vectors.split(10))}, layers={"a": layer})["a"]
    assert len(item.energies) == 16  # a long input does not make the others' directions rounding errors
    assert_captured(item, expected, least=0.98)
    assert item.held_out == pytest.approx(expected.share_held(item.directions.double()), abs=1e-4)
    assert factor < 1 or float((item.directions.T @ long).norm()) == pytest.approx(1, abs=1e-3)


def energy_of(sets) -> float:
    layer = nn.Linear(8, 2)
    return one(layer, sets, layers={"a": layer}, rank=4).energy


def test_the_limit_of_long_inputs_does_not_depend_on_the_order_of_the_sets():
    # One in five tokens is 50 times as long, and all of one set are.
    short = nn.functional.normalize(torch.randn(8, 20, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    sets = {"short": [short], "long": [50 * short]}
    energies = [energy_of({name: sets[name] for name in order}) for order in (["short", "long"], ["long", "short"])]
    assert energies[0] == pytest.approx(energies[1])
    assert energies[0] == pytest.approx((1 + watcher.LONGEST**2) / 2)


@pytest.mark.parametrize("examples", ["shorter", "first"])
def test_a_short_example_does_not_set_the_limit_of_long_inputs(examples):
    # The first token of every example is long. An example of no other token says nothing about their length.
    vectors = nn.functional.normalize(torch.randn(7, 20, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    vectors[:, 0] *= 2000
    batches = [vectors[:1, :1], vectors[1:]] if examples == "shorter" else [vectors]
    tokens = 1 + 6 * 20 if examples == "shorter" else 7 * 20
    expected = (7 * watcher.LONGEST**2 + tokens - 7) / tokens
    assert energy_of({"set": batches}) == pytest.approx(expected, rel=1e-4)


def test_tokens_of_no_length_limit_nothing():
    vectors = torch.zeros(16, 9, 32)
    vectors[:, :4] = torch.randn(16, 4, 32, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(32, 32)
    item = one(layer, {"set": [vectors]}, layers={"a": layer}, rank=8)
    assert_leading(item, moments(layer, {"set": [vectors]}, layers={"a": layer})["a"])


def test_a_process_without_held_out_examples_adds_zeros_on_the_device_of_the_inputs(monkeypatch):
    # Collectives of NCCL take no tensor of the CPU.
    idle = SimpleNamespace(inputs={"layer": (4, torch.device("meta"))}, take=lambda *args: None)
    given = []

    def summed(tensors):
        given.extend(tensors)
        return [torch.tensor([1.0, 4.0])]

    monkeypatch.setattr(inputs.distributed, "summed", summed)
    found = [Input(("layer",), 4, torch.ones(1), torch.eye(4)[:, :1], 1.0)]
    inputs._measure(found, [None], idle, None, None)
    assert [tensor.device.type for tensor in given] == ["meta"]
    assert found[0].held_out == 0.25


@pytest.mark.parametrize(("rows", "warnings"), [(1, 1), (8, 0)])
def test_few_tokens_for_many_directions_are_a_warning(rows, warnings, caplog):
    model = tiny_llama()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name}
    batch = {"input_ids": torch.randint(VOCABULARY, (rows, 7)), "attention_mask": torch.ones(rows, 7)}
    inputs.find(layers, lambda m, b: m(**b), model, {"set": [batch]}, most=lambda width: 8)
    told = [record for record in caplog.records if "subspace_rank" in record.message]
    assert len(told) == warnings
    assert not told or "sees 7 tokens and has" in told[0].message


@pytest.mark.parametrize(
    ("key", "value", "warnings"),
    [("chosen_attention_mask", 0, 1), ("chosen_attention_mask", 1, 0), ("attention_mask", 0, 0)],
)
def test_padding_under_another_name_than_attention_mask_is_a_warning(key, value, warnings, caplog):
    model, ids = tiny_llama(), tokens(8, 20)
    mask = torch.ones_like(ids)
    mask[:, 15:] = value
    batch = {"chosen_input_ids": ids, key: mask}
    find(
        model,
        {"set": [batch, batch], "other": [batch]},
        forward=lambda net, own: net(input_ids=own["chosen_input_ids"], attention_mask=own[key]),
        rank=4,
    )
    told = [record.getMessage() for record in caplog.records if "no 'attention_mask'" in record.message]
    assert len(told) == warnings
    assert all("'set' has 'chosen_attention_mask'" in own for own in told)


class Experts(nn.Module):
    """Of 8 experts, the first gets no token, the second one, and the others get the rest; a first token is long."""

    def __init__(self, width=16):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(8))

    def forward(self, vectors, chosen):
        return [expert(vectors[chosen == i]) for i, expert in enumerate(self.experts)]


def test_experts_are_warned_of_one_by_one_and_limit_long_inputs(caplog):
    torch.manual_seed(0)
    model = Experts()
    layers = {f"experts.{i}": expert for i, expert in enumerate(model.experts)}
    chosen = torch.arange(300) % 6 + 2
    chosen[10] = 1
    vectors = torch.randn(300, 16)
    vectors[200] *= 1000  # of an expert that is not in the first example
    batches = [(vectors[i : i + 4], chosen[i : i + 4]) for i in range(0, 300, 4)]
    found = inputs.find(
        layers,
        lambda m, b: m(*b),
        model,
        {"set": batches},
        most=lambda width: 8,
    )
    counts = {item.layers[0]: item.tokens for item in found}
    assert counts["experts.0"] == 0
    assert counts["experts.1"] <= 1
    assert all(counts[f"experts.{i}"] > 20 for i in range(2, 8))
    messages = [record.message for record in caplog.records]
    assert any("of 8 inputs see no token" in own and "experts.0" in own for own in messages)
    long = next(item for item in found if item.layers[0] == f"experts.{int(chosen[200])}")
    assert float(long.energies[0]) < 0.9 * long.energy  # one token does not make up all of it


@pytest.mark.parametrize("length", [4, 5, 6])
@pytest.mark.parametrize("first", ["examples", "sequence"])
def test_padding_does_not_count_where_the_sequence_comes_first(first, length):
    embed, layer = nn.Embedding(50, 8), nn.Linear(8, 8)
    with torch.no_grad():
        embed.weight[0] = 100.0  # padding
    ids = torch.randint(1, 50, (5, length))
    ids[1:, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def forward(model, batch):
        own = batch["input_ids"] if first == "examples" else batch["input_ids"].T
        return model(embed(own))

    item = one(layer, {"set": [batch]}, rank=4, forward=forward, layers={"": layer})
    padding = embed.weight[0].detach() / embed.weight[0].detach().norm()
    assert float((item.directions.T @ padding).norm()) < 0.95
    assert item.tokens == int(batch["attention_mask"].sum())
    vectors = embed.weight[ids[ids > 0]].detach()
    assert item.energy == pytest.approx(float(vectors.square().sum(-1).mean()), rel=1e-5)  # of every token


def test_an_input_of_width_1_has_no_directions():
    item = one(nn.Linear(1, 4), {"set": [torch.randn(9, 1)]})
    assert item.directions.shape == (1, 0)
    assert item.energies.shape == (0,)
