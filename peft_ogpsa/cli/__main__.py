# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Entry point for `python -m peft_ogpsa.cli`, which `accelerate launch -m` needs."""

from . import main

if __name__ == "__main__":
    main()
