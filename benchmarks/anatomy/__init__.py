# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The anatomy of a step: what projection takes from it, and what the step does to reference losses.

    python benchmarks/why.py --data FOLDER --output benchmarks/results/why

One noun a file: `places` (where a matrix is), `angles` (cosines), `probe` (reference gradients at every state),
`shares` (what is removed), `rules` (what optimizers make of projected gradients), `ages` (how rows age), `watch` (one
training that all of them look at), `figures`.
"""
