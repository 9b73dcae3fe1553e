"""Fused norms compute what a model's own do, and families whose norms differ keep them."""

import importlib.machinery
import sys
import types

import pytest
import torch
from conftest import CONFIGS, tiny_model
from torch.nn.functional import silu
from transformers.models.llama import modeling_llama

from qlora.base import fused
from qlora.base.fused import FusedRMSNorm, fuse, fuse_norms


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
