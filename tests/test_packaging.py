"""What `pyproject.toml` promises, and what an index of packages would show."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import peft_ogpsa

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints"


@pytest.fixture
def requirements() -> dict[str, Requirement]:
    """Of the library and of all its extras for users, by name."""
    try:
        lines = requires("peft-ogpsa") or []
    except PackageNotFoundError:
        pytest.skip("needs the installed package")
    found = [Requirement(line) for line in lines]
    return {own.name: own for own in found if own.marker is None or own.marker.evaluate({"extra": "all"})}


def pins(stack: str) -> dict[str, str]:
    text = (CONSTRAINTS / f"{stack}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name.replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_the_lower_bounds_are_those_of_the_oldest_stack(requirements):
    bounds = {name: str(own.specifier) for name, own in requirements.items()}
    assert all(bound.startswith(">=") and "," not in bound for bound in bounds.values())  # and no upper ones
    lower = {name: Version(bound.removeprefix(">=")) for name, bound in bounds.items()}
    assert lower == {name: Version(version) for name, version in pins("oldest").items()}


@pytest.mark.parametrize("stack", sorted(path.stem for path in CONSTRAINTS.glob("*.txt")))
def test_every_stack_is_within_the_bounds(stack, requirements):
    for name, version in pins(stack).items():
        assert name not in requirements or version in requirements[name].specifier, name


def test_an_index_shows_links_that_lead_somewhere():
    text = metadata("peft-ogpsa").get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20
    assert [link for link in links if not link.startswith("https://")] == []
    (plot,) = [link for link in links if "githubusercontent" in link]
    assert plot.endswith(".png")


def test_the_changelog_begins_with_the_version():
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    if Version(peft_ogpsa.__version__).is_devrelease:
        assert heads[0] == "Unreleased"
    else:
        (date,) = re.findall(r'^date-released: "(\d{4}-\d{2}-\d{2})"$', citation, re.MULTILINE)
        assert heads[0] == f"{peft_ogpsa.__version__} - {date}"


def test_the_container_gets_what_it_copies():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert {"peft_ogpsa", "LICENSE", "NOTICE"} <= set(sources)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert [name for name in sources if f"!{name}" not in ignored or not (ROOT / name).exists()] == []
