"""Short versions of `benchmarks.torture`, and what its long runs found: each of these failed before its mend."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tiny_tokenizer
from peft import get_peft_model
from test_callback import GENERAL, bare_model, model_of, sets, sft, weights
from trl import SFTConfig

from benchmarks.torture import soak
from benchmarks.torture.fuzz import Target, probe
from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet, save_card
from peft_ogpsa.cli.arguments import parser
from peft_ogpsa.cli.compare import read as read_result
from peft_ogpsa.cli.loading import load_adapter, read_adapter_config
from peft_ogpsa.core.files import check_writable, json_lines, read_json
from peft_ogpsa.core.forms import check_form, fits
from peft_ogpsa.data.public import read_public
from peft_ogpsa.evaluation import Estimate, Evaluation, Measurement
from peft_ogpsa.integrations.llamafactory import read as read_llamafactory
from peft_ogpsa.references.budget import refresh_samples
from peft_ogpsa.text.tokenization import encode_prompt
from peft_ogpsa.trainer import checkpoint

ROOT = Path(__file__).parents[1]
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


# Kills


@pytest.fixture
def saved(tmp_path):
    """The output folder of a run with the checkpoints 2 and 4."""
    sft(tmp_path, **SAVING).train()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "flaw"),
    [
        ("trainer_state.json", "trainer_state.json is missing"),
        (checkpoint.STATE_NAME, "ogpsa_state.json is missing"),
        ("trainer_state.json/half", "is damaged"),
        ("optimizer.pt/half", "optimizer.pt is cut off"),
        ("adapter_model.safetensors/half", "adapter_model.safetensors is cut off"),
        (f"{checkpoint.TENSORS_NAME}/half", "ogpsa_subspace.safetensors is cut off"),
    ],
)
def test_checkpoints_that_are_not_whole_are_skipped_with_a_message(saved, name, flaw, caplog):
    name, _, half = name.partition("/")
    path = saved / "checkpoint-4" / name
    content = path.read_bytes()
    path.unlink()
    if half:
        path.write_bytes(content[: len(content) // 2])
    assert checkpoint.last_whole(saved) == saved / "checkpoint-2"
    assert "checkpoint-4 is skipped, because it is not whole" in caplog.text
    assert flaw in caplog.text


def test_a_link_that_leads_nowhere_is_no_error(saved):
    (saved / "checkpoint-4" / "latest").symlink_to("nothing")
    assert checkpoint.last_whole(saved) == saved / "checkpoint-4"


def test_the_newest_whole_checkpoint_is_found_by_number(saved, caplog):
    shutil.copytree(saved / "checkpoint-2", saved / "checkpoint-10")
    (saved / "checkpoint-x").mkdir()
    assert checkpoint.last_whole(saved) == saved / "checkpoint-10"
    (saved / "checkpoint-10" / checkpoint.STATE_NAME).unlink()
    assert checkpoint.last_whole(saved, subspace=False) == saved / "checkpoint-10"
    assert checkpoint.last_whole(saved / "nothing") is None


def test_the_run_that_has_written_last_is_the_one_that_is_resumed(tmp_path, saved, caplog):
    sft(tmp_path, **{**SAVING, "max_steps": 2}).train()  # into the same folder: the older run had 4 steps
    assert checkpoint.last_whole(saved) == saved / "checkpoint-2"
    assert f"checkpoint-4 is skipped, because another run has written {saved / 'checkpoint-2'} later" in caplog.text
    sft(tmp_path, **SAVING).train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert checkpoint.last_whole(saved) == saved / "checkpoint-4"


def test_the_error_for_half_a_subspace_names_the_newest_whole_checkpoint(tmp_path, saved):
    (saved / "checkpoint-4" / checkpoint.STATE_NAME).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"newest whole checkpoint is .*checkpoint-2\."):
        sft(tmp_path, **{**SAVING, "max_steps": 6}).train(resume_from_checkpoint=str(saved / "checkpoint-4"))


@pytest.mark.parametrize("subspace", ["gradients", "both"])
def test_a_finished_run_that_is_resumed_does_not_change(tmp_path, subspace, caplog):
    options = {**SAVING, "lr_scheduler_type": "constant"}  # 6 steps are an epoch
    trainer = sft(tmp_path, model_of(subspace=subspace), **options)
    trainer.train()
    resumed = sft(tmp_path, model_of(subspace=subspace), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    expected = weights(trainer.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.model).items())
    assert "The resumed run was finished" in caplog.text
    assert resumed.model.projector.enabled


@pytest.mark.slow
def test_killed_runs_continue_to_the_same_weights(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.torture",
        "kills",
        "--count",
        "6",
        "--output",
        str(tmp_path / "k.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["differing"] == 0
    assert found["kills"] >= 3


# Files that cannot be written


def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(tmp_path):
    state = {"tensors": {"a": torch.ones(5000)}, "rest": {"b": 1}}
    checkpoint.save(tmp_path, state)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # a larger file fails as on a full disk
    try:
        with pytest.raises(OSError, match=r"ogpsa_subspace\.safetensors cannot be written"):
            checkpoint.save(tmp_path, {**state, "tensors": {"a": torch.zeros(5000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(OSError, match=r"output_dir=.*cannot be written to"):
            check_writable(folder, "output_dir")
    assert (tmp_path / "file").read_text() == "kept"
    check_writable(tmp_path / "new", "output_dir")
    assert not (tmp_path / "new").exists()  # bad input found later must leave nothing


# Fuzzing


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    from benchmarks.torture.targets import targets

    return targets(tmp_path_factory.mktemp("fuzz"))


def test_random_input_works_or_raises_a_documented_error(targets):
    logging.disable(logging.WARNING)
    try:
        found = {name: probe(target, max(3, round(25 * target.share))) for name, target in targets.items()}
    finally:
        logging.disable(logging.NOTSET)
    assert len(found) > 20
    assert not {name: own.failures for name, own in found.items() if own.failures}


def test_the_fuzzer_finds_errors_from_inside():
    from hypothesis import strategies as st

    def faulty(number):
        return [1][number] if number else bytearray(2**45)

    failures = probe(Target(faulty, st.integers(0, 3)), 20).failures
    assert any(failure.startswith("IndexError") for failure in failures)
    assert any(failure.startswith("MemoryError") for failure in failures)
    assert "names nothing" in next(iter(probe(Target(int, st.just("x"), ("field",)), 2).failures))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "of the type NoneType"),
        ({"messages": 5}, "of the type int"),
        ({"messages": "text"}, "text in the column messages"),
        ({"messages": [None]}, r"the message None"),
        ({"messages": [{"content": "no role"}]}, "Give each message a role"),
        ({"prompt": "a", "completion": 5}, "of the type int"),
        ({"prompt": "a", "completion": b"b"}, "of the type bytes"),
        ({"prompt": "a", "completion": "\ud800"}, "not valid Unicode"),
        ({"chosen": 5, "rejected": "x"}, "of the type int"),
    ],
)
def test_rows_of_wrong_types_are_named(row, message):
    with pytest.raises(ValueError, match=rf"'known': row 0.*{message}"):
        ReferenceSet("known", [row]).tokenize(tiny_tokenizer())


def test_columns_without_a_value_are_no_columns():
    row = {"messages": None, "text": None, **GENERAL[0]}
    tokenizer = tiny_tokenizer()
    assert ReferenceSet("a", [row]).tokenize(tokenizer) == ReferenceSet("a", GENERAL[:1]).tokenize(tokenizer)
    asked = {"prompt": None, "messages": GENERAL[0]["prompt"]}
    assert encode_prompt(tokenizer, asked) == encode_prompt(tokenizer, GENERAL[0]["prompt"])
    with pytest.raises(ValueError, match=r"this prompt has the columns \[\]"):
        encode_prompt(tokenizer, {"prompt": None}, "this prompt")


def test_a_message_without_content_calls_a_tool():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    row = {"messages": [*GENERAL[0]["prompt"], call]}
    assert ReferenceSet("a", [row]).tokenize(tiny_tokenizer())


@pytest.mark.parametrize("prompt", [5, None, b"x", [5], [{"role": 1, "content": "x"}], "\ud800", []])
def test_prompts_of_wrong_types_are_named(prompt):
    with pytest.raises(ValueError, match=r"this prompt|chat template"):
        encode_prompt(tiny_tokenizer(), prompt, "this prompt")


@pytest.mark.parametrize("dataset", [None, 5, "rows", {"text": "x"}])
def test_a_reference_set_of_something_else_than_rows(dataset):
    with pytest.raises(ValueError, match=r"'known': dataset is of the type"):
        ReferenceSet("known", dataset)


@pytest.mark.parametrize("exclude", [5, 2.5, None, "lm_head", [5], [""]])
def test_names_to_exclude_must_be_a_list(exclude):
    with pytest.raises(ValueError, match="exclude="):
        FullParameterConfig(exclude=exclude)
    assert FullParameterConfig(exclude=(name for name in ["a", "b"])).exclude == ("a", "b")


def test_numbers_beyond_those_of_floats():
    for name in ("reference_budget", "reference_weight"):
        with pytest.raises(ValueError, match=f"{name}="):
            OGPSAConfig(subspace="gradients", **{name: 10**400})
    with pytest.raises(ValueError, match="refresh_steps="):
        OGPSAConfig(subspace="gradients", refresh_steps=10**400)
    config = OGPSAConfig(subspace="gradients", reference_budget=1e308, rows_from="set")
    assert refresh_samples(config, 4096, 8, 1) == sys.maxsize
    with pytest.raises(ValueError, match="loss="):
        ReferenceSet("a", [], loss=[])


@pytest.mark.parametrize("change", [{"name": ...}, {"arguments": True}, {"evaluation": []}])
def test_damaged_results_of_eval_are_named(tmp_path, change):
    plain = Evaluation(Measurement("m", refusal=Estimate(0.5, 0.4, 0.6, 9)), None, {}).to_dict()
    result = {"name": "x", "arguments": {}, "evaluation": plain, **change}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({name: value for name, value in result.items() if value is not ...}))
    with pytest.raises(ValueError, match=r"result\.json is not a result"):
        read_result(str(path))
    plain["model"]["refusal"]["value"] = "x"
    path.write_text(json.dumps({"name": "x", "arguments": {}, "evaluation": plain}))
    with pytest.raises(ValueError, match="refusal is damaged: value"):
        read_result(str(path))


def nested(text="[" * 100_000):
    return text


@pytest.mark.parametrize("content", ["[]", "5", "null", '[["a", 1]]', "{", nested(), "\ud800"])
def test_json_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="line 1, is not a JSON object"):
        list(json_lines(content))


@pytest.mark.parametrize("content", ["null", "[]", "5", "{}", '{"peft_type": "NO"}', '{"r": 2}', nested(), "\0"])
def test_a_damaged_adapter_config_is_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="adapter="):
        read_adapter_config(str(tmp_path))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        save_card(tmp_path)


@pytest.mark.parametrize("base", [{"a": 1}, ["a"], 5])
def test_a_base_that_is_no_name_is_named(tmp_path, base):
    OGPSAConfig(r=2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        save_card(tmp_path)


def test_yaml_that_is_nested_too_deeply_is_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(nested())
    with pytest.raises(ValueError, match=r"a\.yaml is nested too deeply"):
        read_llamafactory([str(path)])
    with pytest.raises(ValueError, match=r"a\.yaml is nested too deeply"):
        parser("sft", SFTConfig).parse_args_and_config(["--config", str(path)])
    OGPSAConfig(r=2).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{nested()}\n---\n")
    with pytest.raises(ValueError, match=r"README\.md cannot be read"):
        save_card(tmp_path)


def test_damaged_weights_of_an_adapter_are_named(tmp_path):
    config = OGPSAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for content in (b"", path.read_bytes()[:-5], (2**62).to_bytes(8, "little") + path.read_bytes()[8:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="adapter="):
            load_adapter(tiny_llama(), str(tmp_path), read_adapter_config(str(tmp_path)), trainable=False)


def test_the_facts_of_a_card_must_be_a_mapping(tmp_path):
    OGPSAConfig(r=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a mapping of facts"):
        save_card(tmp_path, run=[1])


def test_rows_of_a_public_set_with_other_types_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in ('{"question": "a", "answer": 5}\n', '{"question": "a", "answer', "\0"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"The set 'gsm8k'"):
            read_public("gsm8k", path)


DAMAGES = [
    ("fingerprint", {}),
    ("weights", []),
    ("steps", None),
    ("fresh", [10**6]),
    ("cursor", "x"),
    ("config", None),
    ("rows", 10**9),
    ("order", None),
    ("order", [1, "a"]),
    ("inputs", [{"place": 0}]),
    ("loader", None),
    ("base_weights", {"model.norm.weight": 3}),
    ("base_weights", {"model.norm.weight": ""}),
]


@pytest.mark.parametrize(("entry", "value"), DAMAGES)
def test_damaged_entries_of_a_checkpoint_are_refused(tmp_path, entry, value):
    sft(tmp_path, model_of(subspace="both"), **SAVING).train()
    path = tmp_path / "run" / "checkpoint-4" / checkpoint.STATE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    resumed = sft(tmp_path, model_of(subspace="both"), **{**SAVING, "max_steps": 6})
    with pytest.raises(checkpoint.CheckpointError):
        resumed.train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_damaged_float32_copies_of_a_checkpoint_are_refused(tmp_path, damage):
    config = FullParameterConfig(rows=8, refresh_samples=4)

    def run(**options):
        callback = OGPSACallback(sets(), config=config)
        return sft(tmp_path, bare_model().to(torch.bfloat16), [callback], **{**SAVING, **options})

    run().train()
    folder = tmp_path / "run" / "checkpoint-4"
    state = checkpoint.load(folder)
    name = next(name for name in state["tensors"] if name.startswith("masters."))
    tensor = state["tensors"].pop(name)
    if damage != "missing":
        state["tensors"][name] = tensor[:1].clone() if damage == "shape" else tensor * torch.nan
    checkpoint.save(folder, state)
    with pytest.raises(checkpoint.CheckpointError, match="masters"):
        run(max_steps=6).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        ("1", float, False),
        (None, float | None, True),
        ([1, None], list[int | None], True),
        ([1, "x"], list[int], False),
        ({"a": 1.5}, dict[str, float], True),
        ({1: 1.5}, dict[str, float], False),
    ],
)
def test_forms(value, kind, expected):
    assert fits(value, kind) is expected
    if not expected:
        with pytest.raises(ValueError, match="it is damaged: a has the value"):
            check_form({"a": value}, {"a": kind}, "it")


# Soak


def test_nothing_grows_over_steps_and_nothing_of_a_dropped_model_stays():
    steps = soak.train(60)
    assert steps["refreshes"] >= 12
    assert not {"module hooks", "optimizer hooks", "threads", "files", "objects"} & set(steps["failures"])
    models = soak.drop(8)
    assert models["left"] == 0
    assert not {"optimizer hooks", "threads", "files"} & set(models["failures"])


def test_the_soak_test_sees_growth_and_what_stays(monkeypatch):
    held = {"memory": 1000, "objects": 1000, "files": 3}
    assert soak.grown([held, {**held, "memory": 1005}]) == []
    assert soak.grown([held, {"memory": 1011, "objects": 1000, "files": 4}]) == ["memory", "files"]
    kept = []

    def leaking(make):
        kept.append(make())
        return [weakref.ref(kept[-1])]

    monkeypatch.setattr(soak, "_trained", leaking)
    assert soak.drop(2)["left"] == 2
