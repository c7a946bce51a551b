"""TRL's other trainers, and what the optimizer may be: the step hooks make them work, without a subclass."""

from __future__ import annotations

import importlib

import pytest
import torch
import trl
from coverage_page import COMPLEMENT, CONE, covers
from datasets import Dataset
from loops import LORA, leak
from models import chat, tiny_llama, tiny_tokenizer
from peft import get_peft_model
from transformers import LlamaForSequenceClassification, TrainerCallback

from peft_ogpsa import OGPSACallback, OGPSAConfig, ReferenceSet

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, of what is experimental or deprecated

TOLERANCE = 1e-5
ROWS = [chat(f"How do I break rule {i}?", "I can't help with that, sorry.") for i in range(8)]
GENERAL = [chat(f"What comes after {i}?", f"After {i} comes {i + 1}.") for i in range(6)]
CONVERSATIONS = [{"messages": row["prompt"] + row["completion"]} for row in ROWS]
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": chat("", "Sure, here is how.")["completion"]}
    for row in ROWS
]
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
}


class Violations(TrainerCallback):
    """How far each optimizer step that moved the adapter breaks the cone, in the worst LoRA matrix.

    The largest `r D / (|r| |D|)` over the rows `r` of a matrix, in float64; `D` is the difference of the stored
    parameter after and before the step.
    """

    def __init__(self) -> None:
        self.measured: list[float] = []

    def _stored(self, model) -> list[torch.Tensor]:
        return [p.detach().double() for p in model.projector.subspace.blocks.flat_parameters()]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._before = [p.clone() for p in self._stored(model)]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        subspace = model.projector.subspace
        changes = [now - then for now, then in zip(self._stored(model), self._before, strict=True)]
        if max(change.norm() for change in changes) == 0:
            return
        worst = 0.0
        for rows, change in zip(subspace.blocks.views(subspace.rows.stack), changes, strict=True):
            rows = rows.double().flatten(1)
            lengths = (rows.norm(dim=1) * change.norm()).clamp(min=1e-30)
            worst = max(worst, float((rows @ change.flatten() / lengths).max()))
        self.measured.append(worst)


def base_model():
    return tiny_llama(vocab_size=259, max_position_embeddings=256)


def config_of():
    return OGPSAConfig(subspace="gradients", rows=8, refresh_samples=4, reference_weight=0.0, **LORA)


def reward(completions, **_):
    # Different for every completion: equal rewards have no gradient.
    return [sum(map(ord, str(completion))) / 1e3 for completion in completions]


def of(name, rows, options=None, *, experimental=None, **arguments):
    """What builds a trainer in a folder; `options` are for its config and `arguments` for itself."""

    def build(model, folder, callbacks, **given):
        home = importlib.import_module(f"trl.experimental.{experimental}") if experimental else trl
        return getattr(home, f"{name}Trainer")(
            model,
            args=getattr(home, f"{name}Config")(output_dir=folder, **{**COMMON, **(options or {})}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
            callbacks=callbacks,
            **{key: value() for key, value in arguments.items()},
            **given,
        )

    build.trainer = f"experimental.{experimental}.{name}Trainer" if experimental else f"{name}Trainer"
    return build


DRAWN = {"max_completion_length": 6}
GROUPS = {"num_generations": 2, **DRAWN}
REWARD = {"reward_funcs": lambda: reward}
TEACHER = {"teacher_model": lambda: tiny_llama(1, vocab_size=259, max_position_embeddings=256)}
RATED = [{**row, "label": bool(i % 2)} for i, row in enumerate(ROWS)]
TRIPLES = [{**row, "reference": row["chosen"]} for row in PAIRS]
HINTS = [{**row, "privileged_context": "Be polite."} for row in PROMPTS]
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0}
TRAINERS = {
    "SFT": of("SFT", ROWS),
    "DPO": of("DPO", PAIRS),
    "KTO": of("KTO", RATED),
    "GRPO": of("GRPO", PROMPTS, GROUPS, **REWARD),
    "RLOO": of("RLOO", PROMPTS, GROUPS, **REWARD),
    "Distillation": of("Distillation", PROMPTS, DRAWN, **TEACHER),
    "ORPO": of("ORPO", PAIRS, {"max_length": 128}, experimental="orpo"),
    "CPO": of("CPO", PAIRS, {"max_length": 128}, experimental="cpo"),
    "SimPO": of("CPO", PAIRS, {"max_length": 128, **SIMPO}, experimental="cpo"),
    "TPO": of("TPO", TRIPLES, experimental="tpo"),
    "GKD": of("GKD", CONVERSATIONS, {"max_length": 128, "max_new_tokens": 6}, experimental="gkd", **TEACHER),
    "GOLD": of("GOLD", CONVERSATIONS, {"max_length": 128, **DRAWN}, experimental="gold", **TEACHER),
    "OnlineDPO": of("OnlineDPO", PROMPTS, {"max_new_tokens": 6}, experimental="online_dpo", **REWARD),
    "GMPO": of("GMPO", PROMPTS, GROUPS, experimental="gmpo", **REWARD),
    "A2PO": of("A2PO", PROMPTS, DRAWN, experimental="a2po", **REWARD),
    "SDFT": of("SDFT", HINTS, GROUPS, experimental="sdft"),
    "SDPO": of("SDPO", PROMPTS, {"teacher_model_kind": "live", **GROUPS}, experimental="sdpo", **REWARD),
}


@pytest.mark.parametrize(
    ("name", "given"),
    [pytest.param(name, "peft model", marks=covers(CONE, own.trainer)) for name, own in TRAINERS.items()]
    + [(name, "base and config") for name in ("SFT", "DPO", "KTO", "GRPO", "ORPO", "CPO", "TPO", "OnlineDPO")],
)
def test_trainer(name, given, tmp_path):
    violations = Violations()
    callbacks = [OGPSACallback([ReferenceSet("general", GENERAL)]), violations]
    if given == "peft model":
        trainer = TRAINERS[name](get_peft_model(base_model(), config_of()), str(tmp_path), callbacks)
    else:
        trainer = TRAINERS[name](base_model(), str(tmp_path), callbacks, peft_config=config_of())
    trainer.train()
    projector = trainer.model.projector
    assert projector.steps == 2
    assert projector.subspace.rows.filled == 8
    assert all(".default." in parameter for parameter in projector.subspace.blocks.names())
    assert any("ogpsa/removed" in entry for entry in trainer.state.log_history)
    assert all(torch.isfinite(p).all() for p in projector.subspace.blocks.flat_parameters())
    assert len(violations.measured) == 2
    assert max(violations.measured) <= TOLERANCE


class Leaks(TrainerCallback):
    """The largest `|A U| / |A|` over the layers, after each optimizer step."""

    def __init__(self) -> None:
        self.measured: list[float] = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.measured.append(leak(model.projector))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=covers(COMPLEMENT, own.trainer)) for name, own in TRAINERS.items()]
)
def test_trainer_with_the_default_subspace(name, tmp_path):
    leaks = Leaks()
    sets = [ReferenceSet("general", GENERAL, loss="kl"), ReferenceSet("answers", GENERAL)]
    callbacks = [OGPSACallback(sets), leaks]
    model = get_peft_model(base_model(), OGPSAConfig(**LORA))
    trainer = TRAINERS[name](model, str(tmp_path), callbacks)
    trainer.train()
    assert trainer.model.projector.steps == 2
    assert trainer.model.projector.diagnostics.refreshes == 2
    assert any(key.startswith("ogpsa/removed/") for entry in trainer.state.log_history for key in entry)
    assert len(leaks.measured) == 2
    assert max(leaks.measured) <= 1e-6


@pytest.mark.parametrize("name", ["SDFT", "SDPO"])
def test_moving_average_teacher_is_refused(name, tmp_path):
    # TRL makes one of adapters of the type LORA alone.
    build = of(
        name,
        HINTS if name == "SDFT" else PROMPTS,
        {"teacher_model_kind": "ema", **GROUPS},
        experimental=name.lower(),
        **({} if name == "SDFT" else REWARD),
    )
    with pytest.raises(ValueError, match="teacher_model_kind='ema'"):
        build(base_model(), str(tmp_path), [], peft_config=config_of())


@covers("`ValueError`: it is not a language model", "RewardTrainer")
def test_a_reward_model_is_refused(tmp_path):
    base = tiny_llama(cls=LlamaForSequenceClassification, vocab_size=259, max_position_embeddings=256, num_labels=1)
    model = get_peft_model(base, OGPSAConfig(**{**LORA, "task_type": "SEQ_CLS"}))
    trainer = of("Reward", PAIRS)(model, str(tmp_path), [OGPSACallback([ReferenceSet("general", GENERAL)])])
    with pytest.raises(ValueError, match="language model"):
        trainer.train()


@pytest.mark.parametrize("options", [{"optim": "paged_adamw_8bit"}, {"optim": "adafactor"}, {}])
def test_optimizer_of_the_trainer_and_accumulation(options, tmp_path):
    violations = Violations()
    options = {"max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, **options}
    build = of("SFT", ROWS, options)
    callbacks = [OGPSACallback([ReferenceSet("general", GENERAL)]), violations]
    trainer = build(get_peft_model(base_model(), config_of()), str(tmp_path), callbacks)
    trainer.train()
    assert trainer.model.projector.steps == 4  # optimizer steps, not micro-batches
    assert trainer.model.projector.diagnostics.refreshes == 2
    assert len(violations.measured) == 4
    assert max(violations.measured) <= TOLERANCE


def test_accumulated_batches_train_as_one_large_batch(tmp_path):
    trained = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        options |= {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
        torch.manual_seed(0)
        model = get_peft_model(base_model(), config_of())
        callback = OGPSACallback([ReferenceSet("general", GENERAL)], batch_size=4)
        of("SFT", ROWS, options)(model, str(tmp_path), [callback]).train()
        assert model.projector.diagnostics.collect()
        trained.append([p.detach() for p in model.parameters() if p.requires_grad])
    for together, accumulated in zip(*trained, strict=True):
        torch.testing.assert_close(together, accumulated, rtol=1e-4, atol=1e-6)
