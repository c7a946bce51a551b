# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""All tables of a folder of runs, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .comparisons import comparisons, task_changes
from .report import SAFE, Point, at_equal_loss, at_first_safe, at_smallest_kl, at_the_end, hours


def results(base: Point, runs: Mapping[str, Mapping[int, Any]], command: str) -> str:
    """Return the tables of all runs, which plain LoRA must be among.

    Args:
        base: The base's figures.
        runs: The runs by method and seed.
        command: The command that makes all runs.
    """
    meta = [run["meta_info"] for own in runs.values() for run in own.values()]
    what = "a CPU core" if meta[0]["device"].startswith("CPU") else "the device"
    return f"""# Results

{len(runs)} methods, {len(meta)} runs of {meta[0]["model"]} on {meta[0]["device"]}, at commits
{", ".join(sorted({own["commit"] for own in meta}))} (+: with changes not yet committed), made by

```
{command}
```

All of it takes {hours(base, runs):.1f} hours of {what}.

## At plain LoRA's held-out safety loss

{at_equal_loss(base, runs)}
## Where at least {SAFE:.0%} of every source of held-out harmful requests are refused first

{at_first_safe(base, runs)}
## Where at least {SAFE:.0%} of the first source are refused first

{at_first_safe(base, runs, every=False)}
## Where at least {SAFE:.0%} of every source are refused, at the smallest KL

{at_smallest_kl(base, runs)}
## At the last measurement

{at_the_end(base, runs)}
## Differences where every source is refused first, prompt by prompt

The first method minus the second one: rates in points of 100, KL in nats per token, each with its own 95 % interval. A
star is larger than chance, by Holm's test of the whole table. The intervals hold for these seeds.

{comparisons(base, runs)}
## The same differences, seed by seed

These intervals hold for these prompts. A method that depends on the seed has wide ones.

{comparisons(base, runs, over="seeds")}
## lm-eval's tasks at the end, minus the base's

In points of 100, each with its own 95 % interval. A star is larger than chance, by Holm's test of the whole table.

{task_changes(base, runs)}"""
