"""The README's script runs as it stands, links lead somewhere, and every setting is explained once."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import tiny_llama, tiny_tokenizer

import peft_ogpsa
from peft_ogpsa import FullParameterConfig

pytest.importorskip("mkdocs")  # of the extra docs
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
        "max_steps=40": "max_steps=2, max_length=128",
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


SITE = {  # files of the site, by their path in the repository
    "docs/method.md": "method.md",
    "docs/guides/dpo.md": "guides/dpo.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/why_ages.png": "figures/why_ages.png",
}
FILES = [
    SimpleNamespace(abs_src_path=str(ROOT / path), src_uri=place, inclusion=SimpleNamespace(is_excluded=lambda: False))
    for path, place in SITE.items()
]
CONFIG = SimpleNamespace(repo_url="https://example.org/repo")


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](method.md)", "[a](method.md)"),
        ("[a](method.md#memory)", "[a](method.md#memory)"),
        ("[a](guides/dpo.md)", "[a](guides/dpo.md)"),
        ("[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("[a](#here)", "[a](#here)"),
        ("[a](../examples/loop.py)", "[a](https://example.org/repo/blob/main/examples/loop.py)"),
        ("[a](../README.md#use)", "[a](https://example.org/repo/blob/main/README.md#use)"),
        ("[a](../examples)", "[a](https://example.org/repo/tree/main/examples)"),
        ("[a](../CHANGELOG.md)", "[a](changelog.md)"),
        ("![a](../benchmarks/results/why_ages.png)", "![a](figures/why_ages.png)"),
    ],
)
def test_links(link, expected):
    assert hooks.on_page_markdown(link, page("errors.md"), CONFIG, FILES) == expected


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](dpo.md)", "[a](dpo.md)"),
        ("[a](../method.md#memory)", "[a](../method.md#memory)"),
        ("![a](../../benchmarks/results/why_ages.png)", "![a](../figures/why_ages.png)"),
    ],
)
def test_links_of_a_page_in_a_folder(link, expected):
    assert hooks.on_page_markdown(link, page("guides/sharing.md"), CONFIG, FILES) == expected


def test_links_of_a_page_outside_the_site_s_folder():
    contributing = SimpleNamespace(abs_src_path=str(ROOT / "CONTRIBUTING.md"), src_uri="contributing.md")
    links = hooks.on_page_markdown("[a](docs/method.md#memory)", SimpleNamespace(file=contributing), CONFIG, FILES)
    assert links == "[a](method.md#memory)"


def test_a_link_to_nothing():
    with pytest.raises(FileNotFoundError, match=r"errors\.md links to \.\./nowhere\.md"):
        hooks.on_page_markdown("[a](../nowhere.md)", page("errors.md"), CONFIG, [])


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<code>`int`, *optional*</code>", "<code>int, optional</code>"),
        ("<code>`Sequence[str]`</code>", "<code>Sequence[str]</code>"),
        ("<code>[`~peft.LoraConfig`]</code>", "<code>peft.LoraConfig</code>"),
        ("of [<code>~peft.LoraConfig</code>].", "of <code>peft.LoraConfig</code>."),
        ("<code>rows[0] * 2</code>", "<code>rows[0] * 2</code>"),
    ],
)
def test_marks_of_docstrings(html, expected):
    assert hooks.on_page_content(html, page("api.md"), CONFIG, FILES) == expected
    assert hooks.on_page_content(html, page("cli.md"), CONFIG, FILES) == html


def pages() -> list[Path]:
    """All Markdown files that are in the repository, except the issue templates."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / path for path in listed.stdout.splitlines() if not path.startswith(".")]


def anchors(markdown: str) -> set[str]:
    """The anchors of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"(?ms)^```.*?^```", "", markdown), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"[-\s]+", "-", slug) for slug in words}


def test_links_between_files_of_the_repository():
    broken = []
    for path in pages():
        text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
            file = (path.parent / target).resolve() if target else path
            if not file.exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
                broken.append(f"{path.relative_to(ROOT)}: {target}#{anchor}")
    assert not broken


def test_tables_are_whole():
    """A blank line within a table would make text of its rest, and a missing cell would move the others."""
    broken = []
    for path in pages():
        text = re.sub(r"(?ms)^ *```.*?^ *```", "", path.read_text(encoding="utf-8"))
        for table in re.findall(r"(?m)(?:^ *\|.*\n?)+", text):
            rows = table.splitlines()
            widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
            if len(rows) < 2 or not re.fullmatch(r" *\|(?: *:?-+:? *\|)+", rows[1]) or len(widths) != 1:
                broken.append(f"{path.relative_to(ROOT)}: {rows[0]}")
    assert not broken


def test_configuration_has_one_row_for_each_field():
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    tables = text[: text.index("## The paper's rule")]
    explained = re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)
    assert sorted(explained) == sorted(field.name for field in fields(FullParameterConfig))


def test_the_citation_names_the_version():
    assert f"\nversion: {peft_ogpsa.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
