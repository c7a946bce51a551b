"""Reference sets from prompts alone, answered by a tiny model that was taught what to say; the built-in prompts."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from models import TEMPLATE_OF_PARTS, chat, randomize, tiny_llama, tiny_processor, tiny_tokenizer
from peft import IA3Config, LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from peft_ogpsa import ReferenceSet
from peft_ogpsa.data import NAMES, PROMPTS, SPLITS, load, load_prompts
from peft_ogpsa.references import self_answers
from peft_ogpsa.references.losses import answer_loss, collate
from peft_ogpsa.references.self_answers import AnswerCounts
from peft_ogpsa.text.access import base_parameters
from peft_ogpsa.text.tokenization import encode_row

MAX_NEW_TOKENS = 24
TAUGHT = {
    "Bird?": "A wren sings.",
    "Harm?": "I can't help you.",
    "Loop?": "ha " * 12,
    "Tale?": "The old fox went home at dusk and slept.",
}
CUT = TAUGHT["Tale?"][:MAX_NEW_TOKENS]


@pytest.fixture(scope="module")
def taught():
    """A model that has the answers above by heart, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    batch = collate([encode_row(tokenizer, chat(*pair), "row") for pair in TAUGHT.items()], 0, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = answer_loss(model, batch)
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.05
    model.zero_grad()
    return model, tokenizer


@pytest.fixture
def answered(taught, tmp_path):
    """`from_prompts` on the taught model, with what is given changed."""

    def build(prompts=tuple(TAUGHT), model=None, tokenizer=None, **options):
        settings = {"max_new_tokens": MAX_NEW_TOKENS, "cache_dir": tmp_path, "progress": False, "max_length": 200}
        return ReferenceSet.from_prompts(
            "own", prompts, model or taught[0], tokenizer or taught[1], **{**settings, **options}
        )

    return build


@pytest.fixture
def generated(monkeypatch):
    """The prompts of every call that generates."""
    calls = []

    def spy(*arguments, **options):
        calls.append(arguments[2])
        return answers_generate(*arguments, **options)

    answers_generate = self_answers.generate_ids
    monkeypatch.setattr(self_answers, "generate_ids", spy)
    return calls


def test_answers_are_kept_and_refusals_and_loops_dropped_and_counted(answered, caplog):
    with caplog.at_level(logging.INFO, logger="peft_ogpsa.references.self_answers"):
        own = answered()
    assert own.dataset == [
        {**chat("Bird?", "A wren sings."), "unfinished": False},
        {**chat("Tale?", CUT), "unfinished": True},
    ]
    assert own.counts == AnswerCounts(prompts=4, kept=2, refused=1, unclear=1, too_long=0, unfinished=1)
    assert (
        "Reference set 'own': the base model answers 2 of 4 prompts. It refuses 1, 1 answers are unclear, and 0 "
        "prompts are too long. 1 of the 2 answers are cut.\n"
    ) in caplog.text
    assert "Reference set 'own': the answers are stored in " in caplog.text


def test_short_answers_are_answers(answered, monkeypatch):
    """Yes or no, multiple choice and numbers are abilities. An answer that was cut is not known to be one."""
    primes = "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31"
    said = ["No.", "B", "42", primes, "?!"]
    tokenizer = tiny_tokenizer()
    end = [tokenizer.eos_token_id]
    monkeypatch.setattr(
        self_answers,
        "generate_ids",
        lambda *arguments, **options: [tokenizer(text)["input_ids"] + end for text in said],
    )
    prompts = [f"Question {i}?" for i in range(len(said))]
    own = answered(prompts, max_new_tokens=60)
    assert [row["completion"][0]["content"] for row in own.dataset] == ["No.", "B", "42", primes]
    assert own.counts.unclear == 1
    with pytest.raises(ValueError, match="answers 0 of 5 prompts"):
        answered(prompts, max_new_tokens=2)


def test_a_folder_that_cannot_be_written_is_named_before_the_work(answered, generated, monkeypatch):
    def no_file(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("peft_ogpsa.core.files.tempfile.TemporaryFile", no_file)
    with pytest.raises(OSError, match=r"cache_dir=.* cannot be written to \(Permission denied\)"):
        answered()
    assert generated == []
    monkeypatch.undo()
    own = answered()
    monkeypatch.setattr("peft_ogpsa.core.files.tempfile.TemporaryFile", no_file)
    assert answered().dataset == own.dataset  # what is stored there is read


def test_answers_that_cannot_be_stored_are_used(answered, monkeypatch, caplog):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(self_answers, "replacing", full)
    assert len(answered().dataset) == 2
    assert "Reference set 'own': the answers are used, but cannot be stored for the next run: " in caplog.text
    assert "No space left" in caplog.text


def test_spaces_before_punctuation_stay(answered, monkeypatch):
    """Older versions of transformers remove them for tokenizers such as Llama 3's."""
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True  # as it was then
    written = "if x != y : print('a , b') . So it ends ."
    monkeypatch.setattr(
        self_answers,
        "generate_ids",
        lambda *arguments, **options: [tokenizer(written)["input_ids"] + [tokenizer.eos_token_id]],
    )
    (row,) = answered(["Bird?"], tokenizer=tokenizer, max_new_tokens=99).dataset
    assert row["completion"][0]["content"] == written
    assert "ids" not in row


@pytest.mark.parametrize("thought", ["<think>Hm.</think>", "<think>Hm, and"])
def test_an_answer_that_the_template_would_rewrite_keeps_its_tokens(thought, answered, taught, monkeypatch):
    tokenizer = copy.copy(taught[1])
    # As those of reasoning models: earlier thoughts are dropped.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('</think>')[-1].replace('<think>', '')"
    )
    assert tokenizer.chat_template != taught[1].chat_template
    written = {"Bird?": "A wren sings.", "Tale?": f"{thought} The fox slept."}
    asked = []

    def generate(model, tokenizer, prompts, **settings):
        asked.extend(prompts)
        return [tokenizer(text)["input_ids"] for text in written.values()]

    monkeypatch.setattr(self_answers, "generate_ids", generate)
    for _ in range(2):  # the second time from the file
        own = answered(prompts=list(written), tokenizer=tokenizer, max_new_tokens=500)
        bird, tale = own.tokenize(tokenizer)
        assert "ids" not in own.dataset[0]
        assert tokenizer.decode(bird.answer).startswith("A wren sings.")
        assert tale.ids == asked[1] + tokenizer(written["Tale?"])["input_ids"]
        assert tale.answer_start == len(asked[1])
        assert tale.loss == own.loss
    assert len(asked) == 2
    own.max_length = len(asked[1]) + 5
    assert own.tokenize(tokenizer)[1].ids == tale.ids[: len(asked[1]) + 5]


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_a_refusal_after_a_thought_between_special_tokens_is_one(marks, answered, taught, monkeypatch):
    """Special tokens are left out of an answer's text. With its marks, the thought does not count as the answer."""
    tokenizer = copy.deepcopy(taught[1])
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    thought = f"{marks[0]}Birds sing.{marks[1]}"
    said = [f"{thought}I'm sorry, but I can't help with that.", f"{thought}A wren sings."]
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in said]
    monkeypatch.setattr(self_answers, "generate_ids", lambda *arguments, **options: written)
    own = answered(["Tale?", "Bird?"], tokenizer=tokenizer, max_new_tokens=99)
    (row,) = own.dataset
    assert own.counts.refused == 1
    assert row["completion"][0]["content"] == "<think>Birds sing.</think>A wren sings."
    (example,) = own.tokenize(tokenizer)
    assert example.ids[example.answer_start :][: len(written[1])] == written[1]


def test_a_thought_that_the_template_opens_stays_open(answered, taught, monkeypatch):
    """As with templates whose generation prompt ends with `<think>`: the row is scored where the model wrote it."""
    tokenizer = copy.copy(taught[1])
    opened = tokenizer.chat_template.replace("<s>assistant: {% endif %}", "<s>assistant: <think>{% endif %}")
    assert opened != tokenizer.chat_template
    tokenizer.chat_template = opened
    asked = []

    def generate(model, tokenizer, prompts, **settings):
        asked.extend(prompts)
        return [tokenizer("The user asks about birds")["input_ids"]]

    monkeypatch.setattr(self_answers, "generate_ids", generate)
    (example,) = answered(["Bird?"], tokenizer=tokenizer).tokenize(tokenizer)
    assert tokenizer.decode(asked[0]).endswith("<think>")
    assert example.ids[: example.answer_start] == asked[0]


@pytest.mark.parametrize("post_processor", ["<s> $A", "$A </s>"])
def test_a_tokenizer_that_adds_tokens(answered, taught, generated, post_processor):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    answered(["Bird?"], tokenizer=tokenizer)
    ids = tokenizer("Bird?")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=post_processor, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    answered(["Bird?"], tokenizer=tokenizer)
    assert len(generated) == 2, "the first answers are not used again"
    assert generated[1] == [[1, *ids] if "<s>" in post_processor else ids], "the prompt has no end"


def test_the_template_of_a_processor_is_not_left_out(answered, taught):
    tokenizer = tiny_tokenizer()
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template=tokenizer.chat_template)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"Set processor.tokenizer.chat_template = processor.chat_template"):
        answered(tokenizer=processor)


def test_a_processor_is_asked_as_in_training(answered, monkeypatch):
    """TRL asks the processor, which may add a first token that its tokenizer does not add."""
    processor = tiny_processor(TEMPLATE_OF_PARTS)
    asked = []

    def generate(model, tokenizer, prompts, **settings):
        asked.extend(prompts)
        return [tokenizer("A wren sings.", add_special_tokens=False)["input_ids"] for _ in prompts]

    monkeypatch.setattr(self_answers, "generate_ids", generate)
    own = answered(["Bird?"], tokenizer=processor)
    assert own.chat_template == TEMPLATE_OF_PARTS
    assert processor.tokenizer.decode(asked[0]) == "<s>USER: Bird? ASSISTANT: "
    assert "ids" not in own.dataset[0]
    (example,) = own.tokenize(processor)
    assert example.ids[: example.answer_start] == asked[0]
    assert answered(["Bird?"], tokenizer=processor).dataset == own.dataset
    assert len(asked) == 1
    answered(["Bird?"], tokenizer=processor.tokenizer)
    assert len(asked) == 2, "asked in another way"


def test_columns_for_the_chat_template_reach_it(answered, taught, generated):
    tokenizer = copy.copy(taught[1])
    tokenizer.chat_template = "{{ mood }}{{ tools }}" + tokenizer.chat_template
    row = {"prompt": "Bird?", "chat_template_kwargs": {"mood": "calm"}, "tools": [{"name": "look"}]}
    rows = [row, {**row, "chat_template_kwargs": {"mood": "wild"}}, "Bird?"]
    sets = [answered(prompts=[own], tokenizer=tokenizer) for own in rows]
    starts = ["calm[{'name': 'look'}]", "wild[{'name': 'look'}]", ""]
    for own, ((ids,), start) in zip(sets, zip(generated, starts, strict=True), strict=True):
        assert tokenizer.decode(ids).replace("<s>", "").startswith(start)
        (example,) = own.tokenize(tokenizer)
        assert example.ids[: example.answer_start] == ids
    assert len(generated) == 3  # not from one another's file


def test_a_cut_answer_does_not_teach_to_stop(answered, taught):
    tokenizer = taught[1]
    own = answered()
    finished, cut = own.tokenize(tokenizer)
    assert tokenizer.decode(finished.answer) == "A wren sings.</s>"
    assert tokenizer.decode(cut.answer) == CUT
    own.loss = "all"
    assert [example.answer_start for example in own.tokenize(tokenizer)] == [1, 1]
    assert own.tokenize(tokenizer)[1].ids == cut.ids


def test_truncation_still_cuts_the_rows(answered, taught):
    own = answered(max_length=34)
    assert [len(example.ids) for example in own.tokenize(taught[1])] == [34, 34]


def test_what_is_taught_is_what_the_model_said(answered, taught):
    model, tokenizer = taught
    loss = answer_loss(model, collate(answered().tokenize(tokenizer), 0, "cpu"))
    assert loss < 0.1


def test_without_a_template_rows_are_plain(taught, tmp_path, answered, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    said = {"2+2=": " four, of course.", "Once": " upon a time there was a fox"}
    end = [tokenizer.eos_token_id]

    def generate_ids(model, tokenizer, prompts, **settings):
        texts = [said[tokenizer.decode(ids)] for ids in prompts]
        return [(tokenizer(text)["input_ids"] + end)[:MAX_NEW_TOKENS] for text in texts]

    monkeypatch.setattr(self_answers, "generate_ids", generate_ids)
    own = answered(list(said), tokenizer=tokenizer)
    assert own.dataset == [
        {"prompt": "2+2=", "completion": " four, of course.", "unfinished": False},
        {"prompt": "Once", "completion": said["Once"][:MAX_NEW_TOKENS], "unfinished": True},
    ]
    assert [tokenizer.decode(example.answer) for example in own.tokenize(tokenizer)] == [
        " four, of course.</s>",
        said["Once"][:MAX_NEW_TOKENS],
    ]
    with pytest.raises(ValueError, match=r"'own': prompt 0 is conversational, but the tokenizer has no chat template"):
        answered([[{"role": "user", "content": "Hi"}]], tokenizer=tokenizer)


def test_half_a_character_is_dropped(taught, answered, monkeypatch):
    tokenizer = taught[1]
    ids = tokenizer("A wren sang with great j\u00f6y")["input_ids"]
    position = next(i for i in range(len(ids)) if tokenizer.decode(ids[: i + 1]).endswith("\ufffd"))
    monkeypatch.setattr(self_answers, "generate_ids", lambda *_, **__: [ids[: position + 1]])
    (row,) = answered(["Bird?"], max_new_tokens=position + 1).dataset
    assert row["completion"][0]["content"] == "A wren sang with great j"


def test_prompts_may_be_messages_or_rows(answered):
    messages = [{"role": "user", "content": "Bird?"}]
    for prompts in (
        ["Bird?"],
        [messages],
        [{"prompt": "Bird?"}],
        [{"prompt": messages}],
        [{"prompt": None, "messages": messages}],
        [{"messages": [*messages, {"role": "assistant", "content": "Another answer."}]}],
    ):
        assert answered(prompts).dataset == [{**chat("Bird?", "A wren sings."), "unfinished": False}]


def test_the_adapter_is_off_and_nothing_is_changed(taught, answered, generated):
    base, tokenizer = taught
    expected = answered().dataset
    with torch.random.fork_rng():
        other = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    other.load_state_dict(base.state_dict())
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    model = randomize(get_peft_model(other, config)).train()

    def state():
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return flags, [module.training for module in model.modules()], torch.get_rng_state().tolist()

    before, weights = state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = (tokenizer.padding_side, tokenizer.chat_template, model.generation_config)
    # The same weights give the same file, so another folder shows that the model answers as its base does.
    assert answered(model=model).dataset == expected
    assert len(generated) == 1
    assert answered(model=model, batch_size=3).dataset == expected
    assert len(generated) == 2
    assert state() == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert settings == (tokenizer.padding_side, tokenizer.chat_template, model.generation_config)
    randomize(model, seed=7)  # as training would
    answered(model=model)
    assert len(generated) == 2


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5], "lm_head": [6]}),
        LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"]),
        LoraConfig(target_modules=["q_proj"], use_dora=True),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ],
    ids=["tokens", "tokens of two layers", "modules", "dora", "ia3"],
)
def test_answers_of_the_base_are_used_again_below_any_adapter(taught, answered, generated, config):
    base, _ = taught
    expected = answered().dataset
    model = get_peft_model(copy.deepcopy(base), config)
    for _ in range(2):
        assert answered(model=model).dataset == expected
        for name, parameter in model.named_parameters():  # as training would
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    assert len(generated) == 1
    found = dict(base_parameters(model.get_base_model()))
    assert found.keys() == dict(base.named_parameters()).keys()
    with torch.no_grad():
        found["model.embed_tokens.weight"].mul_(2)
    assert self_answers._weights_digest(model.get_base_model()) != self_answers._weights_digest(base)


def test_answers_are_kept_on_disk_and_used_again(answered, generated, tmp_path):
    first = answered()
    again = answered()
    assert len(generated) == 1
    assert (again.dataset, again.counts) == (first.dataset, first.counts)
    (file,) = tmp_path.iterdir()  # no unfinished file either
    assert [json.loads(line)["prompt"][0]["content"] for line in file.read_text().splitlines()] == list(TAUGHT)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 23},
        {"batch_size": 2},
        {"seed": 1},
        {"sample": True},
        {"samples": 3},
        {"prompts": [*TAUGHT, "Fish?"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_answered_anew(answered, generated, change):
    answered()
    answered(**change)
    assert len(generated) == 2


def test_a_change_of_one_value_is_noticed(taught, answered, generated):
    model = copy.deepcopy(taught[0])
    answered(model=model)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, -1] += 1e-3
    answered(model=model)
    assert len(generated) == 2


def test_other_weights_and_templates_are_answered_anew(taught, answered, generated):
    model, _ = taught
    answered()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += " "
    answered(tokenizer=tokenizer)
    assert len(generated) == 2
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.0001)
    try:
        answered()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert len(generated) == 3
    answered()
    assert len(generated) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "\n".join(text.splitlines()[:-1]),
        lambda text: text.replace("Bird?", "Fish?"),
        lambda text: text.replace('"unfinished": true', '"unfinished": 1'),
        lambda text: text.replace('"completion"', '"answer"'),
        lambda text: "[]\n",
        lambda text: "\udcff",
    ],
    ids=["cut", "short", "prompt", "flag", "column", "list", "bytes"],
)
def test_a_damaged_file_is_rebuilt_with_a_warning(answered, generated, tmp_path, caplog, damage):
    expected = answered().dataset
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    file.write_text(damage(text), errors="surrogateescape")
    assert answered().dataset == expected
    assert len(generated) == 2
    assert f"{file} is damaged" in caplog.text
    assert file.read_text() == text


def test_a_base_that_answers_on_the_cpu_beside_an_accelerator_is_named(answered, monkeypatch, caplog):
    answered(tuple(TAUGHT)[:2])
    assert "on the CPU" not in caplog.text
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    answered(tuple(TAUGHT)[:2])
    assert "on the CPU" not in caplog.text, "these answers are stored"
    answered(tuple(TAUGHT)[:3])
    assert "answers these prompts on the CPU, which is slow, although there is a cuda device" in caplog.text
    assert "device_map='cuda'" in caplog.text


def test_an_interrupted_write_leaves_nothing_behind(answered, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(self_answers.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        answered()
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_in_the_users_cache(answered, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answered(cache_dir=None)
    assert len(list((tmp_path / "cache" / "peft_ogpsa").glob("*.jsonl"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    answered(cache_dir=None)
    assert len(list((tmp_path / ".cache" / "peft_ogpsa").glob("*.jsonl"))) == 1


def test_draws_depend_on_the_seed_alone(taught, answered, generated, tmp_path):
    _, tokenizer = taught
    fresh = tiny_llama(vocab_size=len(tokenizer))

    def drawn(seed, folder, noise):
        torch.manual_seed(noise)
        with contextlib.suppress(ValueError):  # noise may well be no answer
            answered(model=fresh, sample=True, seed=seed, cache_dir=tmp_path / folder)
        (file,) = (tmp_path / folder).iterdir()
        return [json.loads(line)["completion"] for line in file.read_text().splitlines()]

    assert drawn(0, "a", 1) == drawn(0, "b", 2) != drawn(1, "c", 1)


def test_prompts_without_room_are_dropped(answered, generated):
    own = answered(["Bird?", "Bird? " * 50])
    assert (own.counts.kept, own.counts.too_long) == (1, 1)
    assert len(generated[0]) == 1
    with pytest.raises(ValueError, match="all 1 prompts have max_length=200 tokens or more"):
        answered(["Bird? " * 50])


def test_all_refused(answered):
    with pytest.raises(ValueError, match=r"'own': .* answers 0 of 2 .* 1 answers are unclear, .*Give prompts that"):
        answered(["Harm?", "Loop?"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "'own' has no prompts"),
        ({"prompts": "Bird?"}, "prompts is a single str"),
        ({"prompts": [{"text": "Bird?"}]}, r"'own': prompt 0 has the columns \['text'\]"),
        ({"samples": 0}, "samples=0 must be"),
        ({"max_length": 0}, "max_length=0 must be"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments(answered, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        answered(**options)
    assert list(tmp_path.iterdir()) == []


# The built-in prompts

MINIMUM = {"general": 120, "arithmetic": 80, "lookalikes": 100}


def words(text):
    return re.findall(r"[^\W_]+", text.lower().replace("'", ""))


def trigrams(text):
    found = words(text)
    return {tuple(found[i : i + 3]) for i in range(len(found) - 2)} or {tuple(found)}


def overlap(first, second):
    a, b = trigrams(first), trigrams(second)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("name", PROMPTS)
def test_there_are_enough_prompts(name):
    prompts = load_prompts(name)
    assert len(prompts) >= MINIMUM[name]
    assert all(prompt == prompt.strip() and 3 <= len(prompt.split()) <= 40 for prompt in prompts)


def test_no_prompt_is_repeated_or_known():
    new = [prompt for name in PROMPTS for prompt in load_prompts(name)]
    known = [row["prompt"][0]["content"] for name in NAMES for split in SPLITS for row in load(name, split)]
    plain = [" ".join(words(prompt)) for prompt in new + known]
    assert len(plain) == len(set(plain))
    for first, second in itertools.chain(itertools.combinations(new, 2), itertools.product(new, known)):
        assert overlap(first, second) < 0.5, f"{first!r} / {second!r}"


def test_arithmetic_prompts_have_numbers_and_a_question():
    number = re.compile(r"\d|\b(?:two|three|four|five|six|seven|half|twice|quarter)\b", re.IGNORECASE)
    for prompt in load_prompts("arithmetic"):
        assert number.search(prompt), prompt
        assert prompt.endswith("?"), prompt


def test_an_unknown_set_of_prompts():
    with pytest.raises(ValueError, match=r"name='maths'.*'general', 'arithmetic', 'lookalikes'"):
        load_prompts("maths")
