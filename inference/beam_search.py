"""Owns the search: scores and hypotheses of many examples at once, each at its own step, all on the device.

Beam search keeps the K best beginnings of an answer. A step extends each beam by every token, and the best of
all extensions are the candidates: those that end become finished hypotheses, the best of the others the new
beams. The rules are those of transformers (GenerationMixin._beam_search), but every example ends by its own
condition, as if it were generated alone. With one beam the search is greedy, or sampling.

Refuses to know models, caches and text.

Shapes: E slots (an example each), K beams, T new tokens at most, V vocabulary, C candidates of one example, c
candidates of one beam, X and Y any number of rows.
Source: https://huggingface.co/docs/transformers/generation_strategies
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from qlora.base.device import triton_module

_kernel = triton_module("inference.choice_kernel")
_NEVER = -1.0e9  # what transformers adds to scores that must lose


@dataclass(frozen=True)
class SearchRules:
    """The settings of a search.

    warpers: transformers' temperature, top-k and top-p, which are used with `do_sample` only.
    """

    num_beams: int
    max_new_tokens: int
    min_new_tokens: int = 0
    eos_tokens: tuple[int, ...] = ()
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    do_sample: bool = False
    warpers: tuple[Any, ...] = ()


@dataclass
class SearchState:
    """The state of E searches.

    next_EK: the tokens to feed. steps_E: the number of tokens chosen, the first of which follow from the
    prompt. tokens_EKT, scores_EK: the running beams. ancestry_EKT: the beam row that was fed the t-th token
    of a beam's history. best_tokens_EKT, best_scores_EK: finished hypotheses, best first, of best_lengths_EK
    tokens each. finished_EK: true where there is such a hypothesis. improvable_E: true if a running beam may
    still beat a finished one. done_E: true if the search has ended; then its state stays as it is.
    """

    next_EK: Tensor
    steps_E: Tensor
    tokens_EKT: Tensor
    scores_EK: Tensor
    ancestry_EKT: Tensor
    best_tokens_EKT: Tensor
    best_scores_EK: Tensor
    best_lengths_EK: Tensor
    finished_EK: Tensor
    improvable_E: Tensor
    done_E: Tensor

    @classmethod
    def empty(cls, num_slots: int, rules: SearchRules, device: torch.device) -> Self:
        """Make the state of slots without an example, which are all done."""
        e, k, t = num_slots, rules.num_beams, rules.max_new_tokens
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        return cls(
            next_EK=torch.zeros(e, k, **whole),
            steps_E=torch.zeros(e, **whole),
            tokens_EKT=torch.zeros(e, k, t, **whole),
            scores_EK=torch.zeros(e, k, device=device),
            ancestry_EKT=torch.arange(k, device=device)[None, :, None].repeat(e, 1, t),
            best_tokens_EKT=torch.zeros(e, k, t, **whole),
            best_scores_EK=torch.full((e, k), _NEVER, device=device),
            best_lengths_EK=torch.zeros(e, k, **whole),
            finished_EK=torch.zeros(e, k, dtype=torch.bool, device=device),
            improvable_E=torch.ones(e, dtype=torch.bool, device=device),
            done_E=torch.ones(e, dtype=torch.bool, device=device),
        )

    def start(
        self,
        slots: Tensor,
        logits_nV: Tensor,
        rules: SearchRules,
        generators: list[torch.Generator] | None = None,
    ) -> None:
        """Put new examples into `slots` [n], and choose their first tokens by their prompts' logits [n, V].

        `generators` has one for each of the slots, for sampling.
        """
        fresh = SearchState.empty(len(slots), rules, slots.device)
        fresh.scores_EK[:, 1:] = _NEVER  # all beams begin alike, so only the first may branch
        fresh.done_E.zero_()
        advance(fresh, logits_nV[:, None].repeat(1, rules.num_beams, 1), rules, generators)
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, slots, getattr(fresh, field.name))

    def keep(self, slots: Tensor) -> Self:
        """Return the state of some of the slots, in that order."""
        kept = {field.name: getattr(self, field.name).index_select(0, slots) for field in fields(self)}
        return type(self)(**kept)

    def restore(self, other: Self) -> None:
        """Copy another state of the same slots into this one, in place."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def update(self, **new: Tensor) -> None:
        """Write new values into all slots that are not done.

        It is done in place, since a recorded step finds tensors by their addresses.
        """
        for name, value in new.items():
            old = getattr(self, name)
            other_dimensions = [1] * (old.dim() - 1)
            is_done = self.done_E.view(-1, *other_dimensions)
            old.copy_(torch.where(is_done, old, value))


def advance(
    state: SearchState,
    logits_EKV: Tensor,
    rules: SearchRules,
    generators: list[torch.Generator] | None = None,
) -> None:
    """Choose the next tokens from the logits of `state.next_EK`, and bring the state up to date in place.

    `generators` has one for each slot, for sampling. The logits may be overwritten.
    """
    if rules.num_beams > 1:
        _advance_beams(state, logits_EKV, rules)
        return
    if rules.do_sample:
        logits_EKV = logits_EKV.float()
    _forbid_early_eos(logits_EKV, state, rules)
    _advance_single(state, logits_EKV[:, 0], rules, generators)


def _advance_beams(state: SearchState, logits_EKV: Tensor, rules: SearchRules) -> None:
    """Take a step of beam search, as transformers' GenerationMixin._beam_search does."""
    e, k, vocabulary = logits_EKV.shape
    t = rules.max_new_tokens
    device = logits_EKV.device
    ends_when_full = rules.early_stopping is True
    num_candidates = max(2, 1 + len(rules.eos_tokens)) * k

    # The best candidates of all beams are among the best of each.
    log_probs_EKc, ids_EKc = _likeliest(state, logits_EKV, rules, min(num_candidates, vocabulary))
    log_probs_EX = (log_probs_EKc + state.scores_EK[..., None]).flatten(1)
    log_probs_EC, choice_EC = log_probs_EX.topk(num_candidates)
    parents_EC = choice_EC // ids_EKc.shape[-1]
    chosen_EC = ids_EKc.flatten(1).gather(1, choice_EC)
    parents_tokens_ECT = _gather_rows(state.tokens_EKT, parents_EC)
    histories_ECT = parents_tokens_ECT.scatter(2, _places(state, num_candidates), chosen_EC[..., None])

    new_steps_E = state.steps_E + 1
    ends_EC = _is_eos(chosen_EC, rules) | (new_steps_E >= t)[:, None]

    # Running beams: the best candidates that don't end here.
    running_EC = log_probs_EC + ends_EC.float() * _NEVER
    scores_EK, order_EK = running_EC.topk(k)
    parents_EK = parents_EC.gather(1, order_EK)

    # Finished hypotheses: only the first K candidates may join, and only while that can improve something.
    length_E = (new_steps_E.double() ** rules.length_penalty).float()
    full_E = state.finished_EK.all(1) & ends_when_full
    joins_EC = ends_EC & (torch.arange(num_candidates, device=device) < k)
    closed_E = full_E.float() * _NEVER + (~state.improvable_E).float() * _NEVER
    finals_EC = log_probs_EC / length_E[:, None] + closed_E[:, None]
    finals_EC = finals_EC + (~joins_EC).float() * _NEVER
    best_scores_EK, best_EK = torch.cat([state.best_scores_EK, finals_EC], 1).topk(k)
    finished_EK = torch.cat([state.finished_EK, joins_EC], 1).gather(1, best_EK)
    best_tokens_EKT = _gather_rows(torch.cat([state.best_tokens_EKT, histories_ECT], 1), best_EK)
    lengths_EX = torch.cat([state.best_lengths_EK, new_steps_E[:, None].expand(e, num_candidates)], 1)

    # Can a running beam still beat the worst finished one?
    # With "never", the longest answer is assumed, which is the best case if length is rewarded.
    final_length_E = length_E
    if rules.early_stopping == "never" and rules.length_penalty > 0:
        final_length_E = torch.full_like(length_E, float(t) ** rules.length_penalty)
    best_possible_E1 = scores_EK[:, :1] / final_length_E[:, None]
    worst_EK = torch.where(finished_EK, best_scores_EK.min(1, keepdim=True).values, _NEVER)
    improvable_E = state.improvable_E & (best_possible_E1 > worst_EK).any(1)
    goes_on_E = improvable_E & ~(finished_EK.all(1) & ends_when_full) & ~ends_EC.all(1)

    state.update(
        next_EK=chosen_EC.gather(1, order_EK),
        steps_E=new_steps_E,
        scores_EK=scores_EK,
        tokens_EKT=_gather_rows(histories_ECT, order_EK),
        ancestry_EKT=_inherit(state, parents_EK),
        best_tokens_EKT=best_tokens_EKT,
        best_scores_EK=best_scores_EK,
        best_lengths_EK=lengths_EX.gather(1, best_EK),
        finished_EK=finished_EK,
        improvable_E=improvable_E,
    )
    state.done_E.logical_or_(~goes_on_E)


def _likeliest(
    state: SearchState, logits_EKV: Tensor, rules: SearchRules, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Return each beam's likeliest tokens: log-probabilities [E, K, c] in float32, and tokens [E, K, c]."""
    e, k, _ = logits_EKV.shape
    if _kernel is not None and _kernel.supports(logits_EKV.flatten(0, 1)):
        early_E = state.steps_E < rules.min_new_tokens if rules.min_new_tokens else None
        early_X = None if early_E is None else early_E.repeat_interleave(k, output_size=e * k)
        found = _kernel.likeliest(logits_EKV.flatten(0, 1), num_candidates, rules.eos_tokens, early_X)
        log_probs_EKc, ids_EKc = (one.view(e, k, -1) for one in found)
        return log_probs_EKc, ids_EKc
    normalisers_EK1 = logits_EKV.float().logsumexp(-1, keepdim=True)
    _forbid_early_eos(logits_EKV, state, rules)
    top_EKc, ids_EKc = logits_EKV.topk(num_candidates)
    return top_EKc.float() - normalisers_EK1, ids_EKc


def _advance_single(
    state: SearchState, logits_EV: Tensor, rules: SearchRules, generators: list[torch.Generator] | None
) -> None:
    """Take a step of greedy search, or of sampling.

    Sampling uses each slot's own generator, so that a draw does not depend on the other slots.
    """
    if rules.do_sample:
        for warper in rules.warpers:
            logits_EV = warper(None, logits_EV)
        assert generators is not None
        # Whatever a slot without an example holds, it must not spoil the draws of the others.
        probabilities_EV = torch.where(state.done_E[:, None], 0.0, logits_EV).softmax(-1)
        drawn = [
            torch.multinomial(row_V, 1, generator=own)
            for row_V, own in zip(probabilities_EV, generators, strict=True)
        ]
        chosen_E = torch.cat(drawn)
    else:
        chosen_E = logits_EV.argmax(-1)
    new_steps_E = state.steps_E + 1
    tokens_EKT = state.tokens_EKT.scatter(2, _places(state, 1), chosen_E[:, None, None])
    state.update(
        next_EK=chosen_E[:, None],
        steps_E=new_steps_E,
        tokens_EKT=tokens_EKT,
        best_tokens_EKT=tokens_EKT,
        best_lengths_EK=new_steps_E[:, None],
    )
    state.done_E.logical_or_(_is_eos(chosen_E, rules) | (state.steps_E >= rules.max_new_tokens))


def _forbid_early_eos(logits_EKV: Tensor, state: SearchState, rules: SearchRules) -> None:
    """Make EOS impossible, in place, in searches that have fewer than the least new tokens."""
    if rules.min_new_tokens:
        early_E1 = (state.steps_E < rules.min_new_tokens)[:, None]
        for eos in rules.eos_tokens:
            logits_EKV[:, :, eos].masked_fill_(early_E1, -torch.inf)


def _inherit(state: SearchState, parents_EK: Tensor) -> Tensor:
    """Return the new beams' ancestry: the parent's as far as it was fed, and then a beam's own row."""
    later = torch.arange(state.ancestry_EKT.shape[-1], device=parents_EK.device) >= state.steps_E[:, None]
    own_K1 = torch.arange(parents_EK.shape[1], device=parents_EK.device)[:, None]
    return torch.where(later[:, None], own_K1, _gather_rows(state.ancestry_EKT, parents_EK))


def _is_eos(tokens: Tensor, rules: SearchRules) -> Tensor:
    """Tell which tokens are EOS tokens."""
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    for eos in rules.eos_tokens:
        ends = ends | (tokens == eos)
    return ends


def _places(state: SearchState, rows: int) -> Tensor:
    """Return the place of each example's next token, [E, rows, 1]; it is within bounds for all examples."""
    last_place = state.tokens_EKT.shape[-1] - 1
    return state.steps_E.clamp(max=last_place)[:, None, None].expand(-1, rows, 1)


def _gather_rows(source: Tensor, rows_EX: Tensor) -> Tensor:
    """Gather rows of each example: source [E, Y, T] -> [E, X, T]."""
    return source.gather(1, rows_EX[..., None].expand(-1, -1, source.shape[-1]))
