# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What goes out with an adapter: the model card and the upload."""
