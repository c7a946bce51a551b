"""Nothing is unpickled or executed, and what is shared names no path, token or user of this machine."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from coverage_page import covers
from hypothesis import example, given
from hypothesis import strategies as st
from models import tiny_llama
from peft import LoraConfig, get_peft_model
from test_card import UPLOADED, hub, measured  # noqa: F401

from peft_ogpsa import OGPSAConfig, push_adapter, save_card
from peft_ogpsa.cli.loading import load_adapter, read_adapter_config
from peft_ogpsa.sharing.names import public
from peft_ogpsa.sharing.run_record import save_run
from peft_ogpsa.trainer import checkpoint

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "pickle": r"\b(import|from) (c?[pP]ickle|dill|cloudpickle|joblib|shelve|marshal)\b",
    "torch.load": r"\btorch\.load\(",
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "yaml.load": r"\byaml\.(load|full_load|unsafe_load)\(",
    "shell": r"shell\s*=\s*True|\bos\.(system|popen)\(",
    "remote code": r"trust_remote_code['\"]?\s*[=:]\s*[tT]rue",
}


def sources():
    folders = [ROOT / name for name in ("peft_ogpsa", "examples", "notebooks", "benchmarks")]
    kinds = (".py", ".ipynb", ".yaml", ".yml")
    return [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_source_unpickles_or_runs_what_it_reads(name):
    files = sources()
    assert len(files) > 100
    found = {}
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        if match := re.search(FORBIDDEN[name], text):
            found[str(path.relative_to(ROOT))] = match[0]
    assert not found


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("pickle", "import pickle"),
        ("torch.load", "x = torch.load(file)"),
        ("eval", "eval(text)"),
        ("exec", "exec(text)"),
        ("yaml.load", "yaml.load(file)"),
        ("shell", "run(x, shell=True)"),
        ("remote code", "trust_remote_code: true"),
    ],
)
def test_the_search_finds_what_it_looks_for(name, code):
    assert re.search(FORBIDDEN[name], code)
    assert not re.search(FORBIDDEN[name], "model.eval(); yaml.safe_load(f); trust_remote_code=False")


class Poison:
    """When it is unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def poison(tmp_path):
    content = pickle.dumps(Poison(tmp_path / "executed"))
    pickle.loads(content)
    assert (tmp_path / "executed").is_dir()  # it works
    (tmp_path / "executed").rmdir()
    return content


@pytest.fixture
def adapter(tmp_path):
    config = OGPSAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_poisoned_adapter_is_refused_and_not_executed(name, as_zip, tmp_path, adapter, poison):
    (adapter / "adapter_model.safetensors").unlink()
    if as_zip:
        torch.save(Poison(tmp_path / "executed"), adapter / name)
    else:
        (adapter / name).write_bytes(poison)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_adapter(tiny_llama(), str(adapter), read_adapter_config(str(adapter)), trainable=False)
    assert not (tmp_path / "executed").exists()


def test_a_poisoned_file_beside_the_weights_is_not_opened(tmp_path, adapter, poison):
    (adapter / "adapter_model.bin").write_bytes(poison)
    load_adapter(tiny_llama(), str(adapter), read_adapter_config(str(adapter)), trainable=False)
    save_card(adapter)
    assert not (tmp_path / "executed").exists()


def test_a_poisoned_checkpoint_is_refused_and_not_executed(tmp_path, poison):
    folder = tmp_path / "run" / "checkpoint-3"
    checkpoint.save(folder, {"tensors": {"a": torch.ones(2)}, "rest": {}})
    (folder / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", checkpoint.TENSORS_NAME):
        (folder / name).write_bytes(poison)
        assert checkpoint.last_whole(tmp_path / "run") is None
    with pytest.raises(checkpoint.CheckpointError, match=checkpoint.TENSORS_NAME):
        checkpoint.load(folder)
    assert not (tmp_path / "executed").exists()


def test_remote_code_of_a_model_is_not_run(tmp_path):
    from trl import ModelConfig

    from peft_ogpsa.cli.loading import load_base

    tiny_llama().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    with pytest.raises(ValueError, match="model_name_or_path="):
        load_base(ModelConfig(model_name_or_path=str(tmp_path / "model")))
    assert not (tmp_path / "executed").exists()


# What is shared


SECRETS = {"HF_TOKEN": "hf_abcdefghijklmnop", "WANDB_API_KEY": "0123456789abcdef", "USER": "alice-of-tests"}


@pytest.fixture
def secret_home(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "home" / SECRETS["USER"]
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


@covers("pushed without the path of a local base", "base_model_name_or_path")
@pytest.mark.parametrize("config", [OGPSAConfig, LoraConfig])
def test_a_pushed_folder_names_no_path_token_or_user(config, hub, secret_home):  # noqa: F811
    base, folder = secret_home / "models" / "My-Base", secret_home / "runs" / "adapter"
    tiny_llama().save_pretrained(base)
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = str(base)
    get_peft_model(model, config(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + f"\nThis is a version of [{base}](https://huggingface.co/{base}).\n")
    (folder / "training_args.bin").write_bytes(str(folder).encode())
    run = {
        "stage": "dpo",
        "method": "ogpsa",
        "started_from": str(secret_home / "runs" / "first"),
        "dataset": str(secret_home / "rows[1]" / "pairs.jsonl") + "[train[:50]]",
        "references": {"general": str(secret_home / "general.jsonl"), "own": f"prompts:{secret_home}/prompts.jsonl"},
    }
    evaluation = measured() | {"base_model": str(base)}
    evaluation["arguments"] = {"data": str(secret_home / "data"), "output": str(secret_home / "x.json"), "seed": 1}
    save_card(folder, run=run, evaluation=evaluation)
    push_adapter(folder, "me/mine", token=SECRETS["HF_TOKEN"])
    files = hub.repositories["me/mine"]
    assert files.keys() >= UPLOADED - {"ogpsa_config.json"}
    for name, content in files.items():
        for secret in (str(secret_home), *SECRETS.values()):
            assert secret.encode() not in content, name
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "My-Base"
    # On this machine, the adapter still knows its base.
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_the_record_of_a_whole_model_names_no_path(tmp_path, secret_home):
    save_run(tmp_path, {"started_from": str(secret_home / "base"), "dataset": str(secret_home / "rows.jsonl")})
    assert SECRETS["USER"] not in (tmp_path / "ogpsa_run.json").read_text()


part = st.text(alphabet=st.characters(codec="ascii", exclude_characters="/\\\0"), min_size=1, max_size=8)


@given(
    st.lists(part, min_size=1, max_size=3), part, st.sampled_from(["/", "C:\\", "\\\\host\\", "file:///", "../../"])
)
@example(["0"], "[", "/")
def test_no_folder_is_left_of_a_path(folders, name, root):
    mark = "SECRET"
    separator = "\\" if "\\" in root else "/"
    path = root + separator.join([mark, *(mark + folder for folder in folders), name])
    assert mark not in public(path)


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "..\\..\\outside"])
def test_a_name_in_an_adapters_files_leads_nowhere(name, tmp_path, adapter, monkeypatch):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
    shutil.copy(path, tmp_path / "before.json")
    files = set(tmp_path.rglob("*"))
    monkeypatch.chdir(adapter)
    text = save_card(adapter, run={"dataset": name, "references": {"../../general": name}}).read_text()
    assert set(tmp_path.rglob("*")) - files <= {adapter / "README.md", adapter / "ogpsa_run.json"}
    assert "'PATH/TO/outside'" in text
