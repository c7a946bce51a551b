# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The stages to run on a GPU, most useful first."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

SEEDS = (0, 1, 2, 3, 4)
TAX_ROWS = (
    "plain",
    "paper",
    "replay 1",
    "KL 8, 2 of 40",
    "cone of KL, weight 8, 8 rows, 2 of 40",
    "null space",
    "null space, KL 2",
)
"""The rows of `docs/results.md`, by their names in `benchmarks.tax`."""

TRAINING = (("sft", "bf16"), ("dpo", "bf16"), ("sft", "fp16"), ("dpo", "fp16"))
TOY_TRAINING = (("sft", "bf16"), ("dpo", "fp16"))
"""In a rehearsal, each stage of training and each precision once."""


@dataclass(frozen=True)
class Place:
    """Where the stages run, and at which size.

    Attributes:
        folder: The folder of results.
        device: `"cuda"` or `"cpu"`.
        toy: Whether everything is as small as possible, for a rehearsal.
        data: Folder of rows for the tax grid. `None`: the built-in rows.
    """

    folder: Path
    device: str
    toy: bool = False
    data: Path | None = None

    def files(self, name: str) -> Path:
        """Return the folder for a stage's own files."""
        return self.folder / "files" / name

    @property
    def model(self) -> Path:
        """The folder of the model that a rehearsal uses in place of SmolLM2."""
        return self.folder / "toy-model"


@dataclass(frozen=True)
class Stage:
    """One question, and the command that answers it.

    Attributes:
        name: Name of the stage and of its files.
        settles: What the result settles.
        minutes: Estimated minutes on a data-center GPU.
        limit: Minutes after which the stage is stopped.
        command: Arguments of Python.
        beside: Whether the stage may run at the same time as others, because it measures no time and no memory.
    """

    name: str
    settles: str
    minutes: float
    limit: float
    command: tuple[str, ...]
    beside: bool = False
    later: bool = False
    """Whether the stage repeats the question of another stage at another size or seed."""
    shared: str = ""
    """Name of a folder that several stages fill, which differ only in their seed. A stopped stage goes on from it."""

    @property
    def argv(self) -> list[str]:
        """The whole command."""
        return [sys.executable, *self.command]

    def key(self, code: str) -> str:
        """Return a digest of the command and the code. A finished result is kept if its digest is the same."""
        return _digest({"name": self.name, "command": self.command}, code)

    def shared_key(self, code: str) -> str:
        """Return a digest of what all stages of the shared folder have in common."""
        place = self.command.index("--seeds") + 1 if "--seeds" in self.command else len(self.command)
        return _digest(self.command[:place], self.command[place + 1 :], code)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def stages(place: Place) -> list[Stage]:
    """Return all stages, most useful first. Repetitions come after everything else."""
    found = [
        _tests(place),
        _quickstart(place),
        *(_training(place, *kind) for kind in (TOY_TRAINING if place.toy else TRAINING)),
        *_ratios(place),
        _memory(place),
        _building(place),
        *_tax(place),
        *_notebooks(place),
        *([] if place.toy else [_quick_tests(place)]),
    ]
    return sorted(found, key=lambda stage: stage.later)


def _stage(
    place: Place,
    name: str,
    settles: str,
    minutes: float,
    command: list[str],
    toy: list[str],
    *,
    beside: bool = False,
    later: bool = False,
) -> Stage:
    """Make a stage that may take three times its estimate. A rehearsal adds the toy arguments, which override."""
    arguments = [*command, *(toy if place.toy else [])]
    # A rehearsal measures nothing, so its stages may run side by side.
    return Stage(name, settles, minutes, max(3.0, 3 * minutes), tuple(arguments), beside or place.toy, later)


def _tests(place: Place) -> Stage:
    files = ["tests/test_gpu.py", *([] if place.toy else ["tests/test_kernels.py"])]
    command = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", *files]
    junit = place.files("tests") / "tests.xml"
    settles = "Placement, no waiting in a step, CUDA graphs, and the Triton kernels against torch"
    toy = ["-k", "sums_over_pieces"]  # the quick tests run all of these without a GPU
    return _stage(place, "tests", settles, 2, [*command, f"--junitxml={junit}"], toy)


def _quickstart(place: Place) -> Stage:
    output = str(place.files("quickstart"))
    command = ["-m", "peft_ogpsa.cli", "quickstart", "--device", place.device, "--output_dir", output]
    toy = ["--model", str(place.model), "--methods", "plain", "ogpsa", "--steps", "1", "--measurements", "1"]
    toy += ["--reference_samples", "4", "--test_samples", "2", "--batch_size", "2"]
    return _stage(place, "quickstart", "The main job, and its time", 3, command, toy)


def _training(place: Place, stage: str, precision: str) -> Stage:
    name = f"train-{stage}-{precision}"
    command = ["-m", "benchmarks.gpu.training", "--stage", stage, "--precision", precision, "--device", place.device]
    command += ["--output", str(place.files(name) / name)]
    toy = ["--model", str(place.model), "--steps", "2", "--references", "4", "--length", "64", "--batch", "2"]
    case = "with a gradient scaler, as on a T4" if precision == "fp16" else "in bfloat16"
    settles = f"4-bit {stage.upper()} {case}, with a paged 8-bit optimizer, stopped and resumed"
    return _stage(place, name, settles, 2, command, toy, beside=True)


def _ratios(place: Place) -> list[Stage]:
    """Return the stages that time the projection alone and then whole training runs, small shapes first."""
    kernels = ["--kernels"] if place.device == "cuda" else []
    small = ["--shape", "tiny"]
    found = []
    for shape, minutes in (("smollm2-135m", 0.5), ("qwen2.5-1.5b", 0.7), ("llama3.1-8b", 1.0)):
        short = shape.rpartition("-")[2]
        for subspace, own in (
            ("gradients", ["--rows", "8", *kernels]),
            ("activations", ["--subspace", "activations", "--rows", "256", "--rows-dtype", "bfloat16"]),
        ):
            name = f"projection-{short}-{subspace}"
            command = ["benchmarks/projection.py", "--shape", shape, "--first-only", *own]
            command += ["--device", place.device, "--output", str(place.files(name) / name)]
            settles = f"Time and launches of one projection, {shape}, subspace of {subspace}"
            if not (place.toy and short != "135m"):
                later = short == "1.5b"
                found.append(_stage(place, name, settles, minutes, command, [*small, "--rows", "4"], later=later))
    for shape, quantized, batch, minutes in (
        ("smollm2-135m", False, 8, 1.5),
        ("qwen2.5-1.5b", False, 8, 2.0),
        ("qwen2.5-1.5b", True, 8, 2.5),
        ("llama3.1-8b", True, 4, 4.0),
        ("llama3.1-8b", False, 4, 4.0),
    ):
        kind = "qlora" if quantized else "lora"
        name = f"ratios-{shape.rpartition('-')[2]}-{kind}"
        command = ["benchmarks/overhead.py", "--shape", shape, "--batch", str(batch), "--length", "512", *kernels]
        command += ["--reference-length", "256", "--repeats", "3", *(["--quantized"] if quantized else [])]
        command += ["--device", place.device, "--output", str(place.files(name) / name)]
        toy = [*small, "--batch", "1", "--length", "8", "--reference-length", "8", "--repeats", "1", "--steps", "1"]
        settles = f"Training time relative to plain {'QLoRA' if quantized else 'LoRA'}, {shape}"
        later = name not in ("ratios-135m-lora", "ratios-8b-qlora")
        if not (place.toy and later):
            found.append(_stage(place, name, settles, minutes, command, toy, later=later))
    return found


def _memory(place: Place) -> Stage:
    command = ["benchmarks/memory.py", "--shape", "llama3.1-8b", "--adapter-dtype", "float32", "--length", "1024"]
    command += ["--optimizer", "paged_adamw_8bit", "--rows", "0", "8", "48", "--directions", "256", "512"]
    command += ["--repeats", "1", "--device", place.device, "--output", str(place.files("memory-8b") / "memory-8b")]
    toy = ["--shape", "tiny", "--length", "16", "--reference-length", "16", "--rows", "0", "--directions", "8"]
    toy += ["--repeats", "0", "--steps", "1"]
    return _stage(place, "memory-8b", "Whether 8 B in 4 bits trains within 16 GiB", 4, command, toy)


def _building(place: Place) -> Stage:
    command = ["-m", "benchmarks.gpu.building", "--shape", "llama3.1-8b", "--device", place.device]
    command += ["--output", str(place.files("building-8b") / "building-8b")]
    toy = ["--shape", "tiny", "--examples", "4", "--length", "16"]
    return _stage(place, "building-8b", "Time and memory of building the activation subspace", 2, command, toy)


def _tax(place: Place) -> list[Stage]:
    """Return one stage per seed. Each stage adds its runs to the folder of the earlier ones."""
    found = []
    for steps, measurements, minutes in ((100, 5, 3.0), (300, 6, 6.0)):
        for seed in SEEDS[:1] if place.toy else SEEDS:
            folder = f"tax-{steps}"
            command = ["-m", "benchmarks.tax", "--steps", str(steps), "--seeds", str(seed), "--workers", "4"]
            command += ["--schedule", "cosine", "--measurements", str(measurements)]
            command += ["--device", place.device, "--output", str(place.files(folder))]
            command += [*(["--data", str(place.data)] if place.data else []), "--methods", *TAX_ROWS]
            toy = ["--model", str(place.model), "--steps", "1", "--measurements", "1", "--references", "4"]
            toy += ["--tested", "1", "--workers", "1", "--methods", "plain", "null space"]
            settles = f"The alignment tax at {steps} steps, seed {seed}"
            if not (place.toy and steps > 100):
                later = steps > 100 or seed > 0
                own = _stage(place, f"tax-{steps}-seed{seed}", settles, minutes, command, toy, later=later)
                found.append(replace(own, shared=folder))
    return found


def _notebooks(place: Place) -> list[Stage]:
    found = []
    for number, name in enumerate(("01_quickstart_sft_qlora", "02_sft_then_dpo", "03_measure_the_tax"), 1):
        command = ["-m", "benchmarks.gpu.notebook", f"notebooks/{name}.ipynb"]
        command += ["--output", str(place.files(f"notebook-{number}"))]
        toy = ["--model", str(place.model), "--steps", "2"]
        if not (place.toy and number != 2):
            found.append(
                _stage(place, f"notebook-{number}", f"{name}.ipynb runs on a GPU", 2, command, toy, beside=True)
            )
    return found


def _quick_tests(place: Place) -> Stage:
    junit = place.files("quick-tests") / "tests.xml"
    command = ["-m", "pytest", "-q", "-n", "8", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={junit}"]
    settles = "The quick tests where trainers find a GPU (a test that makes its tensors on the CPU may fail)"
    return _stage(place, "quick-tests", settles, 6, command, [], beside=True, later=True)
