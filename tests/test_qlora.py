"""OGPSA over a 4-bit base: what TRL's trainers do with it, float16 compute, and that every step stays projected."""

from __future__ import annotations

import json
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from loops import LORA, batch, loss_of, parameters_of, references, step_violations
from models import chat, tiny_llama, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from test_trainers import COMMON, GENERAL, PAIRS, ROWS, TOLERANCE, Violations
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_ogpsa import OGPSACallback, OGPSAConfig, ReferenceSet, projector_of

pytestmark = pytest.mark.filterwarnings("ignore")

STAGES = {"SFT": (SFTTrainer, SFTConfig, ROWS), "DPO": (DPOTrainer, DPOConfig, PAIRS)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model in a folder: only what is loaded from one can be quantized."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=259, max_position_embeddings=256, hidden_size=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def quantization(dtype=torch.bfloat16):
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def four_bit(folder, dtype=torch.bfloat16):
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization(dtype), dtype=dtype)


def prepared(folder, dtype=torch.bfloat16, **options):
    return prepare_model_for_kbit_training(four_bit(folder, dtype), **options)


@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_policy_of_dpo_is_where_training_starts(precompute, saved, tmp_path):
    """TRL copies the adapter, and then rounds it to bfloat16. The subspace of other references takes a part away."""

    def sets(*rows):
        return [OGPSACallback([ReferenceSet("general", [*GENERAL[: len(GENERAL) - len(rows)], *rows])])]

    options = {"ogpsa": False, "bf16": True}
    config = OGPSAConfig(subspace="activations", subspace_rank=8, reference_weight=0.0, **LORA)
    model = get_peft_model(four_bit(saved), config)
    trainer_of("SFT", model, tmp_path, callbacks=sets(), learning_rate=5e-2, max_steps=20, **options).train()
    trained = adapter(model)
    model.save_pretrained(tmp_path / "sft")
    for rows in ([], [chat("How do I whisk eggs?", "Fast.")]):
        again = PeftModel.from_pretrained(four_bit(saved), tmp_path / "sft", is_trainable=True)
        options |= {"learning_rate": 0.0, "logging_steps": 1, "precompute_ref_log_probs": precompute}
        trainer = trainer_of("DPO", again, tmp_path, callbacks=sets(*rows), **options)
        if rows and precompute:
            with pytest.raises(ValueError, match=r"of the adapter's effect .* precompute_ref_log_probs=False"):
                trainer.train()
            continue
        trainer.train()
        own, ref = adapter(again), adapter(again, "ref")
        # What was computed before is left as it is, if less than `LEAK` of the adapter was removed.
        tolerance = 1e-3 if precompute else 1e-4
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in logged] == pytest.approx([math.log(2)] * len(logged), abs=tolerance)
        for name, value in own.items() if not precompute else ():
            torch.testing.assert_close(value, ref[name.replace("default", "ref")], rtol=0, atol=1e-6)
            if not rows:  # the adapter as it was trained, and not rounded
                torch.testing.assert_close(value, trained[name], rtol=1e-5, atol=1e-6)


def config_of(**overrides):
    return OGPSAConfig(
        **{
            "subspace": "gradients",
            "rows": 8,
            "refresh_steps": 2,
            "refresh_samples": 4,
            "reference_weight": 0.0,
            **LORA,
            **overrides,
        }
    )


def trainer_of(stage, model, folder, *, ogpsa=True, peft_config=None, callbacks=(), **options):
    trainer, config, rows = STAGES[stage]
    settings = {**COMMON, "max_steps": 3, "bf16": True, "gradient_checkpointing": True, **options}
    return trainer(
        model,
        args=config(output_dir=str(folder / "run"), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[*([OGPSACallback([ReferenceSet("general", GENERAL)])] if ogpsa else []), *callbacks],
    )


def packed(model) -> dict[str, torch.Tensor]:
    """The 4-bit weights as they lie in memory, and their scales."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            tensors[f"{name}.weight"] = module.weight.detach().clone()
            tensors[f"{name}.scales"] = module.weight.quant_state.absmax.clone()
    assert tensors
    return tensors


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def adapter(model, name: str = "default") -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    # Under autocast, which the trainer leaves on its model. Without dropout the mode is nothing to the model, but in
    # evaluation mode bitsandbytes would repack the 4-bit weights.
    with torch.autocast("cpu", torch.bfloat16):
        return model.train()(input_ids=batch(0)["input_ids"]).logits.float()


@pytest.mark.parametrize("given", ["prepared peft model", "base and config", "folder and config"])
@pytest.mark.parametrize("stage", STAGES)
def test_trainer(stage, given, saved, tmp_path):
    violations = Violations()
    if given == "prepared peft model":
        model, options = get_peft_model(prepared(saved), config_of()), {}
    elif given == "base and config":
        model, options = four_bit(saved), {"peft_config": config_of()}
    else:
        loading = {"quantization_config": quantization(), "dtype": torch.bfloat16, "device_map": None}
        model, options = str(saved), {"peft_config": config_of(), "model_init_kwargs": loading}
    trainer = trainer_of(stage, model, tmp_path, callbacks=[violations], **options)
    model = trainer.model
    base, reference, start = packed(model), adapter(model, "ref"), adapter(model)
    assert bool(reference) == (stage == "DPO" and given == "prepared peft model")
    trainer.train()

    assert same(packed(model), base)
    assert same(adapter(model, "ref"), reference)
    trained = adapter(model)
    assert all(not torch.equal(value, start[name]) for name, value in trained.items())
    assert all(torch.isfinite(value).all() for value in trained.values())
    projector = model.projector
    assert projector.steps == 3
    assert projector.subspace.rows.filled == 8
    assert {f"base_model.{name}" for name in projector.subspace.blocks.names()} == trained.keys()
    # TRL casts the adapter to bfloat16, in which a projected update is lost to rounding.
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert len(violations.measured) == 3
    assert max(violations.measured) <= TOLERANCE

    trainer.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    (tmp_path / "adapter" / "ogpsa_config.json").unlink()
    fresh = prepared(saved) if given == "prepared peft model" else four_bit(saved)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert same(adapter(loaded), trained)
    for own in (loaded, model):  # before transformers 5, the base rounds otherwise with checkpointing
        own.gradient_checkpointing_disable()
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert not torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("stage", STAGES)
def test_paged_8_bit_optimizer(stage, saved, tmp_path):
    violations = Violations()
    options = {"optim": "paged_adamw_8bit", "max_steps": 5, "gradient_accumulation_steps": 2}
    # Without checkpointing no input needs a gradient, and a layer in evaluation mode would be repacked on some CPUs.
    options |= {"per_device_train_batch_size": 2, "callbacks": [violations], "gradient_checkpointing": False}
    trainer = trainer_of(stage, four_bit(saved), tmp_path, peft_config=config_of(), **options)
    base = packed(trainer.model)
    trainer.train()
    assert same(packed(trainer.model), base)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert trainer.model.projector.steps == 5
    assert max(violations.measured) <= TOLERANCE


def test_callback_added_to_a_trainer_already_made(saved, tmp_path):
    violations = Violations()
    trainer = trainer_of("SFT", four_bit(saved), tmp_path, ogpsa=False, peft_config=config_of())
    assert {value.dtype for value in adapter(trainer.model).values()} == {torch.bfloat16}
    trainer.add_callback(OGPSACallback([ReferenceSet("general", GENERAL)]))
    trainer.add_callback(violations)
    trainer.train()
    assert {value.dtype for value in adapter(trainer.model).values()} == {torch.float32}
    assert len(violations.measured) == 3
    assert max(violations.measured) <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_equals_one_that_never_stopped(stage, saved, tmp_path):
    def trainer(seed):
        torch.manual_seed(seed)  # the resumed adapter, and DPO's copy of it, start from other values
        model = get_peft_model(prepared(saved), config_of(lora_dropout=0.1))
        return trainer_of(stage, model, tmp_path, max_steps=5, save_strategy="steps", save_steps=2)

    straight, resumed = trainer(0), trainer(1)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.model.projector.steps == 5
    assert resumed.model.projector.diagnostics.refreshes == straight.model.projector.diagnostics.refreshes
    assert same(adapter(resumed.model), adapter(straight.model))
    assert same(adapter(resumed.model, "ref"), adapter(straight.model, "ref"))


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("preparation", [True, False])
def test_checkpointing_and_preparation_leave_the_gradients_whole(preparation, reentrant, saved):
    base = prepared(saved, use_gradient_checkpointing=False) if preparation else four_bit(saved)
    torch.manual_seed(0)
    model = get_peft_model(base, config_of())
    assert {p.dtype for p in parameters_of(model)} == {torch.float32}
    gradients = []
    for checkpointing in (False, True) if reentrant is not None else (False,):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        loss_of(model, batch(0)).backward()
        gradients.append([p.grad.clone() for p in parameters_of(model)])
        model.zero_grad()
    for plain, checkpointed in zip(gradients[0], gradients[-1], strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-3, atol=1e-7)
    before = packed(model)
    losses = [loss_of(model, batch(0)).item()]
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2)

    def step():
        optimizer.zero_grad()
        loss_of(model, batch(0)).backward()
        assert all(p.grad is not None for p in parameters_of(model))
        optimizer.step()

    assert max(step_violations(model, optimizer, step=step)) <= TOLERANCE
    losses.append(loss_of(model, batch(0)).item())
    assert losses[1] < losses[0] - 0.2
    assert same(packed(model), before)


def test_bfloat16_adapters_in_a_loop_of_ones_own_are_exact_on_the_float32_copy(saved):
    model = get_peft_model(prepared(saved), config_of()).train()
    for parameter in parameters_of(model):
        parameter.data = parameter.data.to(torch.bfloat16)

    def copy_of(projector):
        return projector.subspace.blocks.stack() if projector._step.masters is None else projector._step.masters

    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-3)
    assert max(step_violations(model, optimizer, stored=copy_of)) <= TOLERANCE
    assert {p.dtype for p in parameters_of(model)} == {torch.bfloat16}


@pytest.mark.parametrize(("rate", "least"), [(1e-2, 1e-3), (1e-3, 1e-2), (2e-4, 1e-1)])
def test_bfloat16_parameters_cannot_hold_the_constraint(saved, rate, least):
    model = get_peft_model(prepared(saved), config_of()).train()
    for parameter in parameters_of(model):
        parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=rate)
    assert least < max(step_violations(model, optimizer)) < 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("preparation", [True, False])
def test_float16_compute_with_a_scaler_that_skips_steps(preparation, fused, saved):
    base = prepared(saved, torch.float16) if preparation else four_bit(saved, torch.float16)
    model = get_peft_model(base, config_of()).train()
    assert {p.dtype for p in parameters_of(model)} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    skipped = 0

    def step():
        nonlocal skipped
        while True:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch(5))).backward()
            steps, scale = model.projector.steps, scaler.get_scale()
            scaler.step(optimizer)  # a fused optimizer's own step is called even where nothing is to be stepped
            scaler.update()
            if scaler.get_scale() == scale:
                return
            skipped += 1
            assert model.projector.steps == steps

    assert max(step_violations(model, optimizer, step=step)) <= TOLERANCE
    assert skipped > 0
    assert model.projector.steps == 4


@pytest.mark.parametrize(
    ("stage", "max_grad_norm", "optim"),
    [  # without clipping, the gradients are still scaled when a fused optimizer gets them
        ("SFT", 1.0, "adamw_torch_fused"),
        ("SFT", 0.0, "adamw_torch_fused"),
        ("DPO", 0.0, "adamw_torch_fused"),
        ("DPO", 1.0, "adamw_torch"),
    ],
)
def test_float16_training_with_a_scaler(stage, max_grad_norm, optim, saved, tmp_path):
    violations = Violations()
    options = {"bf16": False, "fp16": True, "optim": optim, "max_grad_norm": max_grad_norm, "max_steps": 6}
    model = get_peft_model(prepared(saved, torch.float16), config_of())
    trainer = trainer_of(stage, model, tmp_path, callbacks=[violations], **options)
    # accelerate scales losses on GPUs alone; with these two it takes the same path here.
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    trainer.accelerator.native_amp = True
    trainer.train()
    skipped = 22 - round(math.log2(scaler.get_scale()))
    assert 0 < skipped < 5
    projector = trainer.model.projector
    assert len(violations.measured) == projector.steps == 6 - skipped
    assert max(violations.measured) <= TOLERANCE
    logged = [value for entry in trainer.state.log_history for key, value in entry.items() if "ogpsa/" in key]
    assert logged
    assert all(math.isfinite(value) for value in logged)


def test_float16_scaled_gradients_meet_unscaled_rows(saved):
    trained = {}
    for scale in (None, 2.0**8):
        torch.manual_seed(0)
        # The reference gradient that is added is as large as the training gradient: it must be of the same scale.
        model = get_peft_model(prepared(saved, torch.float16), config_of(reference_weight=1.0)).train()
        optimizer = torch.optim.SGD(parameters_of(model), lr=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for number in range(3):
            model.projector.refresh(references(number), loss_of)
            scaler.scale(loss_of(model, batch(number))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert model.projector.steps == 3
        trained[scale] = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_B" in n])
    plain, scaled = trained.values()
    assert plain.norm() > 0.01
    assert (plain - scaled).norm() < 1e-2 * plain.norm()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("subspace", ["activations", "gradients"])
def test_a_plain_adapter_over_a_4_bit_base_is_trained_as_an_ogpsa_adapter_is(stage, subspace, saved, tmp_path):
    settings = {"subspace": "activations", "subspace_rank": 8}
    if subspace == "gradients":
        settings = {"subspace": "gradients", "rows": 8, "refresh_steps": 2, "refresh_samples": 4}
    sets = [ReferenceSet("general", GENERAL)]
    found = []
    for own in (True, False):
        torch.manual_seed(0)
        callback = OGPSACallback(sets, config=None if own else OGPSAConfig(**settings))
        trainer = trainer_of(
            stage,
            four_bit(saved),
            tmp_path / str(own),
            ogpsa=False,
            peft_config=OGPSAConfig(**LORA, **settings) if own else LoraConfig(**LORA),
            callbacks=[callback],
        )
        trainer.train()
        assert projector_of(trainer.model).steps == 3
        found.append(adapter(trainer.model))
    assert {value.dtype for value in found[1].values()} == {torch.float32}
    assert same(*found)
