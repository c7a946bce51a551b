"""docs/coverage.md says what the tests claim, of everything that the installed libraries have."""

from __future__ import annotations

from pathlib import Path

import coverage_page
import pytest

pytest_plugins = ["pytester"]

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
MARKED = sorted(
    path.stem
    for path in Path(__file__).parent.glob("test_*.py")
    if path.stem != "test_coverage_page" and "covers(" in path.read_text(encoding="utf-8")
)


def test_the_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    if coverage_page.stack() not in text:
        pytest.skip(f"the page is for other versions than {coverage_page.stack()}")
    assert text == coverage_page.page(coverage_page.claims_of(MARKED)), "run `make coverage-page`"


def test_every_field_and_every_trainer_has_a_row():
    text = coverage_page.page({"r": {(coverage_page.CONE, "test_some.py::test_it")}})
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == [*coverage_page.fields(), *coverage_page.trainers()]
    assert {"SFTTrainer", "DPOTrainer"} <= set(rows)
    assert "| `r` | trained, and every step kept the cone | `test_some.py::test_it` |" in text
    assert "| `lora_alpha` | **no test** |  |" in text
    assert "| `megatron_core` | **no test** (needs Megatron-Core) |  |" in text


def test_a_claim_about_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"No setting of LoraConfig .*: lora_beta"):
        coverage_page.page({"lora_beta": {(coverage_page.CONE, "test_some.py::test_it")}})


def test_only_a_run_that_passes_writes_the_page(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pytester.makepyfile(
        test_some="""
        import pytest
        from coverage_page import CONE, covers

        @pytest.mark.parametrize("value", [pytest.param(1, marks=covers(CONE, "r")), 2])
        def test_it(value):
            assert value == 1

        @covers(CONE, "lora_alpha")
        def test_other():
            import os
            assert "FAIL" not in os.environ
        """
    )
    arguments = ("-p", "coverage_page", "--coverage-page", "page.md", "-p", "no:cacheprovider")
    assert pytester.runpytest_subprocess(*arguments).ret == 0
    text = (pytester.path / "page.md").read_text(encoding="utf-8")
    assert f"| `r` | {coverage_page.CONE} | `test_some.py::test_it` |" in text
    assert f"| `lora_alpha` | {coverage_page.CONE} | `test_some.py::test_other` |" in text
    (pytester.path / "page.md").unlink()
    monkeypatch.setenv("FAIL", "1")
    assert pytester.runpytest_subprocess(*arguments).ret == 1
    assert not (pytester.path / "page.md").exists()
