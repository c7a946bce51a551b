"""OGPSA under transformers' and TRL's trainers: refreshes, logs, checkpoints, and what bad input gets."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import loops
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from datasets import Dataset
from loops import LORA, parameters_of
from models import TEMPLATE, chat, randomize, tiny_llama, tiny_t5, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet, projector_of
from peft_ogpsa.core import step
from peft_ogpsa.references import self_answers
from peft_ogpsa.references.budget import refresh_samples
from peft_ogpsa.references.losses import LOSSES, reference_loss
from peft_ogpsa.references.self_answers import AnswerCounts
from peft_ogpsa.references.sets import AnsweredSet
from peft_ogpsa.text.refusal import Verdict
from peft_ogpsa.trainer import checkpoint
from peft_ogpsa.trainer.callback import examples_per_step
from peft_ogpsa.trainer.checkpoint import STATE_NAME, TENSORS_NAME, CheckpointError, save

TRAINING = [chat(f"How do I break rule {i}?", "I can't help with that, sorry.") for i in range(12)]
GENERAL = [chat(f"What comes after {i}?", f"After {i} comes {i + 1}.") for i in range(9)]
BENIGN = [chat(f"How do I kill process {i}?", f"Run kill {i} in a shell.") for i in range(7)]


def model_of(**overrides):
    settings = {
        "subspace": "gradients",
        "rows": 8,
        "refresh_steps": 2,
        "refresh_samples": 4,
        "reference_weight": 0.0,
        **LORA,
        **overrides,
    }
    return get_peft_model(tiny_llama(vocab_size=259, max_position_embeddings=256), OGPSAConfig(**settings))


def sets():
    return [ReferenceSet("general", GENERAL), ReferenceSet("benign", BENIGN)]


def sft(tmp_path, model=None, callbacks=None, peft_config=None, eval_dataset=None, **options):
    settings = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **options,
    }
    return SFTTrainer(
        model if model is not None else model_of(),
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(TRAINING),
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        callbacks=[OGPSACallback(sets())] if callbacks is None else callbacks,
        peft_config=peft_config,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_sft_trainer_refreshes_projects_and_logs(tmp_path):
    trainer = sft(tmp_path)
    trainer.train()
    projector = trainer.model.projector
    assert projector.steps == 6
    assert projector.diagnostics.refreshes == 4  # before steps 1, 2, 4 and 6
    assert projector.diagnostics.reference_examples == 16
    assert set(projector.subspace.rows.sets) == {"general", "benign"}
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        assert entry["ogpsa/loss/general"] > 0
        assert -1 <= entry["ogpsa/cosine/benign"] <= 1
        assert 0 <= entry["ogpsa/removed"] <= 1
        assert entry["ogpsa/seconds_projection"] > 0
    assert max(entry["ogpsa/removed"] for entry in entries) > 0.01


def test_reporting_callbacks_see_the_figures(tmp_path):
    class Reporter(TrainerCallback):
        """Stands where TensorBoard's and W&B's callbacks stand: before the user's."""

        seen: list[dict] = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    trainer = sft(tmp_path, max_steps=2)
    trainer.callback_handler.callbacks.insert(0, Reporter())
    trainer.train()
    assert "ogpsa/removed" in Reporter.seen[0]


def test_tensorboard_gets_the_figures(tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sft(tmp_path, max_steps=2, report_to="tensorboard").train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = tensorboard.EventAccumulator(str(folder)).Reload()
    assert any("ogpsa/removed" in tag for tag in events.Tags()["scalars"])


def test_plain_trainer(tmp_path):
    tokenizer = tiny_tokenizer()
    ids = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        for row in TRAINING
    ]
    trainer = Trainer(
        model_of(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            gradient_accumulation_steps=2,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[OGPSACallback(sets(), processing_class=tokenizer)],
    )
    trainer.train()
    assert trainer.model.projector.steps == 3


def test_trainer_that_wraps_the_base_itself(tmp_path):
    # TRL's other path: a bare model and peft_config.
    trainer = SFTTrainer(
        tiny_llama(vocab_size=259, max_position_embeddings=256),
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no", bf16=False, use_cpu=True
        ),
        train_dataset=Dataset.from_list(TRAINING),
        processing_class=tiny_tokenizer(),
        peft_config=OGPSAConfig(subspace="gradients", rows=8, refresh_samples=4, **LORA),
        callbacks=[OGPSACallback(sets())],
    )
    trainer.train()
    assert trainer.model.projector.steps == 2


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing_and_bfloat16_autocast(tmp_path, checkpointing):
    trainer = sft(
        tmp_path,
        max_steps=3,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=checkpointing,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
    )
    trainer.train()
    assert trainer.model.projector.steps == 3
    assert all(torch.isfinite(value).all() for value in weights(trainer.model).values())


def test_a_second_callback_is_refused(tmp_path):
    trainer = sft(tmp_path)
    trainer.add_callback(OGPSACallback(sets()))
    with pytest.raises(ValueError, match=r"several callbacks OGPSACallback.*one callback with all reference sets"):
        trainer.train()


def test_second_stage_starts_with_rows_of_its_own(tmp_path):
    model = model_of(refresh_steps=100)
    for _ in range(2):
        trainer = sft(tmp_path, model, max_steps=2)
        trainer.train()
        assert model.projector.steps == 2
    assert model.projector.diagnostics.refreshes == 4


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("given", ["peft model", "base and config"])
def test_dpo_trainer(tmp_path, given, precompute):
    pairs = [
        {**row, "chosen": row["completion"], "rejected": chat("", "Sure, here is how.")["completion"]}
        for row in TRAINING
    ]
    config = OGPSAConfig(subspace="gradients", rows=8, refresh_steps=2, refresh_samples=4, **LORA)
    base = tiny_llama(vocab_size=259, max_position_embeddings=256)
    trainer = DPOTrainer(
        get_peft_model(base, config) if given == "peft model" else base,
        args=DPOConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            precompute_ref_log_probs=precompute,
        ),
        train_dataset=Dataset.from_list(pairs).remove_columns("completion"),
        processing_class=tiny_tokenizer(),
        peft_config=None if given == "peft model" else config,
        callbacks=[OGPSACallback([*sets(), ReferenceSet("pairs", pairs)])],
    )
    policy = getattr(trainer.model, "peft_config", {})
    reference = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    trainer.train()
    projector = trainer.model.projector
    assert projector.steps == 3
    assert all(".default." in name for name in projector.subspace.blocks.names())
    assert len(projector.subspace.blocks.names()) == 28
    assert set(projector.subspace.rows.sets) == {"general", "benign", "pairs"}
    assert all(torch.equal(p, reference[n]) for n, p in trainer.model.named_parameters() if n in reference)
    assert "default" in policy
    assert "ogpsa/removed" in trainer.state.log_history[0]


PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": chat("", "Sure, here is how.")["completion"]}
    for row in TRAINING
]


def dpo(tmp_path, model, callback=None, **options):
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return DPOTrainer(
        model,
        args=DPOConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
        callbacks=[callback or OGPSACallback(sets())],
    )


@pytest.mark.parametrize("given", ["trained", "trained, with ref", "fresh"])
@pytest.mark.parametrize("version", ["0.28.0", "0.29.0"])
def test_dpo_of_a_trained_adapter_needs_its_copy_as_reference_policy(tmp_path, monkeypatch, version, given):
    model = model_of() if given == "fresh" else randomize(model_of())
    trainer = dpo(tmp_path, model)
    trainer.ref_adapter_name = "ref" if "ref" in given else None  # set by an old trainer alone
    monkeypatch.setattr("trl.__version__", version)
    if given == "trained" and version == "0.28.0":
        before = weights(model)
        with pytest.raises(ValueError, match=r"reference policy is the base model.*trl>=1\.0.*ref_adapter_name="):
            trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    else:
        trainer.train()
        assert model.projector.steps == 1


def forgetful(monkeypatch):
    """Make the trainer load adapters as before transformers 5.23: those in subfolders alone, if there are any."""

    def load(self, checkpoint, model=None):
        for name in set(self.model.peft_config) - {"default"}:
            self.model.load_adapter(f"{checkpoint}/{name}", name, is_trainable=False)
        self.model.set_adapter("default")

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", load)
    monkeypatch.setattr("transformers.__version__", "5.22.2")


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_resumed_run_without_its_adapter_is_refused(tmp_path, monkeypatch, rebuild):
    straight = dpo(tmp_path, model_of(), max_steps=3, save_strategy="steps", save_steps=1)
    straight.train()
    forgetful(monkeypatch)
    checkpoint = str(tmp_path / "checkpoint-1")
    callback = OGPSACallback(sets(), rebuild_subspace=rebuild)
    resumed = dpo(tmp_path, randomize(model_of()), callback, max_steps=3)
    with pytest.raises(
        ValueError, match=r"'default' does not have the weights of .*checkpoint-1.*transformers>=5\.23"
    ):
        resumed.train(resume_from_checkpoint=checkpoint)
    # The remedy: then TRL's reference policy is the checkpoint's, and the trained adapter too.
    loaded = PeftModel.from_pretrained(model_of().unload(), checkpoint, is_trainable=True)
    resumed = dpo(tmp_path, loaded, OGPSACallback(sets(), rebuild_subspace=rebuild), max_steps=3)
    resumed.train(resume_from_checkpoint=checkpoint)
    if not rebuild:
        expected = dict(straight.model.named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())


def test_four_bit_base_keeps_its_adapters_in_float32(tmp_path):
    tiny_llama(vocab_size=259, max_position_embeddings=256, hidden_size=64).save_pretrained(tmp_path / "model")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization, dtype=torch.bfloat16)
    trainer = SFTTrainer(
        base,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            bf16=True,
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=True,
        ),
        train_dataset=Dataset.from_list(TRAINING),
        processing_class=tiny_tokenizer(),
        peft_config=OGPSAConfig(subspace="gradients", rows=8, refresh_samples=4, **LORA),
        callbacks=[OGPSACallback(sets())],
    )
    trainer.train()
    projector = trainer.model.projector
    assert projector.steps == 3
    # TRL makes them bfloat16, in which a small projected update is lost to rounding.
    assert {group.dtype for group in projector.subspace.blocks.groups} == {torch.float32}
    assert projector._step.masters is None
    assert all(torch.isfinite(value).all() for value in weights(trainer.model).values())


def test_without_callback_the_trainer_stops_with_the_remedy(tmp_path):
    with pytest.raises(RuntimeError, match="Add OGPSACallback"):
        sft(tmp_path, callbacks=[]).train()


def test_projection_off_is_plain_lora_to_the_bit(tmp_path):
    with_callback, without = model_of(), model_of(missing_reference="ignore")
    with_callback.projector.enabled = False
    for model, callbacks in ((with_callback, None), (without, [])):
        trainer = sft(tmp_path, model, callbacks, max_steps=3)
        trainer.train()
    assert all(torch.equal(p, weights(without)[name]) for name, p in weights(with_callback).items())


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"rows_dtype": "bfloat16", "rows_from": "batch"},
        {"reference_weight": 1.0},
        {"subspace": "none", "reference_weight": 1.0, "refresh_steps": 5},
    ],
)
def test_resumed_run_equals_one_that_never_stopped(tmp_path, overrides):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    straight = sft(tmp_path / "straight", model_of(lora_dropout=0.1, **overrides), **options)
    straight.train()
    stopped = sft(tmp_path / "stopped", model_of(lora_dropout=0.1, **overrides), **{**options, "max_steps": 3})
    stopped.train()
    resumed = sft(tmp_path / "stopped", model_of(lora_dropout=0.1, **overrides), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.projector.steps == 6
    assert resumed.model.projector.diagnostics.refreshes == straight.model.projector.diagnostics.refreshes
    expected = weights(straight.model)
    assert all(torch.equal(p, expected[name]) for name, p in weights(resumed.model).items())


@pytest.mark.parametrize("seed", [1, 4])
def test_the_reference_gradient_of_rows_not_yet_stepped_on_survives_a_stop(seed):
    # The trainer saves after a step, and so never between a refresh and the step that adds its gradient.
    straight, stopped, resumed = (model_of(reference_weight=2.0, refresh_steps=3) for _ in range(3))
    for model in (straight, stopped):
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(seed))
        model.projector.refresh({"a": [loops.batch(1)]}, loops.loss_of)
    resumed.load_state_dict(stopped.state_dict())
    resumed.projector.load_state_dict(stopped.projector.state_dict())
    for model in (straight, resumed):
        optimizer = torch.optim.SGD(loops.parameters_of(model), lr=0.1)
        loops.loss_of(model, loops.batch(2)).backward()
        optimizer.step()
    assert all(torch.equal(p, weights(straight)[name]) for name, p in weights(resumed).items())


def remove(name):
    return lambda folder: (folder / name).unlink()


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def drop_keys(folder):
    (folder / STATE_NAME).write_text(json.dumps({"rows": 8}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(TENSORS_NAME), "is missing"),
        (remove(STATE_NAME), "is missing"),
        (overwrite(TENSORS_NAME, b"not safetensors"), "is damaged"),
        (overwrite(STATE_NAME, b"{"), "is damaged"),
        (drop_keys, "is damaged"),
    ],
)
def test_damaged_checkpoint(tmp_path, damage, message):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    sft(tmp_path, **options).train()
    folder = tmp_path / "run" / "checkpoint-2"
    damage(folder)
    with pytest.raises(CheckpointError, match=rf"step 2.*{message}.*rebuild_subspace=True"):
        sft(tmp_path, **{**options, "max_steps": 4}).train(resume_from_checkpoint=str(folder))
    rebuilt = sft(tmp_path, callbacks=[OGPSACallback(sets(), rebuild_subspace=True)], **{**options, "max_steps": 4})
    rebuilt.train(resume_from_checkpoint=str(folder))
    assert rebuilt.model.projector.steps == 2


def test_checkpoint_elsewhere_and_of_another_adapter(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    sft(tmp_path, **options).train()
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run" / "checkpoint-2", moved)
    longer = {**options, "max_steps": 4}
    with pytest.raises(CheckpointError, match="is missing"):
        sft(tmp_path, **longer).train(resume_from_checkpoint=str(moved))
    resumed = sft(tmp_path, callbacks=[OGPSACallback(sets(), resume_from=moved)], **longer)
    resumed.train(resume_from_checkpoint=str(moved))
    assert resumed.model.projector.steps == 4
    trainer = sft(tmp_path, model_of(scope="model"), [OGPSACallback(sets(), resume_from=moved)], **longer)
    with pytest.raises(CheckpointError, match="other settings"):
        trainer.train(resume_from_checkpoint=str(moved))


def test_a_run_resumes_with_the_same_sets_in_another_order(tmp_path):
    overrides = {"refresh_samples": 3}  # each draw takes one example more of one of the two sets
    straight = sft(tmp_path / "a", model_of(**overrides), max_steps=6)
    straight.train()
    stopped = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    sft(tmp_path / "b", model_of(**overrides), **stopped).train()
    resumed = sft(tmp_path / "b", model_of(**overrides), [OGPSACallback(sets()[::-1])], max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / "checkpoint-3"))
    own = weights(resumed.model)
    assert all(torch.equal(value, own[name]) for name, value in weights(straight.model).items())


def test_a_callback_that_is_added_during_training_is_refused(tmp_path):
    class Late(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            trainer.add_callback(OGPSACallback(sets()))

    trainer = sft(tmp_path, model_of(missing_reference="ignore"), [Late()])
    with pytest.raises(RuntimeError, match=r"OGPSACallback was added after training had begun.*before trainer\.train"):
        trainer.train()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    # The weights come from one run and, by the name of the folder, the rows from another.
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    sft(tmp_path / "a", **options).train()
    sft(tmp_path / "b", **{**options, "seed": 5, "learning_rate": 3e-2}).train()
    resumed = sft(tmp_path / "b", **{**options, "max_steps": 4})
    with pytest.raises(CheckpointError, match=r"belongs to other weights: .*lora_.* has the norm .*resume_from="):
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-2"))
    fitting = sft(
        tmp_path / "b",
        callbacks=[OGPSACallback(sets(), resume_from=tmp_path / "a" / "run" / "checkpoint-2")],
        **{**options, "max_steps": 4},
    )
    fitting.train(resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-2"))
    assert fitting.model.projector.steps == 4


def test_rows_that_are_not_finite_are_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    sft(tmp_path, **options).train()
    file = tmp_path / "run" / "checkpoint-2" / TENSORS_NAME
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("rows."))
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{name} has values that are not finite"):
        sft(tmp_path, **{**options, "max_steps": 4}).train(resume_from_checkpoint=str(file.parent))


def test_a_checkpoint_copies_only_the_tensors_that_cannot_be_written_as_they_are(tmp_path, monkeypatch):
    stack = torch.arange(12.0).view(2, 6)
    whole = torch.arange(4.0).view(2, 2)
    tensors = {
        "fresh": torch.arange(6.0),
        "whole": whole,
        "the same": whole,
        "the same in another shape": whole.view(4),
        "part": stack[1],
        "gaps": stack[:, 2:],
        "transposed": torch.arange(6.0).view(2, 3).T,
        "empty": torch.zeros(0),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    written = {}

    def watched(given, path):
        written.update(given)
        save_file(given, path)

    monkeypatch.setattr("peft_ogpsa.trainer.checkpoint.save_file", watched)
    checkpoint.save(tmp_path, {"tensors": tensors, "rest": {}})
    kept = [name for name, own in written.items() if own.numel() and own.data_ptr() == tensors[name].data_ptr()]
    assert kept == ["fresh", "whole", "parameter"]
    loaded = checkpoint.load(tmp_path)["tensors"]
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], own) for name, own in tensors.items())


@pytest.mark.parametrize(("rank", "slices"), [(16, 16), (4, 16), (4, 4), (3, 2)])
def test_slices_are_saved_and_restored(tmp_path, rank, slices):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    overrides = {"r": rank, "scope": "slice", "slices": slices}
    straight = sft(tmp_path, model_of(**overrides), **options)
    straight.train()
    resumed = sft(tmp_path, model_of(**overrides), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = weights(straight.model)
    assert all(torch.equal(p, expected[name]) for name, p in weights(resumed.model).items())


class Rows(TrainerCallback):
    """How many pieces of A have a row when a step begins, and how many refreshes there have been."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        projector = projector_of(model)
        names, norms = projector.subspace.blocks.names(), projector.subspace.rows.norms
        without = sum(float(n.max()) == 0 for name, n in zip(names, norms, strict=True) if "lora_A" in name)
        self.seen.append((projector.diagnostics.refreshes, without))


@pytest.mark.parametrize("loss", ["answer", "kl"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_first_step_of_a_warm_up_moves_nothing_and_does_not_count(tmp_path, warmup, loss):
    rows = Rows()
    references = [ReferenceSet("general", GENERAL, loss=loss), ReferenceSet("benign", BENIGN, loss=loss)]
    schedule = {"lr_scheduler_type": "constant_with_warmup" if warmup else "constant", "warmup_steps": warmup}
    sft(tmp_path, model_of(refresh_steps=5), [OGPSACallback(references), rows], max_steps=8, **schedule).train()
    still = warmup > 0  # transformers' first learning rate of a warm-up is 0
    assert rows.seen[: 2 + still] == [(1, 14)] * (1 + still) + [(2, 0)]
    assert [refreshes for refreshes, _ in rows.seen[2 + still :]] == [2] * 4 + [3] * (2 - still)


def test_nested_trainers_may_share_a_callback(tmp_path):
    callback = OGPSACallback(sets())
    inner = sft(tmp_path / "inner", callbacks=[callback], max_steps=2)

    class Nested(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                inner.train()

    outer = sft(tmp_path / "outer", callbacks=[callback, Nested()], save_strategy="steps", save_steps=6)
    outer.train()
    alone = sft(tmp_path / "alone", max_steps=6)
    alone.train()
    assert inner.model.projector.steps == 2
    assert outer.model.projector.diagnostics.refreshes == alone.model.projector.diagnostics.refreshes == 4
    assert all(torch.equal(p, weights(alone.model)[name]) for name, p in weights(outer.model).items())
    assert (tmp_path / "outer" / "run" / "checkpoint-6" / TENSORS_NAME).is_file()


def of_rows(tmp_path, model, trainer_class=Trainer, **options):
    """A trainer of transformers on `TRAINING`."""
    tokenizer = tiny_tokenizer()
    ids = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        for row in TRAINING
    ]
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    given = {"model_init": model} if not isinstance(model, torch.nn.Module) else {"model": model}
    return trainer_class(
        **given,
        args=TrainingArguments(**{**settings, "learning_rate": 1e-2, **options}),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[OGPSACallback(sets(), processing_class=tokenizer)],
    )


class Small(Trainer):
    """Runs out of memory with more than two examples."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_the_reference_batch_shrinks_with_the_batch_that_the_trainer_finds(tmp_path, monkeypatch):
    sizes = []

    def limited(model, batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return reference_loss(model, batch)

    monkeypatch.setattr("peft_ogpsa.trainer.callback.reference_loss", limited)
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "auto_find_batch_size": True, "save_strategy": "no"}
    trainer = of_rows(tmp_path, model_of(refresh_samples=8), Small, **options)
    trainer.train()
    assert trainer.model.projector.steps == 2
    assert sizes[0] > 2 >= sizes[-1]


@pytest.mark.parametrize("limit", [0.05, 0.0])
def test_both_gradients_are_clipped_to_the_trainers_norm(tmp_path, limit):
    model = model_of(reference_weight=2.0, refresh_steps=1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.3)
    norms = []

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(float(torch.cat([p.grad.flatten() for p in loops.parameters_of(model)]).norm()))
            return super().step(closure)

    trainer = sft(tmp_path, model, max_steps=3, max_grad_norm=limit)
    trainer.optimizer = Optimizer(loops.parameters_of(model), lr=1e-6)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
    trainer.train()
    assert model.projector.max_grad_norm is None  # a loop of one's own that follows clips nothing
    logged = [entry["ogpsa/reference_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == len(norms) == 3
    if limit:
        assert max(norms) <= 3 * limit * 1.001  # the training gradient, and twice the reference gradient
        assert logged == pytest.approx([2 * limit] * 3, rel=1e-3)
    else:
        assert min(norms) > 0.15
        assert min(logged) > 0.15


def test_a_norm_of_minus_one_clips_nothing(tmp_path):
    """As in transformers, which clips only to a norm above 0."""
    trained = []
    for limit in (0.0, -1.0):
        trainer = sft(tmp_path, model_of(reference_weight=2.0, refresh_steps=1), max_steps=3, max_grad_norm=limit)
        trainer.train()
        trained.append(weights(trainer.model))
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("limit", [None, 0.0, -1.0])
def test_a_projector_without_a_norm_clips_nothing(limit):
    assert step._clipping(None, [0], limit) == 1.0


class Later(Trainer):
    """Runs out of memory at one step with more than two examples."""

    at = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step == self.at and len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_resumed_run_that_tries_a_smaller_batch_goes_on(tmp_path, caplog):
    """transformers does not load the checkpoint's weights again, so that its subspace does not fit them."""
    options = {"per_device_train_batch_size": 4, "auto_find_batch_size": True}
    of_rows(tmp_path, model_of(refresh_samples=2), max_steps=2, save_steps=2, **options).train()
    trainer = of_rows(tmp_path, model_of(refresh_samples=2), Later, max_steps=8, save_strategy="no", **options)
    trainer.at = 5
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 8
    assert "the weights that it has reached" in caplog.text
    other = of_rows(tmp_path, randomize(model_of(refresh_samples=2)), max_steps=8, save_strategy="no", **options)
    other._load_from_checkpoint = lambda *_: None
    with pytest.raises(CheckpointError, match="belongs to other weights"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_trial_of_a_search_saves_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = of_rows(tmp_path, lambda trial=None: model_of(), max_steps=2, save_steps=2)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    trainer.train(trial=SimpleNamespace(number=7, params={}))
    assert (tmp_path / "run-7" / "checkpoint-2" / TENSORS_NAME).is_file()
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.skipif(
    "enable_jit_checkpoint" not in TrainingArguments.__dataclass_fields__, reason="transformers 5 has it"
)
def test_a_checkpoint_without_the_event_has_the_subspace(tmp_path):
    """`enable_jit_checkpoint` saves so when a machine is taken away."""

    class Taken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.trainer._save_checkpoint(self.trainer.model, trial=None)
                control.should_training_stop = True

    straight = sft(tmp_path / "straight", lr_scheduler_type="constant")
    straight.train()
    callback = Taken()
    callback.trainer = stopped = sft(
        tmp_path,
        callbacks=[OGPSACallback(sets()), callback],
        enable_jit_checkpoint=True,
        save_strategy="steps",
        save_steps=2,
        lr_scheduler_type="constant",
    )
    stopped.train()
    for number in (2, 3):
        assert (tmp_path / "run" / f"checkpoint-{number}" / TENSORS_NAME).is_file()
    resumed = sft(tmp_path, lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=True)
    expected = weights(straight.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.model).items())


def test_what_is_uploaded_during_training_has_ogpsas_settings(tmp_path):
    trainer = sft(tmp_path, max_steps=1)
    trainer.args.push_to_hub, trainer._finish_current_push = True, lambda: None
    trainer.train()
    settings = json.loads((tmp_path / "run" / "ogpsa_config.json").read_text())
    assert settings["subspace"] == "gradients"
    assert settings["rows"] == 8


@pytest.fixture
def uploads(monkeypatch):
    """What is in each folder when its upload begins. With `.busy`, the first upload takes until the end."""
    found = SimpleNamespace(files=[], busy=False)

    def upload(folder_path, path_in_repo=None, **_):
        if path_in_repo is not None:
            found.files.append((path_in_repo, sorted(path.name for path in Path(folder_path).iterdir())))
        return SimpleNamespace(done=lambda: not found.busy, result=lambda: None)

    hub = SimpleNamespace(upload_folder=upload)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *_, **__: hub, raising=False)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload, raising=False)  # in earlier versions
    return found


def uploading(tmp_path, strategy, **options):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "hub_strategy": strategy, **options}
    trainer = sft(tmp_path, **options)
    trainer.args.push_to_hub = True  # only now, because a new trainer would ask the hub
    trainer.push_in_progress, trainer._finish_current_push = None, lambda: None
    return trainer


@pytest.mark.skipif(not hasattr(TrainerCallback, "on_push_begin"), reason="transformers 5 has it")
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize(
    ("strategy", "names"),
    [("checkpoint", ["last-checkpoint"] * 2), ("all_checkpoints", ["checkpoint-2", "checkpoint-4"])],
)
def test_a_checkpoint_that_is_uploaded_has_the_subspace(tmp_path, uploads, monkeypatch, strategy, names, busy):
    """transformers begins the upload before it tells of the checkpoint."""
    uploads.busy = busy
    saved = []
    monkeypatch.setattr("peft_ogpsa.trainer.checkpoint.save", lambda place, _: (saved.append(place), save(place, _)))
    trainer = uploading(tmp_path, strategy)
    trainer.train()
    assert [name for name, _ in uploads.files] == names[: 1 if busy else 2]
    assert all({STATE_NAME, TENSORS_NAME} <= set(files) for _, files in uploads.files)
    for name in ("checkpoint-2", "checkpoint-4"):
        assert (tmp_path / "run" / name / STATE_NAME).is_file()
    assert len(saved) == 2, "no file is replaced while it is uploaded"
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert len(saved) == 2, "the weights may be others after training"
    resumed = sft(tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.projector.steps == 6


def test_an_upload_that_would_lack_the_subspace_is_refused(tmp_path, uploads, monkeypatch):
    with monkeypatch.context() as sharded:
        trainer = uploading(tmp_path, "checkpoint")
        shards = FullyShardedDataParallelPlugin(fsdp_version=2)
        sharded.setitem(AcceleratorState._shared_state, "fsdp_plugin", shards)
        sharded.setattr("peft_ogpsa.core.distributed.count", lambda: 2)
        with pytest.raises(ValueError, match=r"hub_strategy='checkpoint' .* sharded.*save_subspace=False"):
            trainer.train()
    with monkeypatch.context() as old:
        old.delattr(TrainerCallback, "on_push_begin", raising=False)
        with pytest.raises(ValueError, match=r"hub_strategy='all_checkpoints' .*Install transformers>=5"):
            uploading(tmp_path, "all_checkpoints").train()
    assert not uploads.files


def three_sets(loss="answer"):
    return [
        ReferenceSet(n, [chat(f"{n} {i}?", f"Answer {i}.") for i in range(40)], loss=loss) for n in ("a", "b", "c")
    ]


@pytest.mark.parametrize("accumulation", [4, 16, 64])
@pytest.mark.parametrize("whole", [True, False])
def test_a_budget_never_draws_more_batches_than_rows(tmp_path, accumulation, whole):
    config = FullParameterConfig() if whole else None
    overrides = {"rows_from": "batch", "rows": 4, "refresh_samples": None, "reference_budget": 0.3}
    trainer = sft(
        tmp_path,
        bare_model() if whole else model_of(**overrides),
        [OGPSACallback(three_sets(), config=config)],
        max_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    assert 1 <= projector_of(trainer.model).subspace.rows.filled <= 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"rows": 4, "refresh_samples": 5},
            r"rows=4 is too small: a refresh uses up to 5 reference examples.*Set rows=5",
        ),
        ({"rows": 2, "rows_from": "batch", "refresh_samples": 9}, "up to 3 reference batches"),
        ({"rows": 8, "refresh_samples": None, "reference_budget": None}, "up to 120 reference examples"),
        ({"rows": 2, "rows_from": "set", "refresh_samples": None, "reference_budget": None}, "up to 3 reference sets"),
    ],
)
def test_more_reference_gradients_than_rows_are_refused_before_training(tmp_path, overrides, message):
    trainer = sft(tmp_path, model_of(**overrides), [OGPSACallback(three_sets())], per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("weight", [None, 0.0])
def test_references_that_do_not_constrain_may_come_from_any_number_of_sets(tmp_path, weight):
    sets = [ReferenceSet(f"set {i}", [chat(f"What is {i}?", f"It is {i}.")], loss="kl") for i in range(9)]
    settings = {"r": 4, "target_modules": "all-linear", "subspace_rank": 8, "reference_weight": weight}
    base = tiny_llama(vocab_size=259, max_position_embeddings=256)
    model = get_peft_model(base, OGPSAConfig(**settings, task_type="CAUSAL_LM"))
    trainer = sft(tmp_path, model, [OGPSACallback(sets)], per_device_train_batch_size=64, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
    drawn = projector_of(trainer.model).diagnostics.reference_examples
    assert drawn >= 9 if weight is None else drawn == 0


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_base_that_is_trained_is_no_base_to_stay_close_to(tmp_path, bias):
    base = tiny_llama(vocab_size=259, max_position_embeddings=256, attention_bias=True)
    model = get_peft_model(base, OGPSAConfig(subspace="gradients", rows=8, refresh_samples=4, bias=bias, **LORA))
    trainer = sft(tmp_path, model, [OGPSACallback(three_sets("kl"))])
    with pytest.raises(ValueError, match=rf"bias='{bias}' in the configuration of adapter 'default'.*bias='none'"):
        trainer.train()
    assert trainer.state.global_step == 0
    sft(tmp_path, model, [OGPSACallback(three_sets("answer"))], max_steps=1).train()


@pytest.mark.parametrize(
    ("subspace", "losses", "weight", "expected"),
    [
        ("gradients", ("kl", "answer"), None, {"general": 8.0, "benign": 1.0}),
        ("gradients", ("kl", "kl"), None, {"general": 8.0, "benign": 8.0}),
        ("gradients", ("kl", "answer"), 3.0, {"general": 3.0, "benign": 3.0}),
        ("activations", ("kl", "answer"), None, {"general": 2.0, "benign": 1.0}),
        ("activations", ("kl", "answer"), 3.0, {"general": 3.0, "benign": 3.0}),
        ("both", ("kl", "kl"), None, {"general": 2.0, "benign": 2.0}),
        ("none", ("kl", "answer"), None, {"general": 8.0, "benign": 1.0}),
    ],
)
def test_the_weight_of_each_set_is_what_its_loss_calls_for(tmp_path, subspace, losses, weight, expected):
    references = [
        ReferenceSet(name, rows, loss=loss)
        for name, rows, loss in zip(("general", "benign"), (GENERAL, BENIGN), losses, strict=True)
    ]
    rank = {"subspace_rank": 8} if subspace in ("activations", "both") else {}
    rows = {"rows": 8} if subspace in ("gradients", "both") else {}
    settings = {"subspace": subspace, **rank, **rows, "refresh_samples": 4, "reference_weight": weight}
    model = get_peft_model(tiny_llama(vocab_size=259, max_position_embeddings=256), OGPSAConfig(**LORA, **settings))
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update(model.projector._refresher.factors(model.projector.config))

    sft(tmp_path, model, [OGPSACallback(references), Look()], max_steps=1).train()
    assert seen == expected


def test_checkpoints_without_subspace(tmp_path):
    callbacks = [OGPSACallback(sets(), save_subspace=False)]
    sft(tmp_path, callbacks=callbacks, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert not (tmp_path / "run" / "checkpoint-2" / TENSORS_NAME).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference_sets": []}, "reference_sets is empty"),
        ({"reference_sets": [ReferenceSet("a", GENERAL), ReferenceSet("a", BENIGN)]}, "two sets with the name 'a'"),
        ({"reference_sets": [ReferenceSet("a", GENERAL)], "batch_size": 0}, "batch_size=0"),
        ({"reference_sets": [ReferenceSet("a", GENERAL)], "batch_size": True}, "batch_size=True"),
        ({"reference_sets": GENERAL}, r"contains an object of the type dict\. Give .* \[ReferenceSet\(name, rows\)\]"),
        ({"reference_sets": {"a": GENERAL}}, "contains an object of the type str"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        OGPSACallback(**arguments)


@pytest.mark.parametrize("subspace", ["activations", "gradients"])
def test_an_adapter_that_was_loaded_for_inference_is_refused_with_the_remedy(tmp_path, subspace):
    get_peft_model(tiny_llama(), OGPSAConfig(**LORA, subspace=subspace)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match=r"is_trainable=True to PeftModel\.from_pretrained"):
        projector_of(model).refresh(loops.references(0), loops.loss_of)


def test_a_set_of_a_generator_can_be_used_again(tmp_path):
    callback = OGPSACallback([ReferenceSet("general", (row for row in GENERAL), samples=5)])
    trainer = sft(tmp_path, callbacks=[callback], max_steps=2)
    trainer.train()
    trainer.train()
    assert len(callback._runs[-1].loader.sets["general"]) == 5


def test_encoder_decoders_are_refused(tmp_path):
    model = get_peft_model(tiny_t5(), OGPSAConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    options = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(**options),
        train_dataset=[{"input_ids": [1, 2, 3], "labels": [4, 5]}] * 2,
        processing_class=tiny_tokenizer(),
        callbacks=[OGPSACallback(sets())],
    )
    with pytest.raises(ValueError, match="does not work with encoder-decoder models"):
        trainer.train()


def test_bad_sets_stop_before_the_first_step(tmp_path):
    for bad, message in (
        (ReferenceSet("none", []), "'none' is empty"),
        (ReferenceSet("cut", GENERAL, max_length=3), "'cut': max_length=3 cuts off"),
    ):
        trainer = sft(tmp_path, callbacks=[OGPSACallback([bad])])
        before = weights(trainer.model)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert all(torch.equal(p, before[name]) for name, p in weights(trainer.model).items())


def test_model_without_ogpsa_adapter(tmp_path):

    model = get_peft_model(tiny_llama(vocab_size=259, max_position_embeddings=256), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="has no OGPSA adapter"):
        sft(tmp_path, model).train()


def test_deepspeed_is_refused(tmp_path):
    callback = OGPSACallback(sets())
    trainer = sft(tmp_path, callbacks=[callback])

    class Arguments:
        deepspeed = "zero2.json"

    with pytest.raises(ValueError, match="DeepSpeed"):
        callback.on_train_begin(Arguments(), trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"fsdp_version": 1, "cpu_offload": False}, "FSDP 1"),
        ({"fsdp_version": 2, "cpu_offload": True}, "fsdp_offload_params: false"),
    ],
)
def test_other_sharding_is_refused(tmp_path, monkeypatch, plugin, message):
    callback = OGPSACallback(sets())
    trainer = sft(tmp_path, callbacks=[callback])
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", FullyShardedDataParallelPlugin(**plugin))
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def bare_model():
    return tiny_llama(vocab_size=259, max_position_embeddings=256)


def test_whole_weights(tmp_path):
    model = bare_model()
    config = FullParameterConfig(rows=8, refresh_steps=2, refresh_samples=4, exclude=["embed_tokens"])
    trainer = sft(tmp_path, model, [OGPSACallback(sets(), config=config)])
    trainer.train()
    projector = projector_of(trainer.model)
    assert projector.steps == 6
    names = {name for name, _ in model.named_parameters()}
    assert set(projector.subspace.blocks.names()) == names - {"model.embed_tokens.weight"}
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert max(entry["ogpsa/removed"] for entry in entries) > 0.01


def test_resumed_whole_weights_equal_an_uninterrupted_run(tmp_path):
    def run(folder, resume_from=None, **options):
        config = FullParameterConfig(rows=8, refresh_steps=2, refresh_samples=4, rows_dtype="bfloat16")
        callback = OGPSACallback(sets(), config=config, resume_from=resume_from)
        return sft(folder, bare_model(), [callback], **options)

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-3")
    resumed = run(tmp_path / "resumed", checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(AssertionError):
        assert_equal(whole.model, bare_model())
    assert_equal(whole.model, resumed.model)


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_configuration_for_the_wrong_model_is_refused(tmp_path):
    config = FullParameterConfig()
    with pytest.raises(ValueError, match="Leave out config"):
        sft(tmp_path, callbacks=[OGPSACallback(sets(), config=config)]).train()
    with pytest.raises(ValueError, match="config=FullParameterConfig"):
        sft(tmp_path, bare_model()).train()
    with pytest.raises(ValueError, match="must be an OGPSAConfig, for a plain LoRA adapter, or a FullParameterConfig"):
        OGPSACallback(sets(), config=LoraConfig())
    with pytest.raises(ValueError, match="has no LoRA adapter"):
        sft(tmp_path, bare_model(), [OGPSACallback(sets(), config=OGPSAConfig())]).train()
    pairs = [{**row, "chosen": row["completion"], "rejected": row["completion"]} for row in GENERAL]
    with pytest.raises(ValueError, match='loss="dpo"'):
        sft(tmp_path, bare_model(), [OGPSACallback([ReferenceSet("pairs", pairs, loss="dpo")], config=config)]).train()


@pytest.mark.parametrize(
    ("overrides", "batch_size", "accumulation", "expected"),
    [
        ({}, 8, 1, 3),
        ({}, 8, 2, 6),
        ({}, 1, 1, 1),  # at least one
        ({"reference_budget": 0.15}, 8, 1, 6),
        ({"refresh_steps": 1}, 32, 1, 2),
        ({}, 256, 1, 8),  # no more than the rows that are held
        ({"rows_from": "batch", "rows": 2}, 512, 1, 2),  # a batch holds examples of one set
        ({"rows_from": "batch", "rows": 3}, 512, 1, 192),
        ({"rows_from": "batch", "rows": 5}, 1024, 1, 194),
        ({"rows_from": "set"}, 256, 4, 384),
        ({"rows_from": "set"}, 1, 1, 3),  # every set has a row
        ({"refresh_samples": 7}, 8, 1, 7),  # instead of a budget
        ({"reference_budget": None}, 8, 1, None),  # all
    ],
)
def test_budget(overrides, batch_size, accumulation, expected):
    args = TrainingArguments(gradient_accumulation_steps=accumulation, use_cpu=True)
    trained = examples_per_step(args, batch_size)
    assert refresh_samples(OGPSAConfig(subspace="gradients", **overrides), trained, batch_size=64, sets=3) == expected


@pytest.mark.parametrize(("batch_size", "expected"), [(8, 2), (32, 8), (1, 1)])
def test_budget_counts_the_pass_of_the_base(batch_size, expected):
    assert refresh_samples(OGPSAConfig(), batch_size, batch_size=64, sets=3, cost=LOSSES["kl"].cost) == expected


@pytest.mark.parametrize(("losses", "expected"), [(("answer", "answer"), 8), (("kl", "kl"), 5), (("kl", "answer"), 6)])
def test_budget_of_divergences_in_training(losses, expected, tmp_path):
    model = model_of(refresh_samples=None, reference_budget=1.0)
    references = [
        ReferenceSet(name, rows, loss=loss)
        for name, rows, loss in zip(("general", "benign"), (GENERAL, BENIGN), losses, strict=True)
    ]
    sft(tmp_path, model, [OGPSACallback(references)], max_steps=1, per_device_train_batch_size=4).train()
    assert model.projector.diagnostics.reference_examples == expected  # for 2 steps of 4


@pytest.mark.parametrize(
    ("loss", "weight", "warned"),
    [("answer", 8.0, True), ("kl", 8.0, False), ("answer", 1.0, False), ("answer", None, False)],
)
def test_large_weight_of_given_answers_is_warned_of(loss, weight, warned, tmp_path, caplog):
    references = [ReferenceSet("given", GENERAL, loss=loss)]
    with caplog.at_level("WARNING", logger="peft_ogpsa"):
        sft(tmp_path, model_of(reference_weight=weight), [OGPSACallback(references)], max_steps=1).train()
    found = [record.getMessage() for record in caplog.records if "reference_weight=8.0" in record.getMessage()]
    assert len(found) == warned
    assert all("'given'" in text and "Set reference_weight=None or 1.0" in text for text in found)


@pytest.mark.parametrize("subspace", ["activations", "gradients", "both", "none"])
def test_the_example_of_the_callback_triggers_no_warning(subspace, tmp_path, caplog):
    (written,) = re.findall(r"callbacks=(\[OGPSACallback\(.*\)\])\)", OGPSACallback.__doc__)
    names = {"OGPSACallback": OGPSACallback, "ReferenceSet": ReferenceSet, "rows": GENERAL}
    model = get_peft_model(bare_model(), OGPSAConfig(**LORA, subspace=subspace))
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update(model.projector._refresher.factors(model.projector.config))

    with caplog.at_level("WARNING", logger="peft_ogpsa"):
        sft(tmp_path, model, [*eval(written, names), Look()], max_steps=2).train()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("peft_ogpsa")] == []
    assert seen == {"general": 1.0}


def test_too_few_samples_for_rows_of_sets():
    config = OGPSAConfig(subspace="gradients", rows_from="set", refresh_samples=2)
    with pytest.raises(ValueError, match=r"refresh_samples=2 is less than the number of reference sets \(3\)\."):
        refresh_samples(config, 8, batch_size=8, sets=3)


def test_budget_in_training(tmp_path):
    model = model_of(refresh_samples=None, reference_budget=0.1)
    trainer = sft(tmp_path, model, max_steps=12, per_device_train_batch_size=5)  # 10 examples between refreshes
    trainer.train()
    diagnostics = model.projector.diagnostics
    assert diagnostics.refreshes == 7  # before the steps 0, 1, 3, 5, 7, 9, 11
    assert diagnostics.reference_examples == 7
    last = trainer.state.log_history[-2]
    assert {"ogpsa/loss/general", "ogpsa/loss/benign"} <= last.keys()  # each drawn of in turn
    assert set(model.projector.subspace.rows.sets) == {"general", "benign", None}


def test_the_plan_counts_what_the_sets_can_give(tmp_path, capsys):
    model = model_of(refresh_samples=20, rows=16)  # of 9 and 7 examples
    sft(tmp_path, model, max_steps=1, disable_tqdm=False).train()
    assert "OGPSA: 16 reference examples every 2 steps, which add 400% to the passes" in capsys.readouterr().out
    assert model.projector.diagnostics.reference_examples == 16


@pytest.mark.parametrize(
    ("overrides", "bytes_per_parameter"),
    [({}, 8 * 4), ({"rows_dtype": "int8"}, 8), ({"rows_from": "set"}, 2 * 4), ({"constraint": "orthogonal"}, 64)],
)
def test_plan_is_told_before_training(overrides, bytes_per_parameter, tmp_path, capsys):
    model = model_of(refresh_samples=None, reference_budget=0.5, **overrides)
    trainer = sft(tmp_path, model, max_steps=1, disable_tqdm=False)
    trainer.train()
    out = capsys.readouterr().out
    assert "OGPSA: 2 reference examples every 2 steps, which add 50% to the passes of training" in out
    subspace = model.projector.subspace
    held, more = model.projector.memory(sets=2)
    rows = subspace.rows.stack
    stacks = [rows] if subspace.directions is rows else [rows, subspace.directions]
    assert held == sum(part.numel() * part.element_size() for stack in stacks for part in stack)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert held == bytes_per_parameter * count
    assert 4 * count < more <= 8 * count
    assert f"{held / 2**20:,.0f} MiB" in out


def test_a_nested_trainer_that_fails_leaves_the_outer_one_its_own_run(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError("inner")

    callback = OGPSACallback(sets())
    inner = sft(tmp_path / "inner", callbacks=[callback, Fails()], max_steps=2)

    class Nested(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                with pytest.raises(KeyError, match="inner"):
                    inner.train()

    outer = sft(tmp_path / "outer", callbacks=[callback, Nested()], max_steps=4)
    outer.train()
    alone = sft(tmp_path / "alone", max_steps=4)
    alone.train()
    assert outer.model.projector.diagnostics.refreshes == alone.model.projector.diagnostics.refreshes
    assert all(torch.equal(p, weights(alone.model)[name]) for name, p in weights(outer.model).items())


class Begun(TrainerCallback):
    """Whether training has begun, for callbacks after ours."""

    begun = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = True


def test_a_base_that_is_trained_is_refused_before_training_begins(tmp_path):
    model = model_of(target_modules=["q_proj"])
    model.get_base_model().model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    after = Begun()
    with pytest.raises(ValueError, match="belongs to the base model"):
        sft(tmp_path, model, [OGPSACallback([ReferenceSet("kept", GENERAL, loss="kl")]), after]).train()
    assert not after.begun


def test_nothing_is_refreshed_while_projection_is_off(tmp_path):
    model = model_of()
    model.projector.enabled = False
    sft(tmp_path, model, max_steps=3).train()
    assert model.projector.steps == 3
    assert model.projector.diagnostics.refreshes == 0


def test_a_callback_that_serves_again_keeps_no_model_of_before(tmp_path):
    callback = OGPSACallback(sets())
    first = sft(tmp_path / "first", callbacks=[callback], max_steps=1)
    first.train()
    gone = weakref.ref(first.model.projector)
    del first
    sft(tmp_path / "second", callbacks=[callback], max_steps=1).train()
    gc.collect()
    assert gone() is None


def test_adapters_are_float32_before_the_optimizer_is_made_and_a_checkpoint_is_loaded(tmp_path):
    model = model_of()
    for parameter in parameters_of(model):
        parameter.data = parameter.data.to(torch.bfloat16)
    trainer = sft(tmp_path, model)
    assert {p.dtype for p in parameters_of(trainer.model)} == {torch.float32}


def test_answers_under_another_chat_template_are_warned_of(tmp_path, caplog):
    """TRL may change the template after the base has answered."""
    (tmp_path / "other.jinja").write_text("Be brief. " + TEMPLATE)
    rows = [{**row, "unfinished": False} for row in GENERAL]
    own = AnsweredSet("general", rows, counts=AnswerCounts(9, 9, 0, 0, 0, 0), chat_template=TEMPLATE)
    for path in (None, str(tmp_path / "other.jinja")):
        assert "chat template" not in caplog.text
        sft(tmp_path, callbacks=[OGPSACallback([own])], max_steps=1, chat_template_path=path).train()
    assert "'general' holds answers that the base gave under another chat template" in caplog.text


def test_answers_under_no_chat_template_are_warned_of(tmp_path, caplog):
    rows = [{**row, "unfinished": False} for row in GENERAL]
    own = AnsweredSet("general", rows, counts=AnswerCounts(9, 9, 0, 0, 0, 0), chat_template="")
    sft(tmp_path, callbacks=[OGPSACallback([own])], max_steps=1).train()
    assert "'general' holds answers that the base gave under another chat template" in caplog.text


def test_what_the_base_answers_without_a_template_says_so(monkeypatch):
    monkeypatch.setattr(self_answers, "_verdict", lambda _: Verdict.COMPLIANCE)
    model, tokenizer = model_of(), tiny_tokenizer()
    tokenizer.chat_template = None
    own = ReferenceSet.from_prompts("general", ["One?", "Two?"], model, tokenizer, max_new_tokens=4, progress=False)
    assert own.chat_template == ""


def test_the_callbacks_own_batch_size_and_seed(tmp_path):
    callback = OGPSACallback(sets(), batch_size=3, seed=7)
    trainer = sft(tmp_path, callbacks=[callback], max_steps=1)
    trainer.train()
    assert (callback._runs[-1].loader.batch_size, callback._runs[-1].loader.seed) == (3, 7)


def test_figures_may_be_logged_before_and_between_runs(tmp_path):
    callback = OGPSACallback(sets())
    trainer = sft(tmp_path, callbacks=[callback], max_steps=1)
    trainer.log({"loss": 1.0})
    trainer.train()
    other = sft(tmp_path / "other", callbacks=[callback], max_steps=1)
    other.train()
    other.log({"loss": 1.0})
