# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The projection, built on torch alone: the reference subspaces and how they change an optimizer step."""
