# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference sets: their examples, their losses, and the choice of examples for each refresh."""
