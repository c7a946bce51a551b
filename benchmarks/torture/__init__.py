# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What training survives: kills, a full disk, damaged files and thousands of steps. See docs/reliability.md."""
