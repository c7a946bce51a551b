# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The `ogpsa` command."""

from __future__ import annotations

import importlib
import sys

_COMMANDS = {
    "quickstart": "train and compare plain LoRA, the paper's rule and OGPSA on a small model",
    "sft": "supervised fine-tuning that spares the reference sets",
    "dpo": "preference training that spares the reference sets, also of an adapter from sft",
    "eval": "measure refusal, over-refusal, general loss and divergence of a model and its base",
    "compare": "results of eval in one table and one plot",
}


def main(arguments: list[str] | None = None) -> None:
    """Run `ogpsa COMMAND [--option value ...]`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in _COMMANDS:
        wanted = bool(arguments) and arguments[0] not in ("-h", "--help")
        lines = [f"ogpsa: unknown command {arguments[0]!r}"] if wanted else []
        lines += ["usage: ogpsa COMMAND [--help] [--option value ...]", "", "commands:"]
        lines += [f"  {name:<12}{summary}" for name, summary in _COMMANDS.items()]
        print("\n".join(lines), file=sys.stderr if wanted else sys.stdout)
        raise SystemExit(2 if wanted or not arguments else 0)
    # Import the command only now, because its libraries take seconds to load.
    importlib.import_module(f".{arguments[0]}", __name__).run(arguments[1:])
