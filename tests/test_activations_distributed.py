"""The activation subspace in several processes: found together, held by each alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from loops import batch, loss_of
from parallel import build, common_folder, references, sgd, spawn, train, whole, wrap
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard

from peft_ogpsa import projector_of
from peft_ogpsa.core import distributed
from peft_ogpsa.core.sketch import Sketch
from peft_ogpsa.trainer import checkpoint

TOLERANCE = 1e-5
WRAPPERS = ("ddp", "fsdp2")
SETTINGS = {"subspace": "activations", "subspace_rank": 6, "reference_weight": 0.0}
NOT_LINEAR = ["embed_tokens", "*norm*", "lm_head"]

# Model, how it is trained. Reference batches of 3, 2 and 1 examples: no share is even.
CASES: dict[str, tuple[tuple, dict]] = {
    "LoRA": (("lora", {}), {}),
    "LoRA, bfloat16 directions, accumulation": (("lora", {"rows_dtype": "bfloat16"}), {"accumulation": 2}),
    "LoRA, by energy": (("lora", {"subspace_rank": None, "subspace_energy": 0.6}), {"optimizer_of": sgd}),
    "LoRA, a rank of its own": (("lora", {"rank_pattern": {r"layers\.0\..*q_proj": 4}}), {}),
    "LoRA, reference weight": (("lora", {"reference_weight": 0.5}), {}),
    "full": (("full", {"exclude": NOT_LINEAR}), {}),
    "full, SGD": (("full", {"exclude": NOT_LINEAR}), {"optimizer_of": sgd}),
}


def built(kind: str, **overrides: Any) -> torch.nn.Module:
    return build(kind, **{**SETTINGS, **overrides})


def run(case: str, how: str) -> dict[str, Any]:
    (kind, overrides), options = CASES[case]
    model = built(kind, **overrides)
    start = whole(model)
    told = build_and_train(model, how, range(3), **options)
    told["start"] = start
    told["leak"] = leak(model, start, kind)
    told |= directions_of(model)
    return told


def build_and_train(model: torch.nn.Module, how: str, steps: range, **options: Any) -> dict[str, Any]:
    """Builds the subspace first: `train` refreshes but once a step."""
    wrapped = wrap(model, how)
    projector = projector_of(model)
    assert projector.unbuilt
    projector.refresh(references(0), loss_of, model)
    assert not projector.unbuilt
    with patch("parallel.wrap", return_value=wrapped):
        return train(model, how, steps, **options)


def directions_of(model: torch.nn.Module) -> dict[str, Any]:
    tensors, rest = projector_of(model).activations.state_dict()
    spans = {entry["layers"][0]: span(tensors[f"directions.{entry['place']}"]) for entry in rest}
    energies = {entry["layers"][0]: torch.tensor(entry["energies"]) for entry in rest}
    return {"spans": spans, "energies": energies}


def span(u: torch.Tensor) -> torch.Tensor:
    """The projection onto the directions, which no sign or order of them changes."""
    return (u.double() @ u.double().T).float()


def leak(model: torch.nn.Module, start: dict, kind: str) -> float:
    """The largest `||A U|| / ||A||` on assembled parameters; of whole weights that of their change."""
    tensors, rest = projector_of(model).activations.state_dict()
    parameters = whole(model)
    worst = 0.0
    for entry in rest:
        u = tensors[f"directions.{entry['place']}"].double()
        for layer in entry["layers"]:
            if kind == "lora":
                (name,) = [name for name in parameters if f"{layer}.lora_A." in name]
                own = parameters[name].double()
            else:
                name = f"{layer}.weight"
                own = parameters[name].double() - start[name].double()
            assert own.norm() > 0, name
            worst = max(worst, float((own @ u).norm() / own.norm()))
    return worst


# The work of the processes


def _two(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {f"{case} {how}": run(case, how) for how in WRAPPERS for case in CASES}
    for how in WRAPPERS:
        told[f"both {how}"] = _both(how)
        told[f"loaded {how}"] = _loaded(how)
        told[f"in use {how}"] = _in_use(how)
        train(built("lora"), how, range(2), sgd, save=folder / how)
        told[f"resumed {how}"] = train(built("lora"), how, range(2, 4), sgd, resume=folder / how)["parameters"]
    told["refused"] = _refused()
    told["other directions"] = _other_directions()
    told["other batches"] = _other_batches()
    told["sharded along inputs"] = _sharded_along_inputs()
    told["divided"] = _divided()
    return told


def _both(how: str) -> dict[str, Any]:
    model = built("lora", subspace="both", reference_weight=0.0, rows_from="batch")
    start = whole(model)
    told = build_and_train(model, how, range(3))
    return {**told, "leak": leak(model, start, "lora")}


def _loaded(how: str) -> dict[str, Any]:
    """An adapter that was trained in the subspace, in the same one again."""
    model = built("lora")
    train(model, how, range(2))
    before = whole(model)
    projector = projector_of(model)
    projector._builder.subspace = None
    assert projector.due
    projector.refresh(references(0), loss_of, model)
    return {"before": before, "after": whole(model)}


def _in_use(how: str) -> list[bool]:
    model = built("lora")
    wrapped = wrap(model, how)
    projector = projector_of(model)
    projector.refresh(references(0), loss_of, model)
    told = [projector.activations.in_use()]
    with patch("parallel.wrap", return_value=wrapped):
        train(model, how, range(1))
    told.append(projector.activations.in_use())
    projector.reset()
    return [*told, projector.activations is not None]


def _other_directions() -> list[float]:
    """The difference of every A between two processes of which one finds other directions, as other hardware may."""
    leading = Sketch.leading

    def other(sketch: Sketch) -> tuple[torch.Tensor, torch.Tensor]:
        energies, directions = leading(sketch)
        return (energies[:-1], directions[:, 1:]) if distributed.rank() else (energies, directions)

    model = built("lora")
    wrap(model, "ddp")
    with patch.object(Sketch, "leading", other):
        projector_of(model).refresh(references(0), loss_of, model)
    spread = []
    for own in whole(model).values():
        ends = torch.stack([own, -own])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        spread.append(float((ends[0] + ends[1]).max()))
    return spread


def _divided() -> dict[str, torch.Tensor]:
    """The parameters after steps of an optimizer that gives one process all of LoRA, the other the largest weight."""
    model = built("lora", target_modules=["q_proj"], modules_to_save=["lm_head"])
    optimizer = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=1e-2)
    build_and_train(model, "ddp", range(3), optimizer_of=optimizer)
    own = whole(model)
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, own)
    assert len(own) == 5, "two layers' A and B, and the head"
    return held


def _refused() -> str:
    """An adapter that was not born in the complement; all processes say so, and nothing is changed."""
    model = built("lora")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(len(name))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    wrap(model, "fsdp2")
    before = whole(model)
    with pytest.raises(ValueError, match="not trained in the null space") as error:
        projector_of(model).refresh(references(0), loss_of, model)
    after = whole(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(error.value)


def _other_batches() -> list[str]:
    model, told = built("lora"), []
    for own in (batch(0, 1 + distributed.rank()), batch(distributed.rank())):
        with pytest.raises(ValueError, match="differ between the processes") as error:
            projector_of(model).refresh({"own": [own]}, loss_of)
        told.append(str(error.value))
    return told


def _sharded_along_inputs() -> str:
    model = built("lora")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    even = lambda p: p.dim() == 2 and p.shape[1] % dist.get_world_size() == 0  # noqa: E731
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if even(p) else 0))
    with pytest.raises(ValueError, match="sharded along the inputs") as error:
        projector_of(model).refresh(references(0), loss_of, model)
    return str(error.value)


def _four(folder: Path) -> dict[str, Any]:
    """Some processes have no example of a batch, and hold no row of A."""
    return {how: run("LoRA", how) for how in WRAPPERS}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: the threads of several processes would wait for one another
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return common_folder(tmp_path_factory, "activation subspaces")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    for how in WRAPPERS:
        (folder / how).mkdir(exist_ok=True)
    return spawn(_two, 2, folder)


@pytest.fixture(scope="module")
def four(folder) -> list[dict]:
    return spawn(_four, 4, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {case: run(case, "alone") for case in CASES}


def assert_close(ours: dict, theirs: dict, tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].shape == theirs[name].shape, name
        assert float((ours[name] - theirs[name]).abs().max()) <= tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two, alone, case, how):
    told, expected = two[0][f"{case} {how}"], alone[case]
    moved = max(float((p - expected["start"][name]).abs().max()) for name, p in expected["parameters"].items())
    # Sums in another order may round to other digits of bfloat16.
    tolerance = 1e-3 if "bfloat16" in case else TOLERANCE
    assert moved > 10 * tolerance
    assert_close(told["spans"], expected["spans"], tolerance)
    assert_close(told["energies"], expected["energies"])
    assert_close(told["parameters"], expected["parameters"], tolerance)
    assert told["figures"].keys() == expected["figures"].keys()
    for name in told["figures"]:
        # Shares of the steps are those of what a process holds.
        if "seconds" not in name and not ("removed" in name and how == "fsdp2"):
            assert told["figures"][name] == pytest.approx(expected["figures"][name], abs=1e-4), name


@pytest.mark.slow
def test_processes_that_find_other_directions_take_those_of_the_first(two):
    assert len(two[0]["other directions"]) == 28
    assert set(two[0]["other directions"]) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_every_process_ends_with_the_same(two, case, how):
    first, second = (told[f"{case} {how}"] for told in two)
    for what in ("parameters", "spans", "energies"):
        assert_close(first[what], second[what], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_assembled_parameters_are_in_the_complement(two, case, how):
    # Of whole weights the change is measured, which is small beside what is rounded.
    assert two[0][f"{case} {how}"]["leak"] <= (1e-4 if "full" in case else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("case", [case for case in CASES if "reference weight" not in case])
def test_a_step_needs_no_collective(two, case, how):
    assert two[0][f"{case} {how}"]["collectives"] == [0, 0, 0]
    assert two[1][f"{case} {how}"]["collectives"] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_both_constraints_hold_on_assembled_parameters(two, how):
    told = two[0][f"both {how}"]
    assert told["worst"] <= TOLERANCE
    assert told["leak"] <= 1e-6
    # That of the gradient subspace alone.
    assert told["collectives"] == [1 if how == "fsdp2" else 0] * 3


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_a_trained_adapter_is_accepted_and_not_changed(two, how):
    for told in two:
        assert_close(told[f"loaded {how}"]["after"], told[f"loaded {how}"]["before"], 1e-6)


@pytest.mark.slow
def test_processes_that_step_other_parameters_end_with_the_same(two):
    first, second = two[0]["divided"]
    for name, own in first.items():
        assert torch.equal(own, second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_every_process_knows_whether_the_adapter_is_in_use(two, how):
    for told in two:
        assert told[f"in use {how}"] == [False, True, True]


@pytest.mark.slow
def test_every_process_refuses_an_adapter_from_elsewhere(two):
    assert two[0]["refused"] == two[1]["refused"]


@pytest.mark.slow
def test_processes_with_other_batches_are_told(two):
    for told in two:
        assert len(told["other batches"]) == 2
        assert all("sizes of the reference batches, or their tokens, differ" in own for own in told["other batches"])


@pytest.mark.slow
def test_matrices_that_are_sharded_along_their_inputs_are_refused(two):
    for told in two:
        assert "Leave out shard_placement_fn" in told["sharded along inputs"]


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_resumes_what_it_began(two, how):
    straight = train(built("lora"), "alone", range(4), sgd)["parameters"]
    assert_close(two[0][f"resumed {how}"], straight)


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_a_checkpoint_of_two_processes_resumes_alone(two, folder, how):
    straight = train(built("lora"), "alone", range(4), sgd)["parameters"]
    saved = checkpoint.load(folder / how)
    assert any(name.startswith("directions.") for name in saved["tensors"])
    resumed = train(built("lora"), "alone", range(2, 4), sgd, resume=folder / how)["parameters"]
    assert_close(resumed, straight)


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_four_processes_some_without_examples(four, alone, how):
    for told in four:
        assert_close(told[how]["parameters"], alone["LoRA"]["parameters"])
        assert_close(told[how]["spans"], alone["LoRA"]["spans"])
        assert told[how]["leak"] <= 1e-6
