"""What is imported when, and the library without the libraries that only its command line needs."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import peft_ogpsa
from peft_ogpsa import cli, extras

OPTIONAL = ("trl", "datasets", "rich", "matplotlib", "bitsandbytes", "pandas")
WITHOUT = f"import sys\nfor name in {OPTIONAL}: sys.modules[name] = None\n"
TRAINING = """
from models import tiny_llama, tiny_tokenizer
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from peft_ogpsa import *
from peft_ogpsa import data

tokenizer = tiny_tokenizer()
rows = data.load("general")[:4]
messages = [row["prompt"] + row["completion"] for row in rows]
ids = [own[:64] for own in tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]]
base = tiny_llama(vocab_size=259, max_position_embeddings=512)
model = get_peft_model(base, OGPSAConfig(target_modules="all-linear"))
arguments = TrainingArguments(output_dir=sys.argv[1], max_steps=2, save_steps=1, report_to="none", use_cpu=True)
callback = OGPSACallback([ReferenceSet("general", rows)], processing_class=tokenizer)
examples = [{"input_ids": own, "labels": own} for own in ids]
trainer = Trainer(
    model, arguments, DataCollatorForSeq2Seq(tokenizer), examples, processing_class=tokenizer, callbacks=[callback]
)
trainer.train()
assert projector_of(model).steps == 2
model.save_pretrained(sys.argv[1] + "/adapter")
"""


def python(code: str, *arguments: str) -> str:
    """What a fresh process prints."""
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder.parent), str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def run_with_torch():
    """Run code in a new process that has imported torch's parts, which take most of the time, and no other library."""
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload(["torch._inductor.compile_fx", "torch.distributed.tensor"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield lambda code: pool.apply(exec, (code, {}))


def test_importing_loads_nothing_heavy():
    libraries = ("torch", "peft", "transformers", *OPTIONAL)
    assert (
        python(f"import sys, peft_ogpsa, peft_ogpsa.cli; print(sorted(set(sys.modules) & {set(libraries)}))") == "[]"
    )
    assert set(peft_ogpsa.__all__) <= set(dir(peft_ogpsa))
    assert peft_ogpsa.__all__ == sorted(peft_ogpsa._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        peft_ogpsa.Nothing  # noqa: B018


def test_importing_beside_peft_loads_no_extra():
    code = "import sys, peft; before = set(sys.modules); import peft_ogpsa; print(sorted(set(sys.modules) - before))"
    loaded = python(code)
    assert "'peft_ogpsa.tuner.config'" in loaded
    assert [name for name in OPTIONAL if f"'{name}'" in loaded] == []


@pytest.mark.parametrize(
    "imports",
    [
        "import peft_ogpsa, peft",
        "import peft, peft_ogpsa",
        "import peft_ogpsa, importlib.util; importlib.util.find_spec('peft'); import peft",
        "import peft_ogpsa, transformers; transformers.utils.is_peft_available(); import peft",
        "from peft_ogpsa import ReferenceSet",
        "from peft_ogpsa.tuner.config import OGPSAConfig",
        "from peft_ogpsa.tuner.attaching import attach",
        "from peft_ogpsa.trainer.callback import OGPSACallback",
        "from peft_ogpsa import *",
    ],
)
def test_peft_knows_the_type_however_it_is_imported(imports, run_with_torch):
    before = "import sys\nassert not {'transformers', 'peft', 'peft_ogpsa'} & set(sys.modules)"
    after = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as mapping
import peft
assert mapping[peft.PeftType.OGPSA].__name__ == "OGPSAConfig"
assert [f for f in sys.meta_path if "ogpsa" in type(f).__module__] == []
"""
    run_with_torch(f"{before}\n{imports}\n{after}")


def test_the_projection_needs_torch_alone():
    others = "('peft', 'transformers', 'accelerate', 'safetensors', 'huggingface_hub', 'tqdm', 'yaml')"
    blocked = WITHOUT + f"for name in {others}: sys.modules[name] = None\n"
    assert python(f"{blocked}import peft_ogpsa.core.projector as own\nprint(own.Projector.__name__)") == "Projector"


def test_the_library_needs_no_extra(tmp_path):
    python(WITHOUT + TRAINING, str(tmp_path))
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "ogpsa_config.json", "README.md"}


def test_an_installed_extra_is_found():
    pytest.importorskip("trl")
    extras.check("cli", "This test")


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    def versions(name):
        if name == "trl":
            raise PackageNotFoundError(name)
        return "0.1" if name == "bitsandbytes" else "99"

    monkeypatch.setattr(extras, "version", versions)
    with pytest.raises(
        ImportError, match=r'^This test needs trl>=\S+, and trl is not installed\. Run: .*"peft-ogpsa\[cli'
    ):
        extras.check("cli", "This test")
    with pytest.raises(
        ImportError, match=r"needs bitsandbytes>=\S+, and bitsandbytes 0\.1 is installed\. .*\[qlora\]"
    ):
        extras.check("qlora", "This test")
    with pytest.raises(SystemExit, match=r"^ogpsa: ogpsa sft needs trl"):
        cli.main(["sft"])


def test_without_an_installed_package_there_is_nothing_to_check(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", requires)
    extras.check("cli", "This test")
