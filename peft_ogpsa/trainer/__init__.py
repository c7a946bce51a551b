# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The callback for transformers' Trainer and TRL's trainers, and its checkpoints."""
