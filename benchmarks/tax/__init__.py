# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The alignment tax by method: what safety training costs, at matched safety, over seeds.

    python -m benchmarks.tax --data DIR --output benchmarks/results/tax

One noun a file: `data` (what is trained on, kept and measured), `methods` (the grid), `measurement`, `crossing`
(ending a run where it is safe), `training` (one run), `report` (table and plots from the runs' files).
"""
