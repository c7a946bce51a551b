"""`ogpsa eval`: public sets, several adapters in one call, runs that are stopped and continue, and a fast look."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import yaml
from models import chat, randomize, tiny_llama, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peft_ogpsa
from peft_ogpsa import OGPSAConfig, merge_adapter
from peft_ogpsa.cli import main
from peft_ogpsa.cli.eval_models import Base, read_adapters
from peft_ogpsa.cli.eval_plan import plan
from peft_ogpsa.cli.loading import load_base
from peft_ogpsa.data.prompt_sets import read_prompt_set
from peft_ogpsa.evaluation import (
    Comparison,
    Estimate,
    Evaluation,
    Evaluator,
    Measurement,
    Sample,
    Verdict,
    fingerprint,
    wilson,
)
from peft_ogpsa.evaluation import evaluate as measure
from peft_ogpsa.evaluation.pieces import Piece, run_pieces
from peft_ogpsa.evaluation.set_table import set_rows
from peft_ogpsa.evaluation.store import PieceStore
from peft_ogpsa.sharing.folder import weights_digest
from peft_ogpsa.text.generation import generate

TARGETS = ["q_proj", "v_proj"]
PIECE = {"model": "base", "piece": "builtin", "conditions": {}, "measurement": Measurement("m").to_dict()}


def base_model(seed=0):
    return tiny_llama(seed, vocab_size=259, max_position_embeddings=1024)


def save_adapter(folder, path, config, seed, base=None):
    model = randomize(get_peft_model(base or base_model(), config), seed)
    with torch.no_grad():  # what is trained beside LoRA's matrices: biases, and copies of the base's modules
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    model.save_pretrained(path)


@pytest.fixture
def folder(tmp_path):
    """A base, a plain and an OGPSA adapter, test rows, and a file with the columns of XSTest."""
    base_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
    save_adapter(tmp_path, tmp_path / "plain", LoraConfig(**options), 1)
    save_adapter(tmp_path, tmp_path / "ogpsa", OGPSAConfig(r=4, **options), 2)
    (tmp_path / "data").mkdir()
    for name in ("harmful", "benign", "general"):
        rows = [chat(f"{name} {i}?", "It is so.") for i in range(6)]
        (tmp_path / "data" / f"{name}_test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    rows = [{"type": ("contrast_" if i < 4 else "") + "x", "prompt": f"Secret {i}?"} for i in range(9)]
    (tmp_path / "xstest.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def evaluate(folder, output, *options, adapters=(), data=None):
    arguments = ["--adapter", *(str(folder / name) for name in adapters)] if adapters else []
    data = data or f"{folder / 'data'},xstest={folder / 'xstest.jsonl'}"
    main(["eval", "--output", str(folder / output), "--data", data, "--max_new_tokens", "4", *arguments, *options])
    return json.loads((folder / output).read_text())


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(own) for key, own in value.items() if key != "seconds"}
    return [without_seconds(own) for own in value] if isinstance(value, list) else value


def measured(result):
    return without_seconds(result["evaluation"])


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def passes(monkeypatch):
    """The names under which an evaluator measures, in order. `stop_at` stops it like a kill."""

    class Passes(list):
        stop_at = None

    seen = Passes()
    for method in ("measure", "base"):
        original = getattr(Evaluator, method)

        def counted(self, model, name="model", *rest, original=original, method=method):
            if len(seen) == seen.stop_at:
                raise KeyboardInterrupt
            seen.append((method, len(self.harmful or [])))
            return original(self, model, name, *rest)

        monkeypatch.setattr(Evaluator, method, counted)
    return seen


HALF = b"<!-- peft_ogpsa: end -->"


@pytest.mark.parametrize("content", [HALF, "# Notes".encode("utf-16"), b"---\ntags: [lora\n---\n"])
def test_a_card_that_cannot_be_written_is_told_before_anything_is_measured(folder, passes, content):
    (folder / "plain" / "README.md").write_bytes(content)
    with pytest.raises(SystemExit, match=r"^ogpsa eval: .*plain/README\.md "):
        evaluate(folder, "eval.json", "--card", adapters=["ogpsa", "plain"])
    assert passes == []
    assert (folder / "plain" / "README.md").read_bytes() == content
    evaluate(folder, "eval.json", adapters=["plain"])  # without --card, the card does not matter


def test_weights_that_change_in_the_meantime_are_not_those_that_were_measured(folder, monkeypatch):
    path = folder / "plain" / "adapter_model.safetensors"
    measured = weights_digest(folder / "plain")

    def replace(*arguments, **options):
        save_file({name: value + 1 for name, value in load_file(path).items()}, path)
        return run_pieces(*arguments, **options)

    monkeypatch.setattr("peft_ogpsa.cli.eval.run_pieces", replace)
    with pytest.raises(SystemExit, match=rf"^ogpsa eval: evaluation is about other weights: it has .*{measured}"):
        evaluate(folder, "eval.json", "--card", adapters=["plain"])
    assert json.loads((folder / "eval.json").read_text())["weights"] == measured != weights_digest(folder / "plain")
    assert not (folder / "plain" / "ogpsa_eval.json").exists()


def test_a_damaged_record_of_the_training_is_told_before_anything_is_measured(folder, passes):
    (folder / "plain" / "ogpsa_run.json").write_text("{")
    with pytest.raises(SystemExit, match=r"^ogpsa eval: .*plain/ogpsa_run\.json is damaged"):
        evaluate(folder, "eval.json", adapters=["plain"])
    assert passes == []


def test_a_card_that_is_damaged_in_the_meantime_costs_no_figures(folder, monkeypatch, capsys):
    def damage(*arguments, **options):
        (folder / "plain" / "README.md").write_bytes(HALF)
        return run_pieces(*arguments, **options)

    monkeypatch.setattr("peft_ogpsa.cli.eval.run_pieces", damage)
    with pytest.raises(SystemExit, match=r"^ogpsa eval: .*plain/README\.md lacks the mark"):
        evaluate(folder, "eval.json", "--card", "--plot", str(folder / "plot.png"), adapters=["plain"])
    printed = capsys.readouterr().out
    assert "xstest" in printed
    assert "Saved the result" in printed
    assert (folder / "plot.png").is_file()


def test_several_adapters_are_measured_as_each_alone(folder, passes, capsys):
    alone = [evaluate(folder, f"{name}.json", adapters=[name]) for name in ("plain", "ogpsa")]
    passes.clear()
    capsys.readouterr()
    options = ["--card", "--plot", str(folder / "plot.png")]
    both = evaluate(folder, "both.json", *options, adapters=["plain", "ogpsa"])
    printed = capsys.readouterr().out
    # The base once, then each adapter: its own data, then the set.
    assert passes == [("base", 6), ("base", 4), *[("measure", 6), ("measure", 4)] * 2]
    assert [result["name"] for result in both["results"]] == ["plain", "ogpsa"]
    for single, result in zip(alone, both["results"], strict=True):
        assert measured(result) == measured(single)
        assert result.keys() == single.keys()
        assert result["versions"] == {own.__name__: own.__version__ for own in (peft, peft_ogpsa, torch, transformers)}
        assert (result["weights"], result["arguments"]["adapter"]) == (
            single["weights"],
            single["arguments"]["adapter"],
        )
    assert measured(alone[0])["model"] != measured(alone[1])["model"]  # otherwise this test could not see the adapters
    rows = [[cell.strip() for cell in line.split("│")][1:-1] for line in printed.splitlines() if "│" in line]
    assert [row[0] for row in rows if len(row) == 7] == ["base", "plain", "ogpsa"]
    assert [row[:3] for row in rows if row[0] == "xstest"] == [
        ["xstest", name, "4 / 5"] for name in ("base", "plain", "ogpsa")
    ]
    # Two adapters, each with four quantities and two of the set. Both tables say the same number.
    assert " ".join(printed.split()).count("by Holm's test of all 12 differences from base together") == 2
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    for name in ("plain", "ogpsa"):
        card = (folder / name / "README.md").read_text(encoding="utf-8")
        assert "| xstest | this adapter | 4 / 5 |" in card
        assert "data=data,xstest=xstest.jsonl," in card
        shared = (folder / name / "ogpsa_eval.json").read_text(encoding="utf-8")
        assert "Secret" not in card + shared
        assert json.loads(shared)["versions"] == both["results"][0]["versions"]
        assert str(folder) not in card + shared

    main(["compare", str(folder / "both.json"), "--plot", str(folder / "compared.png")])
    compared = capsys.readouterr().out
    assert "measured differently" not in compared
    assert "Differences from plain" in compared
    assert "Refusal by set of prompts, and differences from plain" in compared
    assert " ".join(compared.split()).count("by Holm's test of all 12 differences from plain together") == 2
    # Two files, in which a name occurs twice.
    main(["compare", str(folder / "both.json"), str(folder / "plain.json")])
    compared = capsys.readouterr().out
    assert "both.json:" in "".join(compared.split())


@pytest.mark.parametrize(
    ("paths", "titles"),
    [
        (["out/a/final", "out/b/final", "other/"], ["a/final", "b/final", "other"]),
        (["/out/a/x/final", "/out/b/x/final"], ["a/x/final", "b/x/final"]),
        (["x/final", "final", "final/"], ["x/final", "final", "final/"]),  # no end distinguishes the last two
    ],
)
def test_adapters_are_named_by_the_end_of_their_paths(paths, titles, monkeypatch):
    monkeypatch.setattr("peft_ogpsa.cli.eval_models.read_adapter_config", lambda path: None)
    assert [adapter.title for adapter in read_adapters(paths, None)] == titles


def test_a_stopped_run_continues(folder, passes, capsys):
    whole = evaluate(folder, "whole.json", adapters=["plain", "ogpsa"])
    for stop in range(1, 6):
        (folder / "run.json").unlink(missing_ok=True)
        (folder / "run.json.pieces").unlink(missing_ok=True)
        passes.clear()
        passes.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder, "run.json", adapters=["plain", "ogpsa"])
        assert not (folder / "run.json").exists()
        passes.stop_at = None
        capsys.readouterr()
        result = evaluate(folder, "run.json", adapters=["plain", "ogpsa"])
        assert len(passes) == 6  # none was measured twice
        assert "base: already measured in an earlier run: " in capsys.readouterr().out
        assert [measured(own) for own in result["results"]] == [measured(own) for own in whole["results"]]


def test_a_full_disk_loses_no_figure(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    whole = evaluate(folder, "whole.json", adapters=["plain", "ogpsa"])
    monkeypatch.setattr(PieceStore, "add", full)
    result = evaluate(folder, "full.json", adapters=["plain", "ogpsa"])
    assert "is used, but cannot be stored for the next run: [Errno 28] No space left" in capsys.readouterr().out
    assert [measured(own) for own in result["results"]] == [measured(own) for own in whole["results"]]


def answers(measured):
    own = measured["sets"]["xstest"]
    return [sample["answer"] for sample in own["harmful_samples"] + own["benign_samples"]]


def test_a_base_in_4_bits_is_loaded_once(tmp_path):
    """On some CPUs, bitsandbytes stores the weights in another order at their first use. They are the same weights."""
    tiny_llama(hidden_size=64, vocab_size=259).save_pretrained(tmp_path / "base")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(hidden_size=64, vocab_size=259), config).save_pretrained(tmp_path / "adapter")
    base = Base(model.eval(), lambda: pytest.fail("The base is loaded again."))
    adapters = read_adapters([str(tmp_path / "adapter")], None) * 2
    base.check_fit(adapters)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        first = base.model(ids).logits
        later = base.on_each(adapters, lambda _, adapted: adapted.eval()(ids).logits)
    assert all(torch.equal(first, logits) for logits in later)  # B is zero


@pytest.mark.parametrize(
    ("settings", "kl"),
    [
        ({"modules_to_save": ["lm_head"]}, True),
        ({"bias": "all"}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"layer_replication": [[0, 2], [1, 2]]}, False),
    ],
)
def test_an_adapter_that_changes_the_base_changes_no_other_result(folder, settings, kl):
    biased = tiny_llama(0, vocab_size=259, max_position_embeddings=1024, attention_bias=True)
    biased.save_pretrained(folder / "model")
    options = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
    save_adapter(folder, folder / "changes", LoraConfig(**options, **settings), 5, biased)
    data = None if kl else f"xstest={folder / 'xstest.jsonl'}"
    base = measured(evaluate(folder, "base.json", "--model", str(folder / "model"), data=data))["model"]
    plain = measured(evaluate(folder, "plain.json", adapters=["plain"], data=data))
    alone = measured(evaluate(folder, "alone.json", adapters=["changes"], data=data))
    both = evaluate(folder, "both.json", adapters=["changes", "plain"], data=data)["results"]
    assert [measured(own) for own in both] == [alone, plain]
    assert [alone["base"][name] for name in ("general_mean", "harmful_samples")] == [
        base[name] for name in ("general_mean", "harmful_samples")
    ]
    assert answers(alone["base"]) == answers(base) != answers(alone["model"])
    # As PEFT loads it onto a new base.
    tokenizer = tiny_tokenizer()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "changes")
    rows = read_prompt_set("xstest", folder / "xstest.jsonl", None)
    rows.sort(key=lambda row: row["kind"] == "benign")
    prompts = [row["prompt"] for row in rows]
    assert answers(alone["model"]) == generate(model, tokenizer, prompts, max_new_tokens=4)
    if kl:
        general = [chat(f"general {i}?", "It is so.") for i in range(6)]
        own = measure(model, tokenizer, divergence_prompts=general, max_new_tokens=4)
        assert alone["model"]["kl"]["value"] == pytest.approx(own.model.kl.value)
        assert own.model.kl.value > 0.01


def test_an_adapter_is_added_to_a_finished_run(folder, passes, capsys):
    evaluate(folder, "run.json", adapters=["plain"])
    passes.clear()
    evaluate(folder, "run.json", adapters=["plain", "ogpsa"])
    assert passes == [("measure", 6), ("measure", 4)]


@pytest.mark.parametrize(
    ("change", "reason", "anew"),
    [
        ("setting", "max_length was 1024 and is 512", 4),
        ("seed", "seed was 0 and is 1", 4),
        ("weights", "other weights", 2),
        ("scale", "other weights", 2),
        ("base", "other weights", 4),
        ("template", "other tokenizer", 4),
        ("vocabulary", "other tokenizer", 4),
        ("end", "other config", 4),
        ("rope_parameters", "other config", 4),
        ("rms_norm_eps", "other config", 4),
        ("set", "other data", 2),
        ("rows", "other data", 2),
    ],
)
def test_what_has_changed_is_measured_again(folder, passes, capsys, change, reason, anew):
    evaluate(folder, "run.json", adapters=["plain"])
    passes.clear()
    capsys.readouterr()
    options = {"setting": ["--max_length", "512"], "seed": ["--seed", "1"]}.get(change, [])
    if change == "weights":
        save_adapter(folder, folder / "plain", LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS), 7)
    elif change == "scale":
        edit(folder / "plain" / "adapter_config.json", lora_alpha=80)
    elif change == "base":
        base_model(3).save_pretrained(folder / "model")
    elif change == "template":
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template += " "
        tokenizer.save_pretrained(folder / "model")
    elif change == "vocabulary":  # of the same size
        file = folder / "model" / "tokenizer.json"
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
        file.write_text(json.dumps(tokenizer), encoding="utf-8")
    elif change == "end":
        edit(folder / "model" / "generation_config.json", eos_token_id=[2, 100])
    elif change == "rope_parameters":
        edit(folder / "model" / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    elif change == "rms_norm_eps":
        edit(folder / "model" / "config.json", rms_norm_eps=1.0)
    elif change in ("set", "rows"):
        path = folder / ("xstest.jsonl" if change == "set" else "data/harmful_test.jsonl")
        path.write_text(path.read_text().replace("3?", "33?"), encoding="utf-8")
    result = evaluate(folder, "run.json", *options, adapters=["plain"])
    printed = capsys.readouterr().out
    assert len(passes) == anew
    assert reason in printed
    assert ("already measured" in printed) == (anew < 4)
    (folder / "run.json.pieces").unlink()
    assert measured(evaluate(folder, "run.json", *options, adapters=["plain"])) == measured(result)


def test_a_merged_model_is_measured_like_its_adapter(folder):
    of_adapter = measured(evaluate(folder, "adapter.json", adapters=["plain"]))["model"]
    merge_adapter(folder / "plain", folder / "merged", dtype=torch.float32)
    result = evaluate(folder, "merged.json", "--model", str(folder / "merged"))
    merged = measured(result)["model"]
    assert measured(result)["base"] is merged["kl"] is None
    assert merged["general_mean"]["value"] == pytest.approx(of_adapter["general_mean"]["value"], abs=1e-5)
    assert merged["refusal"] == of_adapter["refusal"]
    assert merged["sets"].keys() == {"xstest"}
    assert result["name"] == "merged"


def test_public_sets_alone(folder, capsys):
    result = evaluate(
        folder, "run.json", "--samples", "2", adapters=["plain"], data=f"xstest={folder / 'xstest.jsonl'}"
    )
    printed = capsys.readouterr().out
    evaluation = Evaluation.from_dict(result["evaluation"])
    assert not evaluation.model.has_own_data
    own = evaluation.model.sets["xstest"]
    assert (own.refusal.n, own.over_refusal.n) == (2, 2)
    assert "KL from base" not in printed
    low, high = wilson(0, 2)
    assert f"0% ({low:.0%} to {high:.0%})" in printed
    assert evaluation.to_dict() == result["evaluation"]
    main(["compare", str(folder / "run.json")])
    compared = capsys.readouterr().out
    assert "Refusal by set of prompts, and differences from base" in compared
    assert "KL from base" not in compared


def test_data_is_compared_by_its_rows(folder, capsys):
    evaluate(folder, "one.json", adapters=["plain"], data=str(folder / "data"))
    shutil.copytree(folder / "data", folder / "copy")
    other = folder / "copy" / "benign_test.jsonl"
    for name, reasons in (("same", []), ("other", ["the benign rows are not the same"])):
        evaluate(folder, f"{name}.json", adapters=["plain"], data=str(folder / "copy"))
        capsys.readouterr()
        main(["compare", str(folder / "one.json"), str(folder / f"{name}.json")])
        lines = [line for line in capsys.readouterr().out.splitlines() if "measured differently" in line]
        assert lines == [f"The results were measured differently: {reason}." for reason in reasons]
        other.write_text(other.read_text().replace("3?", "33?"), encoding="utf-8")


def test_one_row_has_no_interval(folder, capsys):
    def strict(name):
        def refuse(constant):
            raise AssertionError(f"{name} has {constant}")

        return json.loads((folder / name).read_text(), parse_constant=refuse)

    evaluate(folder, "run.json", "--samples", "1", "--card", adapters=["plain"])
    told = "(1 row: no interval)"
    assert told in capsys.readouterr().out
    assert told in (folder / "plain" / "README.md").read_text(encoding="utf-8")
    strict("run.json.pieces")
    for name in ("run.json", "plain/ogpsa_eval.json"):
        model = strict(name)["evaluation"]["model"]
        assert model["general_mean"]["low"] is model["kl"]["high"] is None
        loss = Measurement.from_dict(model).general_mean
        assert (loss.low, loss.high) == (-math.inf, math.inf)
    main(["compare", str(folder / "run.json")])
    compared = capsys.readouterr().out
    assert told in compared
    assert "(no interval)" in compared.partition("Differences from base")[2]
    assert "inf" not in compared


def test_a_fast_look_says_what_its_intervals_are(folder, capsys):
    result = evaluate(folder, "fast.json", "--fast", "--model", str(folder / "model"), data="builtin")
    assert result["arguments"]["samples"] == 24
    assert result["evaluation"]["model"]["refusal"]["n"] == 24
    low, high = wilson(12, 24)
    told = f"With 24 harmful prompts, a rate of 50% has the 95 % interval {low:.0%} to {high:.0%}."
    assert told in capsys.readouterr().out
    given = evaluate(
        folder, "given.json", "--fast", "--samples", "3", "--model", str(folder / "model"), data="builtin"
    )
    assert given["evaluation"]["model"]["refusal"]["n"] == 3


def test_arguments_for_the_chat_template(folder, capsys):
    """They reach every row, and what was measured with others is measured again."""
    tokenizer = tiny_tokenizer()
    said = "{{ message['content'] }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(said, "{{ word }}" + said)
    tokenizer.save_pretrained(folder / "model")
    options = ["--model", str(folder / "model")]
    plain = evaluate(folder, "a.json", *options)["evaluation"]["model"]
    word = ["--chat_template_kwargs", json.dumps({"word": "Please. "})]
    capsys.readouterr()
    asked = evaluate(folder, "a.json", *options, *word)["evaluation"]["model"]
    printed = capsys.readouterr().out
    assert f"{folder / 'data'} is measured again: other data." in printed
    assert "xstest is measured again: other data." in printed
    assert plain["general"] != asked["general"]
    no_word = ["--chat_template_kwargs", json.dumps({"word": ""})]
    assert evaluate(folder, "b.json", *options, *no_word)["evaluation"]["model"]["general"] == plain["general"]
    main(["compare", str(folder / "a.json"), str(folder / "b.json")])
    assert 'chat_template_kwargs is {"word": "Please. "}, {"word": ""}.' in capsys.readouterr().out
    for bad in ("enable_thinking", "[1]", "{"):
        with pytest.raises(SystemExit, match=r"chat_template_kwargs=.* must be a JSON object"):
            evaluate(folder, "c.json", *options, "--chat_template_kwargs", bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data", "builtin,heldout"],
            "contains builtin and heldout. Of builtin, heldout and a folder, give only one",
        ),
        (["--data", "xstest=a.csv,xstest=b.csv"], "a.csv' is not a file"),
        (["--data", "xstest=FOLDER/xstest.jsonl,xstest"], "contains xstest twice"),
        (["--data", "xstest"], "'xstest' .* cannot be loaded from the hub.*give xstest=FILE"),
        (["--data", "xstest=FOLDER/xstest.jsonl", "--plot", "a.png"], "plot='a.png' needs harmful and general rows"),
        (["--data", "xtest"], "data='xtest' contains none of .* Public sets are xstest"),
        (
            ["--data", "FOLDER/data", "--plot", "FOLDER/a.pdf"],
            "a.pdf' must be a .png file. Change the end of its name",
        ),
        (["--adapter", "FOLDER/plain", "FOLDER/plain"], "names an adapter twice"),
        (["--adapter", "FOLDER/plain", "FOLDER/plain/"], "names an adapter twice"),
        (["--adapter", "FOLDER/plain", "FOLDER/ogpsa/../plain"], "names an adapter twice"),
        (["--model", "no/model"], "model='no/model' cannot be loaded: .* Give a folder"),
        (["--adapter", "FOLDER/nameless"], "model is missing. Give a folder"),
        (["--adapter", "FOLDER/plain", "FOLDER/ogpsa", "--name", "one"], "must be 2 different names"),
        (["--adapter", "FOLDER/plain", "FOLDER/other"], "names adapters of different bases"),
        (["--adapter", "FOLDER/plain", "--name", "base"], "name='base' .*plain' is the base's own name.*another name"),
        (["--adapter", "FOLDER/base"], "name='base' .*base' is the base's own name.*another name"),
        (["--adapter", "FOLDER/plain", "FOLDER/wide", "--data", "builtin"], "wide' does not fit the model"),
        (
            ["--adapter", "FOLDER/renamed"],
            "renamed' does not fit .* no weights for some of the layers .*q_proj.lora_A",
        ),
        (["--adapter", "FOLDER/plain", "--adapter", "FOLDER/ogpsa"], "--adapter is given 2 times.*--adapter A B"),
        (["--adapter", "FOLDER/plain", "FOLDER/pissa"], "pissa' has init_lora_weights='pissa'.* Merge the adapter"),
        (["--adapter", "FOLDER/bias"], "bias' has bias='all', which changes the base itself.* Merge the adapter"),
        (["--adapter", "FOLDER/deep"], r"deep' has layer_replication=\[\[0, 2\], \[1, 2\]\]"),
        (["--adapter", "FOLDER/plain", "FOLDER/v1"], "different revisions of .*plain: main, .*v1: v1.0.* one by one"),
        (["--adapter", "FOLDER/plain", "FOLDER/asked"], "different chat templates or end tokens: .*plain and .*asked"),
        (["--adapter", "FOLDER/torn"], "torn' has a tokenizer that cannot be loaded: .* delete its files"),
    ],
)
def test_errors_come_before_anything_is_measured(folder, passes, options, message):
    save_adapter(folder / "elsewhere", folder / "other", LoraConfig(target_modules=TARGETS), 1)
    save_adapter(folder, folder / "base", LoraConfig(target_modules=TARGETS), 1)
    wide = get_peft_model(
        tiny_llama(0, vocab_size=259, hidden_size=64), LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS)
    )
    wide.peft_config["default"].base_model_name_or_path = str(folder / "model")
    wide.save_pretrained(folder / "wide")
    for name, settings in (
        ("pissa", {"init_lora_weights": "pissa"}),
        ("bias", {"bias": "all"}),
        ("deep", {"layer_replication": [[0, 2], [1, 2]]}),
        ("v1", {"revision": "v1.0"}),
        ("asked", {}),
        ("torn", {}),
        ("renamed", {}),
    ):
        save_adapter(folder, folder / name, LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **settings), 1)
    ask_otherwise(folder / "asked")
    shutil.copytree(folder / "plain", folder / "nameless")
    edit(folder / "nameless" / "adapter_config.json", base_model_name_or_path=None)
    (folder / "torn" / "tokenizer_config.json").write_text("{")
    weights = load_file(folder / "renamed" / "adapter_model.safetensors")
    weights = {name.replace(".model.layers", ".model.language_model.layers"): own for name, own in weights.items()}
    save_file(weights, folder / "renamed" / "adapter_model.safetensors")
    options = [option.replace("FOLDER", str(folder)) for option in options]
    model = [] if {"--adapter", "--model"} & {*options} else ["--model", str(folder / "model")]
    with pytest.raises(SystemExit, match=f"(?s)^ogpsa eval: .*{message}"):
        main(["eval", "--output", str(folder / "out.json"), *model, *options])
    assert passes == []
    assert not (folder / "out.json").exists()


def ask_otherwise(path):
    """Save a tokenizer with another chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<s>", "[")
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("base_has_one", [True, False])
def test_the_tokenizer_beside_an_adapter_asks_it_and_the_base(folder, base_has_one, capsys):
    """Training may have used another chat template than the base's."""
    told = "The tokenizer in {} has another chat template or end token than the base's."
    tiny_tokenizer().save_pretrained(folder / "ogpsa")  # the base's
    evaluate(folder, "same.json", adapters=["ogpsa"])
    assert "chat template" not in capsys.readouterr().out
    if not base_has_one:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        (folder / "model" / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(folder / "model")
    for name in ("plain", "ogpsa"):
        ask_otherwise(folder / name)
    own = evaluate(folder, "own.json", adapters=["plain", "ogpsa"])["results"]
    assert told.format(folder / "plain") in capsys.readouterr().out
    ask_otherwise(folder / "model")
    anew = evaluate(folder, "anew.json", adapters=["plain", "ogpsa"])["results"]
    assert told.partition("has")[2] not in capsys.readouterr().out
    assert [measured(result) for result in own] == [measured(result) for result in anew]
    assert own[0]["asked_as"] == anew[0]["asked_as"]
    if base_has_one:
        main(["compare", str(folder / "same.json"), str(folder / "own.json")])
        printed = " ".join(capsys.readouterr().out.split())
        assert "measured differently: the chat template or the end token is not the same." in printed


@pytest.mark.parametrize("model", [None, "model", "copy"])
def test_the_base_has_the_revision_that_the_adapters_name(folder, model, monkeypatch):
    shutil.copytree(folder / "model", folder / "copy")
    for name in ("plain", "ogpsa"):
        edit(folder / name / "adapter_config.json", revision="v1.0")
    revisions = []

    def load(options, **others):
        revisions.append(options.model_revision)
        return load_base(options, **others)

    monkeypatch.setattr("peft_ogpsa.cli.eval.load_base", load)
    options = [] if model is None else ["--model", str(folder / model)]
    results = evaluate(folder, "run.json", *options, adapters=["plain", "ogpsa"])["results"]
    assert revisions == ["main" if model == "copy" else "v1.0"]
    assert [result["base_revision"] for result in results] == revisions * 2


QUESTION = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("harmful", {"question": "Why?"}, r"row 6 has the columns \['question'\]"),
        ("benign", {"prompt": [{"role": "user"}]}, "row 6 has the message"),
        ("general", {"prompt": [QUESTION]}, r"row 6 has the columns \['prompt'\]"),
        ("general", {"text": "Why?"}, r"row 6 has the columns \['text'\]"),  # no prompt for the KL from base
        ("general", chat("Why? " * 300, "So."), "row 6 has no answer token left: .* raise --max_length"),
    ],
)
def test_bad_rows_are_named_before_anything_is_measured(folder, passes, kind, row, message):
    path = folder / "data" / f"{kind}_test.jsonl"
    path.write_text(path.read_text() + "\n" + json.dumps(row), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"^ogpsa eval: .*{kind}_test.jsonl: {message}"):
        evaluate(folder, "out.json", adapters=["plain"])
    assert passes == []
    assert not (folder / "out.json").exists()


def test_columns_that_are_not_read_may_hold_anything(folder):
    path = folder / "data" / "harmful_test.jsonl"
    rows = [json.loads(line) | {"added": f"2024-05-0{day} 10:00:00"} for day, line in enumerate(path.open(), 1)]
    path.write_text("\n".join(map(json.dumps, rows)))  # which become dates when they are loaded
    result = evaluate(folder, "run.json", "--model", str(folder / "model"))
    assert result["evaluation"]["model"]["refusal"]["n"] == 6


def test_rows_may_mix_prompts_and_messages(folder):
    """Data sets put None where a row lacks a column."""
    rows = [{"prompt": "Why?"}, {"messages": [QUESTION]}]
    (folder / "data" / "harmful_test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = evaluate(folder, "out.json", "--model", str(folder / "model"), data=str(folder / "data"))
    assert [own["prompt"] for own in measured(result)["model"]["harmful_samples"]] == ["Why?", "Why?"]


def test_a_file_in_another_encoding_is_named(folder):
    (folder / "data" / "benign_test.jsonl").write_text('{"prompt": "caf\xe9"}', encoding="latin-1")
    with pytest.raises(SystemExit, match=r"benign_test.jsonl' cannot be loaded: line 1 is not in UTF-8"):
        evaluate(folder, "out.json", "--model", str(folder / "model"))


NESTED = (json.dumps(PIECE["measurement"])[:-1] + ', "sets": {"a": ') * 2000 + "{}" + "}}" * 2000


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"pieces": [{"model"', id="cut"),
        pytest.param("[]", id="list"),
        pytest.param('{"pieces": 3}', id="no list"),
        pytest.param('{"pieces": {"model": "base"}}', id="mapping"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param(json.dumps({"pieces": [PIECE | {"measurement": {"general": []}}]}), id="general"),
        pytest.param(json.dumps({"pieces": [PIECE | {"conditions": []}]}), id="conditions"),
        pytest.param(json.dumps({"pieces": [PIECE | {"piece": ["builtin"]}]}), id="name"),
        pytest.param(json.dumps({"pieces": [PIECE | {"measurement": "M"}]}).replace('"M"', NESTED), id="deep sets"),
    ],
)
def test_a_damaged_store_is_named(folder, text):
    (folder / "run.json.pieces").write_text(text)
    with pytest.raises(SystemExit, match=r"run\.json\.pieces cannot be read .*Delete it to measure everything again"):
        evaluate(folder, "run.json", adapters=["plain"])


def test_help_says_what_is_the_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Do not apply the chat template" in line]
    assert "default" not in line


# The parts


def test_the_store_keeps_measurements_and_their_conditions(tmp_path):
    path = tmp_path / "run.json.pieces"
    inner = Measurement("m", harmful_samples=[Sample("a", "b", Verdict.REFUSAL)])
    store = PieceStore(path)
    store.add("base", "xstest", {"seed": 0, "data": "a"}, Measurement("m", sets={"xstest": inner}))
    store.add("base", "builtin", {"seed": 0}, Measurement("m"))
    found = PieceStore(path).get("base", "xstest")
    assert found.measurement == Measurement("m", sets={"xstest": inner})
    assert found.changes({"seed": 0, "data": "a"}) == []
    assert found.changes({"seed": 1, "data": "b", "limit": 3}) == [
        "other data",
        "limit was None and is 3",
        "seed was 0 and is 1",
    ]
    assert PieceStore(path).get("other", "xstest") is None
    assert [file.name for file in tmp_path.iterdir()] == ["run.json.pieces"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_a_checksum(dtype):
    model = base_model().to(dtype)
    before = fingerprint.of_weights(model)
    assert before == fingerprint.of_weights(base_model().to(dtype))
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.nextafter(model.lm_head.weight[3, 5], torch.tensor(9, dtype=dtype))
    assert fingerprint.of_weights(model) != before


def test_the_scale_of_an_adapter_is_part_of_the_checksum():
    settings = [{}, {"lora_alpha": 80}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 80}}, {"lora_dropout": 0.5}]
    models = [get_peft_model(base_model(), LoraConfig(target_modules=TARGETS, **own)) for own in settings]
    plain, *scaled, dropout = [fingerprint.of_weights(randomize(model)) for model in models]
    assert len({plain, *scaled}) == 4
    assert dropout == plain


def rates(refused, prompts="p"):
    samples = [
        Sample(f"{prompts}{i}", "", Verdict.REFUSAL if r else Verdict.COMPLIANCE) for i, r in enumerate(refused)
    ]
    return Measurement("m", refusal=Estimate.from_count(sum(refused), len(refused)), harmful_samples=samples)


def test_sets_are_compared_prompt_by_prompt():
    one = Measurement("one", sets={"advbench": rates([True] * 10 + [False] * 30)})
    two = Measurement("two", sets={"advbench": rates([True] * 30 + [False] * 10), "xstest": rates([True])})
    rows = set_rows(Comparison({"one": one, "two": two}))
    assert [row[:4] for row in rows] == [
        ["advbench", "one", "40 / -", "25% (14% to 40%)"],
        ["advbench", "two", "40 / -", "75% (60% to 86%)"],
        ["xstest", "two", "1 / -", "100% (21% to 100%)"],
    ]
    assert rows[0][4] == rows[2][4] == "-"
    assert rows[1][4].startswith("+50% (")
    assert rows[1][4].endswith("*")


# Everything at once


@pytest.fixture
def local_tasks(folder):
    """Two multiple-choice tasks over a local file."""
    pairs = ("am", "do"), ("go", "is"), ("no", "we"), ("by", "up")
    rows = [{"question": f"{number}?", "choices": pair, "gold": number % 2} for number, pair in enumerate(pairs)]
    (folder / "tasks").mkdir()
    (folder / "tasks" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("local_pairs", "local_others"):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "pairs.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        }
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder / "tasks"


def pieces(path):
    return json.loads(path.read_text())["pieces"] if path.is_file() else []


@pytest.mark.slow
def test_one_command_measures_everything_and_continues_after_a_kill(folder, local_tasks):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

    def command(output):
        data = f"{folder / 'data'},xstest={folder / 'xstest.jsonl'}"
        options = ["--adapter", str(folder / "plain"), str(folder / "ogpsa"), "--data", data, "--max_new_tokens", "4"]
        options += ["--tasks", "local_pairs,local_others", "--include_path", str(local_tasks), "--card"]
        options += ["--plot", str(folder / f"{output}.png"), "--output", str(folder / output)]
        return [sys.executable, "-m", "peft_ogpsa.cli", "eval", *options]

    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    whole = subprocess.run(command("whole.json"), capture_output=True, text=True, env=environment)
    assert whole.returncode == 0, whole.stderr

    store = folder / "killed.json.pieces"
    process = subprocess.Popen(
        command("killed.json"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    end = time.monotonic() + 300
    while len(pieces(store)) < 5 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(pieces(store)) < 12
    assert not (folder / "killed.json").exists()

    again = subprocess.run(command("killed.json"), capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert "base: already measured in an earlier run: " in again.stdout
    assert "measured again" not in again.stdout
    results = [json.loads((folder / name).read_text())["results"] for name in ("whole.json", "killed.json")]
    assert [measured(own) for own in results[0]] == [measured(own) for own in results[1]]
    assert len(pieces(store)) == 12  # base, plain, ogpsa: rows, set, two tasks
    assert [score["task"] for score in results[1][1]["evaluation"]["model"]["tasks"][::2]] == [
        "local_pairs",
        "local_others",
    ]
    assert (folder / "killed.json.png").read_bytes().startswith(b"\x89PNG")
    for name in ("plain", "ogpsa"):
        card = (folder / name / "README.md").read_text(encoding="utf-8")
        assert "| xstest | this adapter |" in card
        assert "| local_others | acc" in card


def test_two_pieces_of_one_name_do_not_take_each_others_result(tmp_path):
    rows = [{"prompt": "1+1?", "answer": "2"}]
    answers = {"max_new_tokens": 2, "batch_size": 1, "progress": False}
    pieces = [Piece.of_answers("arithmetic", tiny_tokenizer(), rows, **answers) for _ in range(2)]
    options = {
        "store": PieceStore(tmp_path / "store"),
        "key": "a",
        "conditions": {},
        "tell": print,
        "stage": nullcontext,
    }
    with pytest.raises(ValueError, match=r"Two things to measure have the same name: arithmetic\."):
        run_pieces(pieces, base_model(), "a", **options)


def test_an_lm_eval_task_with_the_name_of_a_set_gets_another_name():
    runner = SimpleNamespace(
        names=["arithmetic", "other"],
        version="1",
        limit=None,
        chat_template=True,
        chat_template_kwargs={},
        batch_size=1,
        digest=lambda name: name,
    )
    parsed = SimpleNamespace(batch_size=1)
    data = SimpleNamespace(name="builtin", rows={"arithmetic": [{"prompt": "1+1?", "answer": "2"}]}, sets={})
    pieces = plan(parsed, data, runner, tiny_tokenizer(), divergence=False)
    assert [piece.name for piece in pieces] == ["arithmetic", "lm-eval arithmetic", "other"]
