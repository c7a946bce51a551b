"""Scope `slice`: each slice of a matrix is a block of its own."""

import pytest
import torch
from models import tiny_llama, tokens
from peft import get_peft_model
from test_projector import ogpsa_model

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.core.gradient_subspace import GradientSubspace
from peft_ogpsa.core.layout import Blocks
from peft_ogpsa.references.losses import answer_loss

SHAPES = {"a": (16, 6), "b": (6, 16), "c": (16, 6), "odd": (3, 5), "prime": (17,), "tall": (40, 2)}
COUNTS = {"a": 16, "b": 16, "c": 16, "odd": 15, "prime": 1, "tall": 16}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut(values):
    """The slices as parameters of their own."""
    return {
        f"{name}.{i}": part
        for name, value in values.items()
        for i, part in enumerate(value.reshape(COUNTS[name], -1).unbind(0))
    }


def subspaces(dtype, constraint):
    """A subspace over slices, and one over tensors that are those slices, with the same rows."""
    whole, pieces = parameters(), cut(parameters())
    layouts = Blocks(whole, dict.fromkeys(whole, ""), "slice"), Blocks(pieces, dict.fromkeys(pieces, ""), "tensor")
    made = [GradientSubspace(layout, 5, constraint, dtype) for layout in layouts]
    for subspace, form in zip(made, (lambda v: v, cut), strict=True):
        slots = subspace.rows.claim(4)
        writer = subspace.rows.open(slots)
        gradients = [form(parameters(seed)) for seed in range(1, 5)]
        for piece, name in enumerate(subspace.blocks.names()):
            writer.add(piece, torch.stack([gradient[name] for gradient in gradients[:2]]))
            writer.add(piece, torch.stack([gradient[name] for gradient in gradients[2:]]), first=2)
            writer.weight = 0.5
            writer.add(piece, gradients[0][name].unsqueeze(0))
            writer.weight = 1.0
        assert subspace.commit(slots, ["x", "x", "y", "y"]) == []
    return made


@pytest.mark.parametrize(
    ("dtype", "constraint"),
    [
        (torch.float32, "cone"),
        (torch.bfloat16, "cone"),
        (torch.int8, "cone"),
        (torch.float32, "orthogonal"),
        (torch.bfloat16, "orthogonal"),
    ],
)
def test_slices_are_projected_as_parameters_of_their_own(dtype, constraint):
    sliced, parts = subspaces(dtype, constraint)
    assert sliced.blocks.count == parts.blocks.count == sum(COUNTS.values())
    step = parameters(9)
    corrections = []
    for subspace, values in ((sliced, step), (parts, cut(step))):
        layout = subspace.blocks
        stack = layout.stack([values[name] for name in layout.names()])
        coefficients, removed = subspace.coefficients(subspace.directed(stack))
        found = [piece for group in subspace.corrections(coefficients) for piece in group]
        corrections.append(dict(zip(layout.names(), found, strict=True)))
        assert removed.sum() > 1e-3
    expected = corrections[1]
    for name, correction in corrections[0].items():
        for i, own in enumerate(correction.reshape(COUNTS[name], -1)):
            torch.testing.assert_close(own, expected[f"{name}.{i}"], rtol=1e-5, atol=1e-6)
    for name in ("x", "y"):
        (one, other) = (subspace.cosines(subspace.overlaps(subspace.blocks.stack())) for subspace in (sliced, parts))
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("slices", "odd"), [(1, 1), (4, 3), (16, 15)])
def test_number_of_slices(slices, odd):
    layout = Blocks(parameters(), dict.fromkeys(SHAPES, ""), "slice", slices)
    counts = {name: group.slices for group in layout.groups for name in group.names}
    assert (counts["a"], counts["odd"], counts["prime"]) == (slices, odd, 1)
    config = OGPSAConfig(subspace="gradients", r=4, target_modules=["q_proj"], scope="slice", slices=slices)
    model = get_peft_model(tiny_llama(), config)
    ids = tokens()
    model.projector.refresh({"kept": [{"input_ids": ids}]}, lambda m, b: m(input_ids=b["input_ids"]).logits.mean())
    assert {group.slices for group in model.projector.subspace.blocks.groups} == {slices}


def test_layout():
    layout = Blocks(parameters(), dict.fromkeys(SHAPES, ""), "slice")
    assert {name: group.slices for group in layout.groups for name in group.names} == COUNTS
    stack = layout.stack()
    for name, view in zip(layout.names(), layout.views(stack), strict=True):
        assert torch.equal(view.reshape(SHAPES[name]), parameters()[name])
    holes = layout.stack([None] * len(SHAPES))
    assert all(not part.any() for part in holes)
    rows = layout.zeros(3)
    for name, view in zip(layout.names(), layout.views(rows), strict=True):
        view[1] += parameters()[name].reshape(view[1].shape)
    saved = layout.gathered("rows", rows)
    assert all(torch.equal(saved[f"rows.{name}"][1], value) for name, value in parameters().items())
    assert not any(saved[f"rows.{name}"][[0, 2]].any() for name in SHAPES)
    back = layout.zeros(3)
    layout.scatter("rows", saved, back)
    assert all(torch.equal(one, other) for one, other in zip(rows, back, strict=True))


@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("rows_dtype", ["float32", "bfloat16", "int8"])
def test_no_slice_of_an_update_raises_a_reference_loss(rows_dtype, weight):
    model = ogpsa_model(scope="slice", rows_dtype=rows_dtype, reference_weight=weight, r=8)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-2)
    batch, references = tokens(4, seed=1), tokens(3, seed=2)

    def as_batch(ids):
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    for _ in range(3):
        model.projector.refresh({"kept": [as_batch(references)]}, answer_loss)
        model.eval()
        gradients = [torch.autograd.grad(answer_loss(model, as_batch(ids.unsqueeze(0))), own) for ids in references]
        model.train()
        before = [parameter.detach().clone() for parameter in own]
        optimizer.zero_grad()
        answer_loss(model, as_batch(batch)).backward()
        optimizer.step()
        tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 3e-2}[rows_dtype]
        for gradient in gradients:
            for old, new, g in zip(before, own, gradient, strict=True):
                change = (new.detach() - old).double().reshape(16, -1)
                g = g.double().reshape(16, -1)
                rise = (change * g).sum(1)
                assert (rise <= tolerance * change.norm(dim=1) * g.norm(dim=1) + 1e-12).all()


def test_gradient_projection_in_slices():
    model = ogpsa_model(scope="slice", projection="gradient", constraint="orthogonal", r=8)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = tokens(2, seed=2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model.projector.refresh({"kept": [batch]}, answer_loss)
    model.eval()
    reference = torch.autograd.grad(answer_loss(model, {k: v[:1] for k, v in batch.items()}), own)
    model.train()
    other = {"input_ids": ids.flip(1), "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}
    answer_loss(model, other).backward()
    torch.optim.SGD(own, lr=0.0).step()
    for parameter, g in zip(own, reference, strict=True):
        left = (parameter.grad.reshape(16, -1) * g.reshape(16, -1)).sum(1)
        bound = 1e-5 * parameter.grad.reshape(16, -1).norm(dim=1) * g.reshape(16, -1).norm(dim=1)
        assert (left.abs() <= bound + 1e-9).all()


def test_memory_counts_every_slice():
    config = {"r": 4, "target_modules": ["q_proj"]}
    by = {
        scope: get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **config, scope=scope)).projector.memory(
            2
        )
        for scope in ("slice", "tensor")
    }
    assert by["slice"] == by["tensor"]


def test_shards_are_refused(monkeypatch):
    monkeypatch.setattr("peft_ogpsa.core.layout.distributed.are_sharded", lambda parameters: True)
    with pytest.raises(ValueError, match="scope='slice' is not allowed with sharded parameters"):
        Blocks(parameters(), dict.fromkeys(SHAPES, ""), "slice")
