"""Full precision whatever a script has set for TF32, by either of torch's interfaces."""

from __future__ import annotations

import contextlib

import pytest
import torch

from peft_ogpsa.core.precision import compute_dtype, full_precision

NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")
MATMULS = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if NEWER else []


def state():
    """All that torch says of the precision of products; an error counts as a value."""
    found = []
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        with contextlib.suppress(RuntimeError):
            found.append(read())
    return found + [getattr(own, "fp32_precision", None) for own in (torch.backends, *MATMULS)]


def set_newer(own, value):
    own.fp32_precision = value


SETTINGS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "everything": lambda: set_newer(torch.backends, "tf32"),
    "CUDA": lambda: set_newer(torch.backends.cuda.matmul, "tf32"),
}


@pytest.fixture(autouse=True)
def as_it_was():
    places = [torch.backends, *MATMULS] if NEWER else []
    before = [own.fp32_precision for own in places]
    yield
    for own in places:
        own.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for own, value in zip(places, before, strict=True):
        own.fp32_precision = value


@pytest.mark.parametrize("name", SETTINGS)
def test_tf32_is_off_inside_and_what_it_was_afterwards(name):
    if name in ("everything", "CUDA") and not NEWER:
        pytest.skip("torch.backends.fp32_precision came with torch 2.9")
    SETTINGS[name]()
    before = state()
    with full_precision(torch.device("cpu")), full_precision(torch.device("cpu")):
        assert all(own.fp32_precision == "ieee" for own in MATMULS)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    assert state() == before


def test_autocast_is_off_inside():
    one = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(torch.device("cpu")):
            assert (one @ one).dtype == torch.float32
        assert (one @ one).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "real", "expected"),
    [("cpu", True, torch.float32), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16)],
)
def test_the_dtype_is_one_that_the_device_does_not_emulate(monkeypatch, device, real, expected):
    """A T4 emulates bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: real or including_emulation)
    assert compute_dtype(device) == expected
