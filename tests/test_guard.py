"""What the guard notices: steps and parameters that the projection missed, one test for each of its branches."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from loops import LORA, batch, loss_of, ogpsa_model, parameters_of, references
from models import tiny_llama
from peft import get_peft_model
from test_callback import Begun, model_of, sets, sft, weights

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, attach
from peft_ogpsa.core.guard import _some, refuse_averaging


class Unhooked(torch.optim.Optimizer):
    """As some optimizers with states of their own: no `super().__init__()`, so torch has no hooks around its step."""

    def __init__(self, parameters, lr=1e-2):
        self.param_groups = [{"params": list(parameters), "lr": lr}]
        self.state, self.defaults = {}, {"lr": lr}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def zero_grad(self, set_to_none=True):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.sign(), alpha=self.param_groups[0]["lr"])


class Constant:
    """A scheduler that does nothing: torch's own refuse such an optimizer."""

    def step(self):
        pass

    def state_dict(self):
        return {}

    def get_last_lr(self):
        return [1e-2]


def trainer_with(tmp_path, make, model=None, **options):
    trainer = sft(tmp_path, model, **options)
    trainer.optimizer = make(parameters_of(trainer.model))
    trainer.lr_scheduler = Constant()
    return trainer


# The projector steps as often as the optimizer


def test_a_trainer_whose_optimizer_torch_has_no_hooks_for_stops_at_its_first_step(tmp_path):
    trainer = trainer_with(tmp_path, Unhooked)
    with pytest.raises(RuntimeError, match=r"Unhooked made a step that was not projected.*adamw_torch"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_it_may_train_where_projection_is_off(tmp_path):
    trainer = trainer_with(tmp_path, Unhooked, max_steps=2)
    trainer.model.projector.enabled = False
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_trainer_whose_optimizer_holds_other_parameters_stops(tmp_path):
    trainer = trainer_with(tmp_path, lambda own: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(RuntimeError, match="SGD made a step that was not projected"):
        trainer.train()


def test_a_wrapper_that_steps_twice_and_has_no_hooks_stops(tmp_path):
    class Twice(Unhooked):
        def __init__(self, parameters):
            super().__init__(parameters)
            self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=1e-3)

        def step(self, closure=None):
            self.inner.step()
            self.inner.step()

    trainer = trainer_with(tmp_path, Twice)
    with pytest.raises(RuntimeError, match="Twice made 2 steps with the projected parameters in one step"):
        trainer.train()


def test_a_step_that_a_gradient_scaler_skips_is_no_step():
    model = ogpsa_model()
    guard = model.projector.guard
    optimizer = torch.optim.SGD(parameters_of(model), lr=0.1)
    guard.note_step()
    optimizer.step_was_skipped = True
    guard.check_step(optimizer)
    optimizer.step_was_skipped = False
    with pytest.raises(RuntimeError, match="not projected"):
        guard.check_step(optimizer)


class SkipsItself(torch.optim.SGD):
    """A fused optimizer in what it asks of a scaler, whose skipped step torch counts as a change."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.add_(torch.zeros_like(p) if self.found_inf else -1e-3 * p.grad / self.grad_scale)


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda own: torch.optim.AdamW(own, lr=1e-2), False),
        (lambda own: torch.optim.AdamW(own, lr=1e-2, fused=True), True),
        (lambda own: SkipsItself(own, lr=1e-2), True),
    ],
    ids=["plain", "fused", "of one's own"],
)
def test_steps_that_a_gradient_scaler_skips_in_fact(make, fused, caplog):
    # It does not call a plain optimizer, and calls a fused one with a mark on it.
    model = ogpsa_model()
    guard = model.projector.guard
    optimizer = make(parameters_of(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model.projector.refresh(references(0), loss_of)
    for overflow in (True, False, True):
        guard.note_step()
        scaler.scale(loss_of(model, batch(0))).backward()
        if overflow:
            parameters_of(model)[1].grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        optimizer.step_was_skipped = overflow and not fused
        guard.check_step(optimizer)
    assert (model.projector.steps, model.projector.skipped) == (1, 2 * int(fused))
    assert not caplog.records


def test_training_without_rows_is_counted_where_the_user_allows_it(tmp_path):
    model = model_of(missing_reference="ignore")
    sft(tmp_path, model, callbacks=[], max_steps=2).train()
    assert model.projector.steps == 2


# What is projected is what is trained


def test_projected_parameters_that_are_not_the_models_stop_training():
    model, other = ogpsa_model(), ogpsa_model()
    model.projector.refresh(references(0), loss_of)
    model.projector.guard.check_parameters(model, None)
    with pytest.raises(
        RuntimeError, match=r"projected parameter .*lora_A.* is not, or is no longer, a trainable parameter"
    ):
        model.projector.guard.check_parameters(other, None)
    parameters_of(model)[3].requires_grad_(False)
    with pytest.raises(RuntimeError, match="no longer, a trainable parameter"):
        model.projector.guard.check_parameters(model, None)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "1 parameters are trained but not projected.*lm_head"),
        ({"use_dora": True, "target_modules": ["q_proj"]}, "2 parameters.*lora_magnitude_vector"),
        ({}, None),
    ],
)
def test_trained_parameters_that_are_not_projected_are_named_once(overrides, named, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        sft(tmp_path, model_of(**{**LORA, **overrides})).train()
    found = [record.getMessage() for record in caplog.records if "not projected" in record.getMessage()]
    assert len(found) == (named is not None)
    if named:
        assert re.search(named, found[0])


def test_what_the_user_has_excluded_is_not_named(tmp_path, caplog):
    base = tiny_llama(vocab_size=259, max_position_embeddings=256)
    config = FullParameterConfig(rows=8, refresh_samples=4, exclude=["lm_head"])
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        sft(tmp_path, base, [OGPSACallback(sets(), config=config)], max_steps=2).train()
    assert "not projected" not in caplog.text


# Every parameter has had a reference gradient


class Forked(torch.nn.Module):
    """Of which the second branch is taken only where it is asked for."""

    def __init__(self):
        super().__init__()
        self.one, self.other = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)

    def forward(self, x, other=False):
        return (self.other if other else self.one)(x)


def forked():
    torch.manual_seed(0)
    config = OGPSAConfig(
        subspace="gradients", r=2, target_modules=["one", "other"], rows=4, refresh_steps=2, reference_weight=0.0
    )
    return get_peft_model(Forked(), config)


def train_forked(model, reference_takes_other, steps=4):
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    x = torch.randn(3, 5, 6)
    for number in range(steps):
        if model.projector.due:
            other = number in reference_takes_other
            model.projector.refresh({"set": [x]}, lambda net, b, other=other: net(b, other=other).square().mean())
        (model(x).sum() + model(x, other=True).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_parameters_without_a_reference_gradient_are_named_at_the_second_counted_refresh(caplog):
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        train_forked(forked(), (), steps=2)  # refreshed before the steps 1 and 2, and counted once
        assert not caplog.records
        train_forked(model := forked(), (), steps=8)
    (found,) = [record.getMessage() for record in caplog.records]
    assert "2 of the 4 projected parameters had no nonzero reference gradient" in found
    assert "other.lora_A" in found
    assert "other.lora_B" in found
    assert "one.lora_A" not in found
    assert model.projector.diagnostics.refreshes == 5


def test_parameters_that_have_had_one_some_time_are_not_named(caplog):
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        train_forked(forked(), (1,), steps=8)  # in the second refresh alone
    assert not caplog.records


def test_no_model_that_trains_as_usual_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        sft(tmp_path, model_of(reference_weight=None)).train()
    assert not [record for record in caplog.records if record.name.startswith("peft_ogpsa")]


# The parameters change in projected steps alone


def train_by_hand(model, step, steps=3):
    for number in range(steps):
        if model.projector.due:
            model.projector.refresh(references(number), loss_of)
        loss_of(model, batch(number)).backward()
        step()
        model.zero_grad()


class Slow:
    """Around an optimizer that torch has hooks for, one that it does not know moves the parameters once more."""

    def __init__(self, inner):
        self.inner = inner

    @torch.no_grad()
    def step(self):
        self.inner.step()
        for group in self.inner.param_groups:
            for p in group["params"]:
                p.mul_(0.99)


@pytest.mark.parametrize(
    ("make", "warned"),
    [
        (lambda own: torch.optim.AdamW(own, lr=1e-2), 0),
        (lambda own: Slow(torch.optim.AdamW(own, lr=1e-2)), 1),
        (lambda own: Unhooked(own), 1),
    ],
    ids=["hooked", "wrapped", "unhooked"],
)
def test_changes_outside_of_projected_steps_are_warned_of_once(make, warned, caplog):
    model = ogpsa_model()
    for parameter in parameters_of(model):
        torch.nn.init.normal_(parameter.data, std=0.1)
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        train_by_hand(model, make(parameters_of(model)).step)
    found = [r for r in caplog.records if "changed outside a projected optimizer step" in r.getMessage()]
    assert len(found) == warned


def test_other_trained_parameters_are_named_in_a_loop_of_ones_own(caplog):
    model = ogpsa_model(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        train_by_hand(model, torch.optim.SGD(parameters_of(model), lr=1e-2).step)
    found = [record.getMessage() for record in caplog.records if "not projected" in record.getMessage()]
    assert len(found) == 1
    assert "1 parameters are trained but not projected" in found[0]
    assert "lm_head" in found[0]


# Optimizers whose saved weights are not those of their steps


def schedule_free(parameters):
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    optimizer.param_groups[0]["train_mode"] = True  # as the packages of schedule-free optimizers have it
    return optimizer


def test_schedule_free_optimizers_are_refused_with_the_update_and_taken_with_the_gradient(tmp_path):
    optimizer = schedule_free([torch.nn.Parameter(torch.ones(1))])
    for overrides in ({}, {"subspace": "gradients"}, {"subspace": "both", "projection": "gradient"}):
        with pytest.raises(ValueError, match=r"average of weights.*subspace='gradients' with projection='gradient'"):
            refuse_averaging(optimizer, OGPSAConfig(**overrides))
    refuse_averaging(optimizer, OGPSAConfig(subspace="gradients", projection="gradient"))
    trainer = trainer_with(tmp_path, schedule_free)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="average of weights"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer.model).items())
    trainer = trainer_with(tmp_path, schedule_free, model_of(projection="gradient"), max_steps=2)
    trainer.train()
    assert trainer.model.projector.steps == 2


def test_they_are_refused_in_a_loop_of_ones_own():
    model = ogpsa_model()
    model.projector.refresh(references(0), loss_of)
    loss_of(model, batch(0)).backward()
    with pytest.raises(ValueError, match="schedule-free"):
        schedule_free(parameters_of(model)).step()


def test_the_guard_counts_anew_in_a_second_stage(caplog):
    model = forked()
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        train_forked(model, (), steps=8)
        model.projector.reset()
        train_forked(model, (), steps=8)
    assert len(caplog.records) == 2


def test_whole_weights_are_guarded_too():
    model = tiny_llama()
    projector = attach(model, FullParameterConfig())
    projector.refresh(references(0), loss_of)
    projector.guard.check_parameters(model, None)
    with pytest.raises(RuntimeError, match="no longer, a trainable parameter"):
        projector.guard.check_parameters(tiny_llama(), None)


def test_parameters_are_not_named_for_rows_that_have_been_replaced_since(caplog):
    model = forked()
    model.peft_config["default"].rows = 3  # as many as a refresh fills
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        train_forked(model, (1,), steps=8)
    assert not caplog.records


def test_what_is_in_training_and_in_no_optimizer_is_not_named(caplog):
    model = ogpsa_model(modules_to_save=["lm_head"])
    model.projector.refresh(references(0), loss_of)
    own = [p for name, p in model.named_parameters() if "lora_" in name]
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        model.projector.guard.check_parameters(model, torch.optim.SGD(own, lr=0.1))
        assert not caplog.records
        model.projector.guard.check_parameters(model, torch.optim.SGD(parameters_of(model), lr=0.1))
    assert "1 parameters are trained but not projected" in caplog.text


def test_long_lists_of_names_say_how_many_more_there_are():
    assert _some("abcde") == "a, b, c, d, e"
    assert _some("abcdef") == "a, b, c, d, e and 1 more"


def test_weights_restored_together_with_their_rows_are_no_change_from_outside(caplog):
    model = ogpsa_model()
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    model.projector.refresh(references(0), loss_of)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    rows = model.projector.state_dict()
    rows = {**rows, "tensors": {name: value.clone() for name, value in rows["tensors"].items()}}
    loss_of(model, batch(0)).backward()
    optimizer.step()
    model.load_state_dict(kept)
    model.projector.load_state_dict(rows)
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        assert not model.projector.due
        loss_of(model, batch(1)).backward()
        optimizer.step()
    assert not caplog.records


def test_schedule_free_optimizers_are_refused_before_training_begins(tmp_path):
    after = Begun()
    trainer = trainer_with(tmp_path, schedule_free, callbacks=[OGPSACallback(sets()), after])
    with pytest.raises(ValueError, match="average of weights"):
        trainer.train()
    assert not after.begun


def test_changes_are_noticed_in_a_loop_that_refreshes_on_a_schedule_of_its_own(caplog):
    model = ogpsa_model()
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    model.projector.refresh(references(0), loss_of)
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        for number in range(2):
            loss_of(model, batch(number)).backward()
            optimizer.step()
            with torch.no_grad():
                parameters_of(model)[0].mul_(0.9)
    assert len([r for r in caplog.records if "changed outside a projected optimizer step" in r.getMessage()]) == 1


@pytest.mark.parametrize("settings", [{}, {"subspace": "activations", "refresh_steps": 5}])
def test_a_wrapper_that_copies_the_parameters_over_themselves_is_no_change(settings, caplog):
    """As DDP does when it is made after the first refresh."""
    model = ogpsa_model(**settings)
    model.projector.refresh(references(0), loss_of)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    with torch.no_grad():
        for parameter in parameters_of(model):
            parameter.copy_(parameter.clone())
    loss_of(model, batch(0)).backward()
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        optimizer.step()
    assert "changed outside" not in caplog.text


def test_weights_that_are_swapped_and_put_back_in_the_null_space_are_no_change(caplog):
    model = ogpsa_model(subspace="activations", refresh_steps=5)
    model.projector.refresh(references(0), loss_of)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        for number in range(3):
            loss_of(model, batch(number)).backward()
            optimizer.step()
            kept = [parameter.detach().clone() for parameter in parameters_of(model)]
            with torch.no_grad():
                for parameter in parameters_of(model):
                    parameter.mul_(0.5)  # an average of the weights is measured
                for parameter, own in zip(parameters_of(model), kept, strict=True):
                    parameter.copy_(own)
        assert "changed outside" not in caplog.text
        with torch.no_grad():
            for parameter in parameters_of(model):
                torch.nn.init.normal_(parameter)
        loss_of(model, batch(4)).backward()
        with pytest.raises(ValueError, match="not trained in the null space"):
            optimizer.step()
    assert "changed outside a projected optimizer step" in caplog.text


@pytest.mark.parametrize("settings", [{"projection": "gradient"}, {"subspace": "none", "reference_weight": 1.0}])
def test_schedule_free_optimizers_may_move_the_weights_to_and_fro(settings, caplog):
    model = ogpsa_model(**settings)
    optimizer = schedule_free(parameters_of(model))
    with caplog.at_level(logging.WARNING, logger="peft_ogpsa"):
        for number in range(4):
            if model.projector.due:
                model.projector.refresh(references(number), loss_of)
            loss_of(model, batch(number)).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():  # optimizer.eval()
                parameters_of(model)[0].mul_(0.9)
    assert not caplog.records


# Reference gradients are computed as often as the settings say

REFRESHED = {"gradients": {}, "weight": {"subspace": "activations", "subspace_rank": 8, "reference_weight": 8.0}}


def refreshing(**overrides):
    settings = {"subspace": "gradients", "rows": 8, "refresh_samples": 4, "refresh_steps": 2}
    if overrides.get("subspace") == "activations":
        del settings["rows"]
    return get_peft_model(
        tiny_llama(vocab_size=259, max_position_embeddings=256), OGPSAConfig(**{**LORA, **settings, **overrides})
    )


@pytest.mark.parametrize("kind", REFRESHED)
def test_a_second_trainer_without_references_stops(kind, tmp_path):
    model = refreshing(**REFRESHED[kind])
    sft(tmp_path, model, max_steps=4).train()  # the last refresh is before the last step
    effect = {"gradients": "projected with old rows", "weight": "weight is no longer applied"}[kind]
    with pytest.raises(RuntimeError, match=rf"are 4 steps old, with refresh_steps=2, .*{effect}.*OGPSACallback"):
        sft(tmp_path, model, callbacks=[]).train()
    assert model.projector.steps == 7
    sft(tmp_path, model).train()


@pytest.mark.parametrize("kind", REFRESHED)
@pytest.mark.parametrize("mode", ["error", "warn", "ignore"])
def test_a_loop_that_forgets_to_refresh_is_told(kind, mode, caplog):
    model = refreshing(**REFRESHED[kind], missing_reference=mode)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-3)

    def steps(count):
        for number in range(count):
            loss_of(model, batch(number)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def refresh():
        while model.projector.due:
            model.projector.refresh(references(0), loss_of)

    refresh()
    steps(1)
    refresh()
    steps(4)
    refresh()  # late, but not too late
    steps(4)
    assert not caplog.records
    before = [p.detach().clone() for p in parameters_of(model)]
    if mode == "error":
        with pytest.raises(RuntimeError, match=r"4 steps old, .*projector\.due.*larger refresh_steps"):
            steps(1)
        assert all(torch.equal(p, was) for p, was in zip(parameters_of(model), before, strict=True))
    else:
        steps(2)
        warned = [record for record in caplog.records if "4 steps old" in record.getMessage()]
        assert len(warned) == (mode == "warn")
    refresh()
    steps(4)
    if mode == "warn":
        caplog.clear()
        steps(2)
        assert len([record for record in caplog.records if "4 steps old" in record.getMessage()]) == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])  # by the trainer's clipping
def test_an_overflow_that_a_gradient_scaler_finds_is_no_missed_step(fused, unscaled):
    Accelerator(cpu=True)
    model = ogpsa_model()
    inner = torch.optim.AdamW(parameters_of(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    model.projector.refresh(references(0), loss_of)
    scaler.scale(loss_of(model, batch(0)) * torch.inf).backward()
    if unscaled:
        scaler.unscale_(inner)
    model.projector.guard.note_step()
    optimizer.step()
    model.projector.guard.check_step(optimizer)
    assert model.projector.steps == 0


# What the optimizer must not do


def null_space(weight=0.0, **more):
    overrides = more if weight == 0 else {"refresh_steps": 2, **more}
    return get_peft_model(
        tiny_llama(),
        OGPSAConfig(**LORA, subspace="activations", subspace_rank=8, reference_weight=weight, **overrides),
    )


def cone(**overrides):
    return ogpsa_model(**overrides)


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda: null_space(2.0), True),
        (lambda: null_space(None), True),
        (null_space, False),
        (lambda: cone(reference_weight=2.0), True),
        (cone, False),
        (lambda: cone(projection="gradient"), True),
        (lambda: cone(projection="gradient", constraint="orthogonal"), False),
    ],
)
def test_what_goes_up_the_gradient_is_refused_or_does_the_same(make, refused):
    """To maximize the negative of a loss is to minimize it, or an error."""
    trained = []
    for maximize in (False, True):
        model = make()
        optimizer = torch.optim.SGD(parameters_of(model), lr=0.1, maximize=maximize)
        for number in range(4):
            while model.projector.due:
                model.projector.refresh(references(100), loss_of)
            loss = loss_of(model, batch(number))
            (-loss if maximize else loss).backward()
            if maximize and refused:
                with pytest.raises(ValueError, match=r"SGD has maximize=True.*Set maximize=False"):
                    optimizer.step()
                return
            optimizer.step()
            optimizer.zero_grad()
        trained.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value)


def with_another(model):
    model.add_adapter("two", model.peft_config["default"])
    return model


def trained_once(model, number):
    while model.projector.due:
        model.projector.refresh(references(100), loss_of)
    loss_of(model, batch(number)).backward()


FROZEN = r"The optimizer would step .*lora_[AB]\.default.*, which is frozen"


def test_a_gradient_of_an_adapter_that_is_no_longer_in_training_stops_the_step():
    model = with_another(cone())
    both = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(both, lr=0.1)
    trained_once(model, 0)
    model.set_adapter("two")
    trained_once(model, 1)
    before = [parameter.detach().clone() for parameter in both]
    with pytest.raises(RuntimeError, match=FROZEN):
        optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(both, before, strict=True))
    model.projector.enabled = False
    optimizer.step()


def test_parameters_that_are_frozen_between_backward_and_step_stop_it():
    model = null_space()
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    trained_once(model, 0)
    for parameter in parameters_of(model):
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match=FROZEN):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # moves nothing


def test_gradients_of_zero_still_move_a_frozen_adapter():
    """By the optimizer's momentum and weight decay."""
    model = with_another(null_space())
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], lr=1e-2)
    trained_once(model, 0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    model.set_adapter("two")
    trained_once(model, 1)
    with pytest.raises(RuntimeError, match=FROZEN):
        optimizer.step()


def test_base_weights_that_join_the_optimizer_later_are_refused():
    model = null_space()
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    trained_once(model, 0)
    optimizer.step()
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [weight]})
    trained_once(model, 1)
    with pytest.raises(ValueError, match=r"up_proj.base_layer.weight is trained and belongs to the base model"):
        optimizer.step()


@pytest.mark.parametrize("where", ["held before", "second optimizer", "after a warning"])
def test_base_weights_that_are_unfrozen_later_are_refused(where, caplog):
    more = {"modules_to_save": ["lm_head"]} if where == "after a warning" else {}
    model = null_space(**more)
    held = list(model.parameters()) if where == "held before" else parameters_of(model)
    optimizer = torch.optim.AdamW(held, lr=1e-2)
    trained_once(model, 0)
    optimizer.step()
    assert ("trained but not projected" in caplog.text) == bool(more)
    weight = model.get_base_model().model.norm.weight.requires_grad_(True)
    if where == "second optimizer":
        torch.optim.AdamW([weight], lr=1e-2)
    elif where == "after a warning":
        optimizer.add_param_group({"params": [weight]})
    trained_once(model, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model.norm.weight is trained and belongs to the base model"):
            optimizer.step()
    weight.requires_grad_(False)
    optimizer.step()


def test_parameters_that_the_optimizer_holds_and_that_are_unfrozen_later_are_named(caplog):
    model = cone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained_once(model, 0)
    optimizer.step()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trained_once(model, 1)
        optimizer.step()
    assert "1 parameters are trained but not projected" in caplog.text


@pytest.mark.parametrize("make", [null_space, lambda: cone(refresh_steps=9)], ids=["activations", "gradients"])
def test_a_matrix_that_replaces_another_one_needs_a_refresh(make, caplog):
    model = make()
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    for number in range(2):
        trained_once(model, number)
        optimizer.step()
    holder = model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"]
    holder.weight = torch.nn.Parameter(holder.weight.detach().clone())
    optimizer.add_param_group({"params": [holder.weight]})
    trained_once(model, 2)
    with pytest.raises(RuntimeError, match=r"only the (activation subspace|reference gradients) of other parameters"):
        optimizer.step()
    assert model.projector.due
    trained_once(model, 3)
    optimizer.step()
    assert any(own is holder.weight for own in model.projector.projected().values())
    assert "not LoRA matrices" not in caplog.text


def test_other_parameters_that_join_the_optimizer_later_are_named(caplog):
    model = cone()
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    trained_once(model, 0)
    optimizer.step()
    optimizer.add_param_group({"params": [model.get_base_model().model.norm.weight.requires_grad_(True)]})
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trained_once(model, 1)
        optimizer.step()
    assert "1 parameters are trained but not projected" in caplog.text


def test_a_frozen_adapter_that_becomes_active_later_is_refused():
    model = with_another(null_space())
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)
    for number in range(2):
        trained_once(model, number)
        optimizer.step()
        optimizer.zero_grad()
    model.base_model.set_adapter(["default", "two"])
    for name, parameter in model.named_parameters():
        if ".two." in name:
            torch.nn.init.ones_(parameter.requires_grad_(False))
    loss_of(model, batch(2)).backward()
    with pytest.raises(ValueError, match=r"The adapter 'two' is frozen and active together with"):
        optimizer.step()
    model.set_adapter("default")
    optimizer.step()
