"""The LoRA kernels compute what their formula does: on a GPU as they are, else in Triton's interpreter."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from on_device import DEVICE, DTYPES, randn

from qlora.lora import kernels as lora_kernels
from qlora.lora.products import Dropout, LayerPart
from qlora.lora.tables import make_bank_tables, make_pass_tables
from qlora.pass_buffers import PassSize

BOUNDS = ((0, 50), (50, 51), (51, 150), (150, 300))
RANKS = (4, 33, 0, 64)
WIDTH_IN, WIDTH_OUT, NUM_TOKENS, LAYER = 96, 80, 300, 5
DROPOUTS = [Dropout(0.3, 7, 2, (0, 1), (20, 30)), None, None, Dropout(0.1, 8, 2, (0, 5), (100, 50))]


def parts_of(dtype: torch.dtype) -> list[LayerPart | None]:
    """Adapters of several ranks, one of which leaves the layer alone."""
    parts: list[LayerPart | None] = []
    for number, (rank, bound) in enumerate(zip(RANKS, BOUNDS, strict=True)):
        if rank == 0:
            parts.append(None)
            continue
        a, b = (
            randn(*shape, dtype=dtype, seed=10 + 2 * number + i)
            for i, shape in enumerate(((rank, WIDTH_IN), (WIDTH_OUT, rank)))
        )
        a_grad, b_grad = (torch.zeros(one.shape, device=DEVICE) for one in (a, b))
        parts.append(LayerPart(*bound, a, b, a_grad, b_grad, 0.5 + rank / 50, None))
    return parts


def dropped_inputs(dropouts, x: torch.Tensor) -> torch.Tensor:
    """The kernels' dropout factors of every input, which differ by design from the plain way's.

    An adapter whose A is the identity hands them on.
    """
    eye = torch.eye(128, x.shape[1], device=DEVICE)
    parts = []
    for bound in BOUNDS:
        b = torch.zeros(8, 128, device=DEVICE)
        parts.append(LayerPart(*bound, eye, b, torch.zeros_like(eye), torch.zeros_like(b), 1.0, None))
    layer = replace(make_bank_tables([parts], DEVICE).layers[0], index=LAYER)
    tables = make_pass_tables(DEVICE, BOUNDS, dropouts)
    ones, out = torch.ones(x.shape, device=DEVICE), torch.zeros(x.shape[0], 8, device=DEVICE)
    (low_NTR,) = lora_kernels.add_lora(ones, [out], tables, [layer])
    return low_NTR[0, :, : x.shape[1]].double()


@pytest.mark.parametrize("dropouts", [[None] * 4, DROPOUTS], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_gradients_equal_the_formula(dtype, dropouts):
    """Against float64, to the dtype's rounding; what is put into new memory is what is added to zeros."""
    parts = parts_of(dtype)
    x, dy = (
        randn(NUM_TOKENS, WIDTH_IN, dtype=dtype, seed=1),
        randn(NUM_TOKENS, WIDTH_OUT, dtype=dtype, seed=2),
    )
    tables = make_pass_tables(DEVICE, BOUNDS, dropouts)
    layer = replace(make_bank_tables([parts], DEVICE).layers[0], index=LAYER)
    mask = dropped_inputs(dropouts, x)
    y, dx = (torch.zeros(NUM_TOKENS, width, dtype=dtype, device=DEVICE) for width in (WIDTH_OUT, WIDTH_IN))
    kept = lora_kernels.add_lora(x, [y], tables, [layer])
    lora_kernels.lora_backward(x, [dy], dx, kept, tables, [layer])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for part in filter(None, parts):
        here = slice(part.start, part.end)
        xd, grad = x[here].double() * mask[here], dy[here].double()
        a, b = part.a.double(), part.b.double()
        expected = {
            "y": part.scale * xd @ a.T @ b.T,
            "dx": part.scale * (grad @ b @ a) * mask[here],
            "a": part.scale * (grad @ b).T @ xd,
            "b": part.scale * grad.T @ (xd @ a.T),
        }
        found = {"y": y[here], "dx": dx[here], "a": part.a_grad, "b": part.b_grad}
        for name in expected:
            error = (found[name].double() - expected[name]).norm()
            assert error <= tolerance * expected[name].norm(), name
    assert not y[51:150].any(), "nobody's tokens get nothing"
    new_y, new_dx = torch.full_like(y, torch.nan), torch.full_like(dx, torch.nan)
    kept = lora_kernels.add_lora(x, [new_y], tables, [layer], is_new=True)
    lora_kernels.lora_backward(x, [dy], new_dx, kept, tables, [layer])
    assert torch.equal(new_y, y) and torch.equal(new_dx, dx)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("within", [False, True], ids=["summed before", "summed within"])
def test_layers_that_read_the_same_input_are_written_together(num_layers, within, monkeypatch):
    """Layers of other widths and ranks, one without some adapters: as one layer after another."""
    monkeypatch.setattr(lora_kernels, "adds_pieces_later", lambda num_tiles: within)
    x = randn(NUM_TOKENS, WIDTH_IN, dtype=torch.float32, seed=1)
    tables = make_pass_tables(DEVICE, BOUNDS, DROPOUTS)
    widths, layers = (WIDTH_OUT, 200, 16), []
    for place, (width, ranks) in enumerate(zip(widths, (RANKS, (70, 3, 8, 0), (1, 0, 0, 2)), strict=True)):
        parts = []
        for number, (rank, bound) in enumerate(zip(ranks, BOUNDS, strict=True)):
            a, b = (
                randn(*shape, dtype=torch.float32, seed=50 + 10 * place + 2 * number + i)
                for i, shape in enumerate(((rank, WIDTH_IN), (width, rank)))
            )
            none = torch.zeros(0, device=DEVICE)
            parts.append(LayerPart(*bound, a, b, none, none, 0.5 + rank / 50, None) if rank else None)
        layers.append(parts)
    bank = make_bank_tables(layers, DEVICE).layers
    expected = [torch.zeros(NUM_TOKENS, width, device=DEVICE) for width in widths]
    for place, y in enumerate(expected):
        lora_kernels.add_lora(x, [y], tables, [bank[place]])
    found = [torch.full_like(y, torch.nan) for y in expected[:num_layers]]
    lora_kernels.write_lora(x, found, tables, bank[:num_layers])
    for y, of_one in zip(found, expected, strict=False):
        assert y.isfinite().all() and (y - of_one).norm() <= 1e-5 * of_one.norm()


def parts_at(place: int, ranks: tuple[int, ...], width: int) -> list[LayerPart | None]:
    """Adapters of some ranks at a layer of some width, with gradients that are there already."""
    parts: list[LayerPart | None] = []
    for number, (rank, bound) in enumerate(zip(ranks, BOUNDS, strict=True)):
        a, b, a_grad, b_grad = (
            randn(*shape, dtype=torch.float32, seed=100 * place + 4 * number + i)
            for i, shape in enumerate(2 * [(rank, WIDTH_IN), (width, rank)])
        )
        parts.append(LayerPart(*bound, a, b, a_grad, b_grad, 0.5 + rank / 50, None) if rank else None)
    return parts


@pytest.mark.parametrize("ranks", [(8, 32, 0, 64), (4, 33, 0, 70)], ids=["even ranks", "odd ranks"])
@pytest.mark.parametrize(("num_layers", "has_input"), [(2, True), (3, False), (4, True)])
def test_layers_that_read_the_same_input_are_trained_together(num_layers, ranks, has_input):
    """Products, gradients and that of the input: as of one layer after another, to rounding."""
    x = randn(NUM_TOKENS, WIDTH_IN, dtype=torch.float32, seed=1)
    tables = make_pass_tables(DEVICE, BOUNDS, DROPOUTS)
    widths = (WIDTH_OUT, 200, 16, 48)[:num_layers]
    dys = [randn(NUM_TOKENS, width, dtype=torch.float32, seed=5 + i) for i, width in enumerate(widths)]
    found: list[list[torch.Tensor]] = []
    for step in (1, num_layers):
        layers = [parts_at(i, ranks[i:] + ranks[:i], width) for i, width in enumerate(widths)]
        bank = make_bank_tables(layers, DEVICE).layers
        ys = [torch.full((NUM_TOKENS, width), torch.nan, device=DEVICE) for width in widths]
        total = torch.zeros_like(x)
        for first in range(0, num_layers, step):
            here = slice(first, first + step)
            kept = lora_kernels.add_lora(x, ys[here], tables, bank[here], is_new=True)
            dx = torch.full_like(x, torch.nan) if has_input else None
            lora_kernels.lora_backward(x, dys[here], dx, kept, tables, bank[here])
            total += 0 if dx is None else dx
        gradients = [
            grad for layer in layers for part in layer if part for grad in (part.a_grad, part.b_grad)
        ]
        found.append([*ys, total, *gradients])
    assert not has_input or found[0][num_layers].any()
    for alone, together in zip(*found, strict=True):
        assert together.isfinite().all() and (together - alone).norm() <= 1e-5 * alone.norm()


class Launched:
    """Keeps what a kernel would be compiled with, and launches nothing."""

    def __init__(self, found: set[tuple[object, ...]]):
        self._found = found

    def __getitem__(self, grid):
        def launch(*inputs, **options):
            dtypes = [str(one.dtype) for one in inputs if isinstance(one, torch.Tensor)]
            self._found.add((*sorted(options.items()), ("dtypes", tuple(dtypes))))

        return launch


@pytest.mark.parametrize("has_dropout", [False, True], ids=["plain", "dropout"])
def test_passes_of_sizes_with_equal_kernels_are_compiled_once(has_dropout, monkeypatch):
    """A recording can't compile, so that a size must not need what another one of its kind did not."""
    known: dict[tuple[int, ...], set[tuple[object, ...]]] = {}
    room = {"answers": 64, "rows": 32, "prefix_tokens": 0, "longest_row": 1024, "longest": 64}
    room |= {"longest_part": 1024, "longest_prefix": 64, "rank": 16, "num_layers": 3}
    (layer,) = make_bank_tables([parts_of(torch.float32)], DEVICE).layers
    plain = make_pass_tables(DEVICE, BOUNDS, DROPOUTS if has_dropout else [None] * 4)
    for tokens, parts in itertools.product(range(64, 20_000, 64), (1, 2, 16, 64)):
        size = PassSize(
            tokens=tokens, parts=parts, has_dropout=has_dropout, is_training=True, odd_ranks=True, **room
        )
        tables = replace(plain, num_tiles=size.num_tiles, num_parts=parts)
        x, found = torch.zeros(8, WIDTH_IN, device=DEVICE), set[tuple[object, ...]]()
        for name in ("down_kernel", "up_kernel", "grad_kernel", "input_kernel"):
            monkeypatch.setattr(lora_kernels, name, Launched(found))
        for count in (1, 2, 3):
            ys = [torch.zeros(8, WIDTH_OUT, device=DEVICE) for _ in range(count)]
            lora_kernels.write_lora(x, ys, tables, [layer] * count)
            kept = lora_kernels.add_lora(x, ys, tables, [layer] * count)
            lora_kernels.lora_backward(x, ys, x, kept, tables, [layer] * count)
        assert known.setdefault(size.kernels, found) == found
    assert len(known) >= 3


@pytest.mark.parametrize(("ranks", "is_even"), [((8, 64, 0, 16), True), ((8, 33, 0, 16), False)])
def test_kernels_count_on_even_ranks_where_all_are_even(ranks, is_even, monkeypatch):
    """A single odd rank at any layer is one too many, and tables may be made for odd ones to come."""
    found = set[tuple[object, ...]]()
    for name in ("down_kernel", "up_kernel", "grad_kernel", "input_kernel"):
        monkeypatch.setattr(lora_kernels, name, Launched(found))
    layers = [parts_at(0, (16, 16, 16, 16), WIDTH_OUT), parts_at(1, ranks, WIDTH_OUT)]
    tables, bank = make_pass_tables(DEVICE, BOUNDS, DROPOUTS), make_bank_tables(layers, DEVICE)
    x, y = torch.zeros(NUM_TOKENS, WIDTH_IN, device=DEVICE), torch.zeros(NUM_TOKENS, WIDTH_OUT, device=DEVICE)
    kept = lora_kernels.add_lora(x, [y], tables, bank.layers[:1])
    lora_kernels.lora_backward(x, [y], x, kept, tables, bank.layers[:1])
    assert {dict(options)["EVEN_RANKS"] for options in found} == {is_even}
    assert not make_bank_tables(layers, DEVICE, odd_ranks=True).even_ranks
    if not is_even:
        with pytest.raises(AssertionError):
            make_bank_tables([[None] * 4] * 2, DEVICE, least_rank=64).copy_(bank)


def test_dropout_drops_its_share():
    mask = dropped_inputs(DROPOUTS, torch.ones(NUM_TOKENS, WIDTH_IN))
    assert (mask[150:] == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (mask[:50] == 0).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (mask[50:150] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kib"), [(86, 99), (90, 227)], ids=["RTX 3090, A10G", "H100"])
def test_kernels_fit_the_shared_memory_of_a_gpu(architecture, kib):
    """A program that asks for more than a GPU has fails when it is launched."""
    script = Path(__file__).parent / "compiled_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(script), str(architecture), str(kib * 1024)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {name for name, _ in found} == {"down_kernel", "up_kernel", "grad_kernel", "input_kernel"}
    assert max(size for _, size in found) <= kib * 1024
