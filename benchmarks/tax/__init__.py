# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The alignment tax by method: what safety training costs, at matched safety, over seeds.

    python -m benchmarks.tax --data DIR --output benchmarks/results/tax

Each file has one subject: `data` (rows to train on, to preserve and to measure), `methods` (the grid), `measurement`,
`crossing` (ending a run when it is safe), `training` (one run), `grid` (all runs), `report`, `comparisons` and `plots`
(tables and plots from the files of the runs).
"""
