"""Compiles the LoRA kernels for an NVIDIA GPU that need not be there, and prints each one's shared memory.

    python tests/compiled_kernels.py ARCHITECTURE BYTES

BYTES: the shared memory that such a GPU gives a program. Prints a JSON list of [kernel, bytes].
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora.lora import kernels
from qlora.lora.products import Dropout, LayerPart
from qlora.lora.tables import make_bank_tables, make_pass_tables

BOUNDS = [(0, 50), (50, 300)]
WIDTH_IN, WIDTH_OUT, NUM_LAYERS = 96, 80, 3
CPU = torch.device("cpu")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
ALIGNED = {"wide", "wide_1", "wide_2", "low", "out", "K", "K_1", "K_2"}


class Compiled:
    """Stands for a kernel: compiles what it would be launched with, and notes the shared memory."""

    def __init__(self, kernel: Any, target: GPUTarget, found: list[tuple[str, int]]):
        self.kernel, self.target, self.found = kernel, target, found

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *inputs: Any, **options: Any) -> None:
        names = self.kernel.arg_names
        constants = {name: options.pop(name) for name in names if name in options}
        kinds = {
            name: TYPES[one.dtype] if isinstance(one, torch.Tensor) else "i32"
            for name, one in zip(names, inputs, strict=False)
        }
        source = ASTSource(
            fn=self.kernel,
            signature={name: kinds.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED},
        )
        compiled = triton.compile(source, target=self.target, options=options)
        self.found.append((self.kernel.__name__, compiled.metadata.shared))


def main() -> None:
    """Compile the kernels of a training pass, for ranks and dtypes at the ends of what there is."""
    architecture, room = map(int, sys.argv[1:])
    target, found = GPUTarget("cuda", architecture, 32), list[tuple[str, int]]()
    kernels._shared_bytes = lambda device: room - kernels._SPARED_BYTES
    for name in ("down_kernel", "up_kernel", "grad_kernel", "input_kernel"):
        setattr(kernels, name, Compiled(getattr(kernels, name), target, found))
    tables = make_pass_tables(
        CPU, BOUNDS, [Dropout(0.1, 1, 1, (0,), (end - start,)) for start, end in BOUNDS]
    )
    for dtype in (torch.bfloat16, torch.float32):
        for rank in (16, 64, 256):
            train_once(tables, dtype, rank)
    print(json.dumps(found))


def train_once(tables: Any, dtype: torch.dtype, rank: int) -> None:
    """Launch what a forward and a backward of layers with one input launch."""
    a, b = torch.zeros(rank, WIDTH_IN, dtype=dtype), torch.zeros(WIDTH_OUT, rank, dtype=dtype)
    part = [LayerPart(*bound, a, b, a.float(), b.float(), 1.0, None) for bound in BOUNDS]
    layers = make_bank_tables([part] * NUM_LAYERS, CPU).layers
    x = torch.zeros(BOUNDS[-1][1], WIDTH_IN, dtype=dtype)
    ys = [torch.zeros(len(x), WIDTH_OUT, dtype=dtype) for _ in range(NUM_LAYERS)]
    kept = kernels.add_lora(x, ys, tables, layers, is_new=True)
    kernels.lora_backward(x, ys, torch.empty_like(x), kept, tables, layers)


if __name__ == "__main__":
    main()
