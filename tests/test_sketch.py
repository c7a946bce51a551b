"""The sketch's directions against the eigenvectors of the exact second moment, in float64."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from peft_ogpsa.core.sketch import OVERSAMPLING, Sketch

CPU = torch.device("cpu")
NARROW, WIDE = 32, 512  # of rank 8: held whole, and not


def spectrum(name: str, width: int) -> torch.Tensor:
    """Energies along the axes, of sum 1: a power law by its exponent, "dominant" or "flat"."""
    if name == "dominant":
        energies = torch.full((width,), 0.001 / (width - 1), dtype=torch.float64)
        energies[0] = 0.999
        return energies
    exponent = 0.0 if name == "flat" else float(name)
    energies = torch.arange(1, width + 1, dtype=torch.float64) ** -exponent
    return energies / energies.sum()


def orthogonal(width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


@lru_cache
def stream(name: str, width: int, sampled: bool = False) -> torch.Tensor:
    """`4 width` vectors: normal samples, or such that each quarter `[i::4]` has just that spectrum."""
    generator = torch.Generator().manual_seed(0)
    axes = orthogonal(width, generator) * spectrum(name, width).sqrt()
    if sampled:
        return torch.randn(4 * width, width, generator=generator, dtype=torch.float64) @ axes.T
    return torch.stack([orthogonal(width, generator) @ axes.T for _ in range(4)], 1).flatten(0, 1)


def gapped(count: int = 200, width: int = 48, leading: int = 8, seed: int = 0) -> torch.Tensor:
    """Vectors whose leading energies are apart from each other and from the rest."""
    generator = torch.Generator().manual_seed(seed)
    energies = torch.full((width,), 0.01, dtype=torch.float64)
    energies[:leading] = torch.arange(leading, 0, -1) * 1.0
    left = torch.linalg.qr(torch.randn(count, width, generator=generator, dtype=torch.float64))[0]
    return (left * energies.sqrt()) @ orthogonal(width, generator).T


def moment_of(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.double().T @ vectors.double()


def eigen(moment: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and -vectors, strongest first."""
    values, vectors = np.linalg.eigh(moment.numpy())
    return values[::-1].copy(), vectors[:, ::-1].copy()


def sketch_of(vectors: torch.Tensor, rank: int, turns: int = 4, seed: int = 0) -> Sketch:
    """As `inputs.find` makes it: turned after each of equal parts of the stream, and then given all of it."""
    own = Sketch(vectors.shape[1], rank, CPU, seed)
    for turn in range(turns):
        own.add(vectors[turn::turns])
        own.turn()
    own.add(vectors)
    return own


def captured(own: Sketch, vectors: torch.Tensor, rank: int) -> float:
    """Energy in the directions, relative to that in the best ones."""
    moment = moment_of(vectors)
    directions = own.leading()[1]
    assert directions.shape[1] <= rank
    return float(torch.trace(directions.T @ moment @ directions)) / eigen(moment)[0][:rank].sum()


def assert_orthonormal(directions: torch.Tensor):
    assert directions.dtype == torch.float64
    assert (directions.T @ directions - torch.eye(directions.shape[1]).double()).abs().max() < 1e-10


# Held whole


@pytest.mark.parametrize("rank", [1, 8])
def test_exact_directions(rank):
    vectors = gapped()
    own = Sketch(48, 8, CPU) if rank == 8 else Sketch(34, 1, CPU)
    if rank == 1:
        vectors = gapped(width=34)
    assert own.exact
    own.add(vectors)
    energies, directions = own.leading()
    values, axes = eigen(moment_of(vectors))
    assert directions.shape == (vectors.shape[1], rank)
    np.testing.assert_allclose(energies.numpy(), values[:rank], rtol=1e-5)
    assert subspace_angles(directions.numpy(), axes[:, :rank]).max() < 1e-5
    for k in range(rank):  # one by one too: the gaps between them are wide
        assert subspace_angles(directions[:, k : k + 1].numpy(), axes[:, k : k + 1]).max() < 1e-5


def test_where_exact_ends():
    assert Sketch(2 * (8 + OVERSAMPLING), 8, CPU).exact
    assert not Sketch(2 * (8 + OVERSAMPLING) + 1, 8, CPU).exact


@pytest.mark.parametrize("width", [48, 200])
def test_weights_count_as_repetitions(width):
    vectors = gapped(width=width)
    weighted, repeated = Sketch(width, 8, CPU), Sketch(width, 8, CPU)
    assert weighted.exact == (width == 48)
    weighted.add(vectors[:50], 3.0)
    weighted.add(vectors[50:], 0.5)
    for _ in range(6):
        repeated.add(vectors[:50])
    repeated.add(vectors[50:])
    (energies, directions), (others, axes) = weighted.leading(), repeated.leading()
    assert torch.allclose(2 * energies, others, rtol=1e-5)
    assert torch.allclose(2 * weighted.energy, repeated.energy, rtol=1e-6)
    assert subspace_angles(directions.numpy(), axes.numpy()).max() < 1e-4
    if weighted.exact:
        exact = 3.0 * moment_of(vectors[:50]) + 0.5 * moment_of(vectors[50:])
        np.testing.assert_allclose(energies.numpy(), eigen(exact)[0][:8], rtol=1e-5)


@pytest.mark.parametrize("width", [48, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_vectors(dtype, width):
    vectors = gapped(width=width).to(dtype)
    own = sketch_of(vectors, 8)
    assert own.parts()[0].dtype in (torch.float32, torch.float64)
    assert own.parts()[1].dtype == torch.float64
    energies, directions = own.leading()
    # Of the vectors as rounded: a sum in bfloat16 or float16 would be off by a thousand times as much.
    moment = moment_of(vectors)
    np.testing.assert_allclose(energies.numpy(), eigen(moment)[0][:8], rtol=1e-5 if own.exact else 2e-2)
    along = torch.einsum("ik,ij,jk->k", directions, moment, directions)
    np.testing.assert_allclose(along.numpy(), eigen(moment)[0][:8], rtol=1e-5 if own.exact else 2e-2)
    assert float(own.energy) == pytest.approx(float(torch.trace(moment)), rel=1e-6)


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_under_autocast(width):
    # Accelerate runs a model's forward pass, and hence the hooks in it, under autocast.
    vectors = torch.randn(300, width)
    plain, cast = Sketch(width, 8, CPU), Sketch(width, 8, CPU)
    plain.add(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(vectors)
    for one, other in zip(plain.parts(), cast.parts(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("width", [48, 200])
def test_order_and_splitting(width):
    vectors = gapped(width=width).float()
    whole, pieces = Sketch(width, 8, CPU), Sketch(width, 8, CPU)
    whole.add(vectors)
    for piece in vectors.flip(0).split([1, 60, 9, 130]):
        pieces.add(piece)
    (energies, directions), (others, axes) = whole.leading(), pieces.leading()
    assert ((energies - others).abs() < 1e-5 * energies[0]).all()
    assert (directions @ directions.T - axes @ axes.T).norm() < 1e-5 * 8
    assert float(whole.energy) == pytest.approx(float(pieces.energy), rel=1e-6)


# Not held whole


@pytest.mark.parametrize("name", ["0.5", "0.7", "1", "2", "dominant", "flat"])
@pytest.mark.parametrize(("width", "rank"), [(256, 8), (256, 32), (512, 16)])
def test_captured_energy(width, rank, name):
    vectors = stream(name, width)
    own = sketch_of(vectors, rank)
    assert not own.exact
    assert captured(own, vectors, rank) >= 0.99


@pytest.mark.parametrize(
    ("name", "least"), [("0.5", 0.98), ("0.7", 0.99), ("1", 0.99), ("2", 0.99), ("dominant", 0.99), ("flat", 0.9)]
)
def test_captured_energy_of_samples(name, least):
    # Quarters differ by chance here. In flat spectra the best directions of a sample are chance altogether.
    for rank in (8, 32):
        assert (
            captured(sketch_of(stream(name, 256, sampled=True), rank), stream(name, 256, sampled=True), rank) >= least
        )


@pytest.mark.parametrize("name", ["0.5", "0.7", "1"])
@pytest.mark.parametrize(("width", "rank"), [(256, 8), (512, 16)])
def test_turns_are_needed(width, rank, name):
    vectors = stream(name, width)
    none, one, four = (captured(sketch_of(vectors, rank, turns), vectors, rank) for turns in (0, 1, 4))
    assert none < 0.97  # slow spectra are missed
    assert none < one < four
    assert four - none > 0.03


def test_turned_subspace_is_the_best_one():
    # With gaps, directions themselves can be compared.
    vectors = gapped(count=400, width=200)
    directions = sketch_of(vectors, 8).leading()[1]
    assert subspace_angles(directions.numpy(), eigen(moment_of(vectors))[1][:, :8]).max() < 5e-3


@pytest.mark.parametrize("name", ["0.5", "1", "dominant"])
def test_energies_are_those_along_the_directions(name):
    vectors = stream(name, 256)
    energies, directions = sketch_of(vectors, 16).leading()
    along = torch.einsum("ik,ij,jk->k", directions, moment_of(vectors), directions)
    assert (energies <= along * (1 + 1e-5)).all()  # too little, if anything
    assert energies.sum() >= 0.97 * along.sum()


@pytest.mark.parametrize("name", ["0.5", "2", "dominant", "flat"])
@pytest.mark.parametrize("width", [NARROW, 256])
def test_what_leading_promises(width, name):
    vectors = stream(name, width)
    own = sketch_of(vectors, 8)
    energies, directions = own.leading()
    assert directions.shape == (width, 8)
    assert energies.dtype == torch.float64
    assert_orthonormal(directions)
    assert (energies[:-1] >= energies[1:]).all()
    assert (energies > 0).all()
    assert own.energy.shape == ()
    assert own.energy.dtype == torch.float64
    assert float(own.energy) == pytest.approx(float(torch.trace(moment_of(vectors))), rel=1e-6)


def test_seed():
    vectors = stream("0.7", 256)
    first, again, other = (sketch_of(vectors, 16, seed=seed) for seed in (3, 3, 4))
    for one, two in zip([*first.leading(), *first.parts()], [*again.leading(), *again.parts()], strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(Sketch(256, 16, CPU, 3)._test, Sketch(256, 16, CPU, 4)._test)
    assert captured(first, vectors, 16) == pytest.approx(captured(other, vectors, 16), abs=0.01)


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    sketch_of(torch.ones(4, WIDE), 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory():
    width, rank = 4096, 32
    own = Sketch(width, rank, CPU)
    for _ in range(2):
        own.add(torch.randn(3, width))
        held = [value for value in vars(own).values() if isinstance(value, torch.Tensor)]
        assert {id(part) for part in own.parts()} <= {id(value) for value in held}
        assert [part.shape for part in own.parts()] == [(width, rank + OVERSAMPLING), (), ()]
        assert own._test.shape == (width, rank + OVERSAMPLING)
        assert sum(value.numel() for value in held) <= 2 * width * (rank + OVERSAMPLING) + 2
        own.turn()
    whole = Sketch(NARROW, 8, CPU)
    assert [part.shape for part in whole.parts()] == [(NARROW, NARROW), (), ()]


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_parts_add_up(width):
    # What several processes do: each sums its own vectors, and what they hold is summed in place.
    vectors = gapped(count=600, width=width).float()
    whole, half, rest = (Sketch(width, 8, CPU) for _ in range(3))
    whole.add(vectors)
    half.add(vectors[:300])
    rest.add(vectors[300:])
    for part, other in zip(half.parts(), rest.parts(), strict=True):
        part.add_(other)
    assert torch.allclose(half.leading()[0], whole.leading()[0], rtol=1e-4)
    assert float(half.energy) == pytest.approx(float(whole.energy), rel=1e-6)


# Degenerate streams


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("turns", [0, 1, 4])
def test_fewer_vectors_than_directions(turns, width):
    vectors = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    own = sketch_of(vectors, 8, turns)
    energies, directions = own.leading()
    assert directions.shape == (width, 5)
    assert_orthonormal(directions)
    assert float(energies.sum()) == pytest.approx(float(own.energy), rel=1e-4)
    assert (vectors.double() @ directions).square().sum() == pytest.approx(float(own.energy), rel=1e-4)


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("adds", [1, 1000])
def test_identical_vectors(adds, width):
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
    own = Sketch(width, 8, CPU)
    for _ in range(2):
        own.turn()
        for _ in range(adds):  # rounding errors of long sums are not directions either
            own.add(vector.expand(3, -1), 1 / adds)
    energies, directions = own.leading()
    assert directions.shape == (width, 1)
    assert float(directions[:, 0] @ vector.double() / vector.double().norm()) ** 2 == pytest.approx(1, abs=1e-6)
    assert float(energies) == pytest.approx(3 * float(vector.square().sum()), rel=1e-4)


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_one_direction_beside_noise(width):
    generator = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    vectors = torch.randn(400, 1, generator=generator) * axis + 1e-5 * torch.randn(400, width, generator=generator)
    own = sketch_of(vectors, 8)
    energies, directions = own.leading()
    assert float(directions[:, 0] @ axis.double()) ** 2 == pytest.approx(1, abs=1e-6)
    assert float(energies[0]) == pytest.approx(float(own.energy), rel=1e-4)
    assert_orthonormal(directions)


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("count", [None, 0, 3])
def test_nothing_to_find(count, width):
    own = Sketch(width, 8, CPU)
    for _ in range(2):  # also after a turn of a sketch that has seen nothing
        if count is not None:
            own.add(torch.zeros(count, width))
        energies, directions = own.leading()
        assert energies.shape == (0,)
        assert directions.shape == (width, 0)
        assert float(own.energy) == 0
        own.turn()
    # It is of use afterwards: the test matrix is not turned to where nothing is, and away from these.
    vectors = torch.zeros(4, width)
    vectors[:, -4:] = torch.randn(4, 4)
    own.add(vectors)
    assert own.leading()[1].shape == (width, 4)


@pytest.mark.parametrize("rank", [NARROW, NARROW + 1, 10 * NARROW])
def test_as_many_directions_as_the_width(rank):
    vectors = torch.randn(100, NARROW)
    own = Sketch(NARROW, rank, CPU)
    own.add(vectors)
    energies, directions = own.leading()
    assert own.exact
    assert directions.shape == (NARROW, NARROW)
    np.testing.assert_allclose(energies.numpy(), eigen(moment_of(vectors))[0], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
@pytest.mark.parametrize("width", [NARROW, 256])
def test_scale_of_vectors(width, scale):
    vectors = stream("1", width).float()
    plain, scaled = sketch_of(vectors, 8).leading(), sketch_of(vectors * scale, 8).leading()
    assert torch.allclose(scaled[0] / scale**2, plain[0], rtol=1e-3)
    assert subspace_angles(scaled[1].numpy(), plain[1].numpy()).max() < 1e-2


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_turn_forgets(width):
    own, fresh = Sketch(width, 8, CPU), Sketch(width, 8, CPU)
    own.add(torch.randn(50, width))
    own.turn()
    assert float(own.energy) == 0
    assert not own.parts()[0].any()
    vectors = torch.randn(3, width)
    own.add(vectors)
    fresh.add(vectors)
    assert own.leading()[1].shape == (width, 3)
    assert torch.allclose(own.leading()[0], fresh.leading()[0], rtol=1e-3)
