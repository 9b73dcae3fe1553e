"""Kernels compiled together, before anything launches them, on a GPU."""

import pytest
import torch

from qlora.base.compiling import compile_together

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
import triton.language as tl  # noqa: E402 - there is none without Triton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@triton.jit
def _write(target_ptr, value, SIZE: tl.constexpr):
    tl.store(target_ptr + tl.arange(0, SIZE), value)


def test_kernels_are_compiled_and_launched_later(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = torch.zeros(64, device="cuda")

    def work():
        _write[(1,)](target, 3.0, SIZE=64)
        _write[(1,)](target, 3.0, SIZE=32)

    assert compile_together(work) == (2, 0)
    assert not target.any()
    assert compile_together(work) == (0, 0)  # this process has them
    work()
    assert (target == 3.0).all()


def test_work_that_fails_leaves_launches_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = torch.zeros(16, device="cuda")

    def work():
        _write[(1,)](target, 2.0, SIZE=16)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        compile_together(work)
    _write[(1,)](target, 5.0, SIZE=16)
    assert (target == 5.0).all()
