"""The Triton kernels compute what the plain ways do: on a GPU as they are, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from conftest import HAS_KERNELS

from inference.beam_search import SearchRules, SearchState, advance
from inference.cached_attention import DecodePass
from inference.kv_cache import KVCache
from qlora.lora.products import Dropout, LayerPart
from qlora.lora.tables import make_bank_tables, make_pass_tables
from qlora.pass_buffers import PassSize

if not HAS_KERNELS:
    pytest.skip("pip install 'triton>=3.9'", allow_module_level=True)
from inference import choice_kernel, decode_kernel
from qlora.lora import kernels as lora_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter reads bfloat16 as integers"),
    ),
]


BOUNDS = ((0, 50), (50, 51), (51, 150), (150, 300))
RANKS = (4, 33, 0, 64)
WIDTH_IN, WIDTH_OUT, NUM_TOKENS, LAYER = 96, 80, 300, 5
DROPOUTS = [Dropout(0.3, 7, 2, (0, 1), (20, 30)), None, None, Dropout(0.1, 8, 2, (0, 5), (100, 50))]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


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
@pytest.mark.parametrize("num_layers", [2, 3, 4])
@pytest.mark.parametrize("has_input", [True, False], ids=["dx", "no dx"])
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
        return lambda *_, **options: self._found.add(tuple(sorted(options.items())))


def test_passes_of_sizes_with_equal_kernels_are_compiled_once(monkeypatch):
    """A recording can't compile, so that a size must not need what another one of its kind did not."""
    known: dict[tuple[int, ...], set[tuple[object, ...]]] = {}
    room = {"answers": 64, "rows": 32, "parts": 2, "prefix_tokens": 0, "longest_row": 1024, "longest": 64}
    room |= {"longest_part": 1024, "longest_prefix": 64, "rank": 16, "num_layers": 3, "odd_ranks": True}
    (layer,) = make_bank_tables([parts_of(torch.float32)], DEVICE).layers
    for tokens in range(64, 20_000, 64):
        size = PassSize(tokens=tokens, has_dropout=False, is_training=False, **room)
        tables = replace(make_pass_tables(DEVICE, BOUNDS, [None] * 4), num_tiles=size.num_tiles)
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


def test_dropout_drops_its_share():
    mask = dropped_inputs(DROPOUTS, torch.ones(NUM_TOKENS, WIDTH_IN))
    assert (mask[150:] == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (mask[:50] == 0).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (mask[50:150] == 1).all()


def test_the_columns_that_beams_see_are_listed_with_their_beams():
    """Compares several blocks of columns; an example at its first step sees its beams' own rows alone."""
    slots, beams, steps = 3, 3, 200
    generator = torch.Generator().manual_seed(0)
    ancestry = torch.randint(0, beams, (slots, beams, steps), generator=generator)
    ancestry[0] = ancestry[0, :1]  # all beams have one history
    taken = [150, steps + 7, 0]  # the second has ended, and its slot goes on for a while
    for slot, step in enumerate(taken):
        ancestry[slot, :, min(step, steps - 1)] = torch.arange(beams)
    seen = decode_kernel.seen_columns(ancestry.to(DEVICE), torch.tensor(taken, device=DEVICE))
    for slot, step in enumerate(taken):
        expected = dict[int, int]()
        for place in range(min(step + 1, steps)):
            for beam in range(beams):
                column = place * beams + int(ancestry[slot, beam, place])
                expected[column] = expected.get(column, 0) | 1 << beam
        count = int(seen.counts_E[slot])
        columns = seen.columns_EW[slot, :count].tolist()
        assert columns == sorted(expected)
        assert seen.beams_EW[slot, :count].tolist() == [expected[column] for column in columns]


def plain_start(q_SHD, k_KPD, v_KPD, scale):
    """Compute what FlashAttention gives of a prefix, in plain PyTorch: output and log-sum-exp."""
    keys, values = (one.repeat_interleave(q_SHD.shape[1] // len(one), 0) for one in (k_KPD, v_KPD))
    scores_HSP = torch.einsum("shd,hpd->hsp", q_SHD, keys) * scale
    out_SHD = torch.einsum("hsp,hpd->shd", scores_HSP.softmax(-1), values)
    return out_SHD.contiguous(), scores_HSP.logsumexp(-1)


@pytest.mark.parametrize("is_started", [False, True], ids=["alone", "behind the prefix"])
@pytest.mark.parametrize(("sliding_window", "softcap"), [(None, None), (9, None), (50, None), (None, 5.0)])
@pytest.mark.parametrize("prefix_length", [0, 7])
@pytest.mark.parametrize(("beams", "heads"), [(2, 4), (1, 4), (2, 2), (1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decode_kernel_equals_plain_attention(
    is_started, sliding_window, softcap, prefix_length, beams, heads, dtype, monkeypatch
):
    """Template, prompts of unequal length, histories of beams that have crossed, to the dtype's rounding.

    Several rows share what is read, or one row, of one beam and one head, is alone. Where 16-bit numbers on
    a GPU start from what FlashAttention gives of the prefix, float32 does from the same in plain PyTorch.
    """
    if is_started and dtype == torch.float32:

        def supports(q, longest, window, cap):
            return cap is None and (window is None or window >= longest)

        monkeypatch.setattr(decode_kernel.flash_attention, "supports", supports)
        monkeypatch.setattr(decode_kernel.flash_attention, "attend_prefix", plain_start)
    slots, steps, kv_heads, width, longest = 3, 6, 2, 16, 5
    state = SearchState.empty(slots, SearchRules(beams, steps), DEVICE)
    state.done_E.zero_()
    state.steps_E.copy_(torch.tensor([1, 4, 6], device=DEVICE))
    if beams == 2:
        state.ancestry_EKT.copy_(
            torch.tensor([[0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]], device=DEVICE).expand(slots, -1, -1)
        )
    for slot, step in enumerate((0, 3, 5)):
        state.ancestry_EKT[slot, :, step] = torch.arange(beams, device=DEVICE)
    shapes = {
        "prefix": (2, 1, kv_heads, prefix_length, width),
        "prompts": (2, 1, slots, kv_heads, longest, width),
        "fed": (2, 1, slots, kv_heads, steps, beams, width),
    }
    stores = {name: randn(*shape, dtype=dtype, seed=7) for name, shape in shapes.items()}
    cache = KVCache(**stores, own_E=torch.tensor([5, 0, 3], device=DEVICE))
    query = randn(slots * beams, heads, width, dtype=dtype, seed=8)
    key, value = (randn(slots * beams, kv_heads, width, dtype=dtype, seed=seed) for seed in (9, 10))
    found = decode_kernel.decode_attention(
        query,
        key,
        value,
        cache.prefix[:, 0],
        cache.prompts[:, 0],
        cache.fed[:, 0],
        cache.own_E,
        state.steps_E - 1,
        decode_kernel.seen_columns(state.ancestry_EKT, state.steps_E - 1),
        0.25,
        sliding_window,
        softcap,
    )
    plain = DecodePass(
        KVCache(**{name: one.cpu().float() for name, one in stores.items()}, own_E=cache.own_E.cpu()),
        SearchState(**{name: one.cpu() for name, one in vars(state).items()}),
        steps,
    )
    fed = (one.cpu().float() for one in (query, key, value))
    expected = plain.attend(0, *fed, 0.25, sliding_window, softcap)
    rounding = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found.cpu().float(), expected, **rounding)


def plainly_likeliest(logits, count, banned, banned_rows):
    log_probs = logits.double().log_softmax(-1)
    for token in banned:
        log_probs[banned_rows, token] = -torch.inf
    return torch.sort(log_probs, dim=-1, descending=True, stable=True)[0][:, :count], log_probs


@pytest.mark.parametrize("vocabulary", [7, 128, 4096, 9001])
@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("banned", [(), (2,), (5, 3)])
@pytest.mark.parametrize("kind", ["far apart", "mostly equal", "one finite", "sorted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest_tokens_are_those_of_a_sort(vocabulary, count, banned, kind, dtype):
    """Each once, with its own log-probability, of equal ones the first; banned ones where they are banned."""
    logits = 4 * randn(5, vocabulary, dtype=dtype, seed=3)
    if kind == "mostly equal":
        logits = logits.round().clamp(-1, 1)
    if kind == "one finite":
        logits[:, 1:] = -torch.inf
    if kind == "sorted":
        logits = torch.sort(logits, dim=-1, descending=True)[0].contiguous()
    logits[0, 0] = 30.0
    banned_rows = torch.tensor([True, False, True, True, False], device=DEVICE)
    given = logits.clone()
    found, tokens = choice_kernel.likeliest(given, count, banned, banned_rows if banned else None)
    expected, log_probs = plainly_likeliest(logits.cpu(), count, banned, banned_rows.cpu())
    assert torch.equal(given, logits), "the logits are left as they are"
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == count for row in tokens.tolist())
    own = log_probs.gather(1, tokens.cpu())
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    firsts = torch.sort(log_probs, dim=-1, descending=True, stable=True)[1][:, :count]
    assert torch.equal(tokens.cpu(), firsts)


def test_a_row_that_is_no_number_gives_tokens_of_the_vocabulary():
    """So a damaged model's search goes on to its end."""
    logits = torch.full((2, 300), torch.nan, device=DEVICE)
    logits[1] = torch.inf
    log_probs, tokens = choice_kernel.likeliest(logits, 4)
    assert log_probs.isnan().all()
    assert ((tokens >= 0) & (tokens < 300)).all()


def test_beams_advance_by_the_kernel_as_by_torch(monkeypatch):
    """With tokens that may not end an answer yet."""
    rules = SearchRules(3, 8, min_new_tokens=3, eos_tokens=(2, 9))
    found = []
    for by_kernel in (True, False):
        monkeypatch.setattr(choice_kernel, "supports", lambda logits, by_kernel=by_kernel: by_kernel)
        state = SearchState.empty(4, rules, DEVICE)
        logits = [randn(12, 200, dtype=torch.float32, seed=20 + step) for step in range(6)]
        for one in logits:
            one[:, 2] += 6.0
        state.start(torch.arange(4, device=DEVICE), logits[0][::3], rules)
        for one in logits[1:]:
            advance(state, one.view(4, 3, -1), rules)
        found.append(state)
    for name, expected in vars(found[1]).items():
        torch.testing.assert_close(vars(found[0])[name], expected, msg=name)
    assert found[0].best_lengths_EK.max() > 3
