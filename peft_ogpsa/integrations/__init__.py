# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""OGPSA in training tools that make their own LoRA: one module a tool."""
