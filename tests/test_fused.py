"""Fused norms compute what a model's own do, and families whose norms differ keep them."""

import pytest
import torch
from conftest import CONFIGS, tiny_model

from qlora.base.fused import FusedRMSNorm, fuse_norms


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
