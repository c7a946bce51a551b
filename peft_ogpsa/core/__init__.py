# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The projection itself, on torch alone: what is held of the references, and what it does to a step."""
