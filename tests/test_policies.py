"""`benchmarks/policies.py`: the policy that refreshes when a probe asks for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_callback import model_of, sets, sft

from benchmarks.policies import Adaptive


@pytest.mark.parametrize(("threshold", "refreshes"), [(float("inf"), 2), (-float("inf"), 4)])
def test_a_probe_asks_for_a_refresh(tmp_path, threshold, refreshes):
    model = model_of(refresh_steps=20)
    probe = Adaptive(sets(), threshold, seed=0)
    sft(tmp_path, model, [probe], max_steps=6).train()
    assert model.projector.diagnostics.reference_examples == 4 * refreshes
    probes = refreshes + 2  # one after each refresh, and two that ask: at steps 2 and 4
    assert probe.passes == pytest.approx(probes * len(sets()) / 3)
