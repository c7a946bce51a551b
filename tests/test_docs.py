"""The README's script runs as it stands, and the site's links to files of the repository exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import tiny_llama, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import hooks

ROOT = Path(__file__).parents[1]


def test_the_script_of_the_readme(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (name,) = re.findall(r'^name = "(.*)"$', script, re.MULTILINE)
    tiny_llama(vocab_size=259, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    # A random model for the real one, whose answers would not be kept, and fewer of everything.
    changes = {
        name: str(tmp_path / "model"),
        "max_steps=30": "max_steps=2, use_cpu=True, bf16=False, max_length=128",
        "samples=48, max_new_tokens=64": f"samples=8, max_new_tokens=4, max_length=400, cache_dir={str(tmp_path)!r}",
    }
    for old, new in changes.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    kept = "import peft_ogpsa.references.self_answers as own\nown.classify = lambda text: own.Verdict.COMPLIANCE\n"
    run = subprocess.run([sys.executable, "-c", kept + script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "activation subspace" in run.stdout + run.stderr
    assert '"peft_type": "LORA"' in (tmp_path / "adapter/adapter_config.json").read_text()
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def page(path: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / "docs" / path), src_uri=path))


def files(*paths: str) -> SimpleNamespace:
    own = SimpleNamespace(inclusion=SimpleNamespace(is_excluded=lambda: False))
    return SimpleNamespace(get_file_from_path=lambda path: own if path in paths else None)


CONFIG = SimpleNamespace(repo_url="https://example.org/repo")


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](method.md)", "[a](method.md)"),
        ("[a](method.md#memory)", "[a](method.md#memory)"),
        ("[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("[a](#here)", "[a](#here)"),
        ("[a](../examples/loop.py)", "[a](https://example.org/repo/blob/main/examples/loop.py)"),
        ("[a](../README.md#use)", "[a](https://example.org/repo/blob/main/README.md#use)"),
        ("[a](../examples)", "[a](https://example.org/repo/tree/main/examples)"),
    ],
)
def test_links(link, expected):
    assert hooks.on_page_markdown(link, page("errors.md"), CONFIG, files("method.md")) == expected


def test_a_link_to_nothing():
    with pytest.raises(FileNotFoundError, match=r"errors\.md links to \.\./nowhere\.md"):
        hooks.on_page_markdown("[a](../nowhere.md)", page("errors.md"), CONFIG, files())
