"""The Python code of the guides runs: the blocks of a page one after the other, with a tiny model and little data."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
from models import tiny_llama, tiny_tokenizer

from peft_ogpsa import data
from peft_ogpsa.references import self_answers
from peft_ogpsa.references.refusals import SAFETY_INSTRUCTION

pytestmark = pytest.mark.filterwarnings("ignore")

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "quickstart.md", *sorted((DOCS / "guides").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run:(?P<reason>.*?)-->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
CHANGES = {  # for a CPU, a tiny model that has a position for each of 512 bytes, and a few seconds
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': "TINY",
    '"Qwen/Qwen2.5-1.5B-Instruct"': "TINY",
    "torch.float16": "torch.float32",
    "        fp16=True,\n": "",
    "max_steps=40": "max_steps=2, max_length=128, disable_tqdm=True",
    "samples=48": "samples=4, max_length=400, cache_dir='answers', progress=False",
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def code_of(page: Path) -> list[tuple[str, str | None]]:
    """The Python blocks of a page, each with the reason for which it is not run."""
    return [(block["code"], block["reason"]) for block in BLOCK.finditer(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=259, max_position_embeddings=512, hidden_size=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def one_sentence(model, tokenizer, prompts, **settings) -> list[list[int]]:
    told = [SAFETY_INSTRUCTION in tokenizer.decode(ids) for ids in prompts]
    said = ["I can't help with that." if own else "Here it is." for own in told]
    return [tokenizer.encode(text, add_special_tokens=False) for text in said]


@each_page
def test_code_runs(page, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(self_answers, "generate_ids", one_sentence)  # a random model's answers would not be kept
    for name in ("load", "load_prompts", "pairs"):
        whole = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *given, whole=whole: list(islice(whole(*given), 12)))
    namespace = {"__name__": page.stem, "TINY": tiny}
    for number, (code, reason) in enumerate(code_of(page)):
        if reason is not None:
            continue
        for old, new in CHANGES.items():
            code = code.replace(old, new)
        exec(compile(code, f"{page.name}, block {number}", "exec", dont_inherit=True), namespace)
    saved = [path for path in tmp_path.rglob("adapter_config.json") if "out" not in path.parts]
    assert all(json.loads(path.read_text())["peft_type"] == "LORA" for path in saved)


@each_page
def test_every_block_runs_or_says_why_not(page):
    text = page.read_text(encoding="utf-8")
    blocks = code_of(page)
    assert len(blocks) == text.count("```py") > 0
    assert any(reason is None for _, reason in blocks)
    assert text.count("<!-- not run") == sum(reason is not None for _, reason in blocks)
    assert all(reason is None or reason.strip() for _, reason in blocks)


def test_every_change_is_needed():
    code = "".join(code for page in PAGES for code, _ in code_of(page))
    assert all(old in code for old in CHANGES)
