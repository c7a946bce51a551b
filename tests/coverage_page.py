"""docs/coverage.md: what tests show of PEFT's settings and TRL's trainers. A run of those tests writes it.

A test claims what it shows with `@covers(what, *subjects)`. `pytest -p coverage_page --coverage-page FILE` runs the
tests that claim something, and writes the page if all of them have passed. `test_coverage_page.py` compares the page
with the claims and with the installed libraries.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest

CONE = "trained, and every step kept the cone"
COMPLEMENT = "trained, and every step kept `A U = 0`"
REFUSED = "`ValueError` with the default subspace: “... {} ...”"
SAME = "same parameters and outputs as `LoraConfig`"
SAVED = "saved and loaded, with the same outputs"

# What would be needed for a test, or what else there is to say of a subject without one.
WITHOUT = {
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "revision": "needs the hub",
    "megatron_config": "needs Megatron-Core",
    "megatron_core": "needs Megatron-Core",
    "use_qalora": "needs a GPTQ base and a GPU",
    "qalora_group_size": "needs a GPTQ base and a GPU",
    "runtime_config": "needs a GPU",
    "loftq_config": "PEFT's LoftQ needs a GPU",
    "arrow_config": "routes between trained adapters, and does not train one",
    "experimental.async_distillation.AsyncDistillationTrainer": "needs a vLLM server",
    "experimental.async_grpo.AsyncGRPOTrainer": "needs a vLLM server",
    "experimental.iw_opd.IWOPDTrainer": "needs a vLLM server",
    "experimental.server_distillation.ServerDistillationTrainer": "needs a server",
}

Claims = dict[str, set[tuple[str, str]]]
"""What which test shows, by subject."""


def covers(what: str, *subjects: str) -> pytest.MarkDecorator:
    """A mark: this test shows `what` of these fields of `LoraConfig`, or of these trainers."""
    return pytest.mark.covers(what, *subjects)


def fields() -> list[str]:
    """The fields of the installed PEFT's `LoraConfig`."""
    from peft import LoraConfig

    return [field.name for field in dataclasses.fields(LoraConfig)]


def trainers() -> list[str]:
    """The trainers of the installed TRL, those of `trl.experimental` under the name of their module."""
    import trl
    from trl import experimental

    found = [name for name in dir(trl) if name.endswith("Trainer")]
    for module in pkgutil.iter_modules(experimental.__path__):
        # Read, not imported: some need packages that are not installed.
        path = Path(experimental.__path__[0]) / module.name / "__init__.py"
        if path.exists():
            names = set(re.findall(r"\b[A-Z]\w*Trainer\b", path.read_text(encoding="utf-8")))
            found += [f"experimental.{module.name}.{name}" for name in sorted(names) if name not in found]
    return found


def stack() -> str:
    """The versions that the page is about."""
    return f"peft {version('peft')} and trl {version('trl')}"


def page(claims: Claims) -> str:
    """The whole page.

    Raises:
        ValueError: If a claim is about something that the installed libraries do not have.
    """
    if unknown := claims.keys() - {*fields(), *trainers()}:
        raise ValueError(f"No setting of LoraConfig and no trainer of TRL: {', '.join(sorted(unknown))}")
    return TEXT.format(
        stack=stack(),
        fields=_table("field", fields(), claims),
        trainers=_table("trainer", trainers(), claims),
    )


def _table(head: str, subjects: list[str], claims: Claims) -> str:
    lines = [f"| {head} | what tests show | tests |", "|---|---|---|"]
    for subject in subjects:
        shown: dict[str, list[str]] = {}
        for what, test in sorted(claims.get(subject, ())):
            shown.setdefault(what, []).append(f"`{test}`")
        if shown:
            whats, tests = "<br>".join(shown), "<br>".join(", ".join(own) for own in shown.values())
        else:
            whats = f"**no test** ({WITHOUT[subject]})" if subject in WITHOUT else "**no test**"
            tests = ""
        lines.append(f"| `{subject}` | {whats} | {tests} |")
    return "\n".join(lines)


def claims_of(modules: Iterable[str]) -> Claims:
    """What the tests of these modules claim, whether they pass or not."""
    claims: Claims = {}
    for name in modules:
        for test, function in vars(importlib.import_module(name)).items():
            if not test.startswith("test_"):
                continue
            for mark in getattr(function, "pytestmark", []):
                marks = [mark]
                if mark.name == "parametrize":
                    marks = [own for values in mark.args[1] for own in getattr(values, "marks", ())]
                for own in marks:
                    if own.name == "covers":
                        _add(claims, own.args, f"{name}.py::{test}")
    return claims


def _add(claims: Claims, arguments: Iterable[str], test: str) -> None:
    what, *subjects = arguments
    for subject in subjects:
        claims.setdefault(subject, set()).add((what, test))


TEXT = """\
# Coverage of PEFT and TRL

What the tests show of each field of PEFT's `LoraConfig`, and of each trainer of TRL, together with OGPSA. This page is
for {stack}. A run of the tests that it names writes it, and only if all of them pass:

```
make coverage-page
```

"Every step" means that the change of the stored parameters was measured in each step, in float64, against all stored
reference gradients (the cone), or that `A U` was measured after it. The tests use tiny models on a CPU. For the
settings, they also check that training without the setting ends elsewhere.

## Fields of LoraConfig

{fields}

## Trainers of TRL

{trainers}
"""


# The plugin.


def pytest_addoption(parser):
    parser.addoption("--coverage-page", metavar="FILE", help="run the tests that claim something, and write the page")


def pytest_configure(config):
    if config.getoption("--coverage-page"):
        config.pluginmanager.register(Writer(Path(config.getoption("--coverage-page")).absolute()))


class Writer:
    """Writes the page if everything has passed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.claims: Claims = {}
        self.others: list[str] = []

    def pytest_collection_modifyitems(self, config, items):
        items[:], rest = (
            [item for item in items if item.get_closest_marker("covers")],
            [item for item in items if not item.get_closest_marker("covers")],
        )
        config.hook.pytest_deselected(items=rest)
        for item in items:
            for mark in item.iter_markers("covers"):
                item.user_properties.append(("covers", mark.args))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            test = re.sub(r"^.*/|\[.*$", "", report.nodeid)
            for name, arguments in report.user_properties:
                if name == "covers":
                    _add(self.claims, arguments, test)
        elif not report.passed:
            self.others.append(report.nodeid)

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus or self.others:
            print(f"\n{self.path} is not written: {len(self.others)} tests did not pass.")
            session.exitstatus = session.exitstatus or 1
        else:
            self.path.write_text(page(self.claims), encoding="utf-8")
