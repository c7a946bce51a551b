"""Properties of the linalg, over sampled shapes, ranks, scales and degeneracies."""

import math

import pytest
import scipy
import torch
from scipy.optimize import nnls
from torch.nn.functional import normalize as unit

from peft_ogpsa.core import cone as cone_rule
from peft_ogpsa.core import linalg

SHAPES = [(1, 1), (1, 7), (2, 3), (4, 40), (12, 64), (12, 5), (30, 200)]
KINDS = ["plain", "common", "zero", "duplicate", "opposite", "near", "deficient", "cancelling", "bfloat16"]
SCALES = [1.0, 1e-20, 1e20]


def sample(
    kind: str, m: int, d: int, seed: int = 0, blocks: int = 4, normalized: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[blocks, m, d]` of one kind of degeneracy, and vectors with and without conflicts.

    Deficient and cancelling rows are whole numbers, so that they are exactly so unless they are normalized.
    """
    generator = torch.Generator().manual_seed(1000 * seed + 31 * m + d + KINDS.index(kind))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = randn(blocks, m, d)
    half = m // 2
    if kind == "common":
        rows += randn(blocks, 1, d)
    elif kind == "zero":
        rows[:, ::2] = 0.0
    elif kind == "duplicate":
        rows[:, half:] = rows[:, : m - half]
    elif kind == "opposite":
        rows[:, m - half :] = -rows[:, :half]
    elif kind == "near" and m > 1:
        rows[:, 1] = -unit(rows[:, 0], dim=-1) + 1e-2 * unit(rows[:, 1], dim=-1)
    elif kind == "deficient":
        rank = (m + 2) // 3
        rows = (randn(blocks, m, rank) * 4).round() @ (randn(blocks, rank, d) * 4).round()
    elif kind == "cancelling" and m > 1:
        rows = (rows * 8).round()
        rows[:, -1] = -rows[:, :-1].sum(1)
    rows = linalg.normalize(rows) if normalized else rows.float()
    vectors = randn(blocks, d)
    vectors[::2] += (rows.double() * 2 * randn(blocks, m, 1)).sum(1)[::2]
    return (rows.bfloat16() if kind == "bfloat16" else rows), vectors.float()


def exact_products(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (rows.double() @ vectors.double().unsqueeze(-1)).squeeze(-1)


def orthogonal(rows: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    basis = linalg.orthonormal_rows(rows, linalg.span_weights(linalg.gram(rows)))
    return vectors - linalg.combine(basis, linalg.products(basis, vectors)), basis


def cone(rows: torch.Tensor, vectors: torch.Tensor, passes: int = 2) -> torch.Tensor:
    gram = linalg.gram(rows)
    for _ in range(passes):
        coefficients = cone_rule.cone_coefficients(gram, linalg.products(rows, vectors))
        vectors = vectors - linalg.combine(rows, coefficients)
    return vectors


def close(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, tolerance: float) -> bool:
    difference = (a.double() - b.double()).norm(dim=-1)
    return bool((difference <= tolerance * scale.double().norm(dim=-1)).all())


cases = pytest.mark.parametrize(("kind", "shape"), [(k, s) for k in KINDS for s in SHAPES], ids=str)


# --- rows and products ---


@pytest.mark.parametrize("scale", [1e-39, 1e-30, 1e-20, 1.0, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_survives_extreme_scales(scale, dtype):
    directions = torch.tensor([[[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]]) / 4
    rows = (directions * scale).to(dtype)
    length = rows.double().norm(dim=-1)
    torch.testing.assert_close(linalg.norms(rows), length, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(linalg.normalize(rows).double(), rows.double() / length[..., None], rtol=1e-6, atol=0)


def test_normalize_without_float64_does_not_overflow(monkeypatch):
    monkeypatch.setattr(linalg, "small_dtype", lambda device: torch.float32)
    rows = torch.tensor([[[3e30, 4e30], [3e-30, 4e-30], [3.0, 4.0]]])
    expected = torch.tensor([0.6, 0.8]).expand(1, 3, 2)
    torch.testing.assert_close(linalg.normalize(rows), expected)


def test_zero_and_non_finite_rows_become_zero_rows():
    rows = torch.ones(1, 5, 3)
    rows[0, 1], rows[0, 2, 1], rows[0, 3, 0] = 0.0, math.nan, -math.inf
    result = linalg.normalize(rows)
    assert torch.equal(result[0, 1:4], torch.zeros(3, 3))
    torch.testing.assert_close(result.norm(dim=-1)[0], torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]))
    assert not linalg.norms(rows)[0, 2:4].isfinite().any()


@pytest.mark.parametrize("tile", [1, 7, 64, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_do_not_change_the_result(monkeypatch, tile, dtype):
    monkeypatch.setattr(linalg, "TILE", tile)
    rows, vectors = sample("plain", 3, 11, blocks=5)
    rows = rows.to(dtype)
    exact = rows.double()
    coefficients = torch.linspace(-1, 1, 15).reshape(5, 3)
    torch.testing.assert_close(linalg.norms(rows), exact.norm(dim=-1))
    torch.testing.assert_close(linalg.normalize(rows), unit(exact, dim=-1).float())
    torch.testing.assert_close(linalg.gram(rows), exact @ exact.mT, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(linalg.products(rows, vectors), exact_products(rows, vectors).float())
    combined = (coefficients.double()[:, None] @ exact)[:, 0].float()
    torch.testing.assert_close(linalg.combine(rows, coefficients.double()), combined)
    weights = torch.arange(30, dtype=torch.float64).reshape(5, 2, 3)
    torch.testing.assert_close(linalg.orthonormal_rows(rows, weights), (weights @ exact).float())


def test_dtypes():
    rows, vectors = sample("bfloat16", 3, 8)
    gram = linalg.gram(rows)
    products = linalg.products(rows, vectors.bfloat16())
    assert gram.dtype == torch.float64
    assert linalg.norms(rows).dtype == torch.float64
    assert linalg.span_weights(gram).dtype == torch.float64
    assert cone_rule.cone_coefficients(gram, products).dtype == torch.float64
    assert products.dtype == linalg.combine(rows, products).dtype == linalg.normalize(rows).dtype == torch.float32
    assert linalg.small_dtype("mps") == torch.float32


# --- orthogonal ---


@cases
def test_orthogonal_against_svd(kind, shape):
    rows, vectors = sample(kind, *shape)
    result, basis = orthogonal(rows, vectors)
    _, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    right = right * (values > linalg.TOLERANCE * values[:, :1]).unsqueeze(-1)
    oracle = vectors.double() - linalg.combine(right, exact_products(right, vectors)).double()
    residual = linalg.products(basis, result).norm(dim=-1)
    assert (residual <= 1e-5 * vectors.norm(dim=-1)).all()
    assert (linalg.products(rows, result).abs().amax(-1) <= 1e-5 * vectors.norm(dim=-1)).all()
    assert close(result, oracle, vectors, 1e-5)
    assert close(orthogonal(rows, result)[0], result, vectors, 1e-5)
    assert (result.norm(dim=-1) <= vectors.norm(dim=-1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", ["plain", "common", "zero", "duplicate", "opposite", "deficient"])
def test_orthogonal_coefficients_agree_with_the_basis(kind):
    rows, vectors = sample(kind, 8, 60)
    inverse = linalg.pseudo_inverse(linalg.gram(rows))
    coefficients = linalg.orthogonal_coefficients(inverse, linalg.products(rows, vectors))
    assert close(vectors - linalg.combine(rows, coefficients), orthogonal(rows, vectors)[0], vectors, 1e-5)


def test_rank_keeps_the_top_directions():
    rows, _ = sample("common", 9, 50)
    weights = linalg.span_weights(linalg.gram(rows), rank=3)
    assert torch.equal(weights[:, 3:], torch.zeros_like(weights[:, 3:]))
    basis = linalg.orthonormal_rows(rows, weights[:, :3]).double()
    torch.testing.assert_close(basis @ basis.mT, torch.eye(3).double().expand(4, 3, 3), rtol=0, atol=1e-6)
    top = torch.linalg.svd(rows.double(), full_matrices=False)[2][:, :3]
    torch.testing.assert_close(basis.mT @ basis, top.mT @ top, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("angle", "kept"), [(1e-8, 1), (5e-7, 1), (2e-6, 2), (1e-5, 2), (1e-3, 2), (1.0, 2)])
def test_two_rows_are_dropped_as_gram_schmidt_drops_them(angle, kept):
    first, other = torch.zeros(2, 6, dtype=torch.float64).scatter_(1, torch.tensor([[1], [4]]), 1.0)
    rows = torch.stack([first, math.cos(angle) * first + math.sin(angle) * other])[None]
    remainder = rows[0, 1] - (rows[0, 1] @ first) * first
    assert (2 if remainder.norm() >= 1e-6 else 1) == kept
    weights = linalg.span_weights(linalg.gram(rows))
    basis = weights @ rows
    assert (basis.norm(dim=-1) > 0.5).sum() == kept
    span = torch.outer(first, first) + (torch.outer(other, other) if kept == 2 else 0.0)
    torch.testing.assert_close((basis.mT @ basis)[0], span, rtol=0, atol=1e-3)


def test_span_of_nothing_is_nothing():
    weights = linalg.span_weights(torch.zeros(2, 3, 3))
    assert torch.equal(weights, torch.zeros(2, 3, 3, dtype=torch.float64))


# --- cone ---


@pytest.mark.skipif(
    tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 16),  # the last one for Python 3.10 is 1.15
    reason="nnls of SciPy before 1.16 is wrong for some of these rows",
)
@pytest.mark.parametrize("seed", range(2))
@cases
def test_cone_against_non_negative_least_squares(kind, shape, seed):
    rows, vectors = sample(kind, *shape, seed=seed, normalized=False)
    exact = rows.double()
    products = exact_products(rows, vectors)
    coefficients = cone_rule.cone_coefficients(linalg.gram(rows), products)
    result = vectors.double() - (coefficients[:, None] @ exact)[:, 0]
    for block in range(len(rows)):
        solution, _ = nnls(exact[block].T.numpy(), vectors[block].double().numpy(), maxiter=10000)
        oracle = vectors[block].double() - exact[block].T @ torch.from_numpy(solution)
        assert (result[block] - oracle).norm() <= 1e-5 * vectors[block].norm()
    # Karush-Kuhn-Tucker: feasible, non-negative, complementary.
    length = vectors.double().norm(dim=-1, keepdim=True)
    slopes = exact_products(rows, result)
    assert (coefficients >= 0).all()
    assert (slopes <= 1e-7 * exact.norm(dim=-1) * length).all()
    assert (coefficients * slopes.abs() <= 1e-6 * length**2).all()


@cases
def test_cone_in_float32(kind, shape):
    rows, vectors = sample(kind, *shape)
    result = cone(rows, vectors)
    length = vectors.norm(dim=-1, keepdim=True)
    assert (linalg.products(rows, result) <= 1e-5 * length).all()
    assert (result.norm(dim=-1, keepdim=True) <= length * (1 + 1e-6)).all()
    assert close(cone(rows, result), result, vectors, 1e-5)


@pytest.mark.parametrize("shape", [(48, 30), (96, 64), (96, 500)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "opposite", "near", "deficient", "cancelling"])
def test_large_degenerate_cones_converge(kind, shape):
    rows, vectors = sample(kind, *shape, blocks=16)
    gram, products = linalg.gram(rows), exact_products(rows, vectors)
    coefficients = cone_rule.cone_coefficients(gram, products)
    slopes = products - (gram @ coefficients.unsqueeze(-1)).squeeze(-1)
    length = vectors.double().norm(dim=-1, keepdim=True)
    assert (slopes <= 1e-6 * length).all()
    assert torch.equal(coefficients, cone_rule.cone_coefficients(gram, products, iterations=100))
    assert torch.equal(coefficients, cone_rule.cone_coefficients(cone_rule.correlations(gram), products))


@pytest.mark.parametrize("angle", [1e-2, 1e-3])
def test_nearly_opposed_rows(angle):
    rows, vectors = sample("plain", 2, 64, blocks=32)
    rows[:, 1] = -rows[:, 0] + angle * rows[:, 1]
    rows = linalg.normalize(rows)
    vectors = unit(vectors + 2 * unit(rows.sum(1), dim=-1), dim=-1)
    assert linalg.products(rows, cone(rows, vectors, passes=1)).max() <= 1e-7 / angle
    assert linalg.products(rows, cone(rows, vectors)).max() <= 1e-6


@pytest.mark.parametrize("scale", SCALES)
def test_cone_ignores_the_scale_of_rows_and_follows_that_of_the_vector(scale):
    rows, vectors = sample("common", 6, 30)
    factors = torch.logspace(0, math.log10(scale), 6, dtype=torch.float64)[:, None]
    scaled = rows.double() * factors
    products = exact_products(scaled, vectors)
    moved = (cone_rule.cone_coefficients(scaled @ scaled.mT, products)[:, None] @ scaled)[:, 0]
    expected = vectors - cone(rows, vectors, passes=1)
    assert close(moved, expected, vectors, 1e-6)
    gram = linalg.gram(rows)
    coefficients = cone_rule.cone_coefficients(gram, exact_products(rows, vectors))
    larger = cone_rule.cone_coefficients(gram, exact_products(rows, vectors) * scale)
    torch.testing.assert_close(larger, coefficients * scale, rtol=1e-9, atol=1e-12 * scale)


@cases
def test_cone_is_the_identity_without_conflict(kind, shape):
    rows, vectors = sample(kind, *shape)
    gram, products = linalg.gram(rows), -linalg.products(rows, vectors).abs()
    assert torch.equal(cone_rule.cone_coefficients(gram, products), torch.zeros(products.shape, dtype=torch.float64))


def test_zero_rows_get_no_weight():
    rows, vectors = sample("zero", 9, 40)
    coefficients = cone_rule.cone_coefficients(linalg.gram(rows), linalg.products(rows, vectors))
    assert torch.equal(coefficients[:, ::2], torch.zeros(4, 5, dtype=torch.float64))
    assert (coefficients > 0).any()


@pytest.mark.parametrize("seed", range(3))
def test_one_row_has_a_closed_form(seed):
    rows, vectors = sample("plain", 1, 20, seed=seed, blocks=10)
    products = exact_products(rows, vectors)
    gram = linalg.gram(rows) * 4
    coefficients = cone_rule.cone_coefficients(gram, products)
    torch.testing.assert_close(coefficients, products.clamp(min=0.0) / gram[..., 0], rtol=1e-9, atol=0.0)


def test_order_of_rows_does_not_matter():
    rows, vectors = sample("common", 12, 64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    gram, products = linalg.gram(rows), exact_products(rows, vectors)
    coefficients = cone_rule.cone_coefficients(gram, products)
    permuted = cone_rule.cone_coefficients(gram[:, order][:, :, order], products[:, order])
    torch.testing.assert_close(permuted, coefficients[:, order], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_see_their_neighbors(kind):
    rows, vectors = sample(kind, 6, 30)
    gram, products = linalg.gram(rows), linalg.products(rows, vectors)
    together = cone_rule.cone_coefficients(gram, products)
    spans = linalg.span_weights(gram)
    gram[1], products[2] = math.nan, math.inf
    poisoned = cone_rule.cone_coefficients(gram, products)
    weights = linalg.span_weights(gram)
    for block in (0, 3):
        alone = cone_rule.cone_coefficients(gram[block : block + 1], products[block : block + 1])[0]
        torch.testing.assert_close(together[block], alone, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(poisoned[block], alone, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(weights[block], spans[block])
    assert poisoned[1].isnan().any()
    assert poisoned[2].isnan().any()
    assert weights[1].isnan().all()


def test_cone_without_float64(monkeypatch):
    monkeypatch.setattr(linalg, "small_dtype", lambda device: torch.float32)
    rows, vectors = sample("common", 12, 64, blocks=16)
    result = cone(rows, vectors)
    monkeypatch.undo()
    assert close(result, cone(rows, vectors), vectors, 1e-3)


def test_the_cone_needs_no_operation_that_a_cuda_graph_cannot_hold(monkeypatch):
    """`torch.cholesky_solve` of a batch goes to MAGMA, whose pointers are in the host's memory."""

    def refuse(*arguments, **options):
        raise AssertionError("torch.cholesky_solve")

    monkeypatch.setattr(torch, "cholesky_solve", refuse)
    rows, vectors = sample("plain", 12, 64)
    assert not torch.equal(cone(rows, vectors), vectors)


def test_nothing_is_read_back_from_an_accelerator():
    """The meta device holds no values, so any data-dependent control flow raises on it."""
    rows = torch.empty(3, 5, 16, device="meta")
    vectors = torch.empty(3, 16, device="meta")
    gram, products = linalg.gram(linalg.normalize(rows)), linalg.products(rows, vectors)
    inverse = linalg.pseudo_inverse(gram)
    basis = linalg.orthonormal_rows(rows, linalg.span_weights(gram, rank=2))
    assert basis.shape == rows.shape
    for coefficients in (
        cone_rule.cone_coefficients(gram, products),
        linalg.orthogonal_coefficients(inverse, products),
    ):
        assert linalg.combine(rows, coefficients).shape == vectors.shape
        assert linalg.combine(rows.bfloat16(), coefficients).shape == vectors.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_empty_shards(dtype):
    rows = torch.empty(2, 3, 0, dtype=dtype)
    assert linalg.norms(rows).tolist() == [[0.0] * 3] * 2
    assert not linalg.gram(rows, [1]).any()
    assert linalg.products(rows, torch.empty(2, 0)).tolist() == [[0.0] * 3] * 2
    assert linalg.combine(rows, torch.ones(2, 3)).shape == (2, 0)
    assert linalg.normalize(rows).shape == rows.shape
