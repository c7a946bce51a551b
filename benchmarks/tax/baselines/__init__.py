# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Methods of other authors that the grid compares with. The library does not have them."""
