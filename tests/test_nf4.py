"""A base that stays in NF4 has the values that bitsandbytes gives it, whichever kernel computes them."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import HAS_KERNELS

from qlora.base import nf4
from qlora.base.device import default_device

if not HAS_KERNELS:
    pytest.skip("pip install 'triton>=3.9'", allow_module_level=True)
from qlora.base import nf4_kernel

DEVICE = default_device()
# In the interpreter bfloat16 numbers are integers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


def quantised(shape=(24, 136), dtype=torch.float32, **options):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    weights[0, 0] = 40.0  # so that scales differ
    data, state = quantize_4bit(weights, **{"quant_type": "nf4", "compress_statistics": True, **options})
    return SimpleNamespace(data=data, quant_state=state, device=data.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 136), (128, 1024), (1, 64), (3, 50)])
@pytest.mark.parametrize("options", [{}, {"compress_statistics": False}, {"blocksize": 128}])
def test_the_kernel_gives_what_bitsandbytes_gives_to_the_last_bit(dtype, shape, options):
    weight = quantised(shape, dtype, **options)
    assert nf4_kernel.supports(weight.quant_state)
    found = nf4_kernel.dequantise(weight.data, weight.quant_state)
    expected = dequantize_4bit(weight.data, weight.quant_state)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_other_formats_are_left_to_bitsandbytes(monkeypatch):
    weight = quantised(quant_type="fp4")
    monkeypatch.setitem(nf4._are_ours, weight.device, True)
    assert not nf4_kernel.supports(weight.quant_state)
    assert torch.equal(nf4.dequantise(weight), dequantize_4bit(weight.data, weight.quant_state))


def wrong(data, state):
    return dequantize_4bit(data, state) + 1e-7


def failing(data, state):
    raise RuntimeError("no such card")


@pytest.mark.parametrize(
    ("kernel", "milliseconds", "is_taken"),
    [(None, [1.0, 2.0], True), (None, [2.0, 1.0], False), (wrong, [1.0, 2.0], False), (failing, [], False)],
)
def test_the_kernel_is_taken_where_it_is_the_same_and_faster(kernel, milliseconds, is_taken, monkeypatch):
    weight, times = quantised(), iter(milliseconds)
    monkeypatch.setattr(nf4, "_milliseconds", lambda call: next(times))
    if kernel is not None:
        monkeypatch.setattr(nf4_kernel, "dequantise", kernel)
    assert nf4._is_better(weight) == is_taken


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_layer_has_its_values_by_either_kernel(is_ours, monkeypatch):
    weight, called, plain = quantised(), [], nf4_kernel.dequantise

    def counted(data, state):
        called.append(1)
        return plain(data, state)

    monkeypatch.setattr(nf4_kernel, "dequantise", counted)
    monkeypatch.setitem(nf4._are_ours, weight.device, is_ours)
    assert torch.equal(nf4.dequantise(weight), dequantize_4bit(weight.data, weight.quant_state))
    assert bool(called) == is_ours
