# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The command. Each part imports only what it needs, because `unpack` runs before anything is installed."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import benchmarks.gpu as package


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks.commit import commit

    from . import machine
    from .plan import chosen
    from .runner import Runner
    from .stages import Place, stages

    place = Place(arguments.output.resolve(), arguments.device, arguments.toy, arguments.data)
    own = stages(place)
    known = [stage.name for stage in own]
    unknown = [name for name in arguments.stages or [] if name not in known]
    if unknown:
        raise SystemExit(f"--stages {unknown[0]!r} is unknown. Choose from: {', '.join(known)}.")
    wanted = [stage for stage in own if stage.name in (arguments.stages or known)]
    start = time.monotonic()
    deadline = start + 60 * arguments.budget if arguments.budget else float("inf")
    found = machine.ask()
    if arguments.device == "cuda" and found["memory"] is None:
        raise SystemExit("torch finds no GPU here. Add --device cpu --toy to rehearse without one.")
    options = {"workers": arguments.workers, "any_code": arguments.any_code, "deadline": deadline}
    runner = Runner(place, found, machine.code(), commit(), **options)
    missing = [stage for stage in wanted if not runner.finished(stage)]
    planned = chosen(missing, arguments.budget, arguments.workers)
    print(f"{found['device']}: {len(wanted) - len(missing)} stages are done, {len(planned)} are next.", flush=True)
    for stage in missing:
        note = f"{stage.minutes:g} min" if stage in planned else "does not fit into the budget"
        print(f"  {stage.name}: {stage.settles} ({note})", flush=True)
    if arguments.list:
        return 0
    if arguments.toy and not (place.model / "config.json").is_file():
        place.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "benchmarks.gpu.toy", str(place.model)], check=True, cwd=machine.ROOT)
    done = set()
    for result in runner.run(planned):
        if result["status"] == "done":
            done.add(result["stage"])
        print(f"{result['status']:11} {result['seconds']:7.1f} s  {result['stage']}", flush=True)
    bad = [stage.name for stage in planned if stage.name not in done]
    print(f"{len(done)} of {len(planned)} stages done in {time.monotonic() - start:.0f} s.")
    if bad:
        print(f"Not done: {', '.join(bad)}. The logs of those that began are in {arguments.output}.")
    return 1 if bad else 0


def _pack(arguments: argparse.Namespace) -> int:
    from .pack import pack
    from .wheels import installed, missing

    wheels = missing(installed(arguments.have), arguments.python, arguments.project)
    manifest = pack(arguments.folder, wheels, arguments.data, arguments.python, arguments.piece * 2**20)
    for piece in manifest["pieces"]:
        print(f"{piece['bytes'] / 2**20:6.1f} MiB  {piece['name']}")
    print(f"{len(manifest['files'])} files in {len(manifest['pieces'])} pieces.")
    return 0


def _unpack(arguments: argparse.Namespace) -> int:
    from .unpack import Damaged, install, unpack

    try:
        files = unpack(arguments.folder, arguments.to / "carried")
    except Damaged as error:
        raise SystemExit(str(error)) from None
    python = install(files, arguments.to)
    print(f"Run: {python} -m benchmarks.gpu run --output FOLDER --budget 30")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .claims import claims, listed
    from .machine import ROOT
    from .report import load, markdown

    try:
        results = load(arguments.folder)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    text = markdown(results, arguments.folder) + "\n" + listed(claims(ROOT), results)
    (arguments.folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = {"description": package.__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", **about)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="Run the missing stages.")
    run.set_defaults(run=_run)
    run.add_argument("--output", type=Path, required=True, help="Folder for one .json and one .log file per stage.")
    run.add_argument("--budget", type=float, help="Minutes to spend. Stages that do not fit are left out.")
    run.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    run.add_argument("--toy", action="store_true", help="Rehearse with everything as small as possible.")
    run.add_argument("--data", type=Path, help="Folder of rows for the tax grid. Default: the built-in rows.")
    run.add_argument("--stages", nargs="+", help="Names of the stages to run. Default: all.")
    run.add_argument("--workers", type=int, default=2, help="How many stages that measure no time run at once.")
    run.add_argument("--any-code", action="store_true", help="Keep results from other versions of the code.")
    run.add_argument("--list", action="store_true", help="Only show what would run.")

    pack = commands.add_parser("pack", help="Pack pieces for a machine without a network.")
    pack.set_defaults(run=_pack)
    pack.add_argument("folder", type=Path)
    pack.add_argument("--have", type=Path, help="Output of `pip freeze` there. Default: benchmarks/gpu/have.txt.")
    pack.add_argument("--python", default="3.12", help="Python version there.")
    pack.add_argument("--data", type=Path, nargs="*", default=[], help="Files to pack as well.")
    pack.add_argument("--piece", type=float, default=60, help="Largest size of a piece, in MiB.")
    pack.add_argument("--no-project", dest="project", action="store_false", help="Leave out what this package needs.")

    unpack = commands.add_parser("unpack", help="Join, check and install the pieces.")
    unpack.set_defaults(run=_unpack)
    unpack.add_argument("folder", type=Path)
    unpack.add_argument("--to", type=Path, required=True, help="Folder for the virtual environment.")

    report = commands.add_parser("report", help="Write tables, and list the sentences to replace.")
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path)
    return parser


def main() -> int:
    """Run the command."""
    arguments = _parser().parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
