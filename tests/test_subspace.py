"""Blocks and the rows held of them, against dense float64 computations, one block at a time."""

from __future__ import annotations

import pytest
import torch
from loops import loss_of, ogpsa_model, references
from scipy.optimize import nnls

from peft_ogpsa.core import linalg
from peft_ogpsa.core.gradient_subspace import GradientSubspace
from peft_ogpsa.core.layout import Blocks

SHAPES = {
    "layers.0.lora_A": (2, 6),
    "layers.0.lora_B": (5, 2),
    "layers.1.lora_A": (2, 6),
    "layers.1.lora_B": (6, 2),
    "embed.lora_A": (2, 3, 2),
}
OWNERS = {name: name.rpartition(".")[0] for name in SHAPES}
MEMBERS = {
    "tensor": [[name] for name in SHAPES],
    "module": [["layers.0.lora_A", "layers.0.lora_B"], ["layers.1.lora_A", "layers.1.lora_B"], ["embed.lora_A"]],
    "model": [list(SHAPES)],
}


def parameters(seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def blocks(scope: str) -> Blocks:
    return Blocks(parameters(), OWNERS, scope)


def fill(
    subspace: GradientSubspace, gradients: list[dict[str, torch.Tensor]], sets: list[str] | None = None
) -> list[int]:
    slots = subspace.rows.claim(len(gradients))
    writer = subspace.rows.open(slots)
    for piece, name in enumerate(subspace.blocks.names()):
        writer.add(piece, torch.stack([gradient[name] for gradient in gradients]))
    return subspace.commit(slots, sets or ["set"] * len(slots))


def dense(values: dict[str, torch.Tensor], members: list[str]) -> torch.Tensor:
    return torch.cat([values[name].double().flatten() for name in members])


def by_name(layout: Blocks, stack: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(layout.names(), layout.views(stack), strict=True))


def test_pieces_of_one_size_are_stacked_and_views_write_through():
    layout = blocks("tensor")
    assert [(group.numel, len(group.names)) for group in layout.groups] == [(12, 4), (10, 1)]
    stack = layout.stack()
    for name, view in by_name(layout, stack).items():
        assert torch.equal(view, parameters()[name])
        view += 1
    for name, view in by_name(layout, stack).items():
        assert torch.equal(view, parameters()[name] + 1)
    holes = layout.stack([None] * len(SHAPES))
    assert all(not part.any() for part in holes)


@pytest.mark.parametrize("scope", MEMBERS)
def test_reduce_adds_up_blocks_and_spread_gives_back(scope):
    layout = blocks(scope)
    stack = layout.stack()
    sums = layout.reduce([part.sum(-1) for part in stack])
    assert len(sums) == layout.count == len(MEMBERS[scope])
    expected = [float(dense(parameters(), members).sum()) for members in MEMBERS[scope]]
    # Blocks are numbered by their first piece, and pieces are grouped by size.
    assert sorted(sums.tolist()) == pytest.approx(sorted(expected), rel=1e-5)
    spread = torch.cat(layout.spread(sums))
    for name, value in zip(layout.names(), spread, strict=True):
        members = next(members for members in MEMBERS[scope] if name in members)
        assert float(value) == pytest.approx(float(dense(parameters(), members).sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(20))
def test_reduce_is_the_sum_over_the_pieces_of_each_block(dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def drawn(most: int, count: int) -> list[int]:
        return torch.randint(1, most + 1, (count,), generator=generator).tolist()

    names = [f"p{i}" for i in range(drawn(12, 1)[0])]
    given = dict(zip(names, (torch.zeros(size) for size in drawn(3, len(names))), strict=True))
    owners = dict(zip(names, map(str, drawn(4, len(names))), strict=True))
    inner = drawn(3, seed % 3)
    for scope in ("tensor", "module", "model"):
        layout = Blocks(given, owners, scope)
        pieces = [torch.randn(own.pieces, *inner, generator=generator, dtype=dtype) for own in layout.groups]
        blocks = torch.cat(layout.spread(torch.arange(layout.count)))
        expected = torch.zeros(layout.count, *inner, dtype=dtype).index_add_(0, blocks, torch.cat(pieces))
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(layout.reduce(pieces), expected, rtol=tolerance, atol=tolerance)
        pieces[0][0] = torch.nan  # of one block alone
        assert layout.reduce(pieces).isnan().reshape(layout.count, -1).all(1).nonzero().tolist() == [[int(blocks[0])]]


def test_bad_layouts():
    with pytest.raises(ValueError, match="no parameter to project"):
        Blocks({}, {}, "tensor")
    with pytest.raises(ValueError, match="scope='layer' is unknown"):
        Blocks(parameters(), OWNERS, "layer")


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e20, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("scope", MEMBERS)
def test_rows_have_unit_norm_in_every_block_at_any_scale(scope, dtype, scale):
    subspace = GradientSubspace(blocks(scope), 3, "cone", dtype)
    gradients = [parameters(seed, scale) for seed in (1, 2)]
    assert fill(subspace, gradients) == []
    whole = [
        part * scales.unsqueeze(-1) for part, scales in zip(subspace.rows.stack, subspace.rows.scales, strict=True)
    ]
    rows, norms = by_name(subspace.blocks, whole), subspace.blocks.spread(subspace.rows.norms)
    norms = dict(zip(subspace.blocks.names(), torch.cat(norms), strict=True))
    for members in MEMBERS[scope]:
        for slot, gradient in enumerate(gradients):
            row = torch.cat([rows[name][slot].flatten() for name in members])
            exact = dense(gradient, members)
            tolerance = 1e-6 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(row.double(), exact / exact.norm(), rtol=tolerance, atol=tolerance)
            assert float(norms[members[0]][slot]) == pytest.approx(float(exact.norm()), rel=tolerance)
        assert not any(rows[name][2].any() for name in members)


def corrected(subspace, stack):
    """The correction by parameter, and its squared norm in each block."""
    coefficients, squares = subspace.coefficients(subspace.directed(stack))
    pieces = [piece for group in subspace.corrections(coefficients) for piece in group]
    return dict(zip(subspace.blocks.names(), pieces, strict=True)), squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_zero_and_bad_rows(dtype):
    subspace = GradientSubspace(blocks("module"), 4, "cone", dtype)
    zero, bad = parameters(1), parameters(2)
    zero["layers.0.lora_A"].zero_()
    zero["layers.0.lora_B"].zero_()
    bad["embed.lora_A"][0, 0, 0] = torch.nan
    assert fill(subspace, [zero, bad, parameters(3)], ["a", "b", "c"]) == [1]
    assert subspace.rows.sets == ["a", None, "c", None]
    assert subspace.rows.filled == 2
    for part, scales in zip(subspace.rows.stack, subspace.rows.scales, strict=True):
        assert not (part[:, 1] * scales[:, 1:2]).any()
    assert torch.isfinite(subspace.rows.gram).all()
    correction, _ = corrected(subspace, subspace.blocks.stack())
    assert all(torch.isfinite(part).all() for part in correction.values())


def stored(subspace: GradientSubspace, members: list[str]) -> torch.Tensor:
    """The rows of a block as they are held, in float64."""
    whole = [
        part.double() * scales.double().unsqueeze(-1)
        for part, scales in zip(subspace.rows.stack, subspace.rows.scales, strict=True)
    ]
    rows = by_name(subspace.blocks, whole)
    return torch.cat([rows[name].flatten(1) for name in members], dim=1)


@pytest.mark.parametrize("scope", MEMBERS)
def test_int8_rows_are_close_and_their_cone_is_exact(scope):
    gradients = [parameters(seed, 10.0**seed) for seed in range(1, 5)]
    # Pieces of very different size in one block each need a scale of their own.
    for gradient in gradients:
        gradient["layers.0.lora_A"] *= 1e-4
    subspace = GradientSubspace(blocks(scope), 4, "cone", torch.int8)
    fill(subspace, gradients)
    for name in SHAPES:
        for row, gradient in zip(stored(subspace, [name]), gradients, strict=True):
            exact = dense(gradient, [name])
            assert torch.cosine_similarity(row, exact, dim=0) > 0.999
    update = parameters(99)
    got, squares = corrected(subspace, subspace.blocks.stack([update[name] for name in subspace.blocks.names()]))
    for members in MEMBERS[scope]:
        rows, vector = stored(subspace, members), dense(update, members)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=0)
        weights, _ = nnls(rows.T.numpy(), -vector.numpy())
        expected = rows.T @ torch.from_numpy(weights)
        assert (dense(got, members) - expected).norm() <= 1e-5 * vector.norm()
    total = sum(dense(got, members).square().sum() for members in MEMBERS[scope])
    assert float(squares.sum()) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("slots", [[5, 0, 1], [4, 2, 3], [1, 3, 5], [3]])
def test_writing_changes_the_opened_rows_alone(dtype, slots):
    subspace = GradientSubspace(blocks("tensor"), 6, "cone", dtype)
    old = [parameters(seed) for seed in range(6)]
    fill(subspace, old)
    before = {name: view.clone() for name, view in by_name(subspace.blocks, subspace.rows.stack).items()}
    writer = subspace.rows.open(slots)
    new = [parameters(10 + i) for i in range(len(slots))]
    for piece, name in enumerate(subspace.blocks.names()):
        writer.add(piece, torch.stack([own[name] for own in new[:1]]))
        if new[1:]:
            writer.add(piece, torch.stack([own[name] for own in new[1:]]), first=1)
    subspace.commit(slots, ["set"] * len(slots))
    for name, view in by_name(subspace.blocks, subspace.rows.stack).items():
        for slot in set(range(6)) - set(slots):
            assert torch.equal(view[slot], before[name][slot])
        for slot, own in zip(slots, new, strict=True):
            got, expected = view[slot].double().flatten(), own[name].double().flatten()
            assert torch.cosine_similarity(got, expected, dim=0) > 1 - (1e-3 if dtype == torch.int8 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("scope", ["tensor", "slice"])
@pytest.mark.parametrize("places", [[0, 1, 2], [1, 2], [0, 2], [1]])
def test_products_add_up_to_gradients(dtype, scope, places):
    subspace = GradientSubspace(Blocks(parameters(), OWNERS, scope, slices=2), 5, "cone", dtype)
    writer = subspace.rows.open([1, 2, 3])
    part = writer.of(places)
    part.weight = 0.5
    torch.manual_seed(0)
    for piece, name in enumerate(subspace.blocks.names()):
        if len(SHAPES[name]) != 2:
            continue
        out, into = SHAPES[name]
        exact = torch.zeros(5, out, into, dtype=torch.float64)
        for _ in range(2):
            outputs, inputs = torch.randn(len(places), 7, out), torch.randn(len(places), 7, into)
            part.add_products(piece, outputs, inputs, 3.0)
            for place, u, x in zip(places, outputs.double(), inputs.double(), strict=True):
                exact[1 + place] += 1.5 * sum(torch.outer(u[t], x[t]) for t in range(7))
        got = stored(subspace, [name]).view(exact.shape)
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.int8: 2e-2}[dtype]
        torch.testing.assert_close(got, exact, rtol=0, atol=tolerance * float(exact.abs().max()))


def test_int8_rows_add_up():
    subspace = GradientSubspace(blocks("tensor"), 2, "cone", torch.int8)
    writer = subspace.rows.open(subspace.rows.claim(1))
    for weight, seed in ((1.0, 1), (0.5, 2)):
        writer.weight = weight
        for piece, name in enumerate(subspace.blocks.names()):
            writer.add(piece, parameters(seed)[name].unsqueeze(0))
    assert subspace.commit([0], ["set"]) == []
    for name in SHAPES:
        exact = parameters(1)[name].double() + 0.5 * parameters(2)[name].double()
        row = stored(subspace, [name])[0]
        assert (row - exact.flatten() / exact.norm()).norm() < 0.02


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e36])
def test_quantize(shape, scale):
    values = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, steps = linalg.quantize(values)
    assert codes.dtype == torch.int8
    assert codes.shape == shape
    assert (codes.abs().amax(-1) == 127).all()
    errors = (codes * steps.double().unsqueeze(-1) - values.double()).abs().amax(-1)
    assert (errors <= 0.5001 * values.double().abs().amax(-1) / 127).all()
    assert not linalg.quantize(0 * values)[1].any()
    for bad in (torch.nan, torch.inf, -torch.inf):
        values.view(-1)[0] = bad
        codes, steps = linalg.quantize(values)
        assert not codes.view(-1, shape[-1])[0].any()
        assert steps.isfinite().sum() == steps.numel() - 1


@pytest.mark.parametrize("kind", ["plain", "duplicate", "more rows than dimensions"])
@pytest.mark.parametrize("scope", MEMBERS)
@pytest.mark.parametrize("seed", range(3))
def test_cone_agrees_with_nnls(scope, kind, seed):
    count = 14 if kind == "more rows than dimensions" else 4
    gradients = [parameters(10 * seed + i, 10.0 ** (i % 3)) for i in range(1, count + 1)]
    if kind == "duplicate":
        gradients[1] = gradients[0]
    subspace = GradientSubspace(blocks(scope), count + 1, "cone")
    fill(subspace, gradients)
    update = parameters(99 + seed)
    stack = subspace.blocks.stack([update[name] for name in subspace.blocks.names()])
    got, squares = corrected(subspace, stack)
    for members in MEMBERS[scope]:
        rows = torch.stack([dense(gradient, members) for gradient in gradients])
        rows = rows / rows.norm(dim=1, keepdim=True)
        vector = dense(update, members)
        weights, _ = nnls(rows.T.numpy(), -vector.numpy())
        expected = rows.T @ torch.from_numpy(weights)
        assert (dense(got, members) - expected).norm() <= 1e-5 * vector.norm()
        assert (rows @ (vector + dense(got, members))).min() >= -1e-5 * vector.norm()
    total = sum(dense(got, members).square().sum() for members in MEMBERS[scope])
    assert float(squares.sum()) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("scope", MEMBERS)
def test_orthogonal_agrees_with_svd(scope, rank):
    gradients = [parameters(seed, 10.0**seed) for seed in range(1, 5)]
    subspace = GradientSubspace(blocks(scope), 5, "orthogonal", rank=rank)
    fill(subspace, gradients)
    update = parameters(99)
    stack = subspace.blocks.stack([update[name] for name in subspace.blocks.names()])
    got, squares = corrected(subspace, stack)
    for members in MEMBERS[scope]:
        rows = torch.stack([dense(gradient, members) for gradient in gradients])
        _, _, directions = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
        basis = directions[: rank or 4]
        vector = dense(update, members)
        assert (dense(got, members) + basis.T @ (basis @ vector)).norm() <= 1e-5 * vector.norm()
    total = sum(dense(got, members).square().sum() for members in MEMBERS[scope])
    assert float(squares.sum()) == pytest.approx(float(total), rel=1e-5)


def test_memory_is_rows_times_parameters():
    size = sum(value.numel() for value in parameters().values())
    for scope, count in (("tensor", 5), ("model", 1)):
        subspace = GradientSubspace(blocks(scope), 7, "cone", torch.bfloat16)
        assert sum(part.numel() for part in subspace.rows.stack) == 7 * size
        assert all(part.dtype == torch.bfloat16 for part in subspace.rows.stack)
        assert subspace.directions is subspace.rows.stack
        assert subspace.rows.gram.shape == (count, 7, 7)


def test_ring_and_gram_stay_right_as_rows_are_replaced():
    subspace = GradientSubspace(blocks("tensor"), 3, "cone")
    for seed in range(5):
        fill(subspace, [parameters(seed)], [f"set{seed}"])
    assert subspace.rows.sets == ["set3", "set4", "set2"]
    fresh = GradientSubspace(blocks("tensor"), 3, "cone")
    fill(fresh, [parameters(3), parameters(4), parameters(2)])
    torch.testing.assert_close(subspace.rows.gram, fresh.rows.gram, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="4 reference gradients do not fit into rows=3"):
        subspace.rows.claim(4)
    subspace.discard([0])
    assert subspace.rows.sets == [None, "set4", "set2"]
    assert not subspace.rows.gram[:, 0].any()
    assert not subspace.rows.gram[:, :, 0].any()


@pytest.mark.parametrize("damage", [{"sets": ["a"]}, {"cursor": 8}, {"cursor": -1}], ids=str)
def test_a_ring_of_another_size_is_refused(damage):
    model, other = ogpsa_model(), ogpsa_model()
    model.projector.refresh(references(0), loss_of)
    state = model.projector.state_dict()
    with pytest.raises(ValueError, match="its list of sets or its next slot does not match rows=8"):
        other.projector.load_state_dict({**state, "rest": {**state["rest"], **damage}})


def worst(subspace: GradientSubspace) -> float:
    """How far a corrected step still goes against a row, at most."""
    layout = subspace.blocks
    own = parameters(7)
    stack = layout.stack([own[name] for name in layout.names()])
    coefficients, _ = subspace.coefficients(subspace.directed(stack))
    for parts, corrections in zip(layout.shaped(stack), subspace.corrections(coefficients), strict=True):
        torch._foreach_add_(parts, corrections)
    return float(-subspace.directed(stack).min())


@pytest.mark.parametrize("scope", ["tensor", "module", "model", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_state_fits_where_parameters_are_grouped_otherwise(scope, dtype):
    """As with another device_map: values by block must not go to other blocks. What depends on groups is refused."""

    def subspace(of: dict[str, torch.Tensor]) -> GradientSubspace:
        return GradientSubspace(Blocks(of, OWNERS, scope, slices=2), 3, "cone", dtype=dtype)

    half = {name: own.bfloat16() if name.startswith("layers.0") else own for name, own in parameters().items()}
    saved, same, other = subspace(half), subspace(half), subspace(parameters())
    scaled = [{name: (1 + i) * own for i, (name, own) in enumerate(parameters(seed).items())} for seed in range(3)]
    fill(saved, scaled)
    tensors, rest = saved.state_dict()
    before = worst(saved)
    assert before < 1e-5
    same.load_state_dict(tensors, rest)
    assert worst(same) == before
    if scope == "slice" or dtype == torch.int8:
        with pytest.raises(ValueError, match=r"on other devices or had other dtypes \(device_map, upcast\)"):
            other.load_state_dict(tensors, rest)
    else:
        other.load_state_dict(tensors, rest)
        assert worst(other) < 1e-5
