"""The decode kernels compute what the plain ways do: on a GPU as they are, else in Triton's interpreter."""

import pytest
import torch
from on_device import DEVICE, DTYPES, randn

from inference import choice_kernel, decode_kernel
from inference.beam_search import SearchRules, SearchState, advance
from inference.cached_attention import DecodePass
from inference.kv_cache import KVCache


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
