# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The `ogpsa` command."""

from __future__ import annotations

import importlib
import sys
from io import TextIOWrapper

from .. import extras

_COMMANDS = {
    "quickstart": "train a small model with plain LoRA, a KL penalty, the published rule and OGPSA, and compare them",
    "sft": "supervised fine-tuning (SFT) that preserves the abilities in the reference sets",
    "dpo": "preference training (DPO) that does the same, also for an adapter that sft saved",
    "eval": "measure refusal, over-refusal and general loss of a model and its base, and the KL from base",
    "compare": "show results of eval in one table and one plot",
}


def main(arguments: list[str] | None = None) -> None:
    """Run `ogpsa COMMAND [--option value ...]`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, TextIOWrapper):  # a Windows console may not know an arrow, and the work must not be lost
        sys.stdout.reconfigure(errors="replace")
    if not arguments or arguments[0] not in _COMMANDS:
        wanted = bool(arguments) and arguments[0] not in ("-h", "--help")
        lines = [f"ogpsa: unknown command {arguments[0]!r}"] if wanted else []
        lines += ["usage: ogpsa COMMAND [--help] [--option value ...]", "", "commands:"]
        lines += [f"  {name:<12}{summary}" for name, summary in _COMMANDS.items()]
        print("\n".join(lines), file=sys.stderr if wanted else sys.stdout)
        raise SystemExit(2 if wanted or not arguments else 0)
    try:
        extras.check("cli", f"ogpsa {arguments[0]}")
    except ImportError as error:
        raise SystemExit(f"ogpsa: {error}") from error
    # Import the command only now, because its libraries take seconds to load.
    importlib.import_module(f".{arguments[0]}", __name__).run(arguments[1:])
