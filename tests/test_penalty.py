"""`ReferencePenalty`: reference losses as a plain penalty, the baseline of everything that projects."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from models import randomize, tiny_llama, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from peft_ogpsa import OGPSAConfig, ReferenceSet
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.losses import reference_loss
from peft_ogpsa.text.tokenization import encode_row
from peft_ogpsa.trainer.penalty import ReferencePenalty

TOKENIZER = tiny_tokenizer()
ROWS = [{"prompt": f"What is {i}?", "completion": f" It is {i * i}."} for i in range(6)]


def sets(loss):
    return [ReferenceSet("squares", ROWS, loss=loss), ReferenceSet("first", ROWS[:3], loss=loss)]


def lora():
    return randomize(get_peft_model(tiny_llama(vocab_size=259), LoraConfig(target_modules=["q_proj", "v_proj"])))


class Watch(TrainerCallback):
    """Keeps the gradients and the parameters of every step, before the penalty and after it."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        self.seen.append((gradients, copy.deepcopy(model)))


def train(folder, penalty, steps=7, **options):
    examples = [encode_row(TOKENIZER, {"prompt": f"Say {i}.", "completion": " No."}, "row") for i in range(8)]
    before, after = Watch(), Watch()
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        lora(),
        arguments,
        train_dataset=Dataset.from_list([{"input_ids": e.ids, "labels": e.labels} for e in examples]),
        data_collator=DataCollatorForSeq2Seq(TOKENIZER),
        processing_class=TOKENIZER,
        callbacks=[before, penalty, after],
    )
    trainer.train()
    return before.seen, after.seen


@pytest.mark.parametrize("most", [0.0, 1e-4, 1e3])
@pytest.mark.parametrize(("loss", "weight", "factor"), [("kl", None, 8.0), ("answer", None, 1.0), ("kl", 3.0, 3.0)])
def test_the_gradient_is_the_weighted_and_clipped_mean_over_the_examples(tmp_path, loss, weight, factor, most):
    torch.manual_seed(0)
    penalty = ReferencePenalty(sets(loss), weight, samples=3, every=3)
    before, after = train(tmp_path, penalty, max_grad_norm=most)
    config = OGPSAConfig(subspace="gradients", refresh_samples=3)
    loader = ReferenceLoader.from_sets(sets(loss), TOKENIZER, config, step_examples=4, batch_size=4, seed=42)
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
        for name_of_set, batch in [(name, batch) for name, own in own_batches.items() for batch in own]:
            count = counts[name_of_set] * len(counts)  # every set counts equally
            for i in range(len(batch["input_ids"])):  # one by one, as an oracle
                model.zero_grad()
                one = {name: value[i : i + 1] if torch.is_tensor(value) else value for name, value in batch.items()}
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
    assert penalty.examples == drawn == 9
    assert uneven


def test_what_it_cannot_do_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ReferencePenalty: reference_sets is empty"):
        ReferencePenalty([])
    pairs = [{"prompt": "Hi", "chosen": " yes", "rejected": " no"}]
    with pytest.raises(ValueError, match="loss='dpo', which needs"):
        train(tmp_path, ReferencePenalty([ReferenceSet("pairs", pairs, loss="dpo")]))
    monkeypatch.setattr("peft_ogpsa.core.distributed.count", lambda: 2)
    with pytest.raises(ValueError, match="works only in one process, but there are 2 processes"):
        train(tmp_path, ReferencePenalty(sets("kl")))


def test_the_default_draws_what_the_default_budget_allows(tmp_path):
    penalty = ReferencePenalty(sets("kl"))
    train(tmp_path, penalty, steps=2)
    # 0.075 of the 20 examples of 5 steps are 1.5 passes; an example with a pass of the base counts 3/2.
    assert penalty.examples == 2


@pytest.mark.parametrize(("samples", "accumulation", "expected"), [(9, 1, 9), (None, 12, 12)])
def test_it_may_draw_more_examples_than_a_cone_has_rows(tmp_path, samples, accumulation, expected):
    penalty = ReferencePenalty([ReferenceSet("squares", ROWS * 3, loss="kl")], samples=samples)
    train(tmp_path, penalty, steps=1, gradient_accumulation_steps=accumulation)
    assert penalty.examples == expected > OGPSAConfig(subspace="gradients").rows
