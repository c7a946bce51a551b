"""The DPO loss of reference pairs: its value, its gradients, its reference policy."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from models import chat, randomize, tiny_llama, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from test_gradients import assert_rows_equal, model_with_random_adapter, one_at_a_time, raw_rows
from trl import DPOConfig, DPOTrainer

from peft_ogpsa import OGPSACallback, OGPSAConfig, ReferenceSet
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.losses import LOSSES, collate, reference_loss
from peft_ogpsa.references.losses.dpo import Pair, with_margins
from peft_ogpsa.text.tokenization import Example
from peft_ogpsa.tuner.adapters import reference_policy
from peft_ogpsa.tuner.model import projector_of

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
preference_loss = LOSSES["dpo"].loss
BETA = 0.3
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"How do I kill process {i}?"}],
        "chosen": [{"role": "assistant", "content": f"Run kill {i} in a shell."}],
        "rejected": [{"role": "assistant", "content": "No." * (i + 1)}],
    }
    for i in range(5)
]


def random_pairs(count: int = 4, margins: bool = True) -> list[Pair]:
    generator = torch.Generator().manual_seed(7)

    def side(length: int) -> Example:
        return Example(torch.randint(3, 100, (length,), generator=generator).tolist(), 1 + length % 3)

    return [
        Pair(side(5 + 2 * i), side(9 - i), BETA, 0.5 * i - 1 if margins else None)  # rejected longer, then chosen
        for i in range(count)
    ]


def by_hand(model, pair: Pair) -> torch.Tensor:
    """The loss of one pair, written out in float64 token by token."""

    def log_probability(example: Example) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].double()
        steps = range(example.answer_start, len(example.ids))
        return sum(logits[t - 1, example.ids[t]] - torch.logsumexp(logits[t - 1], 0) for t in steps)

    gap = log_probability(pair.chosen) - log_probability(pair.rejected) - pair.margin
    return torch.log1p(torch.exp(-pair.beta * gap))


def test_loss_is_the_formula_written_out():
    model = model_with_random_adapter().eval()
    pairs = random_pairs()
    expected = sum(by_hand(model, pair) for pair in pairs) / len(pairs)
    loss = preference_loss(model, collate(pairs, 0, "cpu"))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_one_backward_pass_gives_the_gradient_of_every_pair(scope):
    model = model_with_random_adapter(scope=scope)
    pairs = random_pairs()
    passes = []

    def counted(*arguments):
        passes.append(arguments)
        return reference_loss(*arguments)

    model.projector.refresh({"pairs": [collate(pairs, 0, "cpu")]}, counted)
    assert len(passes) == 1
    rows = raw_rows(model)
    assert len(rows) == len(pairs)
    assert_rows_equal(rows, one_at_a_time(model, pairs, preference_loss))
    by_formula = torch.autograd.grad(by_hand(model, pairs[2]), model.projector.subspace.blocks.flat_parameters())
    assert_rows_equal([rows[2]], [[g.float() for g in by_formula]])


def test_tokenized_pairs():
    tokenizer = tiny_tokenizer()
    pairs = ReferenceSet("pairs", PAIRS, loss="dpo", beta=BETA).tokenize(tokenizer)
    assert len(pairs) == 5
    assert tokenizer.decode(pairs[1].chosen.answer) == "Run kill 1 in a shell.</s>"
    assert tokenizer.decode(pairs[1].rejected.answer) == "No.No.</s>"
    assert (pairs[1].beta, pairs[1].margin) == (BETA, None)
    assert pairs[0].ids == pairs[0].chosen.ids
    # Where the limit leaves a side without an answer, the pair says nothing.
    start = pairs[0].chosen.answer_start
    assert pairs[0].cut(start) is None
    assert len(pairs[0].cut(start + 1).rejected.answer) == 1
    with pytest.raises(ValueError, match=r"not a preference pair, but loss='dpo' needs pairs"):
        ReferenceSet("set", [chat("Why?", "So.")], loss="dpo").tokenize(tokenizer)
    for beta in (0, -1, math.inf, "much"):
        with pytest.raises(ValueError, match="beta="):
            ReferenceSet("set", PAIRS, beta=beta)


USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
OTHER = {"role": "assistant", "content": "Dunno."}
IMPLICIT = {
    "the last turn differs": ([USER, ANSWER], [USER, OTHER]),
    "an earlier turn differs": ([USER, ANSWER, USER, ANSWER], [USER, OTHER, USER, OTHER]),
    "the last turn is the same": ([USER, ANSWER, USER, ANSWER], [USER, OTHER, USER, ANSWER]),
    "one conversation goes on": ([USER, ANSWER], [USER, OTHER, USER, ANSWER]),
    "one conversation begins the other": ([USER, ANSWER], [USER, ANSWER, USER, OTHER]),
    "both are the same": ([USER, ANSWER], [USER, ANSWER]),
    "plain text": ("2+2=4", "2+2=5"),
    "plain text, which differs after a space": ("Q: sky? blue", "Q: sky? green"),
    "plain text, which differs in a word": ("Q: good", "Q: great"),
    "plain text that begins the other": ("Q: yes", "Q: yes sir"),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_pairs_without_a_prompt_are_those_of_trl(tmp_path, name):
    chosen, rejected = IMPLICIT[name]
    row = {"chosen": chosen, "rejected": rejected}
    tokenizer = tiny_tokenizer()
    (pair,) = ReferenceSet("pairs", [row], loss="dpo").tokenize(tokenizer)
    trainer = DPOTrainer(
        get_peft_model(tiny_llama(vocab_size=259), LoraConfig(**LORA)),
        args=DPOConfig(str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    (expected,) = trainer.train_dataset
    for own, answer in ((pair.chosen, "chosen_ids"), (pair.rejected, "rejected_ids")):
        assert own.ids[: own.answer_start] == expected["prompt_ids"]
        assert own.answer == expected[answer]


def test_loader_batches_pairs_by_length():
    (batches,) = ReferenceLoader({"pairs": random_pairs()}, None, 2).draw().values()
    assert [[len(pair.ids) for pair in batch] for batch in batches] == [[8, 9], [9, 11]]


def two_adapters():
    model = get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **LORA))
    model.add_adapter("ref", OGPSAConfig(subspace="gradients", **LORA))
    return randomize(model)


def margin_of(model, pair: Pair) -> float:
    policy = copy.deepcopy(model).eval()
    with torch.no_grad():
        loss = float(by_hand(policy, Pair(pair.chosen, pair.rejected, 1.0, 0.0)))
    return -math.log(math.expm1(loss))  # the loss of margin 0 is log(1 + exp(-gap))


def test_reference_policy_is_the_ref_adapter_or_else_the_base():
    pairs = random_pairs(margins=False)

    def batch(pairs):
        return collate(pairs, 0, "cpu")

    model = two_adapters()
    model.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    (pair,) = with_margins(model, [pairs[:1]], batch)
    as_ref = copy.deepcopy(model)
    as_ref.set_adapter("ref")
    assert pair.margin == pytest.approx(margin_of(as_ref, pair), rel=1e-4)
    assert pair.margin != pytest.approx(margin_of(model, pair), rel=1e-2)
    assert model.active_adapter == "default"
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    alone = randomize(get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **LORA)))
    for name, parameter in alone.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in alone.named_parameters()}
    both = with_margins(alone, [pairs[:1], pairs[1:2]], batch)
    for pair in both:
        assert pair.margin == pytest.approx(margin_of(tiny_llama(), pair), rel=1e-4)
    assert {name: p.requires_grad for name, p in alone.named_parameters()} == flags
    with pytest.raises(RuntimeError, match="inside"), reference_policy(alone):
        raise RuntimeError("inside")
    assert {name: p.requires_grad for name, p in alone.named_parameters()} == flags


def test_a_base_that_the_adapters_start_has_moved_is_no_reference_policy():
    """After PiSSA, the model without its adapter is the residual of the base."""

    def batch(pairs):
        return collate(pairs, 0, "cpu")

    def adapted(**settings):
        return get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **LORA, **settings))

    pairs = random_pairs(margins=False)[:1]
    moved = adapted(init_lora_weights="pissa")
    with pytest.raises(
        ValueError, match=r"init_lora_weights='pissa' in .* reference policy\. Set init_lora_weights=True"
    ):
        with_margins(moved, [pairs], batch)
    moved.add_adapter("ref", OGPSAConfig(subspace="gradients", **LORA))  # a policy of its own
    with_margins(moved, [pairs], batch)
    with_margins(adapted(bias="all"), [pairs], batch)  # the base's biases have not moved before training


@pytest.mark.parametrize("given", ["base and config", "trained adapter"])
def test_dpo_trainer_with_the_dpo_loss_as_reference(tmp_path, given):
    base = tiny_llama(vocab_size=259, max_position_embeddings=256)
    config = OGPSAConfig(
        subspace="gradients", rows=8, refresh_steps=2, refresh_samples=4, reference_weight=0.0, **LORA
    )
    trained = given == "trained adapter"
    model = randomize(get_peft_model(base, config)) if trained else base
    start = copy.deepcopy(model)  # not later: TRL replaces `forward`, and a copy would run the original
    callback = OGPSACallback([ReferenceSet("pairs", PAIRS, loss="dpo", beta=BETA)])
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            beta=BETA,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS]),
        processing_class=tiny_tokenizer(),
        peft_config=None if trained else config,
        callbacks=[callback],
    )
    trainer.train()
    # The policy starts as its own reference, where the loss is log 2 whatever the pair.
    losses = [entry["ogpsa/loss/pairs"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3)
    assert losses[1] != pytest.approx(math.log(2), rel=1e-4)
    assert trainer.model.projector.subspace.rows.filled == 8
    for pair in callback._runs[-1].loader.sets["pairs"]:
        assert pair.margin == pytest.approx(margin_of(start, pair), rel=1e-3, abs=1e-3)
    assert trainer.model.active_adapter == "default"


def test_plain_adapter_has_no_tuner():
    with pytest.raises(ValueError, match="has no OGPSA adapter"):
        projector_of(get_peft_model(tiny_llama(), LoraConfig(**LORA)))
