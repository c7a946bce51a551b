# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer and TRL's trainers: the callback and its checkpoints."""
