"""The projection of a model's own weights in one process, and its configuration."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from loops import batch, loss_of, references
from models import VOCABULARY, tiny_llama
from transformers import LlamaConfig

from peft_ogpsa import FullParameterConfig, OGPSAConfig, attach, projector_of
from peft_ogpsa.core.attachment import detach
from peft_ogpsa.core.config import ProjectionConfig
from peft_ogpsa.core.layout import Blocks

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from full_parameter_memory import estimate, markdown, shard


def steps(model, projector, count=3, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(count):
        if projector.due:
            projector.refresh(references(step), loss_of)
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_paper_rule_against_gram_schmidt():
    # By hand, as published: unit mean gradients, Gram-Schmidt, and what is left of the gradient after both.
    model, plain = tiny_llama(), tiny_llama()
    projector = attach(model, FullParameterConfig.paper("sft"))
    given = references(0)
    projector.refresh(given, loss_of)
    loss_of(model, batch(0)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    def gradients(inputs):
        return torch.autograd.grad(loss_of(plain, inputs), list(plain.parameters()))

    training, *means = (gradients(inputs) for inputs in (batch(0), given["first"][0], given["second"][0]))
    for parameter, start, g, *rows in zip(model.parameters(), plain.parameters(), training, *means, strict=True):
        first = rows[0].double() / rows[0].double().norm()
        second = rows[1].double() / rows[1].double().norm()
        second = second - (second * first).sum() * first
        second = second / second.norm()
        left = g.double() - (g * first).sum() * first - (g * second).sum() * second
        torch.testing.assert_close(parameter.double(), start.double() - 0.1 * left, rtol=0, atol=1e-7)
        assert float((left - g).norm()) > 1e-3 * float(g.norm())


@pytest.mark.parametrize("settings", [{}, {"constraint": "orthogonal"}, {"rows_from": "set", "scope": "model"}])
def test_rows_in_the_hosts_memory_change_nothing(settings):
    ends = []
    for device in ("model", "cpu"):
        model = tiny_llama()
        steps(model, attach(model, FullParameterConfig(rows=4, refresh_steps=1, rows_device=device, **settings)))
        ends.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_large_groups_are_divided_and_nothing_changes(monkeypatch):
    ends, groups = [], []
    for size in (2**26, 5000):
        monkeypatch.setattr("peft_ogpsa.core.layout.LARGEST_GROUP", size)
        model = tiny_llama()
        projector = attach(model, FullParameterConfig(refresh_steps=1))
        steps(model, projector)
        ends.append(list(model.parameters()))
        groups.append(projector.subspace.blocks.groups)
    assert len(groups[1]) > len(groups[0])
    assert max(len(group.names) * group.numel for group in groups[1]) <= 5000
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(*ends, strict=True))


def test_bfloat16_weights_are_collected_in_float32(caplog):
    attach(tiny_llama(), FullParameterConfig())
    assert not caplog.records
    model = tiny_llama().bfloat16()
    projector = attach(model, FullParameterConfig(refresh_steps=1))
    assert "weights in training have 16 bits, such as model.embed_tokens.weight" in caplog.text
    assert "dtype=torch.float32" in caplog.text
    steps(model, projector)
    assert {part.dtype for part in projector._step.masters} == {torch.float32}
    masters = projector.subspace.blocks.views(projector._step.masters)
    for parameter, master in zip(projector.subspace.blocks.flat_parameters(), masters, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, master.bfloat16())


def test_excluded_modules_are_trained_without_projection():
    model, plain = tiny_llama(), tiny_llama()
    projector = attach(
        model, FullParameterConfig(exclude=["*norm", "embed_tokens", "layers.1"], constraint="orthogonal")
    )
    projector.refresh(references(0), loss_of)
    names = projector.subspace.blocks.names()
    assert "lm_head.weight" in names
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not any("norm" in name or "embed" in name or ".1." in name for name in names)
    for own in (model, plain):
        loss_of(own, batch(0)).backward()
        torch.optim.SGD(own.parameters(), lr=0.1).step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (name not in names), name


def test_frozen_parameters_are_left_out():
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    projector = attach(model, FullParameterConfig())
    steps(model, projector, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    assert "lm_head.weight" not in projector.subspace.blocks.names()


def test_a_step_without_references_stops():
    model = tiny_llama()
    attach(model, FullParameterConfig())
    loss_of(model, batch(0)).backward()
    with pytest.raises(RuntimeError, match='missing_reference="ignore" in FullParameterConfig'):
        torch.optim.SGD(model.parameters(), 0.1).step()


def test_attaching_again_replaces_and_detaching_ends():
    model = tiny_llama()
    attach(model, FullParameterConfig())
    second = attach(model, FullParameterConfig(rows=2))
    assert projector_of(model) is second
    steps(model, second)
    assert second.steps == 3
    detach(model)
    with pytest.raises(ValueError, match="attach"):
        projector_of(model)
    loss_of(model, batch(0)).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert second.steps == 0


def test_a_copy_has_no_projector():
    model = tiny_llama()
    attach(model, FullParameterConfig())
    with pytest.raises(ValueError, match="has no OGPSA adapter"):
        projector_of(copy.deepcopy(model))
    assert projector_of(torch.nn.Sequential(model)) is projector_of(model)


def test_state_dict_of_the_model_is_untouched():
    model = tiny_llama()
    keys = set(model.state_dict())
    steps(model, attach(model, FullParameterConfig()))
    assert set(model.state_dict()) == keys
    assert not any("ogpsa" in name for name, _ in model.named_modules())


def test_names_do_not_know_wrappers():
    model = torch.nn.Sequential(torch.nn.Module())
    model[0]._checkpoint_wrapped_module = torch.nn.Linear(3, 2)
    projector = attach(model, FullParameterConfig())
    assert [name for name, _, _ in projector.targets.trained()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows=0"),
        ({"constraint": "box"}, "constraint='box'"),
        ({"rows_device": "disk"}, "rows_device='disk'"),
        ({"exclude": "norm"}, "exclude='norm'"),
        ({"exclude": [1]}, r"exclude=\[1\]"),
        ({"subspace_rank": 2}, "subspace_rank=2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FullParameterConfig(**settings)


def test_exclude_must_match_and_leave_something():
    with pytest.raises(ValueError, match="'embeddings' matches no module"):
        attach(tiny_llama(), FullParameterConfig(exclude=["embeddings"]))
    with pytest.raises(ValueError, match="leaves no parameter to project"):
        attach(tiny_llama(), FullParameterConfig(exclude=["*"]))


@pytest.mark.parametrize("subspace", ["gradients", "activations"])
def test_weights_that_were_frozen_later_are_refused_with_the_remedy_for_weights(subspace):
    model = torch.nn.Linear(4, 4, bias=False)
    projector = attach(model, FullParameterConfig(subspace=subspace))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weight outside of exclude is in training.*requires_grad_") as raised:
        projector.refresh({"set": [torch.randn(3, 4)]}, lambda m, x: m(x).square().mean())
    assert "LoRA" not in str(raised.value)


def test_weights_in_one_memory_are_refused_with_the_remedy_for_weights():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = torch.nn.Parameter(model[0].weight.data)
    projector = attach(model, FullParameterConfig())
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' share memory.* one nn\.Parameter") as raised:
        projector.refresh({"set": [torch.randn(3, 4)]}, lambda m, x: m(x).square().mean())
    assert "ensure_weight_tying" not in str(raised.value)


def test_paper_and_shared_settings():
    assert FullParameterConfig.paper("sft").refresh_steps == 30
    dpo = FullParameterConfig.paper("dpo", rows=3)
    lora = OGPSAConfig.paper("dpo", rows=3)
    assert dpo.ogpsa_dict() == lora.ogpsa_dict()
    assert (dpo.constraint, dpo.projection, dpo.rows_from, dpo.refresh_samples) == (
        "orthogonal",
        "gradient",
        "set",
        None,
    )
    with pytest.raises(ValueError, match="'rlhf'"):
        FullParameterConfig.paper("rlhf")
    shared = [f.name for f in fields(ProjectionConfig)]
    assert list(dpo.ogpsa_dict()) == shared
    assert [f.name for f in fields(OGPSAConfig)][-len(shared) :] == shared
    assert json.loads(json.dumps(asdict(dpo)))["scope"] == "tensor"


def test_blocks_keep_their_order_where_pieces_change_theirs():
    # Two shapes of one size, whose pieces stand in one group until groups are of one name.
    parameters = {name: torch.zeros(shape) for name, shape in {"a": (2, 6), "b": (5,), "c": (3, 4), "d": (5,)}.items()}
    blocks = Blocks(parameters, dict.fromkeys(parameters, ""), "tensor")
    assert blocks.names() == ["a", "c", "b", "d"]
    values = blocks.reduce([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    assert values.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("constraint", ["cone", "orthogonal"])
def test_memory_estimate_against_what_is_held(constraint):
    model = tiny_llama()
    config = FullParameterConfig(rows=3, rows_dtype="bfloat16", exclude=["*norm"], constraint=constraint)
    projector = attach(model, config)
    projector.refresh(references(0), loss_of)
    subspace = projector.subspace
    told = estimate(model.config, config, 1)

    def held(*stacks):
        return sum(part.nbytes for stack in stacks for part in stack)

    assert told["parameters"] == told["gradients"] == sum(p.nbytes for p in model.parameters())
    assert told["AdamW"] == 2 * told["parameters"]
    assert told["rows"] == held(subspace.rows.stack, *([subspace.directions] if constraint == "orthogonal" else []))
    assert told["step: snapshot"] == held(subspace.blocks.stack())
    assert told["step: correction"] == max(part.nbytes for part in subspace.blocks.zeros())
    products = subspace.directed(subspace.blocks.stack())
    assert told["exchanged in a step"] == products.nbytes + 4
    assert told["exchanged by FSDP2"] == 0
    small = [subspace.rows.norms, subspace.rows.gram, subspace.start]
    assert told["Gram matrices, norms, coefficients"] == pytest.approx(held(small), rel=0.2)
    assert "| parameters, GiB |" in markdown({"one": told})


def test_memory_estimate_of_shards():
    assert [shard(torch.Size([10, 3]), n) for n in (1, 2, 4, 20)] == [30, 15, 9, 3]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    one, four = (estimate(config, FullParameterConfig(), n) for n in (1, 4))
    assert four["rows"] == one["rows"] / 4
    on_host = estimate(config, FullParameterConfig(rows_device="cpu"), 4)
    assert (on_host["rows"], on_host["rows in the host's memory"]) == (0, four["rows"])


@pytest.mark.parametrize("largest", [2**26, 5000])
@pytest.mark.parametrize("constraint", ["cone", "orthogonal"])
def test_memory_estimate_of_pinned_rows(constraint, largest, monkeypatch):
    for module in ("peft_ogpsa.core.layout", "full_parameter_memory"):
        monkeypatch.setattr(f"{module}.LARGEST_GROUP", largest)
    model = tiny_llama()
    config = FullParameterConfig(rows=3, rows_device="cpu", constraint=constraint)
    projector = attach(model, config)
    projector.refresh(references(0), loss_of)
    subspace = projector.subspace
    told = estimate(model.config, config, 1)
    # torch rounds each pinned tensor up to a power of two. The basis is not pinned.
    allocated = sum(2 ** math.ceil(math.log2(part.nbytes)) for part in subspace.rows.stack)
    basis = sum(part.nbytes for part in subspace.directions) if constraint == "orthogonal" else 0
    assert told["rows in the host's memory, as allocated"] == allocated + basis
    assert told["rows in the host's memory"] < told["rows in the host's memory, as allocated"]
    assert estimate(model.config, FullParameterConfig(rows=3), 1)["rows in the host's memory, as allocated"] == 0


@pytest.mark.parametrize("part", ["embed", "proj", "layers.1.self", "ayers.0"])
def test_exclude_takes_whole_names_alone(part):
    with pytest.raises(ValueError, match="matches no module"):
        attach(tiny_llama(), FullParameterConfig(exclude=[part]))


def test_weights_that_have_been_replaced_are_not_trained_without_projection():
    model = tiny_llama()
    projector = attach(model, FullParameterConfig())
    projector.refresh(references(0), loss_of)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    loss_of(model, batch(0)).backward()
    with pytest.raises(
        RuntimeError, match="a step with a model with OGPSA that has only the reference gradients of other"
    ):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    projector.refresh(references(0), loss_of)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert projector.steps == 1


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_rows_are_held_where_the_user_wants_them(device):
    # Of weights on another device than the host's: "meta" is one that every machine has.
    config = FullParameterConfig(rows_device=device)
    projector = attach(tiny_llama().to("meta"), config)
    subspace = projector._refresher.make(config, 4)
    assert {part.device.type for part in subspace.rows.stack} == {"cpu" if device == "cpu" else "meta"}
