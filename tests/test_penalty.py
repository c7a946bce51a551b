"""`subspace="none"`: reference losses as a plain penalty, the baseline of everything that projects."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from loops import batch, loss_of, references
from models import randomize, tiny_llama, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet, attach, projector_of
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.losses import reference_loss
from peft_ogpsa.text.tokenization import encode_row

TOKENIZER = tiny_tokenizer()
ROWS = [{"prompt": f"What is {i}?", "completion": f" It is {i * i}."} for i in range(6)]


def sets(loss):
    return [ReferenceSet("squares", ROWS, loss=loss), ReferenceSet("first", ROWS[:3], loss=loss)]


def lora(**settings):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], **settings)
    return randomize(get_peft_model(tiny_llama(vocab_size=259), config))


def tiny_lora(**settings):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], **settings))


def penalty(**settings):
    return OGPSAConfig(subspace="none", **settings)


class Before(TrainerCallback):
    """Keeps the gradients and the model before every step of the optimizer."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        self.seen.append((gradients, copy.deepcopy(model)))


class Recorder(torch.optim.SGD):
    """Keeps the gradients that the optimizer gets, and where it leaves the parameters."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.seen = []

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad.clone() for p in parameters]
        super().step(closure)
        self.seen.append((gradients, [p.detach().clone() for p in parameters]))


def train(folder, references, config, model=None, steps=7, **options):
    examples = [encode_row(TOKENIZER, {"prompt": f"Say {i}.", "completion": " No."}, "row") for i in range(8)]
    before = Before()
    model = lora() if model is None else model
    optimizer = Recorder([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        **{"disable_tqdm": True, **options},
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_list([{"input_ids": e.ids, "labels": e.labels} for e in examples]),
        data_collator=DataCollatorForSeq2Seq(TOKENIZER),
        processing_class=TOKENIZER,
        callbacks=[before, OGPSACallback(references, config=config)],
        optimizers=(optimizer, None),
    )
    trainer.train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    after = [tuple(dict(zip(names, own, strict=True)) for own in step) for step in optimizer.seen]
    return before.seen, after, projector_of(model).diagnostics


@pytest.mark.parametrize("most", [0.0, 1e-4, 1e3])
@pytest.mark.parametrize(("loss", "weight", "factor"), [("kl", None, 8.0), ("answer", None, 1.0), ("kl", 3.0, 3.0)])
def test_the_gradient_is_the_weighted_and_clipped_mean_over_the_examples(tmp_path, loss, weight, factor, most):
    torch.manual_seed(0)
    config = penalty(reference_weight=weight, refresh_samples=3, refresh_steps=3)
    before, after, diagnostics = train(tmp_path, sets(loss), config, max_grad_norm=most)
    loader = ReferenceLoader.from_sets(sets(loss), TOKENIZER, config, step_examples=4, batch_size=4)
    drawn, clips, uneven = 0, [], False
    for step, ((gradients, model), (penalized, _)) in enumerate(zip(before, after, strict=True)):
        added = {name: penalized[name] - gradients[name] for name in gradients}
        if step not in (0, 1, 4):
            assert all((own == 0).all() for own in added.values())
            continue
        own_batches = {name: batches for name, batches in loader.batches("cpu").items() if batches}
        counts = {name: sum(len(batch["input_ids"]) for batch in own) for name, own in own_batches.items()}
        uneven |= len(set(counts.values())) > 1
        expected = dict.fromkeys(added, 0.0)
        for name_of_set, many in [(name, many) for name, own in own_batches.items() for many in own]:
            count = counts[name_of_set] * len(counts)  # every set counts equally
            for i in range(len(many["input_ids"])):  # one by one, as an oracle
                model.zero_grad()
                one = {name: value[i : i + 1] if torch.is_tensor(value) else value for name, value in many.items()}
                reference_loss(model.eval(), one).backward()
                for name, parameter in model.named_parameters():
                    if name in expected:
                        expected[name] = expected[name] + parameter.grad / count
        drawn += sum(counts.values())
        norm = sum(own.double().square().sum() for own in expected.values()).sqrt()
        clip = min(1.0, most / norm) if most else 1.0
        clips.append(clip < 1)
        for name, own in added.items():
            torch.testing.assert_close(own, expected[name] * (factor * clip), rtol=1e-3, atol=1e-7)
    assert clips == [most == 1e-4] * 3
    assert diagnostics.reference_examples == drawn == 9
    assert uneven


def test_the_step_is_the_optimizers_own(tmp_path):
    before, after, diagnostics = train(tmp_path, sets("kl"), penalty(refresh_samples=3))
    for (_, left), (_, following) in zip(after, before[1:], strict=False):
        assert all(torch.equal(value, following.get_parameter(name)) for name, value in left.items())
    figures = diagnostics.collect()
    assert "ogpsa/removed" not in figures
    assert figures["ogpsa/reference_norm"] > 0


def test_the_default_draws_what_the_default_budget_allows(tmp_path):
    _, _, diagnostics = train(tmp_path, sets("kl"), penalty(), steps=2)
    # 0.075 of the 20 examples of 5 steps are 1.5 passes; an example with a pass of the base counts 3/2.
    assert diagnostics.reference_examples == 2


@pytest.mark.parametrize(("samples", "accumulation", "expected"), [(9, 1, 9), (None, 12, 12)])
def test_it_may_draw_more_examples_than_a_cone_has_rows(tmp_path, samples, accumulation, expected):
    references = [ReferenceSet("squares", ROWS * 3, loss="kl")]
    config = penalty(refresh_samples=samples)
    _, _, diagnostics = train(tmp_path, references, config, steps=1, gradient_accumulation_steps=accumulation)
    assert diagnostics.reference_examples == expected > config.rows


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"reference_weight": 0}, "subspace='none' with reference_weight=0 is plain training"),
        ({"subspace_rank": 8}, "subspace_rank=8 has no effect with subspace='none'"),
        ({"subspace_energy": 0.9}, "subspace_energy=0.9 has no effect with subspace='none'"),
        ({"constraint": "orthogonal"}, "constraint='orthogonal' has no effect with subspace='none'"),
        ({"projection": "gradient"}, "projection='gradient' has no effect with subspace='none'"),
        (
            {"rows_dtype": "int8"},
            "rows_dtype='int8' is not allowed with subspace='none', because its reference gradients",
        ),
    ],
)
def test_settings_of_a_projection_are_errors(given, text):
    with pytest.raises(ValueError) as caught:
        penalty(**given)
    assert text in str(caught.value)


def test_whole_weights_need_a_weight():
    with pytest.raises(ValueError, match="Set a reference_weight above 0"):
        FullParameterConfig(subspace="none")
    assert FullParameterConfig(subspace="none", reference_weight=8).refreshes


@pytest.mark.parametrize("missing", ["error", "ignore"])
def test_a_step_without_references(missing):
    models = [tiny_lora() for _ in range(2)]
    attach(models[0], penalty(missing_reference=missing))
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss_of(model, batch(0)).backward()
        if missing == "error" and model is models[0]:
            with pytest.raises(RuntimeError, match=r'reference weight cannot be applied.*missing_reference="ignore"'):
                optimizer.step()
            return
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))


def test_schedule_free_optimizers_are_taken():
    model = tiny_lora()
    projector = attach(model, penalty(reference_weight=1.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.param_groups[0]["train_mode"] = True  # as the packages of schedule-free optimizers have it
    projector.refresh(references(0), loss_of)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert projector.steps == 1


def test_other_parameters_get_no_reference_gradient_and_are_named(caplog):
    model = tiny_lora(modules_to_save=["norm"])
    projector = attach(model, penalty(reference_weight=1.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    projector.refresh(references(0), loss_of)
    loss_of(model, batch(0)).backward()
    norms = [p for name, p in model.named_parameters() if "norm.modules_to_save" in name]
    gradients = [norm.grad.clone() for norm in norms]
    with caplog.at_level("WARNING", logger="peft_ogpsa"):
        optimizer.step()
    assert all(torch.equal(norm.grad, gradient) for norm, gradient in zip(norms, gradients, strict=True))
    assert "5 parameters are trained without reference gradients" in caplog.text


def test_a_step_that_is_not_seen_is_an_error_that_fits(tmp_path):
    model = tiny_lora()
    projector = attach(model, penalty(reference_weight=1.0))
    projector.guard.note_step()
    with pytest.raises(RuntimeError, match="a step that OGPSA did not see, so it lacks the reference gradient"):
        projector.guard.check_step(None)


def test_changes_outside_a_step_are_warned_of(caplog):
    model = tiny_lora()
    projector = attach(model, penalty(reference_weight=1.0))
    projector.refresh(references(0), loss_of)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    with caplog.at_level("WARNING", logger="peft_ogpsa"):
        assert not projector.due
    assert "changed outside an optimizer step that OGPSA saw" in caplog.text


def test_the_plan_says_that_nothing_is_projected(tmp_path, capsys):
    train(tmp_path, sets("kl"), penalty(), steps=1, disable_tqdm=False)
    out = capsys.readouterr().out
    assert "OGPSA: subspace='none', so nothing is projected." in out
    assert "OGPSA: 1 reference examples every 5 steps" in out


def test_the_saved_adapter_and_its_card_say_so(tmp_path):
    config = penalty(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].subspace == "none"
    card = (tmp_path / "README.md").read_text()
    assert "Training used no projection." in card
    assert "Reference weight: 8 for sets with `loss=kl`, 1 for other losses" in card
    assert "Reference sets (the abilities to preserve)" in card
    assert "Activation subspace" not in card
    assert "At every optimizer step" not in card
    assert "2602.07892" not in card
    assert "- ogpsa\n" not in card
