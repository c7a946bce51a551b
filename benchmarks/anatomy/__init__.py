# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What projection removes from an optimizer step, and what the step does to reference losses.

    python benchmarks/why.py --data FOLDER --output benchmarks/results/why

Each file has one subject: `places` (where a matrix is), `angles` (cosines), `probe` (reference gradients at every
step), `shares` (what is removed), `rules` (steps under each projection rule), `ages` (how rows age), `watch` (the
training run that all of them measure), `tables` and `figures`.
"""
