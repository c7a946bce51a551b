# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Methods of others that the grid compares with and the library does not have, one noun a file."""
