"""Full precision whatever a script has set for TF32, by either of torch's interfaces."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ogpsa.core import precision
from peft_ogpsa.core.precision import bit_sum, compute_dtype, full_precision

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


@pytest.mark.skipif(not NEWER, reason="torch.backends.fp32_precision came with torch 2.9")
def test_a_later_change_of_the_general_setting_acts():
    """As with a second trainer in the same process that sets tf32=False."""
    torch.backends.fp32_precision = "tf32"
    with full_precision(torch.device("cpu")):
        pass
    torch.backends.fp32_precision = "ieee"
    assert [own.fp32_precision for own in MATMULS] == ["ieee", "ieee"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 8, 21])
def test_bits_are_added_in_parts(monkeypatch, dtype, count):
    """torch converts what it adds to 64 bits, which takes four times the memory of a model in 16 bits."""
    sizes = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            if "sum" in function.__name__:
                sizes.append(arguments[0].numel())
            return function(*arguments, **(options or {}))

    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int(values.view(precision._INTEGERS[values.element_size()]).sum(dtype=torch.int64))
    monkeypatch.setattr(precision, "_PART", 8)
    with Sums():
        assert bit_sum(values) == whole
    assert max(sizes) <= 8


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
