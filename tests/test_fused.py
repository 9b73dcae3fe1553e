"""Fused norms compute what a model's own do, and families whose norms differ keep them."""

import importlib.machinery
import sys
import types
import weakref

import pytest
import torch
from conftest import CONFIGS, SIZE, tiny_model
from torch.nn.functional import silu
from transformers import GraniteConfig, GraniteForCausalLM
from transformers.models.llama import modeling_llama

from qlora.base import fused, siblings
from qlora.base.fused import fuse
from qlora.base.norms import FusedRMSNorm, fuse_norms
from qlora.base.residuals import fuse_residuals
from qlora.base.siblings import join_siblings


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_stay_the_same(family):
    model, ids = tiny_model(family), torch.arange(3, 40)[None]
    expected = model(ids).logits
    num_fused = fuse_norms(model)
    assert (num_fused == 0) == (family == "gemma2")  # its scale is 1 + weight
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == num_fused
    torch.testing.assert_close(model(ids).logits, expected)


def test_weights_keep_their_names():
    model = tiny_model("llama")
    names = set(model.state_dict())
    fuse_norms(model)
    assert set(model.state_dict()) == names


def add_and_normalise(x, residual, weight, eps):
    total = x + residual
    return torch.nn.functional.rms_norm(total, weight.shape, weight, eps), total


def add_and_forget(x, residual, weight, eps):
    return torch.nn.functional.rms_norm(x + residual, weight.shape, weight, eps), residual


def add_nothing(x, residual, weight, eps):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("family", CONFIGS)
def test_sums_that_are_normalised_change_nothing(family):
    """Nor gradients, for which layers keep their own way; other layers keep it always."""
    model, ids = tiny_model(family), torch.arange(3, 40)[None]
    weight = model.get_input_embeddings().weight
    expected = model(ids).logits
    gradient = torch.autograd.grad(expected.square().sum(), weight)[0]
    fuse_norms(model)
    num_fused = fuse_residuals(model, add_and_normalise)
    assert num_fused == (0 if family == "gemma2" else model.config.num_hidden_layers)
    torch.testing.assert_close(model(ids).logits, expected)
    found = torch.autograd.grad(model(ids).logits.square().sum(), weight)[0]
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(model(ids[:, :5]).logits, expected[:, :5])


def test_each_sum_of_an_inference_is_normalised_at_once():
    """A layer finds there what it would normalise, and the norm behind the last one, too."""
    model, sums = tiny_model("llama"), []
    fuse_norms(model)

    def counted(x, residual, weight, eps):
        sums.append(len(x))
        return add_and_normalise(x, residual, weight, eps)

    fuse_residuals(model, counted)
    for is_training, ours in ((False, 2 * model.config.num_hidden_layers), (True, 0)):
        sums.clear()
        with torch.set_grad_enabled(is_training):
            model(torch.arange(3, 9)[None])
        assert len(sums) == ours


@pytest.mark.parametrize(("kernel", "told"), [(add_and_forget, ""), (add_nothing, "no such kernel")])
def test_a_kernel_that_sums_something_else_or_fails_is_left_out(kernel, told, caplog):
    model, ids = tiny_model("llama"), torch.arange(3, 40)[None]
    fuse_norms(model)
    with torch.no_grad():
        expected = model(ids).logits
        assert fuse_residuals(model, kernel) == 0
        torch.testing.assert_close(model(ids).logits, expected)
    assert told in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("multiplier", "num_fused"), [(0.95, 0), (1.0, 2)])
def test_layers_that_weigh_what_they_add_are_told_apart_however_little(multiplier, num_fused, dtype):
    """Granite's; in bfloat16 its logits differ less than a rounding or two of large numbers would."""
    config = GraniteConfig(**SIZE, residual_multiplier=multiplier)
    model = GraniteForCausalLM(config).requires_grad_(False).eval().to(dtype)
    fuse_norms(model)
    assert fuse_residuals(model, add_and_normalise) == num_fused


def test_a_sum_lets_go_of_what_it_added_before_the_mlp_takes_its_memory(monkeypatch):
    model, held = tiny_model("llama"), []
    fuse_norms(model)
    fuse_residuals(model, add_and_normalise)
    attended = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *of: attended.append(weakref.ref(of[2][0])))
        layer.mlp.register_forward_pre_hook(lambda *_: held.append(attended[-1]() is not None))
    with torch.no_grad():
        model(torch.arange(3, 9)[None])
    assert held == [False] * len(model.model.layers)


def test_sums_of_unequal_dtypes_are_those_of_the_wider_one():
    """As under autocast, whose linear layers give 16-bit numbers: the residual is not rounded to them."""
    model, ids = tiny_model("llama"), torch.arange(3, 40)[None]
    fuse_norms(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        assert fuse_residuals(model, add_and_normalise) == model.config.num_hidden_layers
        assert torch.equal(model(ids).logits, expected)


def quick_mlp(self, x):
    return self.down_proj(silu(self.gate_proj(x)).mul_(self.up_proj(x)))


def other_mlp(self, x):
    return self.down_proj(self.gate_proj(x) * self.up_proj(x))


def failing_mlp(self, x):
    raise RuntimeError("no such kernel")


def still(q, k, cos, sin):
    """A rotary embedding that turns nothing."""
    return q, k


@pytest.fixture
def liger(monkeypatch):
    """Stands in for Liger, which needs a GPU: `liger(rotary, mlp)` says what it puts in."""
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", modeling_llama.LlamaMLP)
    monkeypatch.setattr(fused, "_own_rotary", {})

    def put(rotary, mlp):
        def apply(model, **options):
            if rotary is not None:
                modeling_llama.apply_rotary_pos_emb = rotary
            modeling_llama.LlamaMLP = torch.nn.Identity  # as some versions of Liger do, for models to come
            for layer in model.model.layers:
                layer.mlp.forward = types.MethodType(mlp, layer.mlp)

        for name in ("liger_kernel", "liger_kernel.transformers"):
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module._apply_liger_kernel_to_instance = apply
            monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.mark.parametrize("family", CONFIGS)
def test_siblings_are_multiplied_together_and_give_what_each_gives_alone(family, monkeypatch):
    """With few rows; with more, and for whoever asks for one of them alone, each does its own product."""
    model, ids = tiny_model(family), torch.arange(3, 40)[None]
    expected = model(ids).logits
    joined = join_siblings(model)
    assert joined in (0, model.config.num_hidden_layers)
    torch.testing.assert_close(model(ids).logits, expected)
    torch.testing.assert_close(model(ids[:, :5]).logits, expected[:, :5])
    monkeypatch.setattr(siblings, "_MOST_ROWS", 8)
    torch.testing.assert_close(model(ids).logits, expected)
    torch.testing.assert_close(model(ids[:, :8]).logits, expected[:, :8])
    assert join_siblings(model) == 0


@pytest.mark.parametrize("sizes", [(12, 12, 12), (12, 4, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_siblings_share_one_weight_and_mind_whose_input_it_is(sizes, bias):
    names, linears = ("q_proj", "k_proj", "v_proj"), [torch.nn.Linear(8, size, bias) for size in sizes]
    model = torch.nn.Module()
    for name, linear in zip(names, linears, strict=True):
        setattr(model, name, linear)
    assert join_siblings(model) == 1
    parts = [getattr(model, name) for name in names]
    assert len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1
    x, y = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    with torch.no_grad():
        for order in ((0, 1, 2), (2, 1, 0), (0, 0, 1), (1, 1, 2)):
            for one in (x, y):
                for index in order:
                    torch.testing.assert_close(parts[index](one), linears[index](one))
        parts[0](x)
        torch.testing.assert_close(parts[1](y), linears[1](y))
        torch.testing.assert_close(parts[1](x), linears[1](x))


def test_no_more_than_one_attentions_weights_are_there_twice(monkeypatch):
    model, there, plain = tiny_model("llama"), [], siblings._Siblings
    originals = [weakref.ref(layer.self_attn.q_proj) for layer in model.model.layers]

    def counted(linears):
        there.append(sum(original() is not None for original in originals))
        return plain(linears)

    monkeypatch.setattr(siblings, "_Siblings", counted)
    join_siblings(model)
    assert there == [2, 1]


def test_what_is_no_plain_layer_has_no_siblings():
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn
    layer.k_proj = torch.nn.Sequential(layer.k_proj)
    layer = model.model.layers[1].self_attn
    layer.v_proj = layer.v_proj.double()  # its product would be another one
    assert join_siblings(model) == model.config.num_hidden_layers - 2


def test_a_familys_models_on_a_cpu_keep_their_own_rotary_embedding(liger):
    """Liger's is for GPUs, and is put in for all models of a family, once more with each model."""
    model, ids, called = tiny_model("llama"), torch.arange(3, 40)[None], []
    expected, own = model(ids).logits, modeling_llama.apply_rotary_pos_emb

    def rotary(*inputs):
        called.append(inputs)
        return own(*inputs)

    liger(rotary, quick_mlp)
    for _ in range(2):
        fuse(model)
    tried = len(called)
    torch.testing.assert_close(model(ids).logits, expected)
    assert tried == len(called) == 2, "tried out once for each model, and used by none here"
    assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
    torch.testing.assert_close(tiny_model("llama")(ids).logits, expected)  # one that is made later


@pytest.mark.parametrize(
    ("rotary", "mlp"), [(still, quick_mlp), (None, other_mlp), (None, failing_mlp), (still, failing_mlp)]
)
def test_what_computes_something_else_is_left_out(liger, rotary, mlp, caplog):
    model, ids = tiny_model("llama"), torch.arange(3, 40)[None]
    expected, own = model(ids).logits, modeling_llama.apply_rotary_pos_emb
    liger(rotary, mlp)
    fuse(model)
    torch.testing.assert_close(model(ids).logits, expected)
    assert modeling_llama.apply_rotary_pos_emb is own
    torch.testing.assert_close(tiny_model("llama")(ids).logits, expected)
    assert "liger-kernel is left out: " in caplog.text
