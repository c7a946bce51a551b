# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Everything that must be measured on a GPU, in one command.

    python -m benchmarks.gpu run --output FOLDER --budget 30
    python -m benchmarks.gpu report FOLDER

For a machine without a network:

    python -m benchmarks.gpu pack CARRIED
    python -m benchmarks.gpu unpack CARRIED --to ENVIRONMENT
"""
