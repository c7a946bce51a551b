# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The functions that read input: configurations, rows, and every loader of files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model

from peft_ogpsa import FullParameterConfig, OGPSAConfig, ReferenceSet, save_card
from peft_ogpsa.cli.arguments import parser
from peft_ogpsa.cli.compare import run as compare
from peft_ogpsa.cli.datasets import load_rows
from peft_ogpsa.cli.loading import load_adapter, read_adapter_config
from peft_ogpsa.cli.quickstart import load_rows as load_folder
from peft_ogpsa.core.config import ProjectionConfig
from peft_ogpsa.core.files import json_lines
from peft_ogpsa.data.public import PUBLIC, read_public
from peft_ogpsa.evaluation import Estimate, Evaluation, LossResult, Measurement, TaskScore, classify
from peft_ogpsa.evaluation.exact import correct
from peft_ogpsa.integrations.llamafactory import read as read_llamafactory
from peft_ogpsa.references.budget import refresh_samples
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.losses import LOSSES, reference_loss
from peft_ogpsa.sharing.folder import weights_digest
from peft_ogpsa.text.tokenization import encode_prompt, prompt_text
from peft_ogpsa.trainer import checkpoint

from ..byte_tokenizer import byte_tokenizer
from . import inputs, runs
from .fuzz import Target

_VALID = {
    "subspace": ["activations", "gradients", "both", "none"],
    "subspace_rank": [None, 2],
    "subspace_energy": [1.0, 0.5],
    "tokens": ["all", "answer"],
    "constraint": ["cone", "orthogonal"],
    "projection": ["update", "gradient"],
    "scope": ["slice", "tensor", "module", "model"],
    "slices": [1, 4],
    "rows": [1, 8],
    "rows_from": ["example", "batch", "set"],
    "rows_dtype": ["float32", "bfloat16", "int8"],
    "refresh_steps": [1, 5],
    "reference_budget": [None, 0.1, 1],
    "refresh_samples": [None, 4],
    "reference_weight": [None, 0, 2.0],
    "missing_reference": ["error", "warn", "ignore"],
    "exclude": [(), ["lm_head"]],
    "rows_device": ["model", "cpu"],
}
_LORA = {
    "r": [1, 4],
    "lora_alpha": [1, 8],
    "lora_dropout": [0.0, 0.1],
    "target_modules": ["all-linear", ["q_proj"]],
    "bias": ["none", "all", "lora_only"],
    "use_rslora": [True],
    "use_dora": [True],
    "lora_bias": [True],
    "init_lora_weights": [True, False, "gaussian", "pissa", "olora", "orthogonal"],
    "modules_to_save": [["lm_head"]],
    "rank_pattern": [{"q_proj": 2}],
    "layers_to_transform": [[0]],
    "task_type": ["CAUSAL_LM"],
}


def targets(folder: Path) -> dict[str, Target]:
    """Return all targets by name. They write files to `folder`."""
    return {**_configurations(), **_rows(), **_checkpoints(folder), **_adapters(folder), **_tables(folder)}


# Configurations


def _options(names: list[str], valid: dict[str, list], more: dict[str, list] | None = None) -> st.SearchStrategy:
    own = {name: st.sampled_from(valid[name]) | inputs.anything for name in names}
    lora = {name: st.sampled_from(values) for name, values in (more or {}).items()}
    return st.builds(lambda a, b: {**b, **a}, _some(own), _some(lora))


def _some(own: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    if not own:
        return st.just({})
    chosen = st.lists(st.sampled_from(sorted(own)), max_size=4, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: own[name] for name in names}))


def _use(config: ProjectionConfig) -> None:
    """Do what comes right after a configuration is accepted."""
    json.dumps(config.ogpsa_dict())
    for examples in (1, 4096):
        refresh_samples(config, examples, 8, 1, 1.5)


def _make_ogpsa(options: dict[str, Any]) -> None:
    config = OGPSAConfig(**options)
    _use(config)
    config.lora_config()


def _make_whole(options: dict[str, Any]) -> None:
    _use(FullParameterConfig(**options))


def _make_adapter(options: dict[str, Any]) -> None:
    if options.get("rows", 1) > 64 or options.get("r", 1) > 64:
        return
    net = get_peft_model(runs.model(), OGPSAConfig(**{"target_modules": "all-linear", "r": 2, **options}))
    net.projector.memory(1)


def _configurations() -> dict[str, Target]:
    own = [f.name for f in fields(ProjectionConfig)]
    whole = [f.name for f in fields(FullParameterConfig)]
    valid = {name: st.sampled_from(_VALID[name]) for name in own}
    lora = {name: st.sampled_from(values) for name, values in _LORA.items()}
    names = tuple(whole) + tuple(_LORA)
    return {
        "OGPSAConfig": Target(_make_ogpsa, _options(own, _VALID, _LORA), names),
        "FullParameterConfig": Target(_make_whole, _options(whole, _VALID), names),
        "an adapter from valid values": Target(_make_adapter, _some({**valid, **lora}), names, share=0.15),
        "ReferenceSet": Target(
            lambda options: ReferenceSet(**{"name": "a", "dataset": [], **options}),
            _some(dict.fromkeys(("name", "samples", "max_length", "loss", "beta"), inputs.anything)),
            ("name", "samples", "max_length", "loss", "beta"),
        ),
    }


# Rows


def _rows() -> dict[str, Target]:
    tokenizer = byte_tokenizer()
    bare = byte_tokenizer()
    bare.chat_template = None
    net = runs.model()

    def reference(given: tuple[Any, str, bool]) -> None:
        row, loss, chat = given
        examples = ReferenceSet("known", [row], None, 48, loss).tokenize(tokenizer if chat else bare)
        if loss != "dpo":
            with torch.no_grad():
                batch = LOSSES[loss].collate(examples, 0, "cpu")
                if loss != "kl":
                    reference_loss(net, batch)

    def prompt(given: tuple[Any, bool]) -> None:
        encode_prompt(tokenizer if given[1] else bare, given[0])
        prompt_text(given[0])

    prompts = inputs.text | inputs.rows() | inputs.anything
    return {
        "rows of a reference set": Target(
            reference, st.tuples(inputs.rows(), st.sampled_from(sorted(LOSSES)), st.booleans()), ("'known'",)
        ),
        "prompts": Target(prompt, st.tuples(prompts, st.booleans()), ("prompt",)),
        "answers to classify": Target(classify, inputs.text | st.text(max_size=400), share=0.5),
        "numbers in answers": Target(
            lambda answer: correct({"answer": "7"}, answer), st.text(alphabet="0123456789,.- ٣", max_size=40)
        ),
    }


# Checkpoints


def _checkpoints(folder: Path) -> dict[str, Target]:
    made = runs.trainer("sft adapter", folder / "trained", [], max_steps=2)
    made.train()
    whole = folder / "trained" / "checkpoint-2"
    projector = made.model.projector
    loader: ReferenceLoader = made.callback_handler.callbacks[0]._runs[0].loader
    tensors, rest = (whole / checkpoint.TENSORS_NAME).read_bytes(), (whole / checkpoint.STATE_NAME).read_bytes()
    own = folder / "checkpoint"
    own.mkdir()

    def load(given: tuple[bytes, bytes]) -> None:
        (own / checkpoint.TENSORS_NAME).write_bytes(given[0])
        (own / checkpoint.STATE_NAME).write_bytes(given[1])
        saved = checkpoint.load(own)
        loader.load_state_dict(saved["rest"].get("loader"))
        projector.load_state_dict(saved)

    def newest(content: bytes) -> None:
        place = folder / "several" / "checkpoint-3"
        place.mkdir(parents=True, exist_ok=True)
        (place / "trainer_state.json").write_bytes(content)
        checkpoint.last_whole(place.parent, subspace=False)

    state = inputs.files(json.loads(rest))
    parts = st.tuples(st.just(tensors), state) | st.tuples(inputs.damaged(tensors), st.just(rest))
    return {
        "a checkpoint's subspace": Target(load, parts),
        "a trainer's state": Target(newest, inputs.files({"global_step": 3})),
    }


# Adapters


def _writing(path: Path, function: Callable[[], object]) -> Callable[[bytes], None]:
    """Return a function that writes its input to a file, and then calls the given function."""

    def act(content: bytes) -> None:
        path.write_bytes(content)
        function()

    return act


def _adapters(folder: Path) -> dict[str, Target]:
    adapter = folder / "adapter"
    net = get_peft_model(runs.model(), OGPSAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    net.save_pretrained(adapter)
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    base = runs.model()

    def files(
        place: str,
        name: str,
        valid: dict[str, Any],
        function: Callable[[Path], object],
        names: tuple[str, ...] = (),
        share: float = 1.0,
    ) -> Target:
        own = folder / f"adapter-{place}"
        own.mkdir()
        for file in adapter.iterdir():
            (own / file.name).write_bytes(file.read_bytes())

        def act(content: bytes) -> None:
            (own / name).write_bytes(content)
            function(own)

        return Target(act, inputs.files(valid), names, share=share)

    settings = json.loads((adapter / "ogpsa_config.json").read_text())
    lora = json.loads((adapter / "adapter_config.json").read_text())
    run = {"stage": "sft", "dataset": "a/b", "references": {"general": "builtin:general"}, "steps": 3, "seconds": 1.5}

    def load(content: bytes) -> None:
        place = folder / "adapter-weights"
        place.mkdir(exist_ok=True)
        for name in ("adapter_config.json", "ogpsa_config.json"):
            (place / name).write_bytes((adapter / name).read_bytes())
        (place / "adapter_model.safetensors").write_bytes(content)
        load_adapter(base, str(place), read_adapter_config(str(place)), trainable=False).unload()

    def card_with_run(own: Path) -> None:
        save_card(own, run=inputs.parsed((own / "ogpsa_run.json").read_bytes()))

    return {
        "ogpsa_config.json": files(
            "settings",
            "ogpsa_config.json",
            settings,
            lambda own: PeftConfig.from_pretrained(str(own)),
            names=("ogpsa_config.json",),
        ),
        "adapter_config.json": files(
            "lora",
            "adapter_config.json",
            lora,
            lambda own: read_adapter_config(str(own)),
            names=("adapter_config.json", "adapter="),
        ),
        "adapter_config.json, for a card": files(
            "card",
            "adapter_config.json",
            lora,
            save_card,
            names=("adapter_config.json", "ogpsa_config.json"),
            share=0.3,
        ),
        "run of save_card": files("run", "ogpsa_run.json", run, card_with_run),
        "ogpsa_run.json": files(
            "of-run",
            "ogpsa_run.json",
            {**run, "weights_sha256": weights_digest(adapter)},
            save_card,
            ("ogpsa_run.json",),
        ),
        "ogpsa_eval.json": files(
            "of-eval",
            "ogpsa_eval.json",
            {**_result(), "weights_sha256": weights_digest(adapter)},
            save_card,
            ("ogpsa_eval.json",),
            share=0.5,
        ),
        "README.md": Target(
            _writing(adapter / "README.md", lambda: save_card(adapter)),
            inputs.damaged((adapter / "README.md").read_bytes()),
            ("README.md",),
            share=0.3,
        ),
        "adapter_model.safetensors": Target(load, inputs.damaged(weights), ("adapter=",), share=0.2),
    }


# Tables: rows, results, and options


def _result() -> dict[str, Any]:
    """Return a result of `ogpsa eval`."""
    number = Estimate(0.5, 0.4, 0.6, 10)
    loss = LossResult(0.5, 20, [0.4, 0.6], [10, 10])
    score = TaskScore("facts", "acc", 0.5, 0.1, 2, True, [0.0, 1.0], "x")
    measured = Measurement(
        "base", general={"a": number}, general_mean=number, refusal=number, losses={"a": loss}, tasks=[score]
    )
    return {
        "name": "x",
        "base_model": "a/b",
        "arguments": {"data": "builtin", "samples": 3},
        "evaluation": Evaluation(measured, measured, {"seed": 0}).to_dict(),
    }


def _tables(folder: Path) -> dict[str, Target]:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in runs._rows()[:3])
    options = {"ogpsa": {"references": {"general": "builtin:general"}, "rows": 8}, "stage": "sft", "pref_beta": 0.1}
    command = {"model_name_or_path": "a/b", "dataset": "builtin:harmful", "references": ["general=builtin:general"]}

    def arguments() -> None:
        from trl import SFTConfig

        try:
            parser("sft", SFTConfig).parse_args_and_config(["--config", str(folder / "sft.yaml")])
        except SystemExit as error:
            raise ValueError("sft.yaml") from error

    def compared() -> None:
        try:
            compare([str(folder / "result.json")])
        except SystemExit as error:
            raise ValueError(error.code) from error

    def public(given: tuple[str, dict[str, Any]]) -> None:
        name, row = given
        public_set = PUBLIC[name]
        from peft_ogpsa.data.public import _converted

        _converted(name, public_set.read, [row], None)

    for name in ("harmful", "benign", "general"):
        for split in ("train", "test"):
            (folder / f"{name}_{split}.jsonl").write_bytes(lines)
    columns = "prompt response_0 response_1 is_response_0_safe safer_response_id chosen rejected user_query answer"
    columns += " chatgpt_response hallucination question instruction output input messages type is_response_1_safe"
    raw = st.dictionaries(st.sampled_from(columns.split()), inputs.anything, min_size=2, max_size=18)
    yamls = inputs.changed(options).map(lambda own: yaml.safe_dump(own).encode())
    return {
        "JSON lines": Target(lambda content: list(json_lines(content.decode())), inputs.damaged(lines)),
        "rows of quickstart": Target(
            _writing(folder / "general_train.jsonl", lambda: load_folder(str(folder))),
            inputs.damaged(lines),
            ("general_train.jsonl",),
            share=0.5,
        ),
        "rows of a file": Target(
            _writing(folder / "rows.jsonl", lambda: load_rows(str(folder / "rows.jsonl"), "dataset")),
            inputs.damaged(lines),
            ("dataset=",),
            share=0.05,
        ),
        "a result of eval": Target(
            _writing(folder / "result.json", compared), inputs.files(_result()), ("result.json",), share=0.3
        ),
        "rows of public sets": Target(public, st.tuples(st.sampled_from(sorted(PUBLIC)), raw), ("The set",)),
        "a file of a public set": Target(
            _writing(folder / "public.jsonl", lambda: read_public("gsm8k", folder / "public.jsonl")),
            inputs.damaged(b'{"question": "2+2?", "answer": "#### 4"}\n'),
            ("The set", "public.jsonl"),
            share=0.05,
        ),
        "LLaMA-Factory's YAML": Target(
            _writing(folder / "lf.yaml", lambda: read_llamafactory([str(folder / "lf.yaml")])),
            yamls | inputs.damaged(yaml.safe_dump(options).encode()),
            errors=(ValueError, OSError, yaml.YAMLError),
            share=0.3,
        ),
        "the command's YAML": Target(
            _writing(folder / "sft.yaml", arguments),
            inputs.changed(command).map(lambda own: yaml.safe_dump(own).encode())
            | inputs.damaged(yaml.safe_dump(command).encode()),
            errors=(ValueError, OSError, yaml.YAMLError),
            share=0.1,
        ),
    }
