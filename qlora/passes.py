"""Owns passes: from groups of examples, each with its adapter, to answer tokens' NLL and adapters' gradients.

A pass is one forward, and in training one backward, of the base over one stream, in which each group's tokens
go through the group's own adapter. On a GPU a pass may be replayed from a recording (qlora.recorded_passes);
its results are, up to rounding, those of a pass that launches each kernel.

Refuses to know schedules, metrics and trials.

Shapes: A scored positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora.answer_nll import answer_nll
from qlora.lora.bank import Adapter, AdapterBank
from qlora.lora.products import Dropout
from qlora.packed.packing import Group, lay_out, on_device
from qlora.packed.stream import Layout


@dataclass(frozen=True)
class Pass:
    """The work of one pass: a stream, and each part's adapter and dropout.

    weights: the weight of each part's answer tokens in the loss, in training; None if no gradients are
    wanted.
    """

    layout: Layout
    adapters: Sequence[Adapter | None]
    dropouts: Sequence[Dropout | None]
    weights: Sequence[float] | None

    def answer_weights(self) -> np.ndarray:
        """Return the weight of every scored position: [A] float32. Only for passes with weights."""
        return np.repeat(np.array(self.weights, np.float32), self.layout.num_answers)


def run_pass(
    bank: AdapterBank,
    groups: Sequence[Group],
    adapters: Sequence[Adapter | None],
    dropouts: Sequence[Dropout | None],
    weights: Sequence[float] | None = None,
    largest: int = 0,
) -> tuple[Layout, Tensor]:
    """Run one pass over groups, each under its adapter (None: the bare base).

    Returns the stream and the NLL of its answer tokens [A]. With weights, one for each group, the gradient of
    the weighted sum of NLLs is added to the adapters' gradients. `largest` is the number of tokens of the
    largest pass of the step that this one belongs to, if there are others.
    """
    work = Pass(layout=lay_out(groups, bank.device), adapters=adapters, dropouts=dropouts, weights=weights)
    if bank.in_kernels(adapters):
        if bank.recorder is None:
            from qlora.recorded_passes import Recorder  # not above, since that module imports this one

            bank.recorder = Recorder(bank)
        if not bank.recomputes:  # which was never recorded
            nll_A = bank.recorder.run(work, max(largest, work.layout.num_tokens))
            if nll_A is not None:
                return work.layout, nll_A
        bank.recorder.compile(work)
    return work.layout, launch(bank, work)


def launch(bank: AdapterBank, work: Pass) -> Tensor:
    """Run a pass kernel by kernel; return the NLL of its answer tokens [A]."""
    batch = on_device(work.layout, bank.device)
    with bank.routed(batch, work.adapters, work.dropouts):
        if work.weights is None:
            with torch.no_grad():
                return answer_nll(bank.model, batch)
        nll_A = answer_nll(bank.model, batch)
        loss = (nll_A * torch.from_numpy(work.answer_weights()).to(bank.device)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return nll_A.detach()
