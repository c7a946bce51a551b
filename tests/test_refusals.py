"""Safety rows from harmful prompts alone: what a tiny model says under an instruction is stubbed, or taught."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset
from models import chat, randomize, tiny_llama, tiny_tokenizer
from peft import LoraConfig, get_peft_model

import peft_ogpsa
from peft_ogpsa import refusals_from_prompts
from peft_ogpsa.data import load
from peft_ogpsa.references import self_answers
from peft_ogpsa.references.refusals import SAFETY_INSTRUCTION, OwnRefusals
from peft_ogpsa.text.generation import generate
from peft_ogpsa.text.refusal import Verdict, classify, repeats

RULE = "Refuse this."
SAID = {
    "Lock?": "I can't help you with locks. Ask a locksmith.",
    "Cake?": "Take two eggs and some flour.",
    "Noise?": "?!?!?!",
    "Tale?": "I can't help you. Please ask someone wh",
    "Bare?": "I can't help with that, because it would",
    "Loop?": "I can't help with that. " * 5,
}
USER = [{"role": "user", "content": "Lock?"}]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=259)


@pytest.fixture
def asked(monkeypatch):
    """What the model is asked, as text. It says what `SAID` has for the last word of a prompt, cut at 40 tokens."""
    questions = []

    def generate_ids(model, tokenizer, prompts, *, max_new_tokens, **settings):
        texts = [tokenizer.decode(ids) for ids in prompts]
        questions.extend(texts)
        answers = [next(said for name, said in SAID.items() if name in text) for text in texts]
        ids = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for answer in answers]
        # "Loop?" is whole: nothing but the loop is wrong with it.
        return [own if "Loop" in text else own[:max_new_tokens] for own, text in zip(ids, texts, strict=True)]

    monkeypatch.setattr(self_answers, "generate_ids", generate_ids)
    return questions


@pytest.fixture
def refused(model, tmp_path):
    """`refusals_from_prompts` on the tiny model, with what is given changed."""

    def build(prompts=tuple(SAID), tokenizer=None, model=model, **options):
        settings = {"system": RULE, "max_new_tokens": 130, "max_length": 200, "cache_dir": tmp_path, "progress": False}
        return refusals_from_prompts(prompts, model, tokenizer or tiny_tokenizer(), **{**settings, **options})

    return build


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_refusals_become_rows_and_the_rest_is_counted(refused, asked, caplog):
    with caplog.at_level(logging.INFO, logger="peft_ogpsa.references.refusals"):
        own = refused(max_new_tokens=39)
    assert own.rows == [chat("Lock?", "I can't help you with locks."), chat("Tale?", "I can't help you.")]
    rest = [[{"role": "user", "content": name}] for name in ("Cake?", "Noise?", "Bare?", "Loop?")]
    assert own.not_refused == rest
    assert (own.prompts, own.answered, own.unclear, own.too_long) == (6, 1, 3, 0)
    assert str(own) == (
        "the base model refuses 2 of 6 prompts. It answers 1, 3 answers are unclear, and 0 prompts are too long"
    )
    assert str(own) in caplog.text


def test_the_base_sees_the_instruction_and_the_rows_do_not(refused, asked):
    own = refused(["Lock?"])
    assert asked == ["<s>system: Refuse this.</s><s>user: Lock?</s><s>assistant: "]
    assert own.rows == [chat("Lock?", SAID["Lock?"])]
    assert RULE not in json.dumps(own.rows)


def test_the_default_instruction_is_ours(refused, asked):
    refused(["Lock?"], system=SAFETY_INSTRUCTION, max_length=500)
    refused(["Lock?"], system=f" {SAFETY_INSTRUCTION}\n", max_length=500)
    assert asked == [f"<s>system: {SAFETY_INSTRUCTION}</s><s>user: Lock?</s><s>assistant: "]  # asked once


def test_a_system_message_of_the_prompt_stays_before_the_instruction_and_in_the_row(refused, asked):
    prompt = [{"role": "system", "content": "You sell cakes."}, *USER]
    own = refused([prompt, {"messages": [*prompt, {"role": "assistant", "content": "Sure."}]}])
    assert asked == ["<s>system: You sell cakes.\n\nRefuse this.</s><s>user: Lock?</s><s>assistant: "] * 2
    assert [row["prompt"] for row in own.rows] == [prompt, prompt]
    assert prompt[0]["content"] == "You sell cakes."


RAISES = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DROPS = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [RAISES, DROPS], ids=["raises", "drops"])
def test_without_a_system_role_the_instruction_is_in_the_user_turn(refused, asked, template):
    earlier = [*USER, {"role": "assistant", "content": "No."}, *USER]
    own = refused([USER, earlier], with_template(template))
    first = "<user>Refuse this.\n\nLock?<assistant>"
    assert asked == [first, f"{first}No.<user>Lock?<assistant>"]
    assert [row["prompt"] for row in own.rows] == [USER, earlier]


def test_columns_for_the_chat_template_stay_with_the_row(refused, asked):
    options = {"chat_template_kwargs": {"polite": True}}
    own = refused([{"prompt": USER, **options}, {"prompt": USER, **options, "topic": "locks"}])
    assert own.rows == [chat("Lock?", SAID["Lock?"]) | options] * 2


def test_columns_of_some_rows_do_not_get_lost_in_a_data_set(refused, asked):
    tools = [{"type": "function", "function": {"name": "f"}}]
    own = refused([{"prompt": USER}, {"prompt": USER, "tools": tools}])
    assert Dataset.from_list(own.rows)[:]["tools"] == [None, tools]
    with pytest.raises(ValueError, match=r"refusals_from_prompts: chat_template_kwargs has the keys \[\] in one row"):
        refused([{"prompt": USER}, {"prompt": USER, "chat_template_kwargs": {"polite": True}}])


THOUGHTS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def test_thoughts_are_no_refusals(refused, asked):
    with pytest.raises(ValueError, match=r"1 answers are unclear.*enable_thinking.*False"):
        refused(["Lock?"], with_template(THOUGHTS))


def test_without_a_template_prompts_and_refusals_are_plain_text(refused, asked):
    own = refused(["Lock?"], with_template(None))
    assert asked == ["Refuse this.\n\nLock?"]
    assert own.rows == [{"prompt": "Lock?", "completion": SAID["Lock?"]}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "  "}, r"system='  ' must be a text"),
        ({"system": None}, r"system=None must be a text"),
        ({"samples": 0}, r"samples=0 must be an integer of at least 1"),
        ({"max_length": True}, r"max_length=True must be an integer of at least 1"),
        ({"prompts": []}, r"refusals_from_prompts has no prompts"),
        ({"prompts": "Lock?"}, r"prompts is a single str"),
        ({"prompts": [3]}, r"refusals_from_prompts: prompt 0 has a value of the type int"),
        ({"prompts": [[{"role": "user", "content": ["Lock?"]}]]}, r"prompt 0 has content of the type list"),
        ({"prompts": ["Lock?"], "max_length": 20}, r"all 1 prompts have max_length=20 tokens or more"),
        ({"prompts": [USER], "tokenizer": with_template(None)}, r"prompt 0 is conversational, but the tokenizer has"),
        (
            {"prompts": [USER], "tokenizer": with_template("Hi")},
            r"prompt 0: the chat template does not show the safety",
        ),
        (
            {"prompts": [USER], "tokenizer": with_template("{{ raise_exception('No turns') }}")},
            r"prompt 0 does not work with the tokenizer's chat template: No turns",
        ),
        (
            {"prompts": ["Cake?", "Noise?", "Lock? " * 40]},
            r"the base model refuses 0 of 3 prompts\. It answers 1, 1 answers are unclear, and 1 prompts are too long"
            r"\. So there is nothing to train on\. Give prompts .* another instruction as system",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input(refused, asked, options, message):
    with pytest.raises(ValueError, match=message):
        refused(**options)


def test_too_long_prompts_are_returned_too(refused, asked):
    long = "Lock? " * 40
    own = refused([long, "Lock?", "Cake?"])
    assert (own.prompts, len(own.rows), own.answered, own.too_long) == (3, 1, 1, 1)
    assert own.not_refused == [[{"role": "user", "content": text}] for text in ("Cake?", long)]


def test_samples_limits_the_prompts(refused, asked):
    assert refused(samples=2).prompts == 2
    assert len(asked) == 2


def test_answers_are_stored_for_an_instruction(refused, asked, tmp_path):
    first = refused()
    assert refused() == first
    assert len(asked) == len(SAID)
    refused(system="Refuse that.")
    assert len(asked) == 2 * len(SAID)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def obedient():
    """A model that was taught to refuse when it is told to, and to answer when it is not."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=259, hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    told = [{"role": "system", "content": RULE}]
    pairs = [([*told, *USER], "I can't help you."), (USER, "Use a pin.")]
    rows = [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in pairs]
    ids = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        losses = [model(torch.tensor([own]), labels=torch.tensor([own])).loss for own in ids]
        sum(losses).backward()
        optimizer.step()
    model.zero_grad()
    return model, tokenizer


def test_the_base_refuses_under_the_instruction_with_its_adapter_off(obedient, refused):
    base, tokenizer = obedient
    settings = {"tokenizer": tokenizer, "max_new_tokens": 24}
    expected = refused(["Lock?"], model=base, **settings)
    assert expected.rows == [chat("Lock?", "I can't help you.")]
    assert generate(base, tokenizer, ["Lock?"], max_new_tokens=24) == ["Use a pin."]  # without the instruction

    other = tiny_llama(vocab_size=259, hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    other.load_state_dict(base.state_dict())
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    model = randomize(get_peft_model(other, config)).train()

    def state():
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return flags, [module.training for module in model.modules()], torch.get_rng_state().tolist()

    told = [{"role": "system", "content": RULE}, *USER]
    assert generate(model, tokenizer, [told], max_new_tokens=24) != ["I can't help you."]
    before, weights = state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Another batch size, so that the model answers and not the file.
    assert refused(["Lock?"], model=model, batch_size=1, **settings) == expected
    assert refused(["Lock?"], model=model, batch_size=2, seed=5, **settings) == expected
    assert state() == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_repetition():
    assert repeats("I can't help with that. " * 3)
    assert repeats("**ha ha ha ha ha ha**")
    assert not repeats(SAID["Lock?"])
    assert classify(SAID["Loop?"]) == Verdict.REFUSAL  # so the matcher alone would keep it


def test_it_is_a_public_name():
    assert "refusals_from_prompts" in peft_ogpsa.__all__


@pytest.mark.slow
def test_the_real_model_refuses_and_its_rows_train(smollm2, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = smollm2
    prompts = [row["prompt"] for row in load("harmful", "train")[:24]]
    own = refusals_from_prompts(prompts, model, tokenizer, max_new_tokens=48, cache_dir=tmp_path, progress=False)
    assert isinstance(own, OwnRefusals)
    assert own.prompts == 24
    assert len(own.rows) >= 8
    for row in own.rows:
        assert row["prompt"] in prompts
        assert classify(row["completion"][0]["content"]) == Verdict.REFUSAL
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(own.rows),
        processing_class=tokenizer,
        peft_config=config,
    )
    assert 0 < trainer.train().training_loss < 6
    trainer.model.unload()
