"""Reference sets: every row format, truncation, the loss, and the order of the examples."""

from __future__ import annotations

import datetime
import json
from functools import partial

import pytest
import torch
import transformers
from datasets import Dataset
from models import TEMPLATE, TEMPLATE_OF_PARTS, chat, tiny_llama, tiny_processor, tiny_tokenizer
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

from peft_ogpsa import OGPSAConfig, ReferenceLoader, ReferenceSet, reference_loss
from peft_ogpsa.references.losses import answer_loss, collate
from peft_ogpsa.text.tokenization import Example, encode_prompt, encode_row, prompt_text

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
OTHER = {"role": "assistant", "content": "Dunno."}
CHAT_ANSWER = "Because.</s>"

FORMATS = {
    "prompt/completion": ({"prompt": [USER], "completion": [ANSWER]}, CHAT_ANSWER),
    "messages": ({"messages": [USER, ANSWER]}, CHAT_ANSWER),
    "messages, last turn": ({"messages": [USER, OTHER, USER, ANSWER]}, CHAT_ANSWER),
    "messages, user's turn at the end": ({"messages": [USER, ANSWER, USER]}, CHAT_ANSWER),
    "plain prompt/completion": ({"prompt": "2+2=", "completion": "4"}, "4</s>"),
    "text": ({"text": "Once upon a time"}, "nce upon a time</s>"),
    "pairs": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, CHAT_ANSWER),
    "pairs, implicit prompt": ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, CHAT_ANSWER),
    "pairs, the plain prompt in both answers": (
        {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        CHAT_ANSWER,
    ),
    "pairs, plain prompt": ({"prompt": "Why?", "chosen": [ANSWER], "rejected": [OTHER]}, CHAT_ANSWER),
    "pairs and messages": (
        {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]},
        CHAT_ANSWER,
    ),
    "prompt/completion and messages": (
        {"prompt": [USER], "completion": [ANSWER], "messages": [USER, OTHER]},
        CHAT_ANSWER,
    ),
    "plain pairs": ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "4</s>"),
    "plain pairs, implicit prompt": ({"chosen": "2+2=4", "rejected": "2+2=5"}, "4</s>"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_scores_the_answer(name):
    row, answer = FORMATS[name]
    tokenizer = tiny_tokenizer()
    (example,) = ReferenceSet("set", [row]).tokenize(tokenizer)
    assert tokenizer.decode(example.answer) == answer
    (whole,) = ReferenceSet("set", [row], loss="all").tokenize(tokenizer)
    assert whole.ids == example.ids
    assert whole.answer_start == 1


@pytest.mark.parametrize("name", [name for name in FORMATS if "pairs" in name])
def test_both_answers_of_a_pair(name):
    row, answer = FORMATS[name]
    tokenizer = tiny_tokenizer()
    chosen, rejected = ReferenceSet("set", [row], loss="both").tokenize(tokenizer)
    assert tokenizer.decode(chosen.answer) == answer
    assert tokenizer.decode(rejected.answer) == {CHAT_ANSWER: "Dunno.</s>", "4</s>": "5</s>"}[answer]
    assert chosen.ids[: chosen.answer_start] == rejected.ids[: rejected.answer_start]


def test_an_example_of_a_pair_with_every_column_is_that_of_the_pair():
    tokenizer = tiny_tokenizer()
    encoded = [
        ReferenceSet("set", [FORMATS[name][0]], loss="dpo").tokenize(tokenizer) for name in FORMATS if "pairs" in name
    ]
    conversations = [pair for (pair,) in encoded if tokenizer.decode(pair.chosen.answer) == CHAT_ANSWER]
    assert len(conversations) == 5
    assert all(pair == conversations[0] for pair in conversations)


def test_only_what_comes_after_the_prompt_is_scored():
    tokenizer = tiny_tokenizer()
    for prompt, completion, scored in (
        ([USER, OTHER], [USER, ANSWER], "user: Why?</s><s>assistant: Because.</s>"),
        ([USER, OTHER], [ANSWER], "Because.</s>"),  # after an answer that has begun
    ):
        (example,) = ReferenceSet("set", [{"prompt": prompt, "completion": completion}]).tokenize(tokenizer)
        assert tokenizer.decode(example.answer) == scored


def test_datasets_and_iterators_and_samples():
    rows = [chat(f"Question {i}", f"Answer {i}") for i in range(5)]
    tokenizer = tiny_tokenizer()
    from_list = ReferenceSet("set", rows).tokenize(tokenizer)
    assert ReferenceSet("set", Dataset.from_list(rows)).tokenize(tokenizer) == from_list
    assert ReferenceSet("set", iter(rows)).tokenize(tokenizer) == from_list
    assert ReferenceSet("set", rows, samples=2).tokenize(tokenizer) == from_list[:2]


@pytest.mark.parametrize("tools", [[{"name": "look"}], '[{"name": "look"}]'])
def test_columns_for_the_chat_template_reach_it(tools):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ mood }}{{ tools }}" + tokenizer.chat_template
    row = {**chat("Q", "Yes"), "chat_template_kwargs": {"mood": "calm"}, "tools": tools}
    (example,) = ReferenceSet("set", [row]).tokenize(tokenizer)
    assert "calm[{'name': 'look'}]" in tokenizer.decode(example.ids[: example.answer_start])
    assert "Yes" in tokenizer.decode(example.answer)
    plain = {name: row[name] for name in ("prompt", "completion")}
    assert "calm" not in tokenizer.decode(ReferenceSet("set", [plain]).tokenize(tokenizer)[0].ids)


@pytest.mark.parametrize("tools", [[], "[]", "", None])
def test_an_empty_list_of_tools_is_not_none(tools):
    """TRL passes it on to the template, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools is not none %}{{ tools | length }} tools{% endif %}" + TEMPLATE
    row = {**chat("Q", "Yes"), "tools": tools}
    for ids in (ReferenceSet("set", [row]).tokenize(tokenizer)[0].ids, encode_prompt(tokenizer, row)):
        assert tokenizer.decode(ids).startswith("<s>user" if tools in ("", None) else "0 tools<s>user")


def test_a_prompt_with_the_beginning_of_an_answer_is_refused():
    """To ask for the whole answer would measure another request, without a word."""
    tokenizer = tiny_tokenizer()
    for use in (partial(encode_prompt, tokenizer), prompt_text):
        with pytest.raises(ValueError, match="prompt that ends with a turn of the assistant"):
            use({"prompt": [USER, ANSWER]})
    asked = encode_prompt(tokenizer, {"prompt": [USER]})
    assert encode_prompt(tokenizer, {"messages": [USER, ANSWER]}) == asked  # there, it is the answer
    assert encode_prompt(tokenizer, {"prompt": [USER, ANSWER, USER]}) != asked


@pytest.mark.parametrize("begin", ["", "<s>"])
@pytest.mark.parametrize("row", [chat("Why?", "So."), {"prompt": "2+2=", "completion": "4"}], ids=["chat", "plain"])
def test_rows_for_a_processor_are_those_of_trl(tmp_path, row, begin):
    """TRL asks the processor, which adds `<s>` to a conversation that does not begin with it."""
    processor = tiny_processor(begin + TEMPLATE_OF_PARTS)
    (example,) = ReferenceSet("set", [row]).tokenize(processor)
    trainer = SFTTrainer(
        tiny_llama(vocab_size=259),
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row]),
        processing_class=processor,
    )
    (expected,) = trainer.train_dataset
    assert example.ids == expected["input_ids"]
    assert example.labels == expected["labels"]
    assert example.ids.count(processor.tokenizer.bos_token_id) == 1
    if not isinstance(row["prompt"], str):
        assert encode_prompt(processor, row["prompt"]) == example.ids[: example.answer_start]


@pytest.mark.parametrize("made", ["tensor", "flat"])
def test_processors_may_return_a_tensor_or_one_list(monkeypatch, made):
    processor, row = tiny_processor(TEMPLATE_OF_PARTS), chat("Why?", "So.")
    expected = encode_row(processor, row, "a row")
    ask = type(processor).apply_chat_template

    def other(self, *arguments, **options):
        found = ask(self, *arguments, **options)
        if not options["tokenize"]:
            return found
        return torch.tensor(found) if made == "tensor" else found[0]

    monkeypatch.setattr(type(processor), "apply_chat_template", other)
    assert encode_row(processor, row, "a row") == expected
    assert json.dumps(encode_row(processor, row, "a row").ids)


def test_truncation_drops_what_has_no_answer_left(caplog):
    rows = [chat("A question of many words, to be cut", "Yes"), chat("Q", "Yes")]
    tokenizer = tiny_tokenizer()
    (kept,) = ReferenceSet("set", rows, max_length=26).tokenize(tokenizer)
    assert len(kept.ids) <= 26
    assert "'set': max_length=26 cuts off the answers of 1 of 2 examples" in caplog.text
    assert "Q" in tokenizer.decode(kept.ids)
    with pytest.raises(ValueError, match=r"'set': max_length=5 cuts off the answers of all 2 rows"):
        ReferenceSet("set", rows, max_length=5).tokenize(tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "name='' must be"),
        ({"samples": 0}, "samples=0 must be"),
        ({"samples": True}, "samples=True must be"),
        ({"max_length": None}, "max_length=None must be"),
        ({"loss": "ppo"}, "loss='ppo' is unknown"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReferenceSet(**{"name": "set", "dataset": [], **arguments})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "'set' is empty"),
        ([{"question": "Hi"}], "'set': row 0 has the columns"),
        ([{"messages": [USER]}], "'set': row 0 has no answer"),
        ([{"prompt": [USER], "completion": "plain"}], "'set': row 0 mixes"),
        ([{"prompt": [USER], "completion": [ANSWER | {"content": ""}]}], "'set': row 0 has no answer"),
        ([{"prompt": [USER], "completion": [USER]}], "'set': row 0 has no answer"),
        ([{"messages": [USER, ANSWER | {"content": None}]}], "'set': row 0 has the message"),
        ([{"prompt": [USER], "completion": [ANSWER], "label": False}], "'set': row 0 has label=False"),
        ([{"prompt": [USER], "completion": [ANSWER], "images": ["a.png"]}], "content of the type 'images'"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}], "content of the type 'image'"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        ReferenceSet("set", rows).tokenize(tiny_tokenizer())


def test_both_answers_need_pairs():
    with pytest.raises(ValueError, match=r"'set': row 0 is not a preference pair, but loss='both' needs pairs"):
        ReferenceSet("set", [chat("Hi", "Hello")], loss="both").tokenize(tiny_tokenizer())


def test_conversation_without_a_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ReferenceSet("set", [chat("Hi", "Hello")]).tokenize(tokenizer)


def test_loss_is_the_mean_over_examples_of_means_over_tokens():
    model = tiny_llama().double()
    examples = [Example([5, 6, 7, 8, 9], 2), Example([5, 6, 7], 1), Example(list(range(10, 40)), 25)]
    by_hand = []
    for example in examples:
        log_probs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        picked = [log_probs[t - 1, example.ids[t]] for t in range(example.answer_start, len(example.ids))]
        by_hand.append(-torch.stack(picked).mean())
    loss = answer_loss(model, collate(examples, 0, "cpu"))
    torch.testing.assert_close(loss.double(), torch.stack(by_hand).mean(), rtol=1e-5, atol=1e-6)


def examples(count: int, first: int = 0) -> list[Example]:
    return [Example([first + i] * (3 + i % 4), 1) for i in range(count)]


def ids_of(draw: dict) -> dict[str, list[int]]:
    return {name: [e.ids[0] for batch in batches for e in batch] for name, batches in draw.items()}


def test_draws_are_even_over_sets_and_cover_every_example():
    loader = ReferenceLoader({"a": examples(6), "b": examples(9, 50)}, samples=5, batch_size=2)
    draws = [ids_of(loader.draw()) for _ in range(12)]
    assert {len(d["a"]) + len(d["b"]) for d in draws} == {5}
    totals = {name: [i for d in draws for i in d[name]] for name in "ab"}
    assert len(totals["a"]) == len(totals["b"]) == 30
    assert {totals["a"].count(i) for i in range(6)} == {5}
    assert set(totals["b"]) == set(range(50, 59))
    assert totals["a"][:6] != totals["a"][6:12]  # another order every epoch


def test_all_examples_at_every_draw():
    loader = ReferenceLoader({"a": examples(5), "b": examples(2, 50)}, samples=None, batch_size=3)
    for _ in range(2):
        draw = loader.draw()
        assert [len(batch) for batch in draw["a"]] == [3, 2]
        assert sorted(ids_of(draw)["a"]) == list(range(5))
        lengths = [len(e.ids) for batch in draw["a"] for e in batch]
        assert lengths == sorted(lengths)


def test_loader_resumes_and_ignores_the_global_generator():
    def loader():
        return ReferenceLoader({"a": examples(6), "b": examples(9, 50)}, samples=4, batch_size=2, seed=3)

    straight, stopped, resumed = loader(), loader(), loader()
    expected = [straight.draw() for _ in range(9)]
    state = torch.get_rng_state()
    got = [stopped.draw() for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    resumed.load_state_dict(stopped.state_dict())
    got += [resumed.draw() for _ in range(4)]
    assert got == expected
    with pytest.raises(ValueError, match="sizes"):
        ReferenceLoader({"a": examples(6)}, samples=4, batch_size=2).load_state_dict(stopped.state_dict())


def test_fewer_samples_than_sets_are_of_every_set_in_turn():
    loader = ReferenceLoader({"a": examples(6), "b": examples(9, 50), "c": examples(3, 70)}, samples=2, batch_size=2)
    draws = [ids_of(loader.draw()) for _ in range(6)]
    assert all(sum(map(len, draw.values())) == 2 for draw in draws)
    assert [len([draw for draw in draws if name in draw]) for name in "abc"] == [4, 4, 4]
    # Every example of a set comes before one comes again.
    assert len({example for draw in draws for example in draw.get("c", [])}) == 3


def test_loss_needs_a_causal_language_model():
    class Classifier(torch.nn.Module):
        def forward(self, **inputs):
            return type("Output", (), {"logits": torch.zeros(2, 3)})()

    with pytest.raises(
        ValueError, match=r"causal language model, and this Classifier returns logits of shape \(2, 3\)"
    ):
        answer_loss(Classifier(), collate([Example([1, 2], 1)] * 2, 0, "cpu"))


def test_a_tokenizer_may_have_another_one_inside():
    plain, holder = tiny_tokenizer(), tiny_tokenizer()
    holder.tokenizer = object()
    row = chat("Hi", "Yo.")
    assert encode_row(holder, row, "row") == encode_row(plain, row, "row")


def test_the_tokenizer_of_mistral_common_is_refused():
    class MistralCommonBackend:
        chat_template = None

    with pytest.raises(ValueError, match=r"MistralCommonBackend.*PreTrainedTokenizerFast\.from_pretrained"):
        encode_prompt(MistralCommonBackend(), "Hi", "prompt")


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_a_model_that_does_not_generate_is_refused(name):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=f"causal language model, and this {name} does not generate text"):
        answer_loss(getattr(transformers, name)(config), collate([Example([1, 2], 1)] * 2, 0, "cpu"))


def test_every_epoch_has_an_order_of_its_own():
    loader = ReferenceLoader({"a": examples(12)}, samples=12, batch_size=1)
    orders = [loader._order("a", epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    short = ReferenceLoader({"a": examples(5)}, samples=1, batch_size=1)
    taken = [ids_of(short.draw())["a"][0] for _ in range(20)]
    epochs = {tuple(taken[i : i + 5]) for i in range(0, 20, 5)}
    assert len(epochs) > 1
    assert all(len(set(epoch)) == 5 for epoch in epochs)


@pytest.mark.parametrize("samples", [None, 1, 2, 3, 4, 7, 10, 25])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("of", ["example", "batch", "set"])
def test_the_most_that_any_draw_has(samples, batch_size, of):
    loader = ReferenceLoader({"a": examples(6), "b": examples(9, 50), "c": examples(2, 70)}, samples, batch_size)
    counts = []
    for _ in range(30):
        drawn = loader.draw()
        batches = [batch for own in drawn.values() for batch in own]
        counts.append({"example": sum(map(len, batches)), "batch": len(batches), "set": len(drawn)}[of])
    assert loader.most_drawn(of) == max(counts)


def rows(count):
    return [chat(f"What comes after {i}?", f"After {i} comes {i + 1}.") for i in range(count)]


@pytest.mark.parametrize(
    ("loss", "budget", "expected"),
    [("answer", 0.5, 5), ("kl", 0.5, 3), ("answer", 0.05, 1), ("answer", 9.0, 8)],
)
def test_a_loader_for_a_loop_of_ones_own_keeps_to_the_budget(loss, budget, expected):
    # 2 steps of 5 training examples from one refresh to the next; an anchored example costs 3/2.
    config = OGPSAConfig(subspace="gradients", reference_budget=budget, refresh_steps=2)
    sets = [ReferenceSet("a", rows(6), loss=loss), ReferenceSet("b", rows(9), loss=loss)]
    loader = ReferenceLoader.from_sets(sets, tiny_tokenizer(), config, step_examples=5, batch_size=2)
    drawn = loader.batches("cpu")
    assert sum(len(batch["input_ids"]) for own in drawn.values() for batch in own) == expected
    assert all(len(batch["input_ids"]) <= 2 for own in drawn.values() for batch in own)
    assert loader.pad_token_id == tiny_tokenizer().pad_token_id


def test_a_loop_of_ones_own_with_the_exported_names():
    model = get_peft_model(
        tiny_llama(vocab_size=259, max_position_embeddings=256),
        OGPSAConfig(
            subspace="gradients", r=4, target_modules="all-linear", task_type="CAUSAL_LM", reference_budget=0.5
        ),
    )
    sets = [ReferenceSet("answers", rows(6)), ReferenceSet("own", rows(4), loss="kl")]
    loader = ReferenceLoader.from_sets(sets, tiny_tokenizer(), model.projector.config, step_examples=4)
    losses = model.projector.refresh(loader.batches(model.device), reference_loss)
    assert losses["answers"] > 0
    assert losses["own"] == 0
    assert model.projector._refresher.factors(model.projector.config) == {"answers": 1.0, "own": 8.0}


@pytest.mark.parametrize("subspace", ["activations", "gradients"])
def test_batches_of_a_loader_are_for_one_thing_only(subspace):
    """A subspace of one draw would cover little, and all examples come without their loss and its weight."""
    model = get_peft_model(
        tiny_llama(vocab_size=259, max_position_embeddings=256),
        OGPSAConfig(subspace=subspace, r=4, target_modules="all-linear", task_type="CAUSAL_LM", refresh_samples=2),
    )
    projector = model.projector
    loader = ReferenceLoader.from_sets(
        [ReferenceSet("own", rows(9), loss="kl")], tiny_tokenizer(), projector.config, 4
    )
    if projector.unbuilt:
        with pytest.raises(ValueError, match="builds the activation subspace, but these batches are one draw"):
            projector.refresh(loader.batches(model.device), reference_loss)
        assert projector.unbuilt
        projector.refresh(loader.batches(model.device, everything=True), reference_loss)
    with pytest.raises(ValueError, match="needs one draw, but these batches are all examples"):
        projector.refresh(loader.batches(model.device, everything=True), reference_loss)
    assert projector.due
    assert projector.refresh(loader.batches(model.device), reference_loss).keys() == {"own"}
    assert not projector.due


@pytest.mark.parametrize(
    ("names", "message"), [([], "reference_sets is empty"), (["a", "b", "a"], "two sets with the name 'a'")]
)
def test_a_loader_refuses_no_sets_and_two_of_one_name(names, message):
    sets = [ReferenceSet(name, rows(3)) for name in names]
    with pytest.raises(ValueError, match=message):
        ReferenceLoader.from_sets(sets, tiny_tokenizer(), OGPSAConfig(), 4)


def test_a_loader_refuses_what_it_cannot_draw():
    pairs = [{**row, "chosen": row["completion"], "rejected": row["completion"]} for row in rows(4)]
    with pytest.raises(ValueError, match=r"'pairs' has loss='dpo'.*Use OGPSACallback"):
        ReferenceLoader.from_sets([ReferenceSet("pairs", pairs, loss="dpo")], tiny_tokenizer(), OGPSAConfig(), 4)
    with pytest.raises(ValueError, match="rows=8 is too small: a refresh uses up to 20 reference examples"):
        ReferenceLoader.from_sets(
            [ReferenceSet("all", rows(20))],
            tiny_tokenizer(),
            OGPSAConfig(subspace="gradients", reference_budget=None),
            4,
        )


def test_a_loader_resumes_with_the_set_whose_turn_it_is():
    def loader():
        own = {name: [Example([first + i] * 3, 1) for i in range(6)] for name, first in (("a", 0), ("b", 50))}
        return ReferenceLoader(own, samples=3, batch_size=2)

    straight, resumed = loader(), loader()
    straight.draw()  # two of the one and one of the other
    resumed.load_state_dict(straight.state_dict())
    assert resumed.draw() == straight.draw()


def test_a_loader_resumes_with_the_order_that_was_saved():
    own = {"a": [Example([i] * 3, 1) for i in range(12)]}
    straight, resumed = (ReferenceLoader(own, samples=4, batch_size=4, seed=seed) for seed in (3, 0))
    straight.draw()
    resumed.load_state_dict(straight.state_dict())
    assert resumed.draw() == straight.draw()


def test_a_loader_knows_its_references_by_their_tokens_or_their_rows(monkeypatch):
    dated = "<s>Day {{ strftime_now('%d') }}.</s>" + TEMPLATE

    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, cls.day)

    def loader(day=1, template=dated, **changes):
        monkeypatch.setattr(Clock, "day", day)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        own = ReferenceSet(**{"name": "a", "dataset": rows(6), **changes})
        return ReferenceLoader.from_sets([own], tokenizer, OGPSAConfig(), step_examples=4)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    saved = loader().state_dict()
    assert loader(2).digest.partition("-")[0] != saved["digest"].partition("-")[0], "the date is not shown"
    loader(2).load_state_dict(saved)
    loader(dataset=iter([{**row, "source": "web"} for row in rows(6)])).load_state_dict(saved)
    loader().load_state_dict({**saved, "digest": saved["digest"].partition("-")[0]})  # as saved before
    for other in (
        loader(dataset=rows(7)[1:]),
        loader(2, max_length=99),
        loader(2, loss="all"),
        loader(1, "<s>Another template.</s>" + TEMPLATE),
    ):
        with pytest.raises(ValueError, match="but other examples"):
            other.load_state_dict(saved)


def test_a_loader_for_a_loop_of_ones_own_takes_no_pairs():
    pairs = ReferenceSet("pairs", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}], loss="dpo")
    with pytest.raises(ValueError, match="'pairs' has loss='dpo', which needs the log-probabilities"):
        ReferenceLoader.from_sets([pairs], tiny_tokenizer(), OGPSAConfig(), step_examples=8)
