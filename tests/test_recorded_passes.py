"""What a recorded pass reads is what the launched pass works on: buffers filled by NumPy, on a CPU."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import HAS_KERNELS, random_examples, tiny_model
from test_bank import TRIALS
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from qlora import recorded_passes
from qlora.answer_nll import answer_nll
from qlora.base import compiling
from qlora.config import BaseModelSettings
from qlora.lora import banked_linear
from qlora.lora.average import attach_update
from qlora.lora.bank import AdapterBank, make_dropout
from qlora.lora.banked_linear import Route
from qlora.lora.tables import make_bank_tables
from qlora.packed.packing import lay_out, whole_group
from qlora.pass_buffers import PassSize, block_bytes, buffer_fields, buffer_views, filled_block
from qlora.passes import Pass, launch
from qlora.recorded_passes import Recorder, recorded_batch, recorded_pass_tables
from tuning import shared_work
from tuning.shared_work import SharedWork

CPU = torch.device("cpu")


def dense_attention(
    module, query, key, value, mask, scaling=None, packed=None, **others
) -> tuple[Tensor, None]:
    """Attention over a whole stream, its mask read off the stretches alone, as FlashAttention reads them."""
    at, tokens = packed.stretches, query.shape[2]
    place = torch.arange(tokens)
    row, part = (
        torch.searchsorted(bounds, place, right=True) - 1 for bounds in (at.rows.long(), at.parts.long())
    )
    seen = (row[:, None] == row[None]) & (place[:, None] >= place[None])
    for number in range(len(at.parts) - 1):
        prefix = at.prefix_places_P[at.prefixes[number] : at.prefixes[number + 1]]
        looks = (part == number) & ~at.alone_T
        seen[:, prefix] |= looks[:, None]
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.fixture
def bank() -> AdapterBank:
    AttentionInterface.register("dense", dense_attention)
    AttentionMaskInterface.register("dense", lambda *_, **__: None)
    model = tiny_model("llama")
    model.set_attn_implementation("dense")
    return AdapterBank(model, "tiny")


def pass_over(bank: AdapterBank, numbers: tuple[int, ...], weights: tuple[float, ...] | None) -> Pass:
    """A pass over a group a trial, one of which shares no prefix; with weights also dropout."""
    groups = [whole_group(random_examples(4 + n, seed=n, shared=10 + 9 * n)) for n in numbers]
    groups[-1] = replace(groups[-1], prefix_length=0)
    adapters = [bank.attach(TRIALS[n]) for n in numbers]
    for number, adapter in enumerate(adapters):
        adapter.weights.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
        adapter.refresh()
    dropouts = [
        make_dropout(adapter, group, 3) if weights else None
        for adapter, group in zip(adapters, groups, strict=True)
    ]
    return Pass(lay_out(groups), adapters, dropouts, weights)


def buffers_of(size: PassSize, work: Pass) -> dict[str, Tensor]:
    return {name: torch.from_numpy(one) for name, one in buffer_views(size, filled_block(size, work)).items()}


def larger(bank: AdapterBank, work: Pass, **more: int) -> PassSize:
    """A size with more room than a pass needs."""
    own = PassSize.of(work, bank)
    return replace(own, **{name: getattr(own, name) + extra for name, extra in more.items()})


ROOMS = [
    {},
    {"tokens": 96, "answers": 40},
    {"tokens": 128, "rows": 32, "parts": 2, "prefix_tokens": 64, "longest_prefix": 64, "rank": 16},
    {"tokens": 64, "longest_row": 1024, "longest_part": 4096, "longest_prefix": 64, "longest": 2048},
]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("numbers", [(0,), (1, 2), (0, 1, 3)])
def test_the_base_scores_a_filled_buffer_as_it_scores_the_stream(bank, numbers, room):
    """Without adapters: ids, positions, who attends to whom, what is scored. The tail changes nothing."""
    work = pass_over(bank, numbers, None)
    size = larger(bank, work, **room)
    batch = recorded_batch(size, buffers_of(size, work))
    assert batch.num_tokens > work.layout.num_tokens
    with torch.no_grad():
        found = answer_nll(bank.model, batch)[: len(work.layout.targets_A)]
    bare = replace(work, adapters=[None] * len(numbers))
    torch.testing.assert_close(found, launch(bank, bare), rtol=1e-5, atol=1e-5)


@pytest.fixture
def memory_that_is_not_a_number():
    """Fills what is allocated, within, with NaN: what is not written before it is read is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("memory_that_is_not_a_number")
@pytest.mark.parametrize("enough", [1, 10_000], ids=["together", "dx apart"])
@pytest.mark.parametrize(("weights", "room"), [(None, ROOMS[0]), ((0.5, 0.25, 0.125), ROOMS[2])])
def test_a_filled_buffer_gives_the_launched_pass_with_its_adapters(bank, weights, room, enough, monkeypatch):
    """NLL and, in training, the gradients of every adapter, with the kernels in Triton's interpreter.

    Dropout is off, since kernels draw masks of their own; its keys are looked at below. `enough`: programs
    from which on x's gradient is computed with A's.
    """
    if not HAS_KERNELS:
        pytest.skip("pip install 'triton>=3.9'")
    from qlora.lora import kernels

    monkeypatch.setattr(banked_linear, "kernels", kernels)
    monkeypatch.setattr(kernels, "FULL_PROGRAMS", enough)
    work = pass_over(bank, (0, 1, 3), weights)
    work = replace(work, dropouts=[None] * 3)
    size = larger(bank, work, **room)
    buffers = buffers_of(size, work)
    unused = [None] * (size.parts + 1 - len(work.adapters))
    no_adapters = [[None] * (size.parts + 1)] * bank.num_layers
    tables = make_bank_tables(no_adapters, CPU, size.rank, size.odd_ranks)
    tables.copy_(bank.tables_of([*work.adapters, *unused]))
    anchor = torch.zeros((), requires_grad=bool(weights))
    route = Route(anchor, lambda layer: [], recorded_pass_tables(size, buffers), tables.layers)
    with bank.switch.on_route(route), torch.set_grad_enabled(bool(weights)):
        nll_A = answer_nll(bank.model, recorded_batch(size, buffers))
        if weights:
            (nll_A * buffers["weights"]).sum().backward()
    recorded = [adapter.gradients.clone() for adapter in work.adapters]
    for adapter in work.adapters:
        adapter.gradients.zero_()
    torch.testing.assert_close(
        nll_A[: len(work.layout.targets_A)].detach(), launch(bank, work), rtol=1e-4, atol=1e-4
    )
    for found, adapter in zip(recorded, work.adapters, strict=True):
        assert (found - adapter.gradients).norm() <= 1e-4 * max(1.0, adapter.gradients.norm())
        assert adapter.gradients.norm() > 0 or not weights


@pytest.mark.parametrize("room", ROOMS)
def test_tables_name_every_tokens_adapter_and_dropout(bank, room):
    work = pass_over(bank, (0, 1, 3), (1.0, 1.0, 1.0))
    size = larger(bank, work, **room)
    at = buffer_views(size, filled_block(size, work))
    owners = np.full(size.tokens, -1)
    for part, first, end in at["tiles"].reshape(-1, 3):
        owners[first : min(end, first + 64)] = part
    for number, part in enumerate(work.layout.parts):
        assert (owners[part.start : part.end] == number).all()
        assert tuple(at["bounds"][2 * number : 2 * number + 2]) == (part.start, part.end)
    assert (owners[work.layout.num_tokens :] == size.parts).all(), "the tail is nobody's"
    p = [TRIALS[n].lora_dropout for n in (0, 1, 3)]
    assert at["limits"][:3] == pytest.approx([one * 2**32 for one in p], abs=1)
    assert at["factors"][:3] == pytest.approx([1 / (1 - one) for one in p])
    keys = np.concatenate(
        [
            np.zeros(part.end - part.start) if dropout is None else dropout.token_keys()
            for part, dropout in zip(work.layout.parts, work.dropouts, strict=True)
        ]
    )
    assert (at["keys"][: work.layout.num_tokens] == keys).all()
    assert size.has_dropout


def test_a_block_holds_its_buffers_side_by_side(bank):
    size = PassSize.of(pass_over(bank, (0, 2), None), bank)
    fields = list(buffer_fields(size).values())
    for (_, _, end), (kind, start, _) in itertools.pairwise(fields):
        assert end <= start and start % np.dtype(kind).itemsize == 0
    assert fields[-1][2] <= block_bytes(size)


def test_like_passes_have_one_size(bank):
    """A recording is played for many passes: sizes are rounded, so that few come up."""
    sizes = set()
    for seed in range(12):
        group = whole_group(random_examples(8, seed=seed, shared=20))
        adapter = bank.attach(TRIALS[0])
        sizes.add(PassSize.of(Pass(lay_out([group]), [adapter], [None], None), bank))
    assert len(sizes) <= 4


def test_a_size_holds_what_fits_with_little_waste(bank):
    """It says no to whatever its kernels or its buffers are not made for."""
    work = pass_over(bank, (0, 1, 3), (1.0, 1.0, 1.0))
    own = PassSize.of(work, bank)
    assert own.holds(work, own)
    assert all(larger(bank, work, **room).holds(work, own) for room in ROOMS)
    wrong = [
        {"tokens": -128},
        {"tokens": 4 * own.tokens},
        {"answers": -1},
        {"answers": 2 * own.answers},
        {"prefix_tokens": 2 * own.longest_prefix, "longest_prefix": 0},
        {"rows": -32},
        {"parts": -1},
        {"longest_row": -1},
        {"longest_part": -1},
        {"prefix_tokens": own.tokens},
        {"rank": -1},
        {"num_layers": 1},
    ]
    assert not any(larger(bank, work, **room).holds(work, own) for room in wrong)
    assert not replace(own, has_dropout=False).holds(work, own)
    assert own.holds(work, replace(own, has_dropout=False))
    assert not replace(own, is_training=False).holds(work, own)


def test_a_size_for_even_ranks_holds_no_odd_ones(bank):
    """Its kernels load eight numbers at a time; those for odd ranks take both."""
    odd, even = (pass_over(bank, numbers, (1.0, 1.0)) for numbers in ((0, 1), (1, 1)))
    sizes = [PassSize.of(work, bank) for work in (odd, even)]
    assert [size.odd_ranks for size in sizes] == [True, False]
    assert replace(sizes[1], odd_ranks=True).holds(even, sizes[1])
    assert replace(sizes[0], odd_ranks=True).holds(odd, sizes[0])
    assert not replace(sizes[0], odd_ranks=False).holds(odd, sizes[0])


class OnASmallCard:
    """Stands for a recording on a GPU that has memory for recorded passes, or for a launched one."""

    held = 0
    too_large = 10_000

    def __init__(self, bank: AdapterBank, size: PassSize):
        self.size, self.is_held = size, False

    def fill(self, work: Pass) -> None:
        if self.size.tokens > self.too_large:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 82.00 MiB")

    def rehearse(self, stream) -> None:
        if OnASmallCard.held:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 82.00 MiB")

    def record(self, pool, stream) -> None:
        self.is_held = True
        OnASmallCard.held += 1

    def play(self, work: Pass) -> Tensor:
        return torch.zeros(len(work.layout.targets_A))

    def __del__(self) -> None:
        OnASmallCard.held -= self.is_held


@pytest.fixture
def recorder(bank, monkeypatch) -> Recorder:
    monkeypatch.setattr(recorded_passes, "_Recording", OnASmallCard)
    monkeypatch.setattr(OnASmallCard, "held", 0)
    for name in ("graph_pool_handle", "Stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    bank.recorder = Recorder(bank)
    return bank.recorder


def test_recordings_make_room_for_an_average(bank, recorder, tiny_base, monkeypatch):
    """Where there are none, there is no room."""

    def short_of_memory(bank, update):
        if OnASmallCard.held or "too large" in update:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.38 GiB")
        return attach_update(bank, update)

    monkeypatch.setattr(shared_work, "attach_update", short_of_memory)
    work = SharedWork(BaseModelSettings(name=str(tiny_base), quantization="none"), 1000)
    work.bank.recorder = recorder
    assert recorder.run(pass_over(bank, (1,), (1.0,)), 0) is not None
    update = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 64), torch.ones(64, 2))}
    assert set(work.attach(update).layers) == set(update)
    assert recorder.num_recordings == OnASmallCard.held == 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        work.attach({"too large": ()})


def test_recordings_make_room_for_one_with_new_kernels(bank, recorder, monkeypatch):
    """Rank 16 follows 8: its kernels are compiled by a pass that is launched. What never fits is refused."""
    low, high = (pass_over(bank, (number,), (1.0,)) for number in (1, 3))
    for work, count in ((low, 1), (high, 1), (low, 2), (high, 2)):
        assert recorder.run(work, 0) is not None
        assert recorder.num_recordings == OnASmallCard.held == count
    monkeypatch.setattr(OnASmallCard, "too_large", 0)
    large = pass_over(bank, (1, 3), (1.0, 1.0))
    assert recorder.run(large, 0) is None and OnASmallCard.held == 0
    assert recorder.run(low, 0) is None
    monkeypatch.setattr(OnASmallCard, "too_large", 10_000)
    assert recorder.run(large, 0) is None, "it is refused"


def test_a_long_tail_is_several_rows(bank):
    """No row is longer than the kernels' grid; without rows to spare the tail does not fit."""
    work = pass_over(bank, (0,), None)
    own = PassSize.of(work, bank)
    size = replace(own, tokens=own.tokens + 100, longest_row=64)
    lengths = np.diff(buffer_views(size, filled_block(size, work))["rows"])
    assert lengths.max() <= 64 and lengths.sum() == size.tokens
    rows = len(work.layout.parts[0].suffixes.lengths) + 1
    assert not replace(size, rows=rows + 1).holds(work, replace(own, longest_row=64, rows=rows))


def test_kernels_are_looked_for_until_all_were_in_files(monkeypatch):
    """Goes by files alone: kernels that the process has already tell nothing of others."""
    found = iter([(3, 0), (0, 0), (1, 2), (0, 4)])
    asked = []
    monkeypatch.setattr(compiling, "_are_known", [False])
    monkeypatch.setattr(compiling, "compile_together", lambda work: asked.append(work()) or next(found))
    for number in range(6):
        compiling.compile_unless_known(lambda number=number: number)
    assert asked == [0, 1, 2, 3]


def test_work_that_fails_without_its_kernels_is_done_with_them(monkeypatch):
    monkeypatch.setattr(compiling, "_are_known", [False])

    tried = []

    def fails(work):
        tried.append(work)
        raise IndexError("a place that a kernel would have written")

    monkeypatch.setattr(compiling, "compile_together", fails)
    for name in ("first", "second"):
        compiling.compile_unless_known(name)
    assert tried == ["first"], "what fails is not tried again"
