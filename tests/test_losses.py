"""The reference losses as a family: the registry, what each one says of itself, and names of earlier versions."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from loops import ogpsa_model
from models import chat, tiny_llama, tiny_tokenizer

from peft_ogpsa import OGPSAConfig, ReferenceLoader, ReferenceSet, reference_loss
from peft_ogpsa.core.passes import sized
from peft_ogpsa.references import losses
from peft_ogpsa.references.losses import LOSSES, answer_loss, collate, loss_of
from peft_ogpsa.references.losses.answer import AnswerLoss
from peft_ogpsa.references.losses.dpo import DPOLoss
from peft_ogpsa.references.losses.kl import KLLoss
from peft_ogpsa.references.sets import OF_OWN_ANSWERS
from peft_ogpsa.text import batching
from peft_ogpsa.text.tokenization import Example

ROWS = [
    {
        **chat(f"Why {i}?", "So."),
        "chosen": chat("", "So.")["completion"],
        "rejected": chat("", "No " * i)["completion"],
    }
    for i in range(1, 4)
]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_found_from_its_name_its_examples_and_its_batches(name, monkeypatch):
    loss = LOSSES[name]
    assert loss.name == name
    examples = ReferenceSet("set", ROWS, loss=name).tokenize(tiny_tokenizer())
    assert {example.loss for example in examples} == {name}
    assert loss_of(examples) is loss
    if loss.needs_policy:
        examples = [replace(example, margin=0.5) for example in examples]
    batch = collate(examples, 0, "cpu")
    assert all(len(value) == len(examples) for value in batch.values() if isinstance(value, torch.Tensor))
    asked = []
    scored_by = AnswerLoss if "loss" not in batch else type(loss)
    monkeypatch.setattr(scored_by, "loss", lambda self, model, batch: asked.append((model, batch)))
    reference_loss("model", batch)
    assert asked == [("model", batch)]
    assert issubclass(type(loss), scored_by)


def test_what_each_loss_says_of_itself():
    assert {
        name: (
            own.cost,
            own.default_weight,
            own.null_space_weight,
            own.learns_answers,
            own.needs_base,
            own.needs_policy,
        )
        for name, own in LOSSES.items()
    } == {
        "answer": (1, 1, None, True, False, False),
        "all": (1, 1, None, True, False, False),
        "kl": (1.5, 8, 2, False, True, False),
        "both": (1, 1, None, True, False, False),
        "dpo": (2, 1, None, True, True, True),
    }
    assert OF_OWN_ANSWERS == ["kl", "answer"]
    for own in LOSSES.values():
        assert bool(own.without_base) == own.needs_base
        assert not any(LOSSES[other].needs_base for other in own.without_base)


def test_a_new_loss_is_a_class_and_an_entry(monkeypatch):
    class Twice(AnswerLoss):
        name = "twice"
        cost = 2.0
        default_weight = 3.0

        def collate(self, examples, pad_token_id, device):
            return {**super().collate(examples, pad_token_id, device), "loss": self.name}

        def loss(self, model, batch):
            return 2 * super().loss(model, batch)

    monkeypatch.setitem(LOSSES, "twice", Twice())
    sets = [ReferenceSet("a", ROWS, loss="twice"), ReferenceSet("b", ROWS)]
    config = OGPSAConfig(refresh_samples=6)
    loader = ReferenceLoader.from_sets(sets, tiny_tokenizer(), config, step_examples=4)
    assert loader.cost == 1.5
    model, batches = tiny_llama(vocab_size=259), loader.batches("cpu")
    assert [own.weight for own in sized(batches)] == [3.0, 1.0]
    # The draws of both sets have the same order.
    assert reference_loss(model, batches["a"][0]) == 2 * reference_loss(model, batches["b"][0])


def test_batches_of_answers_may_be_given_to_the_model():
    examples = [Example([5, 6, 7, 8], 2), Example([9, 10, 11, 12], 2)]
    batch = collate(examples, 0, "cpu")
    model = tiny_llama()
    torch.testing.assert_close(model(**batch).loss, answer_loss(model, batch))


@pytest.mark.parametrize("name", LOSSES)
def test_sequences_for_an_activation_subspace_are_without_the_data_of_a_loss(name):
    examples = ReferenceSet("set", ROWS, loss=name).tokenize(tiny_tokenizer())
    loader = ReferenceLoader({"set": examples}, None, batch_size=4)
    batches = loader.batches("cpu", everything=True)["set"]
    assert all(batch.keys() == {"input_ids", "attention_mask", "labels"} for batch in batches)
    assert all(batch["input_ids"].dim() == 2 for batch in batches)
    assert sum(len(batch["labels"]) for batch in batches) == 3 * (2 if name in ("both", "dpo") else 1)


def test_every_loss_refuses_a_model_without_token_logits():
    class Classifier(torch.nn.Module):
        def forward(self, **inputs):
            return type("Output", (), {"logits": torch.zeros(2, 3)})()

    examples = ReferenceSet("set", ROWS, loss="dpo").tokenize(tiny_tokenizer())
    batch = collate([replace(example, margin=0.5) for example in examples], 0, "cpu")
    with pytest.raises(ValueError, match="this Classifier returns logits of shape"):
        reference_loss(Classifier(), batch)


@pytest.mark.parametrize("longest_first", [False, True])
def test_batches_by_length_keep_the_order_of_items_of_one_length(longest_first):
    words = ["bb", "a", "cc", "ddd", "e"]
    expected = ["ddd", "bb", "cc", "a", "e"] if longest_first else ["a", "e", "bb", "cc", "ddd"]
    batches = batching.by_length(words, 2, len, longest_first=longest_first)
    assert batches == [expected[:2], expected[2:4], expected[4:]]
    with pytest.raises(ValueError, match="batch_size is 0"):
        batching.by_length(words, 0, len)


def test_padding_on_both_sides():
    assert batching.padded([[1, 2], [3]], 9).tolist() == [[1, 2], [3, 9]]
    ids = batching.padded_ids([[1, 2], [3]], 9, left=True)
    assert ids["input_ids"].tolist() == [[1, 2], [9, 3]]
    assert ids["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert ids["input_ids"].dtype == torch.int64


def test_the_old_modules_warn():
    for name, place in (("divergence", "kl"), ("preferences", "dpo")):
        sys.modules.pop(f"peft_ogpsa.references.{name}", None)
        with pytest.warns(DeprecationWarning, match=rf"moved to peft_ogpsa\.references\.losses\.{place}"):
            importlib.import_module(f"peft_ogpsa.references.{name}")
    old, pairs = (sys.modules[f"peft_ogpsa.references.{name}"] for name in ("divergence", "preferences"))
    assert KLLoss.cost == old.COST
    assert pairs.Pair.loss == DPOLoss.name
    model = ogpsa_model()
    batch = collate([old.Anchored([5, 6, 7], 1)], 0, "cpu")
    assert batch["loss"] == "kl"
    assert old.divergence_loss(model, batch) == reference_loss(model, batch) == 0
    side = Example([5, 6, 7], 1)
    batch = collate([pairs.Pair(side, side, 0.1, 0.0)], 0, "cpu")
    assert pairs.preference_loss(model, batch) == reference_loss(model, batch)


def test_the_old_names_warn():
    def old(name, place):
        with pytest.warns(DeprecationWarning, match=f"{name} is now .*{place}"):
            return getattr(losses, name)

    assert old("ANCHORED_WEIGHT", "KLLoss.default_weight") == 8.0
    assert old("padding_of", "batching.padding_of") is batching.padding_of
    short, long = Example([1], 1), Example([1, 2], 1)
    assert old("batched", "batching.by_length")([long, short], 1) == [[short], [long]]
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        losses.other  # noqa: B018
