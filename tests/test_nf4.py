"""A base that stays in NF4 has the values that bitsandbytes gives it, whichever kernel computes them."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import HAS_KERNELS

from qlora.base import nf4
from qlora.base.device import default_device
from qlora.base.nf4 import quicken_layers

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
    assert nf4_kernel.supports(weight.data, weight.quant_state)
    found = nf4_kernel.dequantise(weight.data, weight.quant_state)
    expected = dequantize_4bit(weight.data, weight.quant_state)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"quant_type": "fp4"}, {"quant_storage": torch.float16}])
def test_other_formats_are_left_to_bitsandbytes(options, monkeypatch):
    weight = quantised(**options)
    monkeypatch.setitem(nf4._are_ours, weight.device, True)
    assert not nf4_kernel.supports(weight.data, weight.quant_state)
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


@pytest.mark.parametrize(
    ("milliseconds", "least"), [([1, 2, 1, 2, 1, 2, 1, 2], 16), ([1, 2, 1, 2, 2, 1], 256), ([2, 1], None)]
)
def test_layers_dequantise_first_from_the_rows_on_where_that_is_faster(milliseconds, least, monkeypatch):
    """With their own gradients, and the results that they had."""
    times, called, plain = iter(milliseconds), [], nf4.dequantise
    model = torch.nn.Sequential(
        Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4"), torch.nn.ReLU(),
        Linear4bit(96, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4"),
    ).to(DEVICE)  # fmt: skip
    inputs = {rows: torch.randn(2, rows // 2, 64, device=DEVICE) for rows in (2, 16, 256, 600)}
    with torch.no_grad():
        expected = {rows: model(x) for rows, x in inputs.items()}
    monkeypatch.setattr(nf4, "_milliseconds", lambda call: next(times))
    monkeypatch.setattr(nf4, "dequantise", lambda weight: called.append(1) or plain(weight))
    assert quicken_layers(model) == least
    with torch.no_grad():
        for rows, x in inputs.items():
            called.clear()
            torch.testing.assert_close(model(x), expected[rows])
            assert len(called) == (2 if least is not None and rows >= least else 0)
    called.clear()
    x = inputs[600].clone().requires_grad_()
    model(x).sum().backward()
    assert not called and x.grad.abs().sum() > 0


def test_layers_that_could_not_be_measured_multiply_as_before(monkeypatch):
    layer = Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4").to(DEVICE)
    monkeypatch.setattr(nf4, "_milliseconds", lambda call: failing(None, None))
    assert quicken_layers(torch.nn.Sequential(layer)) is None
    assert "forward" not in vars(layer)


def test_a_model_without_such_layers_is_left_alone():
    assert quicken_layers(torch.nn.Sequential(torch.nn.Linear(4, 4))) is None
