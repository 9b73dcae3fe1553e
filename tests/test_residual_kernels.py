"""Sums that are normalised, and attentions that are joined, are what torch makes of them."""

import pytest
import torch
from conftest import HAS_KERNELS, tiny_model

from qlora.base.device import default_device
from qlora.base.norms import fuse_norms
from qlora.base.recomputed import recompute_layers
from qlora.base.residuals import fuse_residuals

if not HAS_KERNELS:
    pytest.skip("pip install 'triton>=3.9'", allow_module_level=True)
from qlora.base.residual_kernel import add_and_normalise
from qlora.packed.join_kernel import join

DEVICE = default_device()
DTYPES = [torch.float32, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]  # the interpreter has no other


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Tell that numbers are equal but for a rounding or two of the found ones' dtype."""
    rounding = 4 * torch.finfo(found.dtype).eps
    assert (found.double() - expected).norm() <= rounding * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 72, 1000, 4096])
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
def test_a_sum_and_its_norm_have_their_values_and_gradients(dtype, width, used):
    """In float64 by autograd, also where only one of the two is used further on."""
    x, residual = (randn(2, 5, width, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    weight = randn(width, seed=3, dtype=dtype)
    factors = [randn(2, 5, width, seed=seed, dtype=dtype) for seed in (4, 5)]
    normed, total = add_and_normalise(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    exact = total.detach().double().requires_grad_()  # the norm is that of the sum as it is rounded
    expected = torch.nn.functional.rms_norm(exact, (width,), weight.double(), 1e-5)
    near(normed.detach(), expected.detach())
    ways = {"both": (0, 1), "norm": (0,), "sum": (1,)}[used]
    found = torch.autograd.grad([(normed, total)[i] for i in ways], (x, residual), [factors[i] for i in ways])
    (gradient,) = torch.autograd.grad(
        [(expected, exact)[i] for i in ways], exact, [factors[i].double() for i in ways]
    )
    for one in found:
        near(one, gradient)


def trained_in_part():
    """Return a model whose MLPs' gates are trained and nothing else, inputs, and these weights."""
    model = tiny_model("llama").requires_grad_(False).to(DEVICE)
    weights = [layer.mlp.gate_proj.weight.requires_grad_() for layer in model.model.layers]
    return model, torch.arange(3, 40, device=DEVICE)[None], weights


def test_a_kernel_trains_a_model_as_its_own_layers_do():
    """The layers' own way is taken where norms are trained, or a layer is in training mode."""
    model, ids, weights = trained_in_part()

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(ids).logits.square().mean(), weights)

    expected, calls = gradients(), []
    fuse_norms(model)

    def counted(*inputs):
        calls.append(inputs)
        return add_and_normalise(*inputs)

    assert fuse_residuals(model, counted, in_training=True) == len(weights)
    calls.clear()
    for found, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-7)
    assert len(calls) == 2 * len(weights)
    model.train()
    gradients()
    assert len(calls) == 2 * len(weights)
    model.eval().model.layers[0].post_attention_layernorm.weight.requires_grad_()
    gradients()
    assert len(calls) == 4 * len(weights) - 2, "but for that layer's two"
    model.model.layers[0].post_attention_layernorm.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    gradients()
    assert len(calls) == 6 * len(weights) - 4, "but for those of the layer before it"


def test_layers_that_are_computed_again_leave_nothing_to_each_other():
    """A layer's backward computes it by itself: what the one before it had left is not there any more."""
    model, ids, weights = trained_in_part()
    fuse_norms(model)
    fuse_residuals(model, add_and_normalise, in_training=True)
    found = []
    for recomputes in (False, True):
        assert not recomputes or recompute_layers(model)
        found.append(torch.autograd.grad(model(ids).logits.square().mean(), weights))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        model(ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(3, 16), (5, 72), (32, 128)])
@pytest.mark.parametrize("is_permuted", [False, True])
def test_joined_attentions_are_one_over_all_keys(dtype, heads, width, is_permuted):
    """Where the other has no keys its numbers count for nothing.

    FlashAttention's output has the strides of its queries, which a family may have put together by head.
    """
    queries, keys = 37, 11
    scores, values = randn(heads, queries, 2 * keys), randn(heads, 2 * keys, width, seed=1)
    parts = []
    for there in (slice(keys), slice(keys, None)):
        some = scores[..., there]
        out = (some.softmax(-1) @ values[:, there]).transpose(0, 1)
        out, lse_HS = out.to(dtype), some.logsumexp(-1).float()
        if is_permuted:
            lse_HS = lse_HS.t().contiguous().t()
        else:
            out = out.contiguous()
        assert out.is_contiguous() == lse_HS.is_contiguous() != is_permuted
        parts += [out, lse_HS]
    alone = torch.arange(queries, device=DEVICE) % 3 == 0
    parts[3].masked_fill_(alone, -torch.inf)
    found, lse_HS = join(*parts)
    expected = torch.where(
        alone[:, None, None], parts[0].double(), (scores.softmax(-1) @ values).transpose(0, 1)
    )
    near(found, expected)
    near(lse_HS, torch.where(alone, parts[1].double(), scores.logsumexp(-1)))
