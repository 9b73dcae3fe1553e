"""What runs on a GPU only: FlashAttention over packed rows, the decode kernel, recorded steps. `pytest -m gpu` on such a machine."""

import pytest
import torch
from conftest import CONFIGS, random_examples, tiny_model
from oracles import padded_loss
from test_beam_engine import generated, model_that_ends, prompts, searched
from test_packing import gradients, with_lora

from qlora.attention import use_packed_attention
from qlora.config import DecodingSettings
from qlora.flash_attention import flash_attend, supports
from qlora.packing import Rows, pack
from qlora.perplexity import answer_nll

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


def plain_attention(q_SHD, k_SKD, v_SKD, k_PKD, v_PKD, rows, scale):
    """Row by row, all keys side by side, in float64."""
    outs, start, p = [], 0, rows.prefix_length
    groups = q_SHD.shape[1] // k_SKD.shape[1]
    for length in rows.lengths:
        q = q_SHD[start:start + length].double().transpose(0, 1)
        k, v = (torch.cat([prefix, own[start:start + length]]).double().transpose(0, 1).repeat_interleave(groups, 0)
                for prefix, own in ((k_PKD, k_SKD), (v_PKD, v_SKD)))
        hidden = torch.ones(length, p + length, dtype=torch.bool, device=q.device).triu(p + 1)
        outs.append(((q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(outs)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("prefix", [0, 37])
@pytest.mark.parametrize("width", [64, 128])
def test_flash_attention_over_rows_equals_plain_attention(kv_heads, prefix, width):
    """Output and all five gradients, to bfloat16's rounding of about 2**-8."""
    rows = Rows((5, 130, 1, 64), prefix, CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(rows.num_tokens, 8), *[(rows.num_tokens, kv_heads)] * 2, *[(prefix, kv_heads)] * 2]
    tensors = [torch.randn(*shape, width, generator=generator, device=CUDA).bfloat16().requires_grad_() for shape in shapes]
    assert supports(tensors[0], rows, None, None)
    grad = torch.randn(tensors[0].shape, generator=generator, device=CUDA)
    found = flash_attend(*tensors, rows, width ** -0.5)
    expected = plain_attention(*tensors, rows, width ** -0.5)
    ours = [found, *torch.autograd.grad(found, tensors, grad.bfloat16())]
    theirs = [expected, *torch.autograd.grad(expected, tensors, grad.double(), allow_unused=True)]
    for own, other in zip(ours, theirs, strict=True):
        if own.numel():
            assert (own.double() - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_training_is_as_exact_as_padded_rows(family):
    """In bfloat16 the packed stream is no further from float32 than padded rows are, up to the noise of rounding."""
    examples = random_examples(6, shared=24)
    exact, padded, base = with_lora(tiny_model(family)), with_lora(tiny_model(family)).to(CUDA), tiny_model(family)
    use_packed_attention(base)
    packed = with_lora(base).to(CUDA)
    padded_loss(exact, examples).backward()
    with torch.autocast("cuda", torch.bfloat16):
        padded_loss(padded, examples).backward()
        answer_nll(packed, pack(examples, CUDA)).mean().backward()
    errors = {name: (gradients(model).cpu() - gradients(exact)).norm() for name, model in {"padded": padded, "packed": packed}.items()}
    assert errors["packed"] < 1.5 * errors["padded"], errors


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("settings", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 5, "length_penalty": 0.3},
                                      {"num_beams": 3, "early_stopping": True, "min_new_tokens": 4}])
def test_tokens_equal_those_of_generate(family, settings):
    model, decoding = model_that_ends(family).to(CUDA), DecodingSettings(max_new_tokens=20, **settings)
    expected = [generated(model, text, decoding) for text in prompts()]
    assert searched(model, prompts(), decoding, max_slots=3) == expected
