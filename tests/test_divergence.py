"""Divergence from the base as a reference loss: its value, its gradients, its base."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from loops import ogpsa_model
from models import chat, randomize, tiny_llama, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from test_gradients import assert_rows_equal, model_with_random_adapter, one_at_a_time, raw_rows
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet
from peft_ogpsa.cli.datasets import PromptSet, reference_sets
from peft_ogpsa.evaluation import evaluate
from peft_ogpsa.references.losses import LOSSES, collate, reference_loss
from peft_ogpsa.references.losses.kl import _Divergence
from peft_ogpsa.text.tokenization import Example, encode_row
from peft_ogpsa.tuner.adapters import without_adapter

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
divergence_loss = LOSSES["kl"].loss
ROWS = [chat(f"What is {i} and {i}?", "It is " + "so " * (i % 4) + "much.") for i in range(6)]


def anchored(count: int = 4) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    lengths = [5 + 2 * i for i in range(count)]
    return [Example(torch.randint(3, 100, (n,), generator=generator).tolist(), 1 + n % 3, "kl") for n in lengths]


def by_hand(model, example: Example) -> torch.Tensor:
    """The divergence along one answer, written out in float64 token by token."""
    ids = torch.tensor([example.ids])
    own = model(input_ids=ids).logits[0].double()
    with torch.no_grad():
        base = tiny_llama().eval()(input_ids=ids).logits[0].double()
    steps = range(example.answer_start - 1, len(example.ids) - 1)
    total = 0
    for t in steps:
        p, q = torch.softmax(base[t], 0), torch.softmax(own[t], 0)
        total = total + (p * (p / q).log()).sum()
    return total / len(steps)


def test_loss_is_the_formula_written_out():
    model = model_with_random_adapter().eval()
    examples = anchored()
    expected = sum(by_hand(model, example) for example in examples) / len(examples)
    batch = collate(examples, 0, "cpu")
    assert reference_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-4)
    assert divergence_loss(model, batch).item() == reference_loss(model, batch).item()
    assert expected > 1e-3


def test_base_has_no_divergence_and_no_gradient():
    model = get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **LORA)).eval()
    loss = reference_loss(model, collate(anchored(), 0, "cpu"))
    loss.backward()
    assert abs(loss.item()) < 1e-7
    gradients = [p.grad.abs().max().item() for p in model.parameters() if p.requires_grad]
    assert max(gradients) < 1e-7


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_one_backward_pass_gives_the_gradient_of_every_example(scope):
    model = model_with_random_adapter(scope=scope)
    examples = anchored()
    model.projector.refresh({"kept": [collate(examples, 0, "cpu")]}, reference_loss)
    rows = raw_rows(model)
    assert_rows_equal(rows, one_at_a_time(model, examples, reference_loss))
    by_formula = torch.autograd.grad(by_hand(model, examples[2]), model.projector.subspace.blocks.flat_parameters())
    assert_rows_equal([rows[2]], [[g.float() for g in by_formula]])


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize(
    "config", [OGPSAConfig(subspace="gradients", **LORA), LoraConfig(**LORA, modules_to_save=["lm_head"])]
)
def test_without_adapter_is_the_base_and_changes_nothing(config):
    ids = torch.arange(3, 12).unsqueeze(0)
    base = tiny_llama().eval()(input_ids=ids).logits
    model = randomize(get_peft_model(tiny_llama(), config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    wrapped = Wrapper(model)
    flags = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    own = wrapped(input_ids=ids).logits
    with without_adapter(wrapped):
        assert torch.equal(wrapped(input_ids=ids).logits, base)
    assert not torch.allclose(own, base)
    assert torch.equal(wrapped(input_ids=ids).logits, own)
    with pytest.raises(RuntimeError, match="inside"), without_adapter(wrapped):
        raise RuntimeError("inside")
    assert torch.equal(wrapped(input_ids=ids).logits, own)
    assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == flags
    with pytest.raises(ValueError, match="has no adapter"), without_adapter(tiny_llama()):
        pass


def stacked(config):
    """A model with a frozen adapter `chat` and a new one, `safety`, both active."""
    model = randomize(get_peft_model(tiny_llama(), config, adapter_name="chat"))
    model.add_adapter("safety", config)
    model.base_model.set_adapter(["chat", "safety"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".safety." in name)
    return model


@pytest.mark.parametrize("config", [OGPSAConfig(**LORA), LoraConfig(**LORA)])
def test_a_frozen_adapter_below_the_one_in_training_is_refused(config):
    model = stacked(config)
    refused = pytest.raises(ValueError, match="'chat' is frozen and active together with the adapter in training")
    with refused, without_adapter(model):
        pass
    model.base_model.set_adapter("safety")
    with without_adapter(model):
        pass
    model.base_model.set_adapter(["chat", "safety"])
    model.requires_grad_(False)  # nothing is in training: this is inference with two adapters
    with without_adapter(model):
        pass


@pytest.mark.parametrize("start", ["pissa", "PiSSA_niter_4", "olora"])
def test_a_start_that_moves_weights_out_of_the_base_is_refused(start):
    config = LoraConfig(**{**LORA, "init_lora_weights": start.lower()})
    model = get_peft_model(tiny_llama(vocab_size=259), config)
    model.peft_config["default"].init_lora_weights = start
    message = f"init_lora_weights='{start}' in the configuration of adapter 'default' .*Set init_lora_weights=True"
    with pytest.raises(ValueError, match=message), without_adapter(model):
        pass
    with pytest.raises(ValueError, match=message):
        evaluate(model, tiny_tokenizer(), benign=["Why?"], max_new_tokens=2)
    evaluate(model, tiny_tokenizer(), benign=["Why?"], max_new_tokens=2, base=False)
    # After PEFT has converted the adapter, the base is the original one.
    model.peft_config["default"].init_lora_weights = True
    with without_adapter(model):
        pass


def test_tokenized_rows_keep_their_loss_when_they_are_cut():
    tokenizer = tiny_tokenizer()
    plain = ReferenceSet("set", ROWS).tokenize(tokenizer)
    kept = ReferenceSet("set", ROWS, loss="kl").tokenize(tokenizer)
    assert [(e.ids, e.answer_start) for e in kept] == [(e.ids, e.answer_start) for e in plain]
    assert {example.loss for example in kept} == {"kl"}
    assert kept[0].cut(len(kept[0].ids) - 1).loss == "kl"
    assert collate(kept, 0, "cpu")["loss"] == "kl"
    assert "loss" not in collate(plain, 0, "cpu")


def test_prompts_that_the_base_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "peft_ogpsa.references.self_answers.classify", lambda text: "compliance"
    )  # of random weights' noise
    model = tiny_llama(vocab_size=259)
    given = {"max_new_tokens": 4, "cache_dir": tmp_path, "progress": False}
    own = ReferenceSet.from_prompts("own", ["Why?", "How?"], model, tiny_tokenizer(), **given)
    scored = ReferenceSet.from_prompts("own", ["Why?", "How?"], model, tiny_tokenizer(), loss="answer", **given)
    assert {example.loss for example in scored.tokenize(tiny_tokenizer())} == {"answer"}
    examples = own.tokenize(tiny_tokenizer())
    assert len(examples) == 2
    assert {example.loss for example in examples} == {"kl"}
    with pytest.raises(ValueError, match="loss='dpo' does not work with"):
        ReferenceSet.from_prompts("own", ["Why?"], model, tiny_tokenizer(), loss="dpo", **given)


def test_command_line_names_the_loss():
    given, asked = reference_sets(["a:kl=builtin:general", "b:kl=prompts:lookalikes"], 3, 64, 0.1)
    assert (given.loss, asked.loss) == ("kl", "kl")
    assert isinstance(asked, PromptSet)
    with pytest.raises(ValueError, match="Write :kl or :answer"):
        reference_sets(["b:dpo=prompts:lookalikes"], 3, 64, 0.1)


def trainer(model, folder, callback):
    tokenizer = tiny_tokenizer()
    examples = [encode_row(tokenizer, row, "row") for row in ROWS]
    return Trainer(
        model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": e.ids, "labels": e.labels} for e in examples]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def test_training_with_a_weight_stays_nearer_to_the_base(tmp_path):
    ends = {}
    for weight in (0.0, 100.0):
        config = OGPSAConfig(subspace="gradients", **LORA, reference_weight=weight, refresh_steps=1, refresh_samples=6)
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(vocab_size=259), config)
        run = trainer(model, tmp_path, OGPSACallback([ReferenceSet("kept", ROWS, loss="kl")]))
        run.train()
        ends[weight] = run.state.log_history[1]["ogpsa/loss/kept"]
    assert 0 < ends[100.0] < 0.7 * ends[0.0]


def test_whole_weights_have_no_base_beside_them(tmp_path):
    callback = OGPSACallback([ReferenceSet("kept", ROWS, loss="kl")], config=FullParameterConfig(rows=4))
    with pytest.raises(ValueError, match=r'loss="kl" needs the model without its adapter'):
        trainer(tiny_llama(vocab_size=259), tmp_path, callback).train()


def test_the_gradient_at_the_base_is_zero_to_the_bit():
    model = get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **LORA)).eval()
    loss = reference_loss(model, collate(anchored(), 0, "cpu"))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_value_and_gradient_of_the_divergence_against_autograd_in_float64(scale):
    generator = torch.Generator().manual_seed(0)
    base = scale * torch.randn(7, 50, generator=generator)
    logits = base + 0.3 * scale * torch.randn(7, 50, generator=generator)
    own = logits.clone().requires_grad_()
    weights = torch.rand(7, generator=generator)
    value = _Divergence.apply(own, base)
    (value * weights).sum().backward()
    exact = logits.double().requires_grad_()
    p, q = base.double().softmax(-1), exact.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1)
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_base_whose_biases_are_trained_is_refused(bias):
    base = tiny_llama(attention_bias=True)
    model = get_peft_model(base, OGPSAConfig(subspace="gradients", bias=bias, **LORA))
    with pytest.raises(ValueError, match=rf"bias='{bias}'.*not the original model"):
        divergence_loss(model, collate(anchored(), 0, "cpu"))


def test_a_base_with_a_weight_in_training_is_refused():
    model = get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **{**LORA, "target_modules": ["q_proj"]}))
    batch = collate(anchored(), 0, "cpu")
    divergence_loss(model, batch)
    weight = model.get_base_model().model.layers[1].mlp.up_proj.weight
    weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is trained and belongs to the base model"):
        divergence_loss(model, batch)


@pytest.mark.parametrize(
    "overrides",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}, {"use_dora": True}, {}],
    ids=str,
)
def test_what_an_adapter_trains_beside_its_matrices_is_no_part_of_the_base(overrides):
    model = get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **LORA, **overrides)).eval()
    assert divergence_loss(model, collate(anchored(), 0, "cpu")).item() == pytest.approx(0, abs=1e-6)


def test_a_merged_adapter_is_refused_and_not_unmerged():
    model = model_with_random_adapter().eval()
    batch = collate(anchored(), 0, "cpu")
    expected = divergence_loss(model, batch).item()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base model"):
        divergence_loss(model, batch)
    assert all(module.merged for module in model.modules() if hasattr(module, "lora_A"))
    model.unmerge_adapter()
    assert divergence_loss(model, batch).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("inside", ["base_layer", "original_module"])
def test_a_weight_of_the_base_inside_an_adapters_layer_is_refused_in_training(inside):
    model = ogpsa_model(target_modules=["q_proj"], modules_to_save=["lm_head"])
    examples = collate([Example([5, 6, 7, 8], 2, "kl")], 0, "cpu")
    divergence_loss(model, examples)
    weight = next(p for name, p in model.named_parameters() if f".{inside}." in name)
    weight.requires_grad_(True)
    with pytest.raises(ValueError, match=rf"{inside}.weight is trained and belongs to the base model"):
        divergence_loss(model, examples)
