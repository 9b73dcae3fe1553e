"""Where tests of kernels run, on which numbers: on a GPU as they are, else in Triton's interpreter."""

import pytest
import torch
from conftest import HAS_KERNELS

if not HAS_KERNELS:
    pytest.skip("pip install 'triton>=3.9'", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter reads bfloat16 as integers"),
    ),
]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draw normal numbers, the same for a seed wherever tests run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)
