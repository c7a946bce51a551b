# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back: tokenization, generation, logits, and the refusal matcher."""
