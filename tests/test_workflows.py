"""The hosted workflows: `make lint` finds what is broken in them, and they run the Makefile's commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in GITHUB.glob("workflows/*.yml")}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LINTERS = ("actionlint", "zizmor", "check-jsonschema")

CHECKOUT = "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1"
BROKEN = {
    "an unknown key": ("    timeout-minutes:", "    time-out:", {"actionlint", "check-jsonschema"}),
    "a permission that does not exist": ("contents: read", "contents: reed", {"actionlint", "check-jsonschema"}),
    "an expression that does not end": ("STACK: ${{ matrix.stack }}", "STACK: ${{ matrix.stack }", {"actionlint"}),
    "a property that nothing defines": ("${{ matrix.stack }}", "${{ matrix.stak }}", {"actionlint"}),
    "a job that does not exist in needs": ("  stack:\n", "  stack:\n    needs: nothing\n", {"actionlint"}),
    "a time that does not exist": ("  pull_request:\n", "  schedule: [{cron: 99 99 * * *}]\n", {"actionlint"}),
    "an action that is not pinned": (CHECKOUT, "actions/checkout@v7", {"zizmor"}),
    "credentials that stay": ("persist-credentials: false", "fetch-depth: 1", {"zizmor"}),
    "text of others in a command": (
        'STACK="$STACK"',
        'STACK="${{ github.event.pull_request.title }}"',
        {"actionlint", "zizmor"},
    ),
}
"""Text of ci.yml, what replaces it, and the linters that must find the difference."""


def commands(linter: str) -> list[list[str]]:
    """The commands of `make lint` for the workflows, with the program of this environment."""
    lines = re.findall(rf"^\t\$\(BIN\)/({linter} .*\.github.*)$", MAKEFILE, re.MULTILINE)
    assert lines, f"make lint does not run {linter}"
    program = Path(sys.executable).parent / linter
    if not program.exists() and not program.with_suffix(".exe").exists():
        pytest.skip("needs the extra lint")
    return [[str(program), *shlex.split(line)[1:]] for line in lines]


def passes(linter: str, folder: Path) -> bool:
    codes = []
    for command in commands(linter):
        whole = [str(path) for own in command[1:] for path in (folder.glob(own) if "*" in own else [own])]
        codes.append(subprocess.run([command[0], *whole], cwd=folder, capture_output=True, check=False).returncode)
    return not any(codes)


def copied(folder: Path, change=lambda text: text) -> Path:
    """The repository's `.github` in another folder, with a changed `ci.yml`."""
    for path in GITHUB.rglob("*.y*ml"):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        target.write_text(change(text) if path.name == "ci.yml" else text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("linter", LINTERS)
def test_the_workflows_pass(linter, tmp_path):
    assert passes(linter, copied(tmp_path))


@pytest.mark.parametrize(("name", "linter"), [(name, own) for name in BROKEN for own in sorted(BROKEN[name][2])])
def test_a_broken_workflow_is_found(name, linter, tmp_path):
    old, new, _ = BROKEN[name]

    def change(text):
        assert old in text
        return text.replace(old, new)

    assert not passes(linter, copied(tmp_path, change))


def jobs():
    return [(workflow, name, job) for workflow, own in WORKFLOWS.items() for name, job in own["jobs"].items()]


def test_the_commands_are_the_makefiles():
    targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
    ran = set()
    for workflow, name, job in jobs():
        for step in job["steps"]:
            if "run" in step and (workflow, name) not in (("release", "publish"), ("release", "release")):
                program, target, *_ = shlex.split(step["run"], comments=True)
                assert program == "make", step
                assert target in targets, step
                ran.add(target)
    assert ran >= {"lint", "links", "test-quick", "test-stack", "test-bare", "quickstart", "package", "test", "audit"}


def test_every_job_may_do_little_and_ends():
    for own in WORKFLOWS.values():
        assert own["permissions"] == {}
    for workflow, name, job in jobs():
        assert job["timeout-minutes"] <= 180, (workflow, name)
        writes = {key for key, value in job["permissions"].items() if value != "read"}
        assert writes == {("release", "publish"): {"id-token"}, ("release", "release"): {"contents"}}.get(
            (workflow, name), set()
        )
        if writes:
            assert not any("checkout" in step.get("uses", "") for step in job["steps"]), (workflow, name)


def test_every_python_and_every_stack_is_tested():
    quick = WORKFLOWS["ci"]["jobs"]["quick"]["strategy"]["matrix"]
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert quick["python"] == promised
    assert {own["os"] for own in quick["include"]} | set(quick["os"]) == {
        "ubuntu-latest",
        "macos-latest",
        "windows-latest",
    }
    stacks = [own["stack"] for own in WORKFLOWS["ci"]["jobs"]["stack"]["strategy"]["matrix"]["include"]]
    assert sorted(stacks) == sorted(path.stem for path in (ROOT / "constraints").glob("*.txt"))
