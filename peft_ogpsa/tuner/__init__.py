# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""OGPSA as a PEFT tuner: configuration, model, registration, and contexts that switch the adapter off."""

import peft  # noqa: F401 - first: it registers OGPSA, which imports modules of this package
