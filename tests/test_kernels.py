"""The Triton kernels, against plain torch and SciPy.

Without a GPU, Triton's interpreter runs them on the CPU, in a process of its own because it must be chosen before
triton is imported: `test_all_of_this_in_the_interpreter` runs this file again so. On a GPU they run as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import loops
import pytest
import torch
from loops import LORA, ogpsa_model, parameters_of, step_violations
from models import tiny_llama
from peft import get_peft_model
from scipy.optimize import nnls

from peft_ogpsa import OGPSAConfig
from peft_ogpsa.core import cone, linalg

triton = pytest.importorskip("triton")

from peft_ogpsa.core import kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"
)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_all_of_this_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert "passed" in result.stdout


# The version


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.5.1+git1b0418a9"])
@pytest.mark.parametrize("way", ["environment", "attribute"])
def test_a_triton_that_cannot_compile_the_kernels_is_an_error(way, version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    model = ogpsa_model()  # who does not ask for the kernels may have any Triton
    assert model.projector.kernels is False
    monkeypatch.setenv("PEFT_OGPSA_KERNELS", "1")
    ask = ogpsa_model if way == "environment" else lambda: setattr(model.projector, "kernels", True)
    with pytest.raises(ImportError, match=rf"need triton>=3\.6, but triton {re.escape(version)} is installed"):
        ask()
    assert model.projector.kernels is False


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0+git1", "4.0"])
def test_later_versions_of_triton_are_accepted(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setenv("PEFT_OGPSA_KERNELS", "1")
    assert ogpsa_model().projector.kernels is True


# The kernels one by one


def tensors(pieces: int, numel: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Parameters in places of their own, and their addresses."""
    parameters = [torch.randn(numel, device=DEVICE) for _ in range(pieces)]
    return parameters, torch.tensor([parameter.data_ptr() for parameter in parameters], device=DEVICE)


SHAPES = [(1, 5), (3, 4096), (2, 9001)]  # numbers of chunks, and of tiles, that are whole and that are not


@runs
@pytest.mark.parametrize(("pieces", "numel"), SHAPES)
def test_snapshot(pieces, numel):
    parameters, addresses = tensors(pieces, numel)
    assert torch.equal(kernels.snapshot(addresses, numel), torch.stack(parameters))


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 8, 48])
@pytest.mark.parametrize(("pieces", "numel"), SHAPES)
def test_products(pieces, numel, m, dtype):
    parameters, addresses = tensors(pieces, numel)
    stack = torch.randn(pieces, numel, device=DEVICE)
    rows = torch.randn(pieces, m, numel, device=DEVICE).to(dtype)
    step = stack - torch.stack(parameters)
    chunks = -(-numel // kernels.CHUNK)
    # The last piece's chunks come first, and one place stays free in front.
    positions = 1 + chunks * torch.arange(pieces - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    partials = torch.full((1 + pieces * chunks, m), 7.0, device=DEVICE)
    squares = torch.full((1 + pieces * chunks,), 7.0, device=DEVICE)
    kernels.products(addresses, stack, rows, positions, partials, squares)
    assert torch.equal(partials[0], torch.full((m,), 7.0, device=DEVICE))
    found = partials[1:].double().reshape(pieces, chunks, m).sum(1).flip(0)
    lengths = rows.double().norm(dim=-1) * step.double().norm(dim=-1, keepdim=True)
    assert ((found - (rows.double() @ step.double().unsqueeze(-1)).squeeze(-1)).abs() <= 1e-6 * lengths).all()
    found = squares[1:].double().reshape(pieces, chunks).sum(1).flip(0)
    torch.testing.assert_close(found, step.double().square().sum(-1), rtol=1e-6, atol=0)


def solved(gram: torch.Tensor, products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's answer to `cone.cone_coefficients`' question, and the correction's squared length."""
    blocks = len(gram)
    offsets = torch.arange(blocks + 1, dtype=torch.int32, device=DEVICE)
    squares = torch.arange(1.0, blocks + 1, device=DEVICE)
    partials = -products.float().to(DEVICE)
    coefficients, removed, lengths = kernels.solve(gram.to(DEVICE), partials, squares, offsets)
    assert torch.equal(lengths, squares.double())
    return coefficients.cpu(), removed.cpu()


def reference_rows(kind: str, m: int, d: int) -> torch.Tensor:
    rows = torch.randn(m, d)
    half = m // 2
    if kind == "alike":
        rows = torch.randn(d) + 0.05 * rows
    elif kind == "equal":
        rows[half:] = rows[: m - half]
    elif kind == "opposed":
        rows[half:] = -rows[: m - half]
    elif kind == "nearly opposed":
        rows[half:] = -rows[: m - half] + 1e-3 * rows[half:]
    elif kind == "dependent":
        few = max(1, m // 3)  # of small whole numbers, so that float32 holds the dependence exactly
        return (torch.randint(-2, 3, (1, m, few)) @ torch.randint(-2, 3, (1, few, d))).float() / 32
    elif kind == "some zero":
        rows[::3] = 0
    return linalg.normalize(rows.unsqueeze(0))


@runs
@pytest.mark.parametrize("m", [1, 2, 8, 20, 48])
@pytest.mark.parametrize("kind", ["any", "alike", "equal", "opposed", "nearly opposed", "dependent", "some zero"])
def test_solution_is_the_closest_update_in_the_cone(kind, m):
    for d in (3, m, 4 * m):
        rows = reference_rows(kind, m, d)
        updates = torch.randn(1, d) + rows.sum(1)
        gram = linalg.gram(rows)
        found, removed = solved(gram, linalg.products(rows, updates))
        torch.testing.assert_close(removed, linalg.lengths_squared(gram, found), rtol=1e-9, atol=1e-12)
        rows, update, coefficients = rows[0].double(), updates[0].double(), found[0]
        projected = update - coefficients @ rows
        length = float(update.norm())
        assert (coefficients >= 0).all()
        assert float((rows @ projected).max()) <= 1e-6 * length
        # Feasible, and with a duality gap that bounds the squared distance from the optimum.
        # Products come in float32, and the more alike the rows, the more of their rounding the solution shows.
        exact = {"alike": 1e-5, "nearly opposed": 1e-3}.get(kind, 2e-6)
        assert abs(float((rows @ projected) @ coefficients)) <= exact * length**2
        nearest = update - torch.from_numpy(nnls(rows.T.numpy(), update.numpy(), maxiter=10000)[0]) @ rows
        if float((rows @ nearest).max()) <= 1e-6 * length:  # SciPy, too, gives up on some
            assert float((projected - nearest).norm()) <= exact * length


@runs
@pytest.mark.parametrize("m", [1, 8, 48])
def test_solution_is_the_torch_one(m):
    rows = linalg.normalize(torch.randn(3, m, 5 * m)) * torch.rand(3, m, 1)  # unit length is not assumed
    products = linalg.products(rows, 1e-4 * torch.randn(3, 5 * m))
    gram = linalg.gram(rows)
    torch.testing.assert_close(
        solved(gram, products)[0], cone.cone_coefficients(gram, products), rtol=1e-9, atol=1e-15
    )


@runs
def test_no_conflict_gives_exact_zeros():
    rows = linalg.normalize(torch.randn(2, 8, 50))
    rows[:, 3] = 0
    coefficients, removed = solved(linalg.gram(rows), torch.zeros(2, 8) - torch.rand(2, 8) * (rows != 0).any(-1))
    assert (coefficients == 0).all()
    assert (removed == 0).all()


@runs
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["gram", "products"])
def test_what_is_not_finite_stays_in_its_block(where, value):
    rows = linalg.normalize(torch.randn(4, 8, 20))
    given = {"gram": linalg.gram(rows), "products": linalg.products(rows, torch.randn(4, 20))}
    good, _ = solved(**given)
    given[where][2].view(-1)[5] = value
    coefficients, removed = solved(**given)
    assert coefficients[2].isnan().all()
    assert removed[2].isnan()
    others = [0, 1, 3]
    assert torch.equal(coefficients[others], good[others])


@runs
def test_chunks_of_a_block_add_up():
    m, offsets = 8, [0, 1, 300, 303]
    gram = torch.eye(m, dtype=torch.float64, device=DEVICE).expand(3, m, m).contiguous()
    partials, squares = torch.randn(303, m, device=DEVICE), torch.rand(303, device=DEVICE)
    coefficients, _, lengths = kernels.solve(
        gram, partials, squares, torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    )
    for block, (first, last) in enumerate(pairwise(offsets)):
        expected = -partials[first:last].double().sum(0)
        torch.testing.assert_close(coefficients[block], expected.clamp(min=0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lengths[block], squares[first:last].double().sum(), rtol=1e-12, atol=0)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 8, 48])
@pytest.mark.parametrize(("pieces", "numel"), SHAPES)
def test_correct(pieces, numel, m, dtype):
    parameters, addresses = tensors(pieces, numel)
    before = torch.stack(parameters)
    rows = torch.randn(pieces, m, numel, device=DEVICE).to(dtype)
    coefficients = torch.rand(pieces + 1, m, dtype=torch.float64, device=DEVICE)
    coefficients[:, 1::2] = 0
    coefficients[1] = 0  # the first piece's block
    owners = torch.arange(1, pieces + 1, device=DEVICE)
    expected = before - linalg.combine(rows, coefficients[1:])
    rows[:, 1::2] = torch.nan  # never read
    rows[0] = torch.nan
    kernels.correct(addresses, rows, coefficients, owners)
    after = torch.stack(parameters)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


# Whole steps through the projector


@pytest.fixture
def device(monkeypatch):
    """Lets the kernels have the steps of models on the device that there is."""
    monkeypatch.setattr(kernels, "DEVICES", (DEVICE,))
    loss_of = loops.loss_of
    monkeypatch.setattr(
        loops, "loss_of", lambda model, inputs: loss_of(model, {k: v.to(model.device) for k, v in inputs.items()})
    )
    return DEVICE


def trained(model, kernels_on: bool, moved: bool = False) -> tuple[list[float], torch.Tensor, float]:
    """Violations of the constraint in some steps, the parameters after them, and the share removed."""
    model.projector.kernels = kernels_on
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    violations = []
    for violation in step_violations(model, optimizer):
        violations.append(violation)
        if moved:
            for parameter in parameters_of(model):
                parameter.data = parameter.data.clone()
    assert (model.projector._step.last_launcher is not None) == kernels_on
    parameters = torch.cat([parameter.detach().flatten() for parameter in parameters_of(model)])
    return violations, parameters, model.projector.diagnostics.collect()["ogpsa/removed"]


@runs
@pytest.mark.parametrize(
    ("scope", "rows_dtype"),
    [
        ("slice", "float32"),
        ("tensor", "float32"),
        ("tensor", "bfloat16"),
        ("module", "float32"),
        ("module", "bfloat16"),
        ("model", "float32"),
        ("model", "bfloat16"),
    ],
)
def test_steps_are_those_of_torch(device, scope, rows_dtype, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 64)  # so that these small parameters have several chunks and tiles
    monkeypatch.setattr(kernels, "_TILE", 256)
    # Three parameters of 128 numbers and one of 256. The interpreter takes its time over each.
    target = r".*\.layers\.(0\.self_attn\.q_proj|1\.mlp\.down_proj)"
    overrides = {"scope": scope, "rows_dtype": rows_dtype, "target_modules": target}
    if scope == "slice":
        overrides["slices"] = 2
    _, expected, share = trained(ogpsa_model(**overrides).to(device), False)
    violations, found, own_share = trained(ogpsa_model(**overrides).to(device), True)
    assert max(violations) <= 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert own_share == pytest.approx(share, rel=1e-4)
    assert share > 0.01
    _, again, _ = trained(ogpsa_model(**overrides).to(device), True)
    assert torch.equal(again, found)


@runs
def test_parameters_that_move_in_memory_are_found(device):
    _, expected, _ = trained(ogpsa_model(target_modules=["q_proj"]).to(device), True)
    _, found, _ = trained(ogpsa_model(target_modules=["q_proj"]).to(device), True, moved=True)
    assert torch.equal(found, expected)


@runs
def test_step_without_conflict_leaves_parameters_alone_to_the_bit(device):
    model = ogpsa_model().to(device)
    model.projector.kernels = True
    model.projector.refresh(loops.references(0), loops.loss_of)
    parameters = parameters_of(model)
    for rows in model.projector.subspace.rows.stack:
        rows.abs_()
    model.projector.subspace.rows._update_gram(range(8))
    model.projector.subspace._solve()
    expected = [parameter.detach() - 0.5 for parameter in parameters]  # lower every reference loss
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.5).step()
    assert model.projector._step.last_launcher is not None
    assert all(torch.equal(*pair) for pair in zip(parameters, expected, strict=True))


@runs
def test_launches_do_not_grow_with_layers(device, monkeypatch):
    launch, counts, groups = kernels._launch, [], 0
    for layers in (1, 2):
        names: list[str] = []
        monkeypatch.setattr(
            kernels, "_launch", lambda kernel, *a, names=names, **k: (names.append(kernel), launch(kernel, *a, **k))
        )
        config = OGPSAConfig(subspace="gradients", rows=8, refresh_steps=10, reference_weight=0.0, **LORA)
        model = get_peft_model(tiny_llama(num_hidden_layers=layers), config).to(device)
        model.projector.kernels = True
        list(step_violations(model, torch.optim.SGD(parameters_of(model), lr=1e-2), steps=1))
        counts.append(len(names))
        groups = len(model.projector.subspace.blocks.groups)
    assert counts == [3 * groups + 1] * 2


@runs
@pytest.mark.parametrize(
    ("overrides", "change"),
    [
        ({"constraint": "orthogonal"}, None),
        ({"rows": 65}, None),
        ({"rows_dtype": "int8"}, None),
        ({}, "bfloat16"),
        ({}, "unaligned"),
        ({}, "strided"),
    ],
)
def test_plain_torch_does_what_the_kernels_do_not(device, overrides, change):
    model = ogpsa_model(**overrides).to(device)
    model.projector.kernels = True
    model.projector.refresh(loops.references(0), loops.loss_of)
    first = parameters_of(model)[0]
    if change == "bfloat16":
        first.data = first.data.bfloat16()
    elif change == "unaligned":
        first.data = torch.cat([first.data.new_zeros(1), first.data.flatten()])[1:].view_as(first)
    elif change == "strided":
        first.data = first.data.mT.contiguous().mT
    assert model.projector._step._launcher(model.projector.subspace, model.projector.kernels) is None


def test_they_are_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("PEFT_OGPSA_KERNELS", raising=False)
    assert ogpsa_model().projector.kernels is False
    monkeypatch.setenv("PEFT_OGPSA_KERNELS", "1")
    model = ogpsa_model()
    assert model.projector.kernels is True
    model.projector.refresh(loops.references(0), loops.loss_of)
    assert model.projector._step._launcher(model.projector.subspace, model.projector.kernels) is None  # on a CPU


# Compilation, which needs no GPU

POINTERS = {
    "addresses": "*i64",
    "stack": "*fp32",
    "rows": "*bf16",
    "positions": "*i32",
    "partials": "*fp32",
    "squares": "*fp32",
    "gram": "*fp64",
    "offsets": "*i32",
    "coefficients": "*fp64",
    "removed": "*fp64",
    "lengths": "*fp64",
    "owners": "*i64",
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("m", [1, 8, 48])
@pytest.mark.parametrize("name", ["_snapshot", "_products", "_solve", "_correct"])
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_compiles(capability, name, m, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launched: dict = {}
    monkeypatch.setattr(kernels, "_launch", lambda kernel, programs, *a, **constants: launched.update(constants))
    if name == "_solve":
        kernels.solve(torch.empty(1, m, m), *[torch.empty(1)] * 3)
    elif name == "_snapshot":
        kernels.snapshot(torch.empty(1), 64)
    else:
        kernels.correct(torch.empty(1), torch.empty(1, m, 64), *[torch.empty(1)] * 2)
    warps = launched.pop("num_warps", 4)
    kernel = getattr(kernels, name)
    # Triton makes constants of integers that are 1.
    launched |= {n: 1 for n in ("m", "chunks") if m == 1 and n in kernel.arg_names}
    for rows in ("*bf16", "*fp32") if "rows" in kernel.arg_names else ("*bf16",):
        types = {n: "constexpr" if n in launched else "i32" for n in kernel.arg_names} | {
            n: t for n, t in (POINTERS | {"rows": rows}).items() if n in kernel.arg_names
        }
        aligned = [n for n, t in types.items() if t.startswith("*") or n == "numel"]
        attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(kernel, types, launched, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert len(compiled.asm["cubin"]) > 0
        if name != "_solve":  # parameters and rows move 16 bytes a thread at a time
            assert "ld.global.v4" in compiled.asm["ptx"]
