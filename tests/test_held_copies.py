"""What tensors were is held while they go on to change, and brought to the host by any thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qlora.base.device import hold

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]
NO_ROOM = (2**20, 2**40)  # bytes free, and in all


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_change_and_what_is_held_does_not(device, has_room, monkeypatch):
    """A GPU with room holds a copy until it is brought."""
    tensors = [torch.arange(20 * 2**20, dtype=torch.float32, device=device), torch.ones((), device=device)]
    if not has_room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: NO_ROOM)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    bring = hold(tensors)
    if device == "cuda":
        assert (torch.cuda.memory_allocated() > before) == has_room
    for tensor in tensors:
        tensor.mul_(-3)
    with ThreadPoolExecutor(1) as another:
        many, one = another.submit(bring).result()
    assert torch.equal(many, torch.arange(20 * 2**20, dtype=torch.float32))
    assert one == 1 and one.device.type == many.device.type == "cpu"
    if device == "cuda":
        assert torch.cuda.memory_allocated() == before
