"""The benchmarks of memory and time: that memory is counted right, and that the files of one are read by the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from transformers import LlamaConfig

from peft_ogpsa.core.layout import Blocks

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cost
import overhead
from memory import (
    SHAPES,
    MainMemoryMeter,
    Settings,
    build,
    bytes_of_rows,
    clock,
    estimate,
    estimate_markdown,
    inspect_shape,
    markdown,
    measure,
)

TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)
SHORT = {"length": 64, "reference_length": 32}


def test_meter_counts_a_known_pattern():
    with MainMemoryMeter() as meter:
        kept = torch.empty(1000, dtype=torch.uint8)
        with meter.phase("first"):
            gone = torch.empty(5000, dtype=torch.uint8)
            del gone
            more = torch.empty(2000, dtype=torch.uint8)
        with meter.phase("second"):
            del kept
            last = torch.empty(300, dtype=torch.uint8)
    assert meter.peaks == {"first": 6000, "second": 3000}
    assert more.numel() + last.numel() == 2300


def test_meter_takes_releases_of_what_it_never_saw_for_nothing():
    before = torch.empty(4000, dtype=torch.uint8)
    with MainMemoryMeter() as meter, meter.phase("only"):
        del before
        after = torch.empty(100, dtype=torch.uint8)
    assert meter.peaks == {"only": 100} == {"only": after.numel()}


def test_meter_names_who_holds_the_memory():
    parameter = torch.zeros(50, 20)
    blocks = Blocks({"a": parameter}, {"a": "a"}, "tensor")
    with MainMemoryMeter() as meter, meter.phase("only"):
        stack = blocks.zeros(rows=3)
    assert meter.holders["only"]["layout._make"] == stack[0].nbytes == 12000


def test_the_model_is_built_in_four_bits():
    model = build(TINY, "cpu")
    quantized = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(quantized) == 7 * TINY.num_hidden_layers
    assert all(m.weight.dtype == torch.uint8 for m in quantized)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_a_step_costs_the_rows_more_than_plain_qlora_and_the_estimate_agrees():
    shape = inspect_shape(TINY)
    results = [measure(TINY, Settings(rows=rows, **SHORT), "cpu", steps=2) for rows in (0, 8)]
    plain, ogpsa = results
    assert plain["lora_parameters"] == ogpsa["lora_parameters"] == shape.lora_parameters(16)
    assert "refresh" in ogpsa["peaks"]
    assert "refresh" not in plain["peaks"]
    rows = bytes_of_rows({"rows": 8, "rows_dtype": "bfloat16", **ogpsa})
    assert rows <= ogpsa["peaks"]["step"] - plain["peaks"]["step"] <= 1.1 * rows
    for settings, result in zip((Settings(rows=0, **SHORT), Settings(**SHORT)), results, strict=True):
        computed = estimate(shape, settings)["peaks"]
        measured = {phase: peak for phase, peak in result["peaks"].items() if phase != "build"}
        assert computed == pytest.approx(measured, rel=0.05)


def test_times_are_of_five_steps_and_one_refresh():
    plain, ogpsa = (clock(TINY, Settings(rows=rows, **SHORT), "cpu") for rows in (0, 8))
    assert plain["seconds_refresh"] == 0 < ogpsa["seconds_refresh"]
    assert ogpsa["tokens_per_second"] == pytest.approx(5 * 64 / (5 * ogpsa["seconds_step"] + ogpsa["seconds_refresh"]))


def test_the_estimate_of_a_known_model():
    shape = inspect_shape(SHAPES["llama3.1-8b"])
    assert shape.lora_parameters(16) == 41_943_040
    parts = estimate(shape, Settings())
    assert parts["stay"]["rows"] == 8 * 2 * 41_943_040
    # All 8,030,261,248 parameters, a byte for two of those in linear layers and two bytes for one of the others.
    assert 2 * parts["stay"]["4-bit weights"] + parts["stay"]["embeddings, head, norms, biases"] / 2 == 8_030_261_248
    table = estimate_markdown({"llama3.1-8b": [(Settings(), parts)]})
    assert "| rows | 640.0 |" in table


def test_the_table_compares_with_the_plain_run_of_the_same_kind():
    times = [{"tokens_per_second": 10.0, "seconds_step": 0.1, "seconds_refresh": 0.2}]
    common = {"adapter_dtype": "float32", "optimizer": "adamw", "rows_dtype": "bfloat16", "times": times}
    mebibyte = 2**20
    common |= {"lora_parameters": mebibyte}
    plain = {**common, "rows": 0, "peaks": {"build": 99 * mebibyte, "step": mebibyte}}
    ours = {**common, "rows": 4, "peaks": {"refresh": 11 * mebibyte, "step": 9 * mebibyte}}
    other = {**plain, "optimizer": "paged_adamw_8bit", "peaks": {"step": 5 * mebibyte}}
    assert "| 10.0 | 1.25 | 1.000 |" in markdown([other, plain, ours]).splitlines()[-1]


def test_the_figure_of_the_cost_names_methods_that_are_measured():
    measured = overhead.methods(overhead.Settings())
    assert set(cost.METHODS) < set(measured)
    assert set(cost.METHODS) == set(json.loads((cost.RESULTS / "overhead.json").read_text())["methods"])
