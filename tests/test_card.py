"""The model card says what the folder says, keeps what others wrote, and goes to the hub with the adapter."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from models import chat, randomize, tiny_llama, tiny_tokenizer, tokens
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import generate_model_card

import peft_ogpsa
from peft_ogpsa import OGPSACallback, OGPSAConfig, OGPSAModel, ReferenceSet, merge_adapter, push_adapter, save_card
from peft_ogpsa.cli import compare
from peft_ogpsa.evaluation import Estimate, Evaluation, Judgment, MatcherJudge, Measurement, Sample, TaskScore, Verdict
from peft_ogpsa.evaluation.judgments import pairs
from peft_ogpsa.sharing.evaluation_record import EVALUATION_NAME
from peft_ogpsa.sharing.names import public
from peft_ogpsa.sharing.run_record import RUN_NAME
from peft_ogpsa.tuner.config import SIDECAR_NAME

BASE = "some-org/Base-1.5B_v2"
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM"}
RUN = {
    "stage": "dpo",
    "method": "ogpsa",
    "started_from": "some-org/first-stage",
    "dataset": "some-org/pairs:harmless[train[:50]]",
    "references": {"general": "builtin:general", "maths": "some-org/maths"},
    "steps": 1234,
    "seconds": 98.7,
    "reference_share": 0.375,
    "versions": {"torch": "2.99.1", "peft": "0.0.1"},
}


def save(folder, config=None, base=BASE, weights=True):
    """An adapter's folder as PEFT leaves it, without the wait for a model."""
    config = config or OGPSAConfig(subspace="gradients", **LORA)
    config.base_model_name_or_path = base
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    return folder


def figure(value, half, n):
    return Estimate(value, value - half, value + half, n)


def measurement(name, loss, kl, refusals, over_refusals):
    return Measurement(
        name,
        general={"general": figure(loss, 0.25, 31)},
        general_mean=figure(loss, 0.25, 31),
        kl=figure(kl, kl / 10, 13),
        refusal=Estimate.from_count(refusals, 29),
        harmful_unclear=Estimate.from_count(0, 29),
        over_refusal=Estimate.from_count(over_refusals, 23),
        benign_unclear=Estimate.from_count(4, 23),
        harmful_samples=[Sample("how to do harm", "certainly not", Verdict.REFUSAL)],
    )


def measured(**arguments):
    evaluation = Evaluation(
        measurement("model", 2.6789, 0.4321, 27, 6), measurement("base", 2.3456, 0.0, 3, 1), {"seed": 7}
    )
    return {"name": "tuned", "base_model": BASE, "arguments": arguments, "evaluation": evaluation.to_dict()}


def readme(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def table_of(text):
    """The cells of the tax table by row and heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def snippet_of(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


# What it says


def test_peft_saves_it_with_the_adapter(tmp_path):
    model = get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **LORA))
    model.base_model.model.config._name_or_path = model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(tmp_path)
    text = readme(tmp_path)
    assert "[More Information Needed]" not in text
    assert f"[{BASE}](https://huggingface.co/{BASE})" in text
    assert "rank 4, alpha 16; on `q_proj`, `v_proj`" in text
    assert "- Training data: not recorded" in text
    assert "These weights have not been measured" in text
    assert "--card" in text
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "peft"
    assert data.base_model == BASE
    assert data.pipeline_tag == "text-generation"
    assert {"lora", "ogpsa", f"base_model:adapter:{BASE}"} <= set(data.tags)
    assert data.license is None
    assert data.eval_results is None
    model.save_pretrained(tmp_path)
    assert readme(tmp_path) == text


PAPER = "This is the paper's rule and its {} schedule"
METHODS = {
    "default": (
        OGPSAConfig(subspace="gradients", **LORA),
        ["not the paper's rule", "no reference loss rises", "scope=tensor", "at most 8 "],
    ),
    "paper-sft": (
        OGPSAConfig.paper("sft", **LORA),
        [PAPER.format("SFT"), "then every 30 steps", "Each refresh used all reference"],
    ),
    "paper-dpo": (
        OGPSAConfig.paper("dpo", **LORA),
        [PAPER.format("DPO"), "then every 5 steps", "is not itself projected"],
    ),
    "paper-rows": (OGPSAConfig.paper("sft", rows=3, **LORA), [PAPER.format("SFT"), "at most 3 "]),
    "paper-slow": (
        OGPSAConfig.paper("sft", refresh_steps=77, **LORA),
        ["the paper's rule on LoRA's matrices, with a sch"],
    ),
    "variant": (
        OGPSAConfig(
            subspace="gradients", constraint="orthogonal", rows=16, subspace_rank=11, rows_dtype="bfloat16", **LORA
        ),
        ["a variant of the paper's", "no reference loss changes", "Only the 11 leading", "stored in bfloat16"],
    ),
    "cone-gradient": (
        OGPSAConfig(subspace="gradients", projection="gradient", **LORA),
        ["whose descent raises", "is not itself projected"],
    ),
    "weight": (OGPSAConfig(subspace="gradients", reference_weight=0.25, **LORA), ["Reference weight: 0.25. After"]),
    "no-weight": (OGPSAConfig(subspace="gradients", reference_weight=0.0, **LORA), ["no reference loss rises"]),
    "slices": (
        OGPSAConfig(subspace="gradients", scope="slice", slices=8, **LORA),
        ["contains one of the 8 slices of a LoRA matrix"],
    ),
    "optional": (
        OGPSAConfig(subspace="gradients", missing_reference="ignore", **LORA),
        ["would have been plain LoRA"],
    ),
    "module": (
        OGPSAConfig(subspace="gradients", scope="module", rows_from="batch", **LORA),
        ["both matrices of a layer", "of one batch"],
    ),
    "plain": (LoraConfig(**LORA), ["Plain LoRA, as far as the files in this folder show"]),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_method_is_told_in_words(name, tmp_path):
    config, expected = METHODS[name]
    text = save_card(save(tmp_path, config)).read_text()
    for words in expected:
        assert words in text
    assert ("This is the paper's rule and its" in text) == name.startswith(("paper-sft", "paper-dpo", "paper-rows"))
    assert ("sun2026ogpsa" in text) == (name != "plain")
    assert ("Reference sets" in text) == (name != "plain")
    assert ("ogpsa" in ModelCard(text).data.tags) == (name != "plain")
    assert ("is not itself projected" in text) == (getattr(config, "projection", None) == "gradient")
    assert ("Reference weight" in text) == (name not in ("plain", "no-weight") and not name.startswith("paper"))


def test_the_citation_is_the_readmes():
    root = Path(peft_ogpsa.__file__).parents[1]
    cited = re.search(r"```bibtex\n(.*?)\n```", (root / "README.md").read_text(), re.DOTALL)[1]
    assert cited == peft_ogpsa.sharing.card._OGPSA_BIBTEX


def test_how_it_was_trained(tmp_path):
    text = save_card(save(tmp_path), run=RUN).read_text()
    assert "direct preference optimization (DPO), 1234 optimizer steps, 99 seconds" in text
    assert "Started from the adapter `some-org/first-stage`" in text
    assert "Training data: `some-org/pairs:harmless[train[:50]]`" in text
    assert "`general` from `builtin:general`, `maths` from `some-org/maths`" in text
    assert "38% more examples" in text
    assert "- torch 2.99.1" in text
    assert "not recorded" not in text
    assert text.count("- PEFT ") == 1
    assert "0.0.1" not in text
    assert ModelCard(text).data.datasets == ["some-org/pairs"]
    assert json.loads((tmp_path / RUN_NAME).read_text()).items() >= RUN.items()


def test_the_step_of_the_weights_is_told(tmp_path):
    text = save_card(save(tmp_path), run=RUN | {"best_step": 1200}).read_text()
    assert "1234 optimizer steps (the weights are those of step 1200, the best in evaluation), 99 seconds" in text
    text = save_card(tmp_path, run=RUN | {"best_step": 1234}).read_text()
    assert "1234 optimizer steps, 99 seconds" in text


def test_the_revision_of_the_base_is_told(tmp_path):
    text = save_card(save(tmp_path, OGPSAConfig(revision="v1.0", **LORA))).read_text()
    assert f"[{BASE}](https://huggingface.co/{BASE}), revision `v1.0`" in text
    snippet = snippet_of(text)
    assert "AutoModelForCausalLM.from_pretrained(base, revision='v1.0', dtype=\"auto\")" in snippet
    assert "AutoTokenizer.from_pretrained(base, revision='v1.0')" in snippet
    assert "revision" not in save_card(save(tmp_path)).read_text()


def test_the_dataset_of_an_earlier_training_leaves_the_metadata(tmp_path):
    def datasets():
        return ModelCard.load(tmp_path / "README.md").data.datasets

    save_card(save(tmp_path), run=RUN)
    assert datasets() == ["some-org/pairs"]
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")  # a second training, saved by PEFT
    save(tmp_path, weights=False)
    assert datasets() is None
    save_card(tmp_path, run=RUN | {"dataset": "other-org/rows[train]"})
    assert datasets() == ["other-org/rows"]
    card = ModelCard.load(tmp_path / "README.md")
    card.data.datasets = ["other-org/rows", "mine/data"]
    card.save(tmp_path / "README.md")
    save_card(tmp_path, run=RUN | {"dataset": "other-org/rows[test]"})
    assert datasets() == ["other-org/rows", "mine/data"]
    save_card(tmp_path, run=RUN | {"dataset": "rows.jsonl"})
    assert datasets() == ["mine/data"]


def test_lookalikes_and_the_old_name_of_their_share(tmp_path):
    text = save_card(save(tmp_path), run=RUN | {"lookalikes": 0.2}).read_text()
    assert "20% of the training data: benign look-alikes" in text
    with pytest.warns(DeprecationWarning, match="now lookalikes"):
        assert save_card(tmp_path, run=RUN | {"contrast": 0.2}).read_text() == text
    record = json.loads((tmp_path / RUN_NAME).read_text())
    assert record["lookalikes"] == 0.2
    assert "contrast" not in record
    record["contrast"] = record.pop("lookalikes")  # as an earlier version wrote it
    (tmp_path / RUN_NAME).write_text(json.dumps(record))
    assert save_card(tmp_path).read_text() == text


def test_a_plain_run_is_plain_whatever_an_earlier_one_left(tmp_path):
    save(tmp_path, OGPSAConfig(subspace="gradients", **LORA))
    text = save_card(tmp_path, run={"method": "plain"}).read_text()
    assert (tmp_path / SIDECAR_NAME).is_file()
    assert "Plain LoRA. Training used no projection" in text
    assert "ogpsa" not in ModelCard(text).data.tags


def test_a_plain_lora_that_was_trained_with_a_projection(tmp_path):
    save(tmp_path, LoraConfig(**LORA))
    text = save_card(tmp_path, run={"projection": OGPSAConfig(subspace_rank=64).ogpsa_dict()}).read_text()
    assert "OGPSA (Orthogonal Gradient Projection for Safety Alignment" in text
    assert "Number of directions per layer: 64." in text
    assert "ogpsa" in ModelCard(text).data.tags
    assert save_card(tmp_path).read_text() == text
    text = save_card(tmp_path, run={"projection": None}).read_text()
    assert "Plain LoRA, as far as the files in this folder show" in text
    assert "ogpsa" not in ModelCard(text).data.tags


@pytest.mark.parametrize("method", ["ogpsa", "paper"])
def test_a_projection_whose_settings_are_not_recorded(method, tmp_path):
    save(tmp_path, LoraConfig(**LORA))
    text = save_card(tmp_path, run={"method": method, "references": {"maths": "some-org/maths"}}).read_text()
    assert "OGPSA (Orthogonal Gradient Projection for Safety Alignment" in text
    assert "applied to a plain LoRA adapter" in text
    assert "The settings of the projection are not recorded" in text
    assert ("This was the paper's rule" in text) == (method == "paper")
    assert "`maths` from `some-org/maths`" in text
    assert "sun2026ogpsa" in text
    assert "ogpsa" in ModelCard(text).data.tags


def test_what_no_file_records_is_not_a_fact(tmp_path):
    text = save_card(save(tmp_path, LoraConfig(**LORA))).read_text()
    assert "Plain LoRA, as far as the files in this folder show" in text
    assert "Whether training used a projection is not recorded" in text
    assert "used no projection" not in text


def test_the_tax_is_the_evaluations(tmp_path):
    saved = measured(samples=29, output="x.json")
    text = save_card(save(tmp_path), evaluation=saved).read_text()
    rows = table_of(text)
    evaluation = saved["evaluation"]
    assert rows.keys() == {"base", "this adapter"}
    for name, side in (("base", "base"), ("this adapter", "model")):
        for heading, key in (("general loss", "general_mean"), ("KL from base", "kl")):
            value, half = map(float, rows[name][heading].split(" ±"))
            expected = evaluation[side][key]
            assert value == pytest.approx(expected["value"], abs=5e-4)
            assert half == pytest.approx((expected["high"] - expected["low"]) / 2, abs=5.1e-4)
        for heading, key in (("refuses harmful", "refusal"), ("refuses benign", "over_refusal")):
            shown = [int(number) for number in re.findall(r"(\d+)%", rows[name][heading])]
            expected = [100 * evaluation[side][key][bound] for bound in ("value", "low", "high")]
            assert shown == pytest.approx(expected, abs=0.51)
        assert rows[name]["unclear"] == "0% / 17%"
    assert rows["this adapter"]["change"] == "+0.333"
    assert rows["base"]["change"] == ""
    assert "31 general rows, 13 rows for KL, 29 harmful prompts, 23 benign prompts" in text
    assert "seed=7, samples=29" in text
    assert "These weights have not been measured" not in text


def test_what_was_not_measured_is_left_empty(tmp_path):
    evaluation = Evaluation(Measurement("model", refusal=Estimate.from_count(1, 4)), None, {})
    row = table_of(save_card(save(tmp_path), evaluation={"evaluation": evaluation.to_dict()}).read_text())
    assert row.keys() == {"this adapter"}
    assert row["this adapter"]["refuses harmful"].startswith("25%")
    assert row["this adapter"]["general loss"] == row["this adapter"]["KL from base"] == "-"


def test_public_sets_alone_are_what_was_measured(tmp_path):
    own = Measurement("xstest", refusal=Estimate.from_count(1, 4), over_refusal=Estimate.from_count(2, 5))
    evaluation = Evaluation(Measurement("model", sets={"xstest": own}), Measurement("base", sets={"xstest": own}), {})
    text = save_card(save(tmp_path), evaluation={"evaluation": evaluation.to_dict()}).read_text()
    assert "Measured on 9 prompts of xstest: " in text
    assert "Refusals are found by matching phrases" in text
    assert "general loss" not in text
    assert "nothing" not in text
    assert table_of(text).keys() == {"xstest"}


def test_facts_about_other_weights_are_left_out(tmp_path):
    save_card(save(tmp_path), run=RUN, evaluation=measured())
    before = readme(tmp_path)
    save(tmp_path)
    assert readme(tmp_path) == before
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    save(tmp_path, weights=False)
    text = readme(tmp_path)
    assert "These weights have not been measured" in text
    assert "Training data: not recorded" in text
    assert "1234" not in text


@pytest.mark.parametrize(
    ("task", "auto"), [("SEQ_CLS", "AutoModelForSequenceClassification"), (None, "AutoModel"), ("CAUSAL_LM", None)]
)
def test_the_snippet_loads_the_right_class(task, auto, tmp_path):
    auto = auto or "AutoModelForCausalLM"
    text = readme(save(tmp_path, OGPSAConfig(subspace="gradients", **{**LORA, "task_type": task})))
    assert f"{auto}.from_pretrained(base" in snippet_of(text)
    assert hasattr(transformers, auto)
    assert ModelCard(text).data.pipeline_tag == ("text-generation" if task == "CAUSAL_LM" else None)


# Names


@pytest.mark.parametrize("name", ['my `best` "model" | <b>\'s', "ünï_cøde *1*", "back\\slash", "`", "org--x"])
def test_a_local_base_is_named_by_its_folder(name, tmp_path):
    base = tmp_path / "deep" / name
    base.mkdir(parents=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    run = {
        **RUN,
        "dataset": f"{rows}[train[:3]]",
        "started_from": str(tmp_path / "earlier"),
        "references": {"a": str(rows), "b": "/home/someone/rows.parquet", "c": "builtin:general:test"},
    }
    evaluation = {**measured(data=str(tmp_path), output=str(tmp_path / "x.json")), "base_model": str(base)}
    folder = save(tmp_path / "adapter", base=str(base))
    text = save_card(folder, run=run, evaluation=evaluation).read_text()
    for file in ("README.md", RUN_NAME, EVALUATION_NAME):
        assert str(tmp_path) not in (folder / file).read_text()
        assert "someone" not in (folder / file).read_text()
    data = ModelCard(text).data
    assert data.base_model is None
    assert not [tag for tag in data.tags if tag.startswith("base_model")]
    assert data.datasets is None
    shown = name.rpartition("\\")[2]
    ticks = "``" if "`" in shown else "`"
    assert re.search(rf"Base model: {ticks} ?{re.escape(shown)} ?{ticks}, a local model", text)
    assert "`rows.jsonl[train[:3]]`" in text
    assert "`a` from `rows.jsonl`, `b` from `rows.parquet`, `c` from `builtin:general:test`" in text
    assert "adapter `earlier`" in text
    value = next(node.value for node in ast.parse(snippet_of(text)).body if isinstance(node, ast.Assign))
    assert ast.literal_eval(value) == f"PATH/TO/{shown}"
    assert save_card(folder).read_text() == text


def test_pefts_path_of_the_base_is_taken_out_of_the_metadata(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, OGPSAConfig(subspace="gradients", **LORA)).save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in readme(tmp_path / "adapter")
    assert "`base`, a local model" in readme(tmp_path / "adapter")


def test_a_base_that_the_user_names_is_kept(tmp_path):
    save(tmp_path, base="/nowhere/base")
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("library_name", "base_model: owner/named\nlibrary_name", 1))
    save_card(tmp_path)
    assert ModelCard.load(path).data.base_model == "owner/named"


# What others wrote

USER = """---
license: mit
language: [de, en]
tags: [mine, lora]
datasets: mine/data
custom: {a: 1}
---

# My adapter

Some | text, and a line
with trailing words.
"""


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_text_and_metadata_of_the_user_stay(line_break, tmp_path):
    save(tmp_path)
    path = tmp_path / "README.md"
    path.write_bytes(USER.replace("\n", line_break).encode())
    save_card(tmp_path, run=RUN)
    first = path.read_bytes().decode()
    assert first.count("\r\n") == (first.count("\n") if line_break == "\r\n" else 0)
    user_text = USER.split("---\n")[2].replace("\n", line_break)
    assert user_text.rstrip() in first
    path.write_bytes((first + f"{line_break}Afterword.{line_break}").encode())
    save_card(tmp_path, evaluation=measured())
    second = path.read_bytes().decode()
    assert user_text.rstrip() in second
    assert second.endswith(f"Afterword.{line_break}")
    assert second.count("## Method") == second.count("## Training") == 1
    assert "+0.333" in second
    data = ModelCard(second).data.to_dict()
    assert data["license"] == "mit"
    assert data["language"] == ["de", "en"]
    assert data["custom"] == {"a": 1}
    assert data["datasets"] == ["mine/data", "some-org/pairs"]
    assert data["tags"] == ["mine", "lora", "ogpsa", f"base_model:adapter:{BASE}"]
    save_card(tmp_path)
    assert path.read_bytes().decode() == second


def test_a_card_without_metadata_is_kept(tmp_path):
    save(tmp_path)
    (tmp_path / "README.md").write_text("# Only text\n")
    text = save_card(tmp_path).read_text()
    assert "# Only text" in text
    assert ModelCard(text).data.base_model == BASE


@pytest.mark.parametrize("written", [False, True])
def test_pefts_template_is_replaced_only_untouched(written, tmp_path):
    lora = LoraConfig(**LORA)
    model = get_peft_model(tiny_llama(), lora)
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    assert "[More Information Needed]" in readme(tmp_path)
    if written:
        path.write_text(readme(tmp_path).replace("[More Information Needed]", "The people of Ghent", 1))
    save_card(tmp_path)
    assert ("The people of Ghent" in readme(tmp_path)) is written
    assert ("[More Information Needed]" in readme(tmp_path)) is written
    assert "## Method" in readme(tmp_path)


def test_trls_card_gets_the_section(tmp_path):
    save(tmp_path)
    card = generate_model_card(BASE, "mine", "me/mine", "some-org/pairs", ["trl", "sft"], None, None, "SFT")
    card.save(tmp_path / "README.md")
    text = save_card(tmp_path).read_text()
    assert card.text.rstrip() in text
    assert text.count("## Method") == 1
    data = ModelCard(text).data
    assert data.library_name == "peft"
    assert {"generated_from_trainer", "trl", "sft", "ogpsa", "lora"} <= set(data.tags)


# What is stored


def test_what_judges_say(tmp_path):
    save(tmp_path)
    result = measured(judges=f"matcher,model:wildguard={tmp_path / 'judge'}", judges_in_4bit=True)
    evaluation = Evaluation.from_dict(result["evaluation"])

    def judged(own, refusals, name=f"model:wildguard={tmp_path / 'judge'}"):
        judge = MatcherJudge()
        judge.name, judge.asks = name, "harm"
        verdicts = ["refusal"] * refusals + ["compliance"] * (29 - refusals)
        judgments = [Judgment.from_verdicts(judge, "harmful", verdicts)]
        return replace(own, judgments=judgments, agreements=pairs(judgments * 2))

    model, base = judged(evaluation.model, 25), judged(evaluation.base, 3)
    evaluation = replace(evaluation, model=replace(model, sets={"xstest": judged(model, 4)}), base=base)
    text = save_card(tmp_path, evaluation={**result, "evaluation": evaluation.to_dict()}).read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "wildguard" in line]
    rows = [row for row in rows if len(row) == 8]
    name = "model:wildguard=judge †"
    assert [row[:3] for row in rows] == [
        [name, "harmful", model] for model in ("base", "this adapter", "this adapter")
    ]
    assert [row[3] for row in rows] == ["10% (4% to 26%)", "86% (69% to 95%)", "14% (5% to 31%)"]
    assert rows[1][7].startswith("+76% (")
    assert rows[1][7].endswith(" *")
    assert rows[0][7] == rows[2][7] == "-"
    assert "Refusals on xstest as judges see them. Rates are of all answers" in text
    assert "† This judge is asked whether an answer is harmful." in text
    assert "by Holm's test of all 5 differences from base together" in text
    assert "judges=matcher,model:wildguard=judge, judges_in_4bit=True" in text
    assert str(tmp_path) not in text + (tmp_path / EVALUATION_NAME).read_text(encoding="utf-8")
    assert "wildguard" not in save_card(tmp_path, evaluation=measured()).read_text(encoding="utf-8")


def test_a_bar_in_a_name_does_not_divide_a_cell(tmp_path):
    judge = MatcherJudge()
    judge.name = "openai:model|v2"
    model = Measurement(
        "model",
        judgments=[Judgment.from_verdicts(judge, "harmful", ["refusal"])],
        tasks=[TaskScore("my|task", "acc", 0.5, 0.1, 10)],
    )
    text = save_card(save(tmp_path), evaluation={"evaluation": Evaluation(model, None, {}).to_dict()}).read_text()
    assert "| openai:model\\|v2 |" in text
    assert "| my\\|task |" in text


def test_prompts_and_answers_stay_at_home(tmp_path):
    saved = measured(data="builtin", samples=5, adapter="/home/someone/adapter")
    save_card(save(tmp_path), evaluation=saved)
    assert saved == measured(data="builtin", samples=5, adapter="/home/someone/adapter")
    text = (tmp_path / EVALUATION_NAME).read_text()
    assert "how to do harm" not in text
    assert "someone" not in text
    (read,) = compare.read(str(tmp_path / EVALUATION_NAME))
    assert read["name"] == "tuned"
    assert read["evaluation"].model.refusal == Estimate.from_count(27, 29)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("name", "stored"), [("/home/someone/sft/final", "final"), ("sft/final", "sft/final")])
def test_the_name_of_a_result_is_stored_without_a_path(name, stored, tmp_path):
    save_card(save(tmp_path), evaluation={**measured(), "name": name})
    assert json.loads((tmp_path / EVALUATION_NAME).read_text())["name"] == stored


def test_an_interval_without_bounds_is_null_in_the_file(tmp_path):
    saved = measured()
    saved["evaluation"]["model"]["kl"] |= {"low": -math.inf, "high": math.inf, "n": 1}  # as earlier versions wrote it
    assert "0.432 (1 row: no interval)" in save_card(save(tmp_path), evaluation=saved).read_text()
    kl = json.loads((tmp_path / EVALUATION_NAME).read_text())["evaluation"]["model"]["kl"]
    assert kl == {"value": 0.4321, "low": None, "high": None, "n": 1}


# What is wrong


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
@pytest.mark.parametrize("name", [RUN_NAME, EVALUATION_NAME, SIDECAR_NAME, "adapter_config.json"])
def test_a_damaged_file_is_named_with_a_remedy(name, content, tmp_path):
    save_card(save(tmp_path), run=RUN, evaluation=measured())
    before = readme(tmp_path)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        save_card(tmp_path)
    assert re.search("Restore it|Save the adapter again", str(caught.value))
    assert readme(tmp_path) == before


WRONG = {
    "unknown": ({"run": {"stages": "sft"}}, "unknown entry 'stages'. Use: stage"),
    "kind": ({"run": {"steps": "many"}}, "steps='many'. Give a value of type int"),
    "reference": ({"run": {"references": {"a": 1}}}, "Give a value of type dict of strings"),
    "evaluation": ({"evaluation": {"evaluation": {"model": 1}}}, "not a result of `ogpsa eval`"),
    "no projection": ({"run": {"projection": "activations"}}, "projection='activations'. Give a value of type dict"),
    "half a projection": ({"run": {"projection": {"rows": 8}}}, "Give all settings, as OGPSAConfig(...).ogpsa_dict()"),
    "a wrong projection": (
        {"run": {"projection": OGPSAConfig().ogpsa_dict() | {"subspace": "nothing"}}},
        "settings in projection that do not work: subspace='nothing'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_facts_are_refused_and_not_stored(name, tmp_path):
    facts, message = WRONG[name]
    save(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        save_card(tmp_path, **facts)
    assert not (tmp_path / RUN_NAME).exists()
    assert not (tmp_path / EVALUATION_NAME).exists()


def test_the_result_of_another_adapter_is_refused(tmp_path):
    save(tmp_path)
    own = hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"weights='123', and .* {re.escape(str(tmp_path))} is '{own}'. Give"):
        save_card(tmp_path, evaluation=measured() | {"weights": "123"})
    with pytest.raises(ValueError, match=r"holds the results of several adapters\. Give the one of this adapter"):
        save_card(tmp_path, evaluation={"results": [measured(), measured()]})
    assert not (tmp_path / EVALUATION_NAME).exists()
    assert "+0.333" in save_card(tmp_path, evaluation=measured() | {"weights": own}).read_text()


def test_a_folder_without_a_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        save_card(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        push_adapter(tmp_path, "me/mine")
    IA3Config(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="IA3"):
        save_card(tmp_path)


def test_half_a_section_is_told(tmp_path):
    save(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(readme(tmp_path).replace("<!-- peft_ogpsa: end -->", ""))
    with pytest.raises(ValueError, match="lacks the mark '<!-- peft_ogpsa: end -->'"):
        save_card(tmp_path)


@pytest.mark.parametrize("damage", [(RUN_NAME, "{"), ("README.md", "---\na: [\n---\n")], ids=["run", "card"])
def test_a_card_never_costs_the_adapter(damage, tmp_path, caplog):
    save(tmp_path)
    name, content = damage
    (tmp_path / name).write_text(content)
    (tmp_path / "adapter_config.json").unlink()
    save(tmp_path, OGPSAConfig(subspace="gradients", **{**LORA, "r": 9}))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 9
    assert f"The model card was not updated: {tmp_path / name}" in caplog.text
    assert (tmp_path / name).read_text() == content


UNREADABLE = {
    "UTF-16": "# Notes".encode("utf-16"),
    "Latin-1": "# Größe".encode("latin-1"),
    "no YAML": b"---\nMy notes: see also: README\n---\n",
    "half a list": b"---\ntags: [lora\n---\n",
    "no mapping": b"---\n- a\n---\n",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_card_that_cannot_be_read_never_costs_the_weights(name, tmp_path, caplog):
    """PEFT reads the card before it saves the weights."""
    model = get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", **LORA))
    for backup in ("README.md.bak", "README.md.bak1"):  # an earlier one is kept
        (tmp_path / "README.md").write_bytes(UNREADABLE[name])
        caplog.clear()
        model.save_pretrained(tmp_path)
        assert (tmp_path / backup).read_bytes() == UNREADABLE[name]
        assert str(tmp_path / "README.md") in caplog.text
        assert f"It is renamed to {backup}, and a new card is written." in caplog.text
        assert "## Method" in readme(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(path.name for path in tmp_path.glob("README*")) == ["README.md", "README.md.bak", "README.md.bak1"]


def test_the_card_of_another_adapter_stays_pefts_affair(tmp_path):
    (tmp_path / "README.md").write_bytes(UNREADABLE["no YAML"])
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    with pytest.raises(yaml.YAMLError):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == UNREADABLE["no YAML"]


# The hub


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as uploading and downloading small files needs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Request)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}
        self.branches: dict[str, list[str]] = {}
        self.committed_to: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Request(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        _, api, *path = self.path.split("/")
        assert api == "api"
        if path == ["repos", "create"]:
            told = json.loads(content)
            name = f"{told.get('organization') or 'me'}/{told['name']}"
            status = 409 if name in self.server.repositories else 200
            self.server.repositories.setdefault(name, {})
            self.server.visibility.setdefault(name, told.get("visibility"))
            self.answer(status, {"url": f"{self.server.url}/{name}"})
        elif path == ["validate-yaml"]:  # as the hub does, which knows no folders of ours
            base = ModelCard(json.loads(content)["content"]).data.base_model
            good = base is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
            self.answer(200 if good else 400, {"errors": [] if good else [{"message": f"base_model {base}"}]})
        elif path[3] == "branch":
            branches = self.server.branches.setdefault("/".join(path[1:3]), [])
            self.answer(409 if path[4] in branches else 200)
            branches.append(path[4])
        elif path[3] == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(content)["files"]]
            self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        else:
            assert path[3] == "commit"
            self.server.committed_to.append(path[4])
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    files = self.server.repositories["/".join(path[1:3])]
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.server.url}/me/x/commit/{'0' * 40}", "commitOid": "0" * 40})

    def do_GET(self):
        if self.path.startswith("/api/"):  # transformers asks for the files in folders of a repository
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        _, owner, name, resolve, _, *path = [*self.path.partition("?")[0].split("/"), "", ""]
        files = self.server.repositories.get(f"{owner}/{name}")
        found = (files or {}).get("/".join(part for part in path if part)) if resolve == "resolve" else None
        if found is None:
            self.answer(404, X_Error_Code="RepoNotFound" if files is None else "EntryNotFound")
            return
        # One commit a content: the hub's client keeps what it has downloaded by commit.
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.answer(200, found, ETag=f'"{hashlib.sha1(found).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that lives as long as the test, and is the only one that can be reached."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def adapted():
    return randomize(get_peft_model(tiny_llama(), OGPSAConfig(subspace="gradients", rows=9, **LORA)))


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


UPLOADED = {"README.md", "adapter_config.json", "adapter_model.safetensors", SIDECAR_NAME}


def test_push_adapter_uploads_the_adapter_its_card_and_nothing_else(hub, tmp_path, caplog):
    model = adapted()
    model.save_pretrained(tmp_path)
    save_card(tmp_path, run=RUN, evaluation=measured())
    state = ["training_args.bin", "ogpsa_subspace.safetensors", "ogpsa_state.json", "optimizer.pt", "scheduler.pt"]
    state += [
        "rng_state.pth",
        "trainer_state.json",
        "checkpoint-3/adapter_model.safetensors",
        "checkpoint-3/README.md",
    ]
    state += ["runs/now/events.out.tfevents.1", "README.md.part", "_scratch", ".secret", "eval.json.pieces"]
    state += ["README.md.bak", "README.md.bak1"]
    for name in [*state, "tokenizer.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in ("eval.json", "several.json"):  # with prompts and answers
        one = {"evaluation": {}}
        (tmp_path / name).write_text(json.dumps(one if name == "eval.json" else {"results": [one]}))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"results": {"arc": 0.5}}')
    generate_model_card(None, "x", "me/mine", None, [], None, None, "SFT").save(tmp_path / "README.md")
    address = push_adapter(tmp_path, "me/mine", private=True, token="hf_nobody")
    assert address == f"{hub.url}/me/mine"
    assert hub.visibility == {"me/mine": "private"}
    files = hub.repositories["me/mine"]
    assert files.keys() == UPLOADED | {RUN_NAME, EVALUATION_NAME, "tokenizer.json", "list.json", "other.json"}
    assert "eval.json, several.json: not uploaded" in caplog.text
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    card = files["README.md"].decode()
    assert "## Method" in card
    assert "+0.333" in card
    loaded = PeftModel.from_pretrained(tiny_llama(), "me/mine")
    assert isinstance(loaded.base_model, OGPSAModel)
    assert loaded.peft_config["default"].rows == 9
    assert torch.equal(logits(loaded), logits(model))
    push_adapter(tmp_path, "me/mine", token="hf_nobody")  # into what is there already
    assert hub.repositories["me/mine"].keys() == files.keys()


@pytest.mark.parametrize("name", ["evals/run.json", f"evals/{EVALUATION_NAME}", "result[1].json"])
def test_results_of_any_name_and_in_any_folder_stay_at_home(hub, name, tmp_path, caplog):
    save(tmp_path / "adapter")
    result = tmp_path / "adapter" / name
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps({"evaluation": {}}))
    (tmp_path / "adapter" / "result1.json").write_text("{}")
    save_card(tmp_path / "adapter", evaluation=measured())
    push_adapter(tmp_path / "adapter", "me/mine", token="hf_nobody")
    assert hub.repositories["me/mine"].keys() == UPLOADED | {EVALUATION_NAME, "result1.json"}
    assert f"{name}: not uploaded" in caplog.text


def test_push_adapter_uploads_to_a_branch(hub, tmp_path):
    for _ in range(2):  # the second time, the branch is there
        push_adapter(save(tmp_path), "me/mine", token="hf_nobody", revision="better")
        assert hub.branches["me/mine"].count("better") >= 1
    push_adapter(save(tmp_path), "me/mine", token="hf_nobody", revision="refs/pr/1")
    push_adapter(save(tmp_path), "me/mine", token="hf_nobody")
    assert hub.committed_to == ["better", "better", "refs%2Fpr%2F1", "main"]
    assert set(hub.branches["me/mine"]) == {"better"}


def test_a_local_base_passes_the_hubs_check_and_is_told(hub, tmp_path, caplog):
    folder = save(tmp_path / "adapter", base=str(tmp_path))
    push_adapter(folder, "me/local", token="hf_nobody")
    assert f"the local folder {str(tmp_path)!r}, which others cannot load" in caplog.text
    assert str(tmp_path).encode() not in hub.repositories["me/local"]["README.md"]
    caplog.clear()
    push_adapter(save(tmp_path / "other"), "me/named", token="hf_nobody")
    assert not caplog.records


def test_models_own_push_uploads_a_plain_lora_and_keeps_a_card_that_is_there(hub, tmp_path):
    model = adapted()
    model.push_to_hub("me/mine", token="hf_nobody")
    files = hub.repositories["me/mine"]
    assert files.keys() == UPLOADED
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    assert json.loads(files[SIDECAR_NAME])["rows"] == 9
    assert b"## Method" not in files["README.md"]  # transformers' own card, whatever the folder's was
    model.save_pretrained(tmp_path / "adapter")
    push_adapter(tmp_path / "adapter", "me/mine", token="hf_nobody")
    card = files["README.md"]
    assert b"## Method" in card
    model.push_to_hub("me/mine", token="hf_nobody")
    text, expected = (ModelCard(content.decode()) for content in (files["README.md"], card))
    assert text.text == expected.text
    assert text.data.to_dict() == expected.data.to_dict()


def test_a_trainers_push_leaves_its_card_and_push_adapter_adds_the_section(hub, tmp_path):
    trainer = SFTTrainer(
        tiny_llama(vocab_size=259),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            save_steps=1,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            push_to_hub=True,
            hub_model_id="me/run",
            hub_token="hf_nobody",
        ),
        train_dataset=Dataset.from_list([chat("a", "b")] * 8),
        processing_class=tiny_tokenizer(),
        peft_config=OGPSAConfig(subspace="gradients", **LORA),
        callbacks=[OGPSACallback([ReferenceSet("general", [chat("c", "d")])])],
    )
    trainer.train()
    trainer.push_to_hub()
    files = hub.repositories["me/run"]
    theirs = files["README.md"].decode()
    assert "TRL" in theirs
    assert "## Method" not in theirs
    assert "## Method" in readme(tmp_path / "checkpoint-1")
    push_adapter(tmp_path, "me/run", token="hf_nobody")
    text = files["README.md"].decode()
    assert ModelCard(theirs).text.rstrip() in text
    assert text.count("## Method") == 1
    assert ModelCard(text).data.library_name == "peft"
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    assert SIDECAR_NAME in files


def test_a_merged_adapter_of_the_hub_has_its_own_tokenizer(hub, tmp_path):
    tiny_llama(vocab_size=259).save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.chat_template = "the adapter's own"
    model = get_peft_model(tiny_llama(vocab_size=259), OGPSAConfig(**LORA))
    for name in ("with", "without"):
        model.save_pretrained(tmp_path / name)
        if name == "with":
            tokenizer.save_pretrained(tmp_path / name)
        push_adapter(tmp_path / name, f"me/{name}", token="hf_nobody")
        merge_adapter(f"me/{name}", tmp_path / "merged", base=tmp_path / "base")
        merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert (merged.chat_template == "the adapter's own") is (name == "with")


@pytest.mark.slow
def test_whoever_lacks_the_package_loads_a_plain_lora_from_the_hub(hub, tmp_path):
    model = adapted()
    model.push_to_hub("me/mixin", token="hf_nobody")
    model.save_pretrained(tmp_path / "adapter")
    push_adapter(tmp_path / "adapter", "me/ours", token="hf_nobody")
    tiny_llama().save_pretrained(tmp_path / "base")
    script = """
        import sys
        import torch
        from peft import LoraConfig, LoraModel, PeftModel
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        torch.use_deterministic_algorithms(True)
        logits = {}
        for name in ("me/mixin", "me/ours"):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), name).eval()
            assert type(model.base_model) is LoraModel and type(model.peft_config["default"]) is LoraConfig
            with torch.no_grad():
                logits[name] = model(torch.tensor(eval(sys.argv[1]))).logits
        save_file(logits, "logits.safetensors")
        assert not [name for name in sys.modules if name.partition(".")[0] == "peft_ogpsa"]
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tokens().tolist())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for tensor in load_file(tmp_path / "logits.safetensors").values():
        assert torch.equal(tensor, logits(model))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("builtin:pairs:test", "builtin:pairs:test"),
        ("owner/name:config[train[:9]]", "owner/name:config[train[:9]]"),
        ("public:gsm8k[test]", "public:gsm8k[test]"),
        ("public:gsm8k:/home/me/rows.jsonl", "public:gsm8k:rows.jsonl"),
        ("prompts:lookalikes", "prompts:lookalikes"),
        ("prompts:/home/me/rows.jsonl[train[:9]]", "prompts:rows.jsonl[train[:9]]"),
        ("prompts:public:gsm8k:C:\\me\\rows.jsonl", "prompts:public:gsm8k:rows.jsonl"),
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("data/owner/rows.jsonl", "rows.jsonl"),
    ],
)
def test_names_without_paths(name, told):
    assert public(name) == told


def test_the_card_says_what_else_is_trained_and_how_lora_is_scaled(tmp_path):
    config = OGPSAConfig(
        subspace="gradients",
        **LORA,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        modules_to_save=["lm_head"],
        bias="lora_only",
    )
    text = save_card(save(tmp_path, config)).read_text()
    assert "rsLoRA, rank_pattern `{'q_proj': 2}`; on " in text
    assert "- Also trained, beside LoRA's matrices and without projection: `lm_head`, biases (`lora_only`)" in text
    assert "Also trained" not in save_card(save(tmp_path / "plain")).read_text()


@pytest.mark.parametrize(
    ("given", "used"), [("Gemma3ForConditionalGeneration",) * 2, ("x; import os", "AutoModelForCausalLM")]
)
def test_the_card_loads_the_base_with_its_class(given, used, tmp_path):
    text = save_card(save(tmp_path), run={"model_class": given}).read_text()
    assert f"from transformers import {used}, AutoTokenizer" in text
    assert f"PeftModel.from_pretrained({used}.from_pretrained(base" in text
