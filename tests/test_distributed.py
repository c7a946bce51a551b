"""Several processes and whole weights: the same projection as in one process, on the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import batch, loss_of
from models import tiny_llama
from parallel import SHAPE, build, common_folder, mine, references, sgd, spawn, train, wrap
from parallel_trainers import trained
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from peft_ogpsa import FullParameterConfig, attach, projector_of
from peft_ogpsa.core import distributed
from peft_ogpsa.trainer import checkpoint

TOLERANCE = 1e-5

# Model, how it is trained. Reference batches of 3, 2 and 1 examples: no share is even.
CASES: dict[str, tuple[tuple, dict]] = {
    "full": (("full", {}), {}),
    "full, one row an example": (("full", {"rows_from": "example", "rows_device": "cpu"}), {}),
    "full, parts left out, accumulation": (
        ("full", {"rows_from": "set", "scope": "module", "exclude": ["*norm", "embed_tokens"]}),
        {"accumulation": 2},
    ),
    "full, the paper's rule": (
        ("full", {"rows_from": "set", "projection": "gradient", "constraint": "orthogonal", "rows_device": "cpu"}),
        {"optimizer_of": sgd},
    ),
    "LoRA": (("lora", {"rows_from": "example"}), {}),
    "LoRA, reference weight, accumulation": (
        ("lora", {"rows_from": "batch", "constraint": "orthogonal", "scope": "model", "reference_weight": 0.5}),
        {"accumulation": 2},
    ),
    "LoRA, a penalty alone": (("lora", {"subspace": "none", "reference_weight": 2.0}), {"accumulation": 2}),
    "full, a penalty alone": (("full", {"subspace": "none", "reference_weight": 2.0}), {}),
}
WRAPPERS = ("ddp", "fsdp2")


def run(case: str, how: str) -> dict[str, Any]:
    (kind, overrides), options = CASES[case]
    return train(build(kind, **overrides), how, range(3), **options)


# The work of the processes


def _two(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {f"{case} {how}": run(case, how) for how in WRAPPERS for case in CASES}
    told["deep"] = train(build("full", layers=5), "fsdp2", range(2))["collectives"]
    for how in WRAPPERS:
        told[f"leak {how}"] = _leak(how)
        train(build("full"), how, range(2), sgd, save=folder / f"full {how}")
        train(build("lora"), how, range(2), sgd, save=folder / f"lora {how}")
    told["kept"] = _kept_gradients()
    told["other batches"] = _other_batches()
    told["refusals"] = _refusals()
    return told


def _refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    part = tiny_llama(**SHAPE)
    fully_shard(part.model.layers[0], mesh=mesh)
    attach(part, FullParameterConfig())
    columns = torch.nn.Linear(4, 4)
    columns.weight = torch.nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Replicate()]))
    attach(columns, FullParameterConfig(exclude=[]))
    columns.bias.requires_grad_(False)
    messages = []
    for model in (part, columns):
        with pytest.raises(ValueError, match="shards") as error:
            projector_of(model).refresh(references(0), loss_of, model)
        messages.append(str(error.value))
    return messages


def _leak(how: str) -> list[dict]:
    """With references that nothing may use, and without any."""
    ends = []
    for refresh in (True, False):
        model = build("full", missing_reference="ignore")
        projector_of(model).enabled = False
        ends.append(train(model, how, range(2), refresh=refresh)["parameters"])
    return ends


def _kept_gradients() -> bool:
    """Whether a refresh leaves gradients alone that were there."""
    model = wrap(build("full"), "fsdp2")
    loss_of(model, mine(batch(0, 4))).backward()
    before = [p.grad.to_local().clone() for p in model.parameters()]
    projector_of(model).refresh(references(0), loss_of, model)
    return all(torch.equal(p.grad.to_local(), g) for p, g in zip(model.parameters(), before, strict=True))


def _evaluated(folder: Path) -> str:
    """What the guard says after an evaluation in one process: modules that keep their weights stay gathered."""
    model = build("full")
    mesh = init_device_mesh("cpu", (1,))
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    projector = projector_of(model)
    projector.refresh(references(0), loss_of, model)
    with torch.no_grad():
        loss_of(model, batch(0))
    assert not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    try:
        projector.guard.check_parameters(model, None)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def _other_batches() -> str:
    model = build("lora")
    with pytest.raises(ValueError, match="differ between the processes") as error:
        projector_of(model).refresh({"own": [batch(0, 1 + distributed.rank())]}, loss_of)
    return str(error.value)


def _four(folder: Path) -> dict[str, Any]:
    told = {how: run("LoRA", how) for how in WRAPPERS}
    told["sizes"] = _shards()
    for kind in ("full", "lora"):
        # Whatever wrote the checkpoint.
        for how, wrote in (("fsdp2", "fsdp2"), ("ddp", "fsdp2"), ("fsdp2", "ddp")):
            resumed = train(build(kind), how, range(2, 4), sgd, resume=folder / f"{kind} {wrote}")
            told[f"resumed {kind} {wrote} {how}"] = resumed["parameters"]
    return told


def _shards() -> list[int]:
    """How many elements of every LoRA matrix are here."""
    model = wrap(build("lora"), "fsdp2")
    return [distributed.local(p).numel() for p in model.parameters() if p.requires_grad]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: the threads of several processes would wait for one another
    yield
    torch.set_num_threads(threads)


@cache
def _unbroken(kind: str) -> dict[str, torch.Tensor]:
    return train(build(kind), "alone", range(4), sgd)["parameters"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return common_folder(tmp_path_factory, "whole weights and gradients")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    for how in WRAPPERS:
        for kind in ("full", "lora"):
            (folder / f"{kind} {how}").mkdir(exist_ok=True)
    return spawn(_two, 2, folder)


@pytest.fixture(scope="module")
def four(folder, two) -> list[dict]:
    return spawn(_four, 4, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {case: run(case, "alone") for case in CASES}


def assert_close(ours: dict, theirs: dict, tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert float((ours[name] - theirs[name]).abs().max()) <= tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two, alone, case, how):
    told, expected = two[0][f"{case} {how}"], alone[case]
    start = {name: p.detach() for name, p in build(*CASES[case][0][:1]).named_parameters()}
    moved = max(float((p - start[name]).abs().max()) for name, p in expected["parameters"].items())
    assert moved > 1e-3  # far more than the tolerance
    assert_close(told["parameters"], expected["parameters"])
    # The rows' raw lengths, which projection alone does not see.
    torch.testing.assert_close(told["small"]["norms"], expected["small"]["norms"], rtol=1e-4, atol=1e-5)
    for name, loss in expected["losses"].items():
        assert told["losses"][name] == pytest.approx(loss, abs=1e-5)
    assert told["figures"].keys() == expected["figures"].keys()
    for name in told["figures"]:
        if "seconds" not in name:
            assert told["figures"][name] == pytest.approx(expected["figures"][name], abs=1e-4), name
    assert told["figures"].get("ogpsa/removed", 1.0) > 1e-3
    assert ("ogpsa/removed" in told["figures"]) == ("alone" not in case)


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_every_process_ends_with_the_same(two, case, how):
    first, second = (told[f"{case} {how}"] for told in two)
    assert_close(first["parameters"], second["parameters"], 0.0)
    assert_close(first["small"], second["small"], 0.0)  # the last step's coefficients, where the constraint is a cone
    assert first["losses"] == second["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("case", [case for case in CASES if "paper" not in case])
def test_constraint_holds_on_assembled_parameters(two, case, how):
    assert two[0][f"{case} {how}"]["worst"] <= TOLERANCE


@pytest.mark.slow
def test_one_collective_a_step_whatever_the_depth(two):
    for case in CASES:
        # Without a projection, only a step after a refresh needs one.
        assert two[0][f"{case} fsdp2"]["collectives"] == [1, 1, int("alone" not in case)]
        assert two[0][f"{case} ddp"]["collectives"] == [0, 0, 0]
    assert two[0]["deep"] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_reference_gradients_do_not_leak(two, how):
    with_references, without = two[0][f"leak {how}"]
    assert_close(with_references, without, 0.0)


def test_reference_gradients_do_not_leak_alone():
    ends = []
    for refresh in (True, False):
        model = build("full", missing_reference="ignore")
        projector_of(model).enabled = False
        ends.append(train(model, "alone", range(2), refresh=refresh)["parameters"])
    assert_close(*ends, 0.0)
    # With a reference weight they are meant to arrive.
    weighted = [
        train(build("full", reference_weight=weight), "alone", range(1))["parameters"] for weight in (0.0, 1.0)
    ]
    with pytest.raises(AssertionError):
        assert_close(*weighted, 1e-4)


@pytest.mark.slow
def test_refresh_leaves_gradients_alone_that_were_there(two):
    assert two[0]["kept"] is two[1]["kept"] is True


@pytest.mark.slow
def test_parameters_are_found_again_after_an_evaluation(folder):
    assert spawn(_evaluated, 1, folder) == ["accepted"]


@pytest.mark.slow
def test_processes_with_other_batches_are_told(two):
    assert "sizes of the reference batches" in two[0]["other batches"]


@pytest.mark.slow
def test_other_placements_are_refused(two):
    part, replicated = two[0]["refusals"]
    assert "fully_shard to the whole model" in part
    assert "does not support tensor parallelism" in replicated


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_four_processes_some_without_examples(four, alone, how):
    assert_close(four[0][how]["parameters"], alone["LoRA"]["parameters"])
    assert 0 in four[3]["sizes"]
    assert 0 not in four[0]["sizes"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [("fsdp2", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp2")])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resume_in_four_processes_what_two_began(four, kind, how):
    assert_close(four[0][f"resumed {kind} {how[0]} {how[1]}"], _unbroken(kind))


@pytest.mark.slow
def test_checkpoint_of_shards_resumes_alone(folder, two):
    resumed = train(build("full"), "alone", range(2, 4), sgd, resume=folder / "full fsdp2")["parameters"]
    assert_close(resumed, _unbroken("full"))


# Trainers

TRAINERS = [(stage, kind, how) for stage in ("sft", "dpo") for kind in ("full", "lora") for how in WRAPPERS]


def _trainers(folder: Path) -> dict[str, Any]:
    told = {}
    for key in TRAINERS:
        name = " ".join(key)
        told[name] = trained(*key, folder, save_strategy="steps", save_steps=2)
        if key[0] == "dpo":
            told[f"{name} resumed"] = trained(*key, folder, resume=str(folder / name / "checkpoint-2"))
    trained("sft", "null space", "ddp", folder)
    for how in WRAPPERS:
        told[f"dpo saved {how}"] = trained("dpo", "saved", how, folder, learning_rate=0.0)
    return told


@pytest.fixture(scope="module")
def trainers(folder) -> list[dict]:
    return spawn(_trainers, 2, folder)


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind", "how"), TRAINERS)
def test_trainer_in_two_processes_equals_one(trainers, own_folder, stage, kind, how):
    ours, second = (told[f"{stage} {kind} {how}"] for told in trainers)
    assert_close(ours, second, 0.0)
    assert_close(ours, _alone(stage, kind, own_folder))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind", "how"), [key for key in TRAINERS if key[0] == "dpo"])
def test_trainer_resumes_what_it_began(trainers, stage, kind, how):
    for told in trainers:
        assert_close(told[f"{stage} {kind} {how} resumed"], told[f"{stage} {kind} {how}"], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", WRAPPERS)
def test_the_reference_policy_loses_what_the_adapter_loses(trainers, folder, how):
    """TRL copies the adapter before the subspace of other references takes a part of it away."""
    ours, second = (told[f"dpo saved {how}"] for told in trainers)
    assert_close(ours, second, 0.0)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    own = {name: value for name, value in ours.items() if ".lora_A.default." in name}
    assert own
    for name, value in own.items():  # each step projects A again, which rounds it
        torch.testing.assert_close(value, ours[name.replace(".default.", ".ref.")], rtol=0, atol=1e-6)
    assert any(
        not torch.allclose(value, saved[name.replace(".default", "")], rtol=0.01) for name, value in own.items()
    )


@cache
def _alone(stage: str, kind: str, folder: Path) -> dict[str, torch.Tensor]:
    return trained(stage, kind, "alone", folder)


# The documented commands


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("configuration", "flags"), [("fsdp2", []), ("ddp", ["--lora"])])
def test_documented_commands(tmp_path, configuration, flags):
    root = Path(__file__).parents[1]
    options = "--layers 2 --max_steps 2 --save_steps 2 --per_device_train_batch_size 2 --logging_steps 1 --bf16 false"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(root / f"examples/accelerate/{configuration}.yaml"), "--main_process_port", "0"]
    command += [str(root / "examples/full_parameter.py"), *flags, *options.split(), "--report_to", "none"]
    command += ["--output_dir", str(tmp_path), "--max_length", "64", "--reference_samples", "16"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ogpsa/removed" in done.stdout
    saved = load_file(tmp_path / "checkpoint-2" / checkpoint.TENSORS_NAME)
    if flags:
        directions = [tensor for name, tensor in saved.items() if name.startswith("directions.")]
        assert len(directions) == 2 * 4  # 7 linear maps of a layer have 4 inputs
        assert all(own.shape[1] <= min(512, own.shape[0] // 2) for own in directions)
        assert (tmp_path / "adapter_model.safetensors").is_file()
    else:
        weights = load_file(tmp_path / "model.safetensors")
        rows = {name.removeprefix("rows."): rows for name, rows in saved.items() if name.startswith("rows.")}
        assert len(rows) == 19  # 2 layers of 9 tensors and the last norm
        for name, own in rows.items():
            assert own.shape == (4, *weights[name].shape)
            assert own.flatten(1).norm(dim=1)[:2] == pytest.approx(1, abs=1e-4)
