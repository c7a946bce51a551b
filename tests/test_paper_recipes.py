"""The paper's runs (`examples/paper`): published settings, and a trial of each on a CPU with random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from models import tiny_tokenizer
from safetensors.torch import load_file
from test_public_data import PREFERENCE, safe_rlhf_row, write
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from trl import DPOConfig, SFTConfig

from peft_ogpsa import FullParameterConfig
from peft_ogpsa.cli import main
from peft_ogpsa.cli.arguments import parser, whole_config
from peft_ogpsa.cli.launch import check_saves_whole_model
from peft_ogpsa.cli.random_weights import RandomWeights

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "paper").glob("*_*.yaml"))
SHARED = {"sft": ROOT / "examples/paper/sft.yaml", "dpo": ROOT / "examples/paper/dpo.yaml"}
TRAINING = {"sft": SFTConfig, "dpo": DPOConfig}
MODELS = {"qwen2.5_7b": "Qwen/Qwen2.5-7B-Instruct", "llama3.1_8b": "meta-llama/Llama-3.1-8B-Instruct"}
PIPELINES = {"sft": "sft", "dpo": "dpo", "sft_dpo": "dpo"}
REFERENCES = {
    "sft": ["general=public:ultrafeedback", "truthful=public:halueval"],
    "dpo": ["general:both=public:ultrafeedback_pairs"],
}

# The two architectures in their published sizes, of which no weights are made, over the vocabulary of the tests.
CONFIGS = {
    "qwen2.5_7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=259,
    ),
    "llama3.1_8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=259,
    ),
}
WIDTHS = {"qwen2.5_7b": 56, "llama3.1_8b": 64}


def of(path: Path) -> tuple[str, str, str]:
    """The model, the pipeline and the command of a recipe."""
    model = next(name for name in MODELS if path.stem.startswith(name))
    pipeline = path.stem.removeprefix(f"{model}_")
    return model, pipeline, PIPELINES[pipeline]


def parsed(path: Path, *flags: str):
    stage = of(path)[2]
    return parser(stage, TRAINING[stage]).parse_args_and_config(["--config", str(path), *flags])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands run: configurations and tokenizers without weights, and files of the public sets' columns."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, config in CONFIGS.items():
        config.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    write(tmp_path / "safe_rlhf.jsonl", [safe_rlhf_row(f"May I do {i}?", i % 2, True, True) for i in range(20)])
    write(tmp_path / "ultrafeedback.jsonl", [PREFERENCE] * 3)
    halueval = {"user_query": "Capital of Peru?", "chatgpt_response": "Lima.", "hallucination": "no"}
    write(tmp_path / "halueval.jsonl", [halueval] * 3)
    return tmp_path


def local(stage: str) -> list[str]:
    """Flags that put local files in the hub's place, and a CPU in a GPU's."""
    name = {"sft": "safe_rlhf", "dpo": "safe_rlhf_pairs"}[stage]
    files = [f"{r}:{'halueval' if 'halueval' in r else 'ultrafeedback'}.jsonl" for r in REFERENCES[stage]]
    flags = ["--dataset", f"public:{name}:safe_rlhf.jsonl", "--references", *files]
    return [*flags, "--reference_max_length", "64", "--max_length", "64", "--disable_tqdm", "true"]


def figures(printed: str) -> dict[str, str]:
    lines = [line.strip().split("  ", 1) for line in printed.splitlines() if line.startswith("  ")]
    return {name: figure.strip() for name, figure in lines}


def test_recipes_are_there():
    assert {of(path)[:2] for path in RECIPES} == {(model, pipeline) for model in MODELS for pipeline in PIPELINES}
    assert len(RECIPES) == 6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_settings_are_the_published_ones(path):
    model, pipeline, stage = of(path)
    ogpsa, data, run, training, base = parsed(path)
    assert base.model_name_or_path == (f"out/paper/{model}_sft" if pipeline == "sft_dpo" else MODELS[model])
    assert training.output_dir == f"out/paper/{path.stem}"
    assert run.full_parameter
    assert not run.dry_run
    assert run.random_layers is None

    assert training.learning_rate == 1e-6
    assert training.num_train_epochs == {"sft": 3, "dpo": 1}[stage]
    batches = training.per_device_train_batch_size, training.gradient_accumulation_steps
    assert batches == {"sft": (4, 4), "dpo": (2, 16)}[stage]
    assert (training.optim, training.lr_scheduler_type, training.warmup_steps) == ("adamw_torch", "cosine", 0)
    assert (training.weight_decay, training.max_grad_norm) == (0.0, 1.0)
    assert (training.bf16, training.max_length) == (True, 2048)
    if stage == "dpo":
        assert (training.beta, training.loss_type) == (0.2, ["sigmoid"])
    assert data.dataset == {"sft": "public:safe_rlhf", "dpo": "public:safe_rlhf_pairs"}[stage]
    assert data.references == REFERENCES[stage]
    assert (data.dataset_samples, data.reference_samples, data.reference_max_length) == (10_000, 200, 2048)

    config = whole_config(ogpsa, run, stage)
    assert config == FullParameterConfig.paper(stage, rows_dtype="bfloat16")
    assert config.refresh_steps == {"sft": 30, "dpo": 5}[stage]
    assert (config.constraint, config.projection, config.scope) == ("orthogonal", "gradient", "tensor")
    assert (config.rows_from, config.refresh_samples, config.exclude) == ("set", None, ())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_one_flag_changes_the_method(path):
    stage = of(path)[2]
    ogpsa, _, run, *_ = parsed(path, "--method", "ogpsa")
    assert whole_config(ogpsa, run, stage) == FullParameterConfig(rows_dtype="bfloat16")
    ogpsa, _, run, *_ = parsed(path, "--method", "plain")
    assert whole_config(ogpsa, run, stage) is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_begin_with_their_command(path):
    (first, *_), stage = path.read_text().splitlines(), of(path)[2]
    command = f"-m peft_ogpsa.cli {stage} --config {path.relative_to(ROOT)}"
    assert first.startswith("# accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 8 ")
    assert first.endswith(command)
    # And every command of the README names a file that is there.
    named = [w for w in (path.parent / "README.md").read_text().split() if w.startswith("examples/")]
    assert named
    assert all((ROOT / word).is_file() for word in named if "$" not in word)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_shared_files_hold_no_model(stage):
    assert not {"model_name_or_path", "output_dir", "defaults"} & yaml.safe_load(SHARED[stage].read_text()).keys()


@pytest.mark.parametrize("path", [p for p in RECIPES if "sft_dpo" not in p.stem], ids=lambda path: path.stem)
def test_dry_run_with_random_weights(path, folder, capsys):
    model, _, stage = of(path)
    random = ["--random_layers", "2", "--random_width", str(WIDTHS[model])]
    before = {p for p in folder.rglob("*") if "cache" not in p.parts}
    flags = ["--model_name_or_path", model, *local(stage), *random, "--dry_run"]
    main([stage, "--config", str(path), *flags])
    told = figures(capsys.readouterr().out)
    # 20 rows in batches of 16 over 3 epochs, or of 32 over one.
    steps, refreshes = {"sft": (6, 2), "dpo": (1, 1)}[stage]
    assert told["whole run"].endswith(f"{steps} steps and {refreshes} refreshes")
    # Each weight has a row for each set, and the orthonormal basis as much again, both in two bytes.
    sets = len(REFERENCES[stage])
    weights = parameters(CONFIGS[model], WIDTHS[model], layers=2)
    assert told["reference rows"].startswith(f"{2 * sets * weights * 2:,} bytes")
    assert {p for p in folder.rglob("*") if "cache" not in p.parts} == before


def parameters(config, width: int, layers: int) -> int:
    """Counted from the shapes of the two architectures; input and output embeddings apart."""
    inner = round(config.intermediate_size * width / config.hidden_size)
    keys = width * config.num_key_value_heads // config.num_attention_heads
    attention = 2 * width * width + 2 * width * keys
    if config.model_type == "qwen2":  # which has biases here
        attention += width + 2 * keys
    return 2 * config.vocab_size * width + layers * (attention + 3 * width * inner + 2 * width) + width


def test_sft_then_dpo(folder, capsys):
    """The second recipe reads what the first has saved, where the first has saved it."""
    sft, both = (ROOT / f"examples/paper/qwen2.5_7b_{name}.yaml" for name in ("sft", "sft_dpo"))
    random = ["--random_layers", "2", "--random_width", "56", "--model_name_or_path", "qwen2.5_7b"]
    short = ["--max_steps", "2", "--learning_rate", "1e-3", "--per_device_train_batch_size", "1"]
    main(["sft", "--config", str(sft), *local("sft"), *random, *short])
    saved = folder / "out/paper/qwen2.5_7b_sft"
    assert f"Saved the model: {saved}" in capsys.readouterr().out
    model, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.model_type, model.config.num_hidden_layers, model.dtype) == ("qwen2", 2, torch.float32)
    assert not (saved / "adapter_config.json").exists()
    run = json.loads((saved / "ogpsa_run.json").read_text())
    assert (run["stage"], run["method"], run["steps"], run["started_from"]) == ("sft", "paper", 2, "qwen2.5_7b")
    assert run["full_parameter"]["constraint"] == "orthogonal"
    # Both sets of three, before either step of four batches of one.
    assert run["reference_share"] == pytest.approx(12 / 8)

    main(["dpo", "--config", str(both), *local("dpo"), "--max_steps", "1", "--learning_rate", "1e-3"])
    second = folder / "out/paper/qwen2.5_7b_sft_dpo"
    first, now = (load_file(path / "model.safetensors") for path in (saved, second))
    assert first.keys() == now.keys()
    # One step of AdamW from where the first stage ended.
    moved = max((now[name] - first[name]).abs().max() for name in first)
    assert 0 < moved <= 1.01e-3


@pytest.mark.slow
def test_dry_run_in_two_processes(folder):
    options = ["--random_layers", "2", "--random_width", "64", "--gradient_accumulation_steps", "2", "--dry_run"]
    done = launched("dpo", ["--model_name_or_path", "llama3.1_8b", *local("dpo"), *options])
    told = figures(done.stdout)
    # 20 pairs in batches of 2 over 2 processes, accumulated by 2.
    assert told["whole run"].endswith(" 3 steps and 2 refreshes")
    # Sharded: half of what one process holds, where every shape divides by two.
    weights = parameters(CONFIGS["llama3.1_8b"], 64, layers=2)
    held = int(told["reference rows"].split()[0].replace(",", ""))
    assert held == pytest.approx(weights * 2, rel=0.02)
    assert told["reference rows"].endswith("in each of 2 processes")
    assert done.stdout.count("Dry run:") == 1
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_two_processes_save_the_model_of_one(folder):
    """DPO from saved weights, those of the reference policy too."""
    sft = ROOT / "examples/paper/llama3.1_8b_sft.yaml"
    random = ["--random_layers", "2", "--random_width", "64", "--model_name_or_path", "llama3.1_8b"]
    main(["sft", "--config", str(sft), *local("sft"), *random, "--max_steps", "1"])
    options = ["--model_name_or_path", "out/paper/llama3.1_8b_sft", "--max_steps", "2", "--learning_rate", "1e-3"]
    options += [*local("dpo"), "--bf16", "false", "--rows_dtype", "float32", "--adam_epsilon", "1e-3"]
    options += ["--logging_steps", "1"]
    accumulated = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps"]
    done = launched("dpo", [*options, *accumulated, "1", "--output_dir", "two"])
    assert done.stdout.count("Saved the model") == 1
    # A policy that has not moved yet prefers nothing: with other weights in the reference it would.
    first = next(line for line in done.stdout.splitlines() if "'loss'" in line)
    assert "'loss': '0.6931'" in first or "'loss': 0.6931" in first, first
    dpo = ROOT / "examples/paper/llama3.1_8b_dpo.yaml"
    main(["dpo", "--config", str(dpo), *options, *accumulated, "2", "--output_dir", "one"])
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(folder / "out/paper/llama3.1_8b_sft/model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        moved = (weight - before[name]).abs().max()
        assert (two[name] - weight).abs().max() <= 1e-5 + 1e-2 * moved, name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--random_layers", "29"],
            "random_layers=29 is not allowed: this qwen2 model has 28 layers. Use a number from 1 to 28",
        ),
        (["--random_layers", "0"], "random_layers=0 is not allowed"),
        (["--random_layers", "2", "--random_width", "60"], "random_width=60 is not allowed: .* Use a multiple of 56"),
        (["--random_width", "56"], "random_width=56 has no effect without random_layers"),
        (["--full_parameter", "false", "--random_layers", "2", "--load_in_4bit"], "random_layers=2 creates weights"),
        (["--load_in_4bit"], "load_in_4bit cannot be combined with full_parameter"),
        (["--use_peft"], "use_peft cannot be combined with full_parameter"),
        (["--adapter", "saved"], "adapter='saved' cannot be trained with full_parameter. Merge it"),
        (["--full_parameter", "false", "--exclude", "lm_head"], r"exclude=\['lm_head'\] needs full_parameter"),
        (["--full_parameter", "false", "--rows_device", "cpu"], "rows_device='cpu' needs full_parameter"),
        (
            ["--random_layers", "1", "--random_width", "56", "--exclude", "none", "--dry_run"],
            "exclude: 'none' matches no module",
        ),
        (["--push_to_hub"], "push_to_hub only uploads adapters"),
        (["--dataset_samples", "0"], "dataset_samples=0 must be at least 1"),
        (["--output_dir", "adapter"], "output_dir='adapter' contains a LoRA adapter"),
        (["--model_name_or_path", "nowhere", "--random_layers", "1"], "model_name_or_path='nowhere' cannot be loaded"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(folder, flags, message):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    recipe = ROOT / "examples/paper/qwen2.5_7b_sft.yaml"
    shared = ["--model_name_or_path", "qwen2.5_7b", *local("sft"), "--max_steps", "1"]
    with pytest.raises(SystemExit, match=f"ogpsa sft: .*{message}"):
        main(["sft", "--config", str(recipe), *shared, *flags])
    assert not (folder / "out").exists()


def test_prompts_without_answers_in_several_processes(folder, monkeypatch):
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    recipe = ROOT / "examples/paper/qwen2.5_7b_sft.yaml"
    with pytest.raises(SystemExit, match=r"references has prompts without answers.* Give references with answers"):
        main(["sft", "--config", str(recipe), *local("sft")[:2], "--references", "a=prompts:general"])


def test_random_weights_under_lora(folder, capsys):
    recipe = ROOT / "examples/paper/qwen2.5_7b_sft.yaml"
    random = ["--random_layers", "1", "--random_width", "56", "--model_name_or_path", "qwen2.5_7b"]
    flags = ["--full_parameter", "false", "--lora_r", "2", "--lora_target_modules", "q_proj", "o_proj"]
    main(
        [
            "sft",
            "--config",
            str(recipe),
            *local("sft"),
            *random,
            *flags,
            "--dry_run",
            "--method",
            "ogpsa",
            "--subspace",
            "gradients",
        ]
    )
    # 8 rows of two bytes, of A and B of rank 2, of two square maps.
    assert figures(capsys.readouterr().out)["reference rows"].startswith(f"{8 * 2 * 2 * (56 + 56) * 2:,} bytes")


def test_random_weights_are_the_architecture_and_the_same_everywhere():
    draw = RandomWeights(layers=2, width=64, seed=3)
    state = torch.get_rng_state()
    config = {"layer_types": ["full_attention"] * 32, **CONFIGS["llama3.1_8b"].to_dict()}
    first, second = (draw.build(LlamaConfig(**config), "float32") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert sum(p.numel() for p in first.parameters()) == parameters(CONFIGS["llama3.1_8b"], 64, layers=2)
    attention = first.model.layers[0].self_attn
    assert (attention.head_dim, attention.q_proj.out_features, attention.k_proj.out_features) == (2, 64, 16)
    other = RandomWeights(layers=2, width=64, seed=4).build(LlamaConfig(**config), torch.bfloat16)
    assert other.dtype == torch.bfloat16
    assert not torch.equal(other.lm_head.weight.float(), first.lm_head.weight)


@pytest.mark.parametrize(("kind", "refused"), [("SHARDED_STATE_DICT", True), ("FULL_STATE_DICT", False)])
def test_shards_must_be_put_together_to_be_saved(kind, refused):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    trainer = SimpleNamespace(
        is_fsdp_enabled=True, accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    )
    with pytest.raises(ValueError, match=r"is SHARDED_STATE_DICT, .* Set") if refused else nullcontext():
        check_saves_whole_model(trainer)


def test_dataset_samples(folder):
    from peft_ogpsa.cli.datasets import load_rows

    rows = load_rows("public:safe_rlhf:safe_rlhf.jsonl", "dataset", 5)
    assert len(rows) == 5
    everything = load_rows("public:safe_rlhf:safe_rlhf.jsonl", "dataset").to_list()
    assert rows.to_list() != everything[:5]  # shuffled
    assert all(row in everything for row in rows.to_list())


def test_defaults_of_a_configuration_file(tmp_path):
    (tmp_path / "shared.yaml").write_text("dataset: builtin:harmful\nlearning_rate: 1e-6\nseed: 7\n")
    one = tmp_path / "one.yaml"
    one.write_text("defaults: shared.yaml\nseed: 8\n")
    _, data, _, training, _ = parser("sft", SFTConfig).parse_args_and_config(["--seed", "9", "--config", str(one)])
    assert (data.dataset, training.learning_rate, training.seed) == ("builtin:harmful", 1e-6, 9)
    *_, training, _ = parser("sft", SFTConfig).parse_args_and_config(["--config", str(one)])
    assert training.seed == 8

    one.write_text("defaults: none.yaml\n")
    with pytest.raises(SystemExit, match=r"defaults='.*none\.yaml' in .*one\.yaml is not a file"):
        main(["sft", "--config", str(one)])
    (tmp_path / "none.yaml").write_text("defaults: shared.yaml\n")
    with pytest.raises(SystemExit, match=r"must contain options and no `defaults` of its own"):
        main(["sft", "--config", str(one)])
    one.write_text("defaults: shared.yaml\nunheard_of: 1\n")
    with pytest.raises(SystemExit, match="Unknown arguments from config file"):
        main(["sft", "--config", str(one)])


def test_old_names_of_options_work_and_warn(tmp_path):
    (tmp_path / "shared.yaml").write_text(
        "dataset: builtin:harmful\nlookalikes: 0.1\ncontrast_prompts: shared.jsonl\n"
    )
    one = tmp_path / "one.yaml"

    def parsed(*arguments):
        with pytest.warns(FutureWarning, match="The option contrast.* is now lookalike"):
            _, data, *_ = parser("sft", SFTConfig).parse_args_and_config(["--config", str(one), *arguments])
        return data.lookalikes, data.lookalike_prompts

    one.write_text("dataset: builtin:harmful\ncontrast: 0.2\n")
    assert parsed() == (0.2, "lookalikes")
    assert parsed("--contrast", "0.3", "--contrast-prompts", "own.jsonl") == (0.3, "own.jsonl")
    assert parsed("--contrast=0.3", "--contrast_prompts=own.jsonl") == (0.3, "own.jsonl")
    one.write_text("defaults: shared.yaml\ncontrast: 0.2\n")
    assert parsed() == (0.2, "shared.jsonl")


def launched(stage: str, options: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "examples/accelerate/fsdp2.yaml"), "-m", "peft_ogpsa.cli", stage]
    command += ["--config", str(ROOT / f"examples/paper/llama3.1_8b_{stage}.yaml"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
