"""The notebooks: what is committed of them, and that they run."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu import toy
from benchmarks.gpu.notebook import execute, with_model

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("01_quickstart_sft_qlora", "02_sft_then_dpo", "03_measure_the_tax")
MACHINE_PATH = re.compile(r"/(?:content|home|mnt|opt|root|tmp|usr|Users|var|work)/")

each_notebook = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: dict, kind: str) -> str:
    """All outputs of one MIME type, one after the other; streams count as plain text."""
    found = []
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            found.append("".join(data.get(kind, "")))
    return "\n".join(found)


def test_all_notebooks_are_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@each_notebook
def test_first_code_cell_installs(name):
    source = "".join(code_cells(read(name))[0]["source"])
    assert "%pip install" in source
    assert "find_spec" in source


@each_notebook
def test_code_compiles(name):
    from IPython.core.inputtransformer2 import TransformerManager

    notebook = read(name)
    assert len(notebook["cells"]) < 25
    for cell in code_cells(notebook):
        source = "".join(cell["source"])
        first, _, rest = source.partition("\n")
        compile(TransformerManager().transform_cell(rest if first.startswith("%%") else source), name, "exec")


@each_notebook
def test_committed_outputs_are_of_one_clean_run(name):
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]}
    assert not kinds & {("error", None), ("stream", "stderr")}
    assert outputs(notebook, "image/png")
    text, html = outputs(notebook, "text/plain"), outputs(notebook, "text/html")
    assert "computing in" in text, "readers are told which machine the outputs are from"
    sources = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    assert not MACHINE_PATH.search("\n".join([text, html, sources]))


@pytest.mark.slow
@pytest.mark.long
@each_notebook
def test_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OGPSA_NOTEBOOK_STEPS", "2")
    path = FOLDER / f"{name}.ipynb"
    if name != NAMES[0]:  # one notebook with the real model, which takes minutes, and the others with a toy
        toy.make(tmp_path / "model")
        path = with_model(path, str(tmp_path / "model"), tmp_path)
    notebook = execute(path, tmp_path)  # raises where a cell fails

    text = outputs(notebook, "text/plain")
    assert base64.b64decode(outputs(notebook, "image/png").split()[0]).startswith(b"\x89PNG")
    adapters = {path.parent.name: path for path in tmp_path.rglob("adapter_config.json")}
    assert all(json.loads(path.read_text())["peft_type"] == "LORA" for path in adapters.values())
    if name == NAMES[0]:
        assert set(adapters) == {"adapter"}
        for column in ("ogpsa/removed/q_proj+k_proj+v_proj", "ogpsa/removed/down_proj"):
            assert column in text
        assert "Without the package it is a LoraConfig" in text
        assert "LoraModel gives the same answers: True" in text
    elif name == NAMES[1]:
        assert set(adapters) == {"sft", "dpo"}
        assert "Loaded as OGPSAConfig" in text
        for word in ("KL from base", "refuses benign", "total"):
            assert word in text
    else:
        assert set(adapters) == {"plain_LoRA", "null_space_and_KL_penalty"}
        for word in (
            "general loss",
            "KL from base",
            "refuses benign",
            "Building the subspace took",
            "plain LoRA",
            "[compliance]",
            "kept=",
        ):
            assert word in text
