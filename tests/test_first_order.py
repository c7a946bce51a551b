"""The promise itself, on the real model: to first order, no reference loss rises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.slow
@pytest.mark.long
def test_reference_losses_do_not_rise_under_conflict(smollm2):
    from first_order import curves

    base, tokenizer = smollm2
    results = curves(base, tokenizer, steps=10, learning_rate=1.4e-4, examples=1)
    for method, curve in results.items():
        assert curve["training"][-1] < curve["training"][0] - 0.5, "every method must learn"
        worst = max(max(curve[name]) - curve[name][0] for name in ("general", "benign"))
        if method.startswith("OGPSA"):
            assert worst <= 1e-3
        else:
            assert worst > 5e-3
