"""The activation subspace under transformers' and TRL's trainers."""

from __future__ import annotations

import datetime
import logging
import math

import pytest
import torch
from datasets import Dataset
from models import chat, randomize, tiny_llama, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_callback import GENERAL, TRAINING, sets, sft, weights
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet, projector_of
from peft_ogpsa.core.projector import Projector
from peft_ogpsa.text.logits import pass_through
from peft_ogpsa.trainer import base_weights
from peft_ogpsa.trainer.checkpoint import TENSORS_NAME, CheckpointError
from peft_ogpsa.tuner.attaching import attached

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def base():
    return tiny_llama(vocab_size=259, max_position_embeddings=256)


def model_of(**overrides):
    settings = {"subspace": "activations", "subspace_rank": 8, "reference_weight": 0.0, **LORA, **overrides}
    return get_peft_model(base(), OGPSAConfig(**settings))


def leak(model) -> float:
    """The largest `|A U| / |A|`."""
    found = []
    for stack, place, matrix in projector_of(model).activations._each():
        a = matrix.parameter.detach().double()
        found.append(float((a @ stack.basis[place].double()).norm() / a.norm()))
    return max(found)


@pytest.mark.parametrize("subspace", ["activations", "gradients"])
def test_the_figures_of_a_second_stage_are_of_its_own_steps(tmp_path, subspace):
    found = []
    settings = {} if subspace == "activations" else {"subspace_rank": None, "rows": 8, "refresh_samples": 2}
    for logging_steps in (1, 4):  # the last two of six steps are not logged
        model = model_of(subspace=subspace, **settings)
        sft(tmp_path, model, logging_steps=logging_steps).train()
        second = sft(tmp_path, model, max_steps=1)
        second.train()
        entry = next(entry for entry in second.state.log_history if "loss" in entry)
        found.append({key: value for key, value in entry.items() if key.startswith("ogpsa/removed")})
    assert found[0]
    assert found[0] == found[1]


class Average(TrainerCallback):
    """Averages the weights from the beginning of training on, and puts the average into the model at the end."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.own]

    def on_step_end(self, args, state, control, **kwargs):
        for average, parameter in zip(self.average, self.own, strict=True):
            average.lerp_(parameter.detach(), 0.05)

    def on_train_end(self, args, state, control, **kwargs):
        for average, parameter in zip(self.average, self.own, strict=True):
            parameter.data.copy_(average)


@pytest.mark.parametrize("first", [False, True])
def test_an_average_of_another_callback_is_of_weights_in_the_null_space(tmp_path, first):
    model, callbacks = model_of(), [OGPSACallback(sets()), Average()]
    sft(tmp_path, model, callbacks[::-1] if first else callbacks).train()
    assert leak(model) < 1e-6


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_best_checkpoint_of_another_subspace_is_a_warning(tmp_path, caplog, rebuild):
    class Worse(TrainerCallback):
        """The first evaluation is the best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = state.global_step

    options = {
        "eval_dataset": Dataset.from_list(TRAINING[:4]),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    sft(tmp_path, model_of(), [OGPSACallback(sets()), Worse()], max_steps=4, **options).train()
    other = [ReferenceSet("other", [chat(f"Name colour {i}", f"Colour {i * 7} is blue.") for i in range(8)])]
    model = model_of()
    callback = OGPSACallback([*other, *sets()] if rebuild else sets(), rebuild_subspace=rebuild)
    trainer = sft(tmp_path, model, [callback, Worse()], max_steps=6, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert (leak(model) > 0.01) is rebuild
    assert ("At the end of training, the adapter acts on the reference inputs" in caplog.text) is rebuild


def test_it_is_built_before_the_first_step_and_held(tmp_path, capsys):
    model = model_of()
    trainer = sft(tmp_path, model, disable_tqdm=False)
    trainer.train()
    projector = model.projector
    assert projector.steps == 6
    assert projector.diagnostics.refreshes == 0
    assert projector.diagnostics.reference_examples == 0
    assert projector.subspace is None
    assert leak(model) < 1e-6
    assert any(value.abs().sum() > 0 for name, value in weights(model).items() if "lora_B" in name)
    shown = "".join(capsys.readouterr())
    assert "OGPSA: the activation subspace uses" in shown
    assert "q_proj+k_proj+v_proj: 2 inputs of width 32. 8 directions hold" in shown
    assert "of the energy of held-out ones" in shown
    assert "reference examples every" not in shown


@pytest.mark.parametrize("bf16", [False, True])
def test_building_computes_no_logits_that_nobody_needs(tmp_path, bf16):
    model = model_of()
    lengths = []
    hook = model.get_base_model().lm_head.register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    trainer = sft(tmp_path, model, max_steps=1, bf16=bf16)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    hook.remove()
    assert len(lengths) > 2
    assert set(lengths) == {1}
    assert len({own.tokens for own in model.projector.activations.inputs}) == 1


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_output_layer_in_training_gets_all_of_its_inputs(targets):
    model = get_peft_model(base(), LoraConfig(**{**LORA, "target_modules": targets}))
    ids = torch.arange(8)[None]
    with model.disable_adapter():  # as in a build: PEFT then freezes the adapter
        logits = pass_through(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert logits.shape[1] == (8 if "lm_head" in targets else 1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_subspace_of_the_output_layer_is_that_of_all_tokens(tmp_path, batch_size):
    model = model_of(target_modules=["q_proj", "lm_head"], subspace_rank=None)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}],
        processing_class=tiny_tokenizer(),
        callbacks=[OGPSACallback(sets(), batch_size=batch_size)],
    )
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    inputs = {own.layers[-1].rpartition(".")[2]: own for own in model.projector.activations.inputs}
    assert inputs["lm_head"].tokens == inputs["q_proj"].tokens > 100
    assert len(inputs["lm_head"].energies) == 16


def test_a_layer_that_gets_a_part_of_the_positions_is_refused():
    class Last(torch.nn.Module):
        def __init__(self, lm_head):
            super().__init__()
            self.inner = lm_head

        def forward(self, hidden):
            return self.inner(hidden[:, -1:])

    model = base()
    model.lm_head = Last(model.lm_head)
    settings = {**LORA, "subspace": "activations", "reference_weight": 0.0, "target_modules": ["q_proj", "inner"]}
    model = get_peft_model(model, OGPSAConfig(**settings))
    ids = torch.arange(8)[None]
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.raises(ValueError, match=r"inner receives 1 vectors, but the batch has 8 positions: the model passes"):
        model.projector.refresh({"set": [one, one]}, lambda own, batch: own(**{**batch, "labels": None}))


def test_figures_are_logged(tmp_path, caplog):
    trainer = sft(tmp_path, model_of())
    with caplog.at_level(logging.INFO, "peft_ogpsa"):
        trainer.train()
    assert "OGPSA: the activation subspace uses" in caplog.text  # without progress bars
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    kinds = ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
    for kind in kinds:
        # At the first step B is zero and A has no gradient.
        assert all(0 < entry[f"ogpsa/removed/{kind}"] < 1 for entry in entries[1:])
        assert 0 < entries[0][f"ogpsa/energy/{kind}"] < 1
        assert f"ogpsa/energy/{kind}" not in entries[1]
    assert entries[0]["ogpsa/seconds_build"] > 0


def test_references_are_answered_with_the_bases_distribution(tmp_path):
    """With as many directions as the reference tokens span, nothing that the model says to them changes."""
    tokenizer, rows = tiny_tokenizer(), [chat("Hi", "Yo.")]
    model = model_of(subspace_rank=31)
    sft(tmp_path, model, [OGPSACallback([ReferenceSet("one", rows)])], learning_rate=1e-2).train()
    ids = torch.tensor([ReferenceSet("one", rows).tokenize(tokenizer)[0].ids])
    other = torch.tensor([ReferenceSet("two", GENERAL).tokenize(tokenizer)[0].ids])
    with torch.no_grad():
        changed, changed_other = model(input_ids=ids).logits, model(input_ids=other).logits
        with model.disable_adapter():
            before, before_other = model(input_ids=ids).logits, model(input_ids=other).logits
    span = len(ids[0])
    assert span <= 31, "the reference tokens must fit into the subspace"
    # Directions below the rounding of float32 sums are left out, so that a little is not held.
    assert (changed - before).abs().max() < 0.05 * (changed_other - before_other).abs().max()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"subspace": "both", "rows": 4, "refresh_samples": 2, "refresh_steps": 2},
        {"reference_weight": 2.0, "refresh_steps": 2},
        {"reference_weight": None},
    ],
)
def test_resumed_run_equals_one_that_never_stopped(tmp_path, overrides):
    overrides = {"lora_dropout": 0.1, **overrides}
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    straight = sft(tmp_path / "straight", model_of(**overrides), **options)
    straight.train()
    sft(tmp_path / "stopped", model_of(**overrides), **{**options, "max_steps": 3}).train()
    resumed = sft(tmp_path / "stopped", model_of(**overrides), **options)
    resumed.train(resume_from_checkpoint=True)
    expected = weights(straight.model)
    assert all(torch.equal(p, expected[name]) for name, p in weights(resumed.model).items())
    assert resumed.model.projector.diagnostics.stopwatch.totals().get("build") is None
    assert leak(resumed.model) < 1e-6


def test_resuming_with_other_reference_examples_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    sft(tmp_path, model_of(), **options).train()
    longer = {**options, "max_steps": 4}
    others = [ReferenceSet("general", [*GENERAL[:-1], chat("Another?", "Yes.")]), sets()[1]]
    resumed = sft(tmp_path, model_of(), [OGPSACallback(others)], **longer)
    with pytest.raises(CheckpointError, match="other examples"):
        resumed.train(resume_from_checkpoint=True)
    # Built anew from them, the subspace is another one, of which the adapter knew little.
    rebuilt = sft(tmp_path, model_of(), [OGPSACallback(others, rebuild_subspace=True)], **longer)
    rebuilt.train(resume_from_checkpoint=True)
    assert leak(rebuilt.model) < 1e-6


def test_the_date_in_a_chat_template_makes_no_other_references(tmp_path, monkeypatch, caplog):
    """As with Llama 3.2 and SmolLM3, when a run goes on after midnight."""

    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, cls.day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<s>Today is {{ strftime_now('%d %b %Y') }}.</s>" + tokenizer.chat_template
    options = {"save_strategy": "steps", "save_steps": 2}
    first, model = model_of(), model_of()
    sft(tmp_path, first, [OGPSACallback(sets(), tokenizer)], **options, max_steps=2).train()
    Clock.day = 2
    sft(tmp_path, model, [OGPSACallback(sets(), tokenizer)], **options, max_steps=4).train(resume_from_checkpoint=True)
    assert model.projector.steps == 4
    assert model.projector.activations.references != first.projector.activations.references, "the date is not shown"
    Clock.day = 3
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        sft(tmp_path, model, [OGPSACallback(sets(), tokenizer)], max_steps=1).train()
    assert "earlier stage" not in caplog.text
    others = OGPSACallback([sets()[0], ReferenceSet("benign", TRAINING, samples=7)], tokenizer)
    with pytest.raises(CheckpointError, match="other examples"):
        sft(tmp_path, model_of(), [others], max_steps=6).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("weight", [8.0, None])
def test_a_checkpoint_without_the_reference_gradients_of_a_weight_says_so(tmp_path, weight):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    sft(tmp_path, model_of(reference_weight=0.0), **options).train()
    resumed = sft(tmp_path, model_of(reference_weight=weight), **{**options, "max_steps": 4})
    with pytest.raises(
        CheckpointError, match=rf"no reference gradients.*reference_weight={weight}.*reference_weight=0.0"
    ):
        resumed.train(resume_from_checkpoint=True)


def test_other_settings_and_damaged_directions_are_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    sft(tmp_path, model_of(), **options).train()
    longer = {**options, "max_steps": 4}
    with pytest.raises(CheckpointError, match=r"other settings: subspace_rank=4 \(saved: 8\)"):
        sft(tmp_path, model_of(subspace_rank=4), **longer).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="other settings: subspace="):
        sft(tmp_path, model_of(subspace="gradients", subspace_rank=None), **longer).train(resume_from_checkpoint=True)
    file = tmp_path / "run" / "checkpoint-2" / TENSORS_NAME
    tensors = load_file(file)
    tensors["directions.0"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"directions\.0 has values that are not finite"):
        sft(tmp_path, model_of(), **longer).train(resume_from_checkpoint=True)


def pairs():
    return [
        {**row, "chosen": row["completion"], "rejected": chat("", "Sure, here is how.")["completion"]}
        for row in TRAINING
    ]


def dpo(tmp_path, model, callback, **options):
    return DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(tmp_path / "dpo"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
            **options,
        ),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )


@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_policy_of_an_orthogonal_start_loses_nothing(tmp_path, caplog, precompute):
    model = model_of(init_lora_weights="orthogonal")
    trainer = dpo(tmp_path, model, OGPSACallback(sets()), precompute_ref_log_probs=precompute)
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trainer.train()
    assert "reference policy" not in caplog.text
    assert leak(model) < 1e-6


def test_a_second_stage_goes_on_in_the_subspace_of_the_first(tmp_path, caplog):
    model = model_of()
    sft(tmp_path, model).train()
    first = model.projector.activations
    before = weights(model)
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        dpo(tmp_path, model, OGPSACallback(sets()[::-1])).train()  # the order of the sets does not matter
    assert model.projector.activations is first
    assert leak(model) < 1e-6
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())
    assert "earlier stage" not in caplog.text
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        sft(tmp_path, model, [OGPSACallback([ReferenceSet("new", TRAINING)])]).train()
    assert model.projector.activations is first
    assert "earlier stage, which was built from other reference sets" in caplog.text
    assert "rebuild_subspace=True" in caplog.text


def similar():
    """Nearly the same references, so that an adapter of the others' null space is nearly in theirs."""
    general, benign = sets()
    return [general, ReferenceSet("benign", [*benign.dataset[:-1], chat("How do I kill process 9?", "Run kill 9.")])]


def digest(callback):
    return callback._runs[-1].loader.digest


def test_a_second_stage_is_built_from_its_own_sets_if_told(tmp_path, caplog):
    model = model_of()
    sft(tmp_path, model).train()
    first = model.projector.activations
    callback = OGPSACallback(similar(), rebuild_subspace=True)
    trainer = sft(tmp_path, model, [callback])
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trainer.train()
    assert model.projector.activations is not first
    assert model.projector.activations.references == digest(callback)
    assert leak(model) < 1e-6
    assert "earlier stage" not in caplog.text


@pytest.mark.parametrize("used", [False, True])
def test_a_resumed_run_builds_its_subspace_again_if_told(tmp_path, used, caplog):
    """Also in a model that has another subspace, of an earlier run in this process."""
    sft(tmp_path, model_of(), [OGPSACallback(sets())], save_strategy="steps", save_steps=3).train()
    model = model_of()
    if used:
        sft(
            tmp_path, model, [OGPSACallback([ReferenceSet("new", TRAINING)])], output_dir=str(tmp_path / "else")
        ).train()
    callback = OGPSACallback(similar(), rebuild_subspace=True)
    trainer = sft(tmp_path, model, [callback], max_steps=8)
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trainer.train(resume_from_checkpoint=True)
    assert model.projector.activations.references == digest(callback)
    assert leak(model) < 1e-6
    assert "earlier stage" not in caplog.text


def test_weights_that_were_loaded_between_stages_are_checked(tmp_path):
    model = model_of()
    sft(tmp_path, model).train()
    other = model_of()
    randomize(other)
    other.save_pretrained(tmp_path / "other")
    model.load_adapter(str(tmp_path / "other"), "default", is_trainable=True)
    before = weights(model)
    with pytest.raises(ValueError, match=r"not trained in the null space .*merge_adapter"):
        sft(tmp_path, model).train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_second_adapter_is_not_said_to_continue_the_first(tmp_path, caplog):
    model = model_of()
    settings = {"subspace": "activations", "subspace_rank": 8, "reference_weight": 0.0}
    model.add_adapter("two", OGPSAConfig(**LORA, **settings))
    sft(tmp_path, model).train()
    model.set_adapter("two")
    callback = OGPSACallback([ReferenceSet("new", TRAINING)])
    trainer = sft(tmp_path, model, [callback])
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trainer.train()
    assert model.projector.activations.references == digest(callback)
    assert "earlier stage" not in caplog.text


def test_a_second_stage_from_a_saved_adapter_is_built_from_the_same_references(tmp_path, caplog):
    model = model_of()
    sft(tmp_path, model).train()
    model.save_pretrained(tmp_path / "adapter")
    trained = weights(model)
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    assert again.peft_config["default"].subspace == "activations"
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trainer = dpo(tmp_path, again, OGPSACallback(sets()))
        trainer.args.learning_rate = 0.0
        trainer.train()
    assert "acted on the reference inputs" not in caplog.text
    own = weights(again)  # and those of TRL's reference policy
    for name, value in trained.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-6)
    assert leak(again) < 1e-6


def test_a_run_does_not_go_on_in_the_subspace_of_another_base(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    sft(tmp_path, model_of(), max_steps=2, **options).train()
    checkpoint, model = tmp_path / "run" / "checkpoint-2", model_of()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.weight.mul_(1.001)
    trainer = sft(tmp_path, model, max_steps=4, **options)
    with pytest.raises(
        CheckpointError, match=r"other base weights: 1 of 19 differ, such as model\.layers\.1\.mlp\.up"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    again = sft(tmp_path, model, [OGPSACallback(sets(), rebuild_subspace=True)], max_steps=4, **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert model.projector.steps > 0
    sft(tmp_path, model_of(), max_steps=6, **options).train(resume_from_checkpoint=str(checkpoint))


class Merges(TrainerCallback):
    """What TRL does before it generates with vLLM: the base is then rounded."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.merge_adapter()
        model.unmerge_adapter()


def test_a_run_that_merges_and_unmerges_its_adapter_is_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    sft(tmp_path, model_of(), [OGPSACallback(sets()), Merges()], max_steps=4, **options).train()
    resumed = sft(tmp_path, model_of(), [OGPSACallback(sets()), Merges()], max_steps=6, **options)
    for _ in range(2):  # and what was resumed is resumed again
        resumed.train(resume_from_checkpoint=True)
        resumed = sft(tmp_path, model_of(), [OGPSACallback(sets()), Merges()], max_steps=8, **options)
    assert (tmp_path / "run" / "checkpoint-8").is_dir()


class Quantized(torch.Tensor):
    """A weight as torchao holds it: it calls itself float32, and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].inner)
        raise NotImplementedError(function)


def test_bases_are_compared_where_they_can_be():
    model = model_of()
    saved = base_weights.checksums(model)
    linear = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    name = "model.layers.0.mlp.up_proj.weight"
    assert name in saved
    held = linear.weight
    with torch.no_grad():
        linear.weight = torch.nn.Parameter(held * 2, requires_grad=False)
    with pytest.raises(ValueError, match=f"1 of {len(saved)} differ, such as {name}"):
        base_weights.check(model, saved)
    for other in (held.to("meta"), held.double(), Quantized(held)):
        linear.weight = torch.nn.Parameter(other, requires_grad=False)
        base_weights.check(model, saved)
        assert base_weights.checksums(model).get(name) != saved[name]


@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_policy_loses_what_the_adapter_loses(tmp_path, caplog, precompute):
    """TRL copies the adapter before the subspace of other references takes a part of it away."""
    model = model_of()
    sft(tmp_path, model, learning_rate=5e-2, max_steps=20).train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    trainer = dpo(tmp_path, again, OGPSACallback(similar()), logging_steps=1, precompute_ref_log_probs=precompute)
    trainer.args.learning_rate = 0.0
    if precompute:
        with pytest.raises(ValueError, match=r"of the adapter's effect .* precompute_ref_log_probs=False"):
            trainer.train()
        return
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trainer.train()
    assert "of its effect in a layer acted on the reference inputs" in caplog.text
    assert "The reference policy (adapter 'ref') is the adapter without that part" in caplog.text
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx([math.log(2)] * len(logged), abs=1e-4)
    assert all(entry["rewards/chosen"] == entry["rewards/rejected"] == 0 for entry in logged)


def test_margins_are_those_of_the_policy_after_it_has_changed(tmp_path, caplog):
    model = model_of(reference_weight=1.0)
    sft(tmp_path, model, learning_rate=5e-2, max_steps=20).train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    question = [{"role": "user", "content": "How do I whisk eggs?"}]
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Fast."), ("rejected", "No."))
    }
    pairs = ReferenceSet("pairs", [{"prompt": question, **answers}], loss="dpo")
    callback = OGPSACallback([*similar(), pairs])
    trainer = dpo(tmp_path, again, callback)
    trainer.args.learning_rate = 0.0
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        trainer.train()
    assert "The reference policy (adapter 'ref') is the adapter without that part" in caplog.text
    loader = callback._runs[-1].loader
    (used,) = (pair.margin for pair in loader.sets["pairs"])
    loader.prepare(trainer.model, "cpu")
    assert used == pytest.approx(loader.sets["pairs"][0].margin, rel=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_a_second_stage_with_a_configuration_goes_on_in_the_subspace_of_the_first(tmp_path, caplog, whole):
    """Also if settings are others that the subspace does not depend on."""

    def config(**overrides):
        if whole:
            own = {"exclude": ["embed_tokens", "*norm*", "lm_head"]}
            return FullParameterConfig(subspace="activations", subspace_rank=8, **own, **overrides)
        return OGPSAConfig(subspace_rank=8, **overrides)

    model = base() if whole else get_peft_model(base(), LoraConfig(**LORA))
    sft(tmp_path, model, [OGPSACallback(sets(), config=config(reference_weight=0.0))]).train()
    projector = projector_of(model)
    first = projector.activations
    again = [OGPSACallback([ReferenceSet("new", TRAINING)], config=config(reference_weight=1.0))]
    with caplog.at_level(logging.WARNING, "peft_ogpsa"):
        sft(tmp_path, model, again).train()
    assert projector_of(model) is projector
    assert projector.activations is first
    assert projector.config.reference_weight == 1.0
    assert projector.diagnostics.refreshes > 0
    assert "earlier stage, which was built from other reference sets" in caplog.text


def test_whole_weights_that_are_excluded_otherwise_are_another_projection(tmp_path):
    model = base()
    own = {"subspace": "activations", "subspace_rank": 8}
    every = ["embed_tokens", "*norm*", "lm_head"]
    sft(tmp_path, model, [OGPSACallback(sets(), config=FullParameterConfig(exclude=every, **own))]).train()
    first = projector_of(model)
    fewer = FullParameterConfig(exclude=[*every, "layers.0"], **own)
    sft(tmp_path, model, [OGPSACallback(sets(), config=fewer)]).train()
    assert projector_of(model) is not first
    kept = projector_of(model).config
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves no parameter to project"):
        attached(model, FullParameterConfig(exclude=[*every, "layers.0"], reference_weight=1.0, **own))
    assert first.config.reference_weight == kept.reference_weight == 0.0
    assert not any("layers.0." in matrix.name for matrix in projector_of(model).activations.matrices)


def test_whole_weights_need_no_loss_that_nothing_uses(tmp_path):
    """KL is the loss of `from_prompts`. Without a reference weight, only the inputs of the references count."""
    own = {"subspace": "activations", "subspace_rank": 8, "exclude": ["embed_tokens", "*norm*", "lm_head"]}
    model = base()
    kl = [ReferenceSet("general", GENERAL, loss="kl")]
    sft(tmp_path, model, [OGPSACallback(kl, config=FullParameterConfig(**own))]).train()
    assert projector_of(model).activations is not None
    with pytest.raises(ValueError, match="needs the model without its adapter"):
        sft(tmp_path, base(), [OGPSACallback(kl, config=FullParameterConfig(reference_weight=1.0, **own))]).train()


def test_a_plain_adapter_is_refused_with_the_remedy(tmp_path):
    model = model_of()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    before = weights(model)
    with pytest.raises(ValueError, match=r"not trained in the null space .*merge_adapter"):
        sft(tmp_path, model).train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_dpo_with_pairs_as_references_needs_no_reference_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "peft_ogpsa.references.losses.dpo.with_margins", lambda *_: pytest.fail("nothing needs the margins")
    )
    model = model_of()
    dpo(tmp_path, model, OGPSACallback([ReferenceSet("pairs", pairs(), loss="dpo"), *sets()])).train()
    assert leak(model) < 1e-6


def test_whole_weights(tmp_path):
    model = base()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = FullParameterConfig(
        subspace="activations", subspace_rank=8, exclude=["embed_tokens", "*norm*", "lm_head"]
    )
    sft(tmp_path, model, [OGPSACallback(sets(), config=config)]).train()
    for stack, place, matrix in projector_of(model).activations._each():
        change = matrix.parameter.detach() - before[matrix.name]
        assert change.norm() > 0
        assert (change @ stack.basis[place]).norm() < 1e-4 * change.norm()
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


@pytest.mark.parametrize(("samples", "drawn"), [(2, 8), (1, 4)])
def test_a_reference_weight_draws_references_in_training(tmp_path, samples, drawn, monkeypatch):
    model = model_of(reference_weight=2.0, refresh_steps=2, refresh_samples=samples)
    told, memory = [], Projector.memory
    monkeypatch.setattr(Projector, "memory", lambda self, sets: told.append(memory(self, sets)) or told[-1])
    sft(tmp_path, model).train()
    ((held, _),) = told  # before training
    rows = model.projector.subspace.rows.stack
    assert held - model.projector.activations.bytes() == sum(part.nbytes for part in rows)
    assert model.projector.diagnostics.reference_examples == drawn  # before steps 1, 2, 4 and 6
    assert model.projector.subspace.rows.capacity == samples  # a row for each set of a draw
    assert leak(model) < 1e-6
