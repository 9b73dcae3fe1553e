"""Owns what a program of the decode step's attention does, in Triton: one example, one key-value head.

Its columns are three stretches: the prefix, the example's own prompt tokens, and of what its beams were fed
the columns that any of them sees. They are joined by the online softmax of FlashAttention.

Refuses to know how programs are launched (inference.decode_kernel).

Shapes: as in inference.cached_attention; M = K * G query rows,
rounded up to a power of two, at least 16; C columns that are read at once.
Source: FlashAttention, https://arxiv.org/abs/2205.14135
"""

import triton
import triton.language as tl


@triton.jit
def list_seen(  # type: ignore[no-untyped-def]
    ancestry_ptr, steps_ptr, columns_ptr, beams_ptr, counts_ptr, max_steps, K: tl.constexpr, W: tl.constexpr
):
    """List an example's fed columns that any beam sees, with the beams that do as bits; W columns at once."""
    example = tl.program_id(0)
    last = tl.minimum(tl.load(steps_ptr + example).to(tl.int32), max_steps - 1)
    count = 0
    for start in range(0, (last + 1) * K, W):
        column = start + tl.arange(0, W)
        step, row = column // K, column % K
        beams = tl.zeros((W,), tl.int32)
        for beam in tl.static_range(K):
            ancestry = ancestry_ptr + (example * K + beam) * max_steps
            owner = tl.load(ancestry + step, mask=step <= last, other=-1).to(tl.int32)
            beams |= (owner == row).to(tl.int32) << beam
        is_seen = beams != 0
        place = example * max_steps * K + count + tl.cumsum(is_seen.to(tl.int32), 0) - 1
        tl.store(columns_ptr + place, column, mask=is_seen)
        tl.store(beams_ptr + place, beams, mask=is_seen)
        count += tl.sum(is_seen.to(tl.int32), 0)
    tl.store(counts_ptr + example, count)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    keys_ptr,
    values_ptr,
    row_live,
    row_beam,
    columns_ptr,
    beams_ptr,
    num_columns,
    place,
    query_place,
    most,
    total,
    acc,
    scale,
    softcap,
    IS_LISTED: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add columns to the running softmax (most, total, acc); `place` is the first column's position."""
    channel = tl.arange(0, D)
    for start in range(0, num_columns, C):
        column = start + tl.arange(0, C)
        live = column < num_columns
        if IS_LISTED:
            beams = tl.load(beams_ptr + column, mask=live, other=0)
            column = tl.load(columns_ptr + column, mask=live, other=0)
            seen = ((beams[None, :] >> row_beam[:, None]) & 1) != 0
        else:
            seen = row_live[:, None] & live[None, :]
        if WINDOW > 0:
            seen = seen & ((query_place - (place + (column // K if IS_LISTED else column))) < WINDOW)[None, :]
        keys = tl.load(keys_ptr + column[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(most - safe)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(values_ptr + column[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        most = higher
    return most, total, acc


@triton.jit
def _attend_alone(  # type: ignore[no-untyped-def]
    q,
    keys_ptr,
    values_ptr,
    num_columns,
    place,
    query_place,
    most,
    total,
    acc,
    scale,
    softcap,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    C: tl.constexpr,
):
    """Do what `_attend` does for one row, q [1, 1, D] in float32, without tensor cores, which take sixteen.

    Every C-th column goes to a softmax of its own: most and total [1, C], acc [1, C, D]. The first axis has
    the compiler bring columns into another layout, for which it waits for all of them at once; without it,
    loads move down to where they are used, and each is waited for.
    """
    channel = tl.arange(0, D)
    for start in range(0, num_columns, C):
        column = start + tl.arange(0, C)
        live = column < num_columns
        at = column[:, None] * D + channel[None, :]
        keys = tl.load(keys_ptr + at, mask=live[:, None], other=0.0)
        values = tl.load(values_ptr + at, mask=live[:, None], other=0.0)
        scores = tl.sum(q * keys[None, :, :].to(tl.float32), 2) * scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        if WINDOW > 0:
            live = live & ((query_place - (place + column)) < WINDOW)
        scores = tl.where(live[None, :], scores, float("-inf"))
        higher = tl.maximum(most, scores)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe)
        shrink = tl.exp(most - safe)
        total = total * shrink + weights
        acc = acc * shrink[:, :, None] + weights[:, :, None] * values[None, :, :].to(tl.float32)
        most = higher
    return most, total, acc


@triton.jit
def decode(  # type: ignore[no-untyped-def]
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    prefix_ptr,
    prompts_ptr,
    fed_ptr,
    own_ptr,
    steps_ptr,
    columns_ptr,
    beams_ptr,
    counts_ptr,
    out_ptr,
    lse_ptr,
    scale,
    softcap,
    num_prefix,
    max_own,
    max_steps,
    prefix_kv,
    prompts_kv,
    fed_kv,
    J: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    KP: tl.constexpr,
    STARTED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write an example's new keys and values of one head, and attend from its beams to all that they see."""
    example = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    own = tl.load(own_ptr + example).to(tl.int32)
    step = tl.minimum(tl.load(steps_ptr + example).to(tl.int32), max_steps - 1)
    channel = tl.arange(0, D)

    # Every beam's new key and value, into the row of this step.
    beam = tl.arange(0, KP)
    fed_base = (example * J + head) * max_steps * K * D
    source = ((example * K + beam) * J + head)[:, None] * D + channel[None, :]
    target = fed_base + (step * K + beam)[:, None] * D + channel[None, :]
    tl.store(
        fed_ptr + target,
        tl.load(k_new_ptr + source, mask=(beam < K)[:, None], other=0.0),
        mask=(beam < K)[:, None],
    )
    tl.store(
        fed_ptr + fed_kv + target,
        tl.load(v_new_ptr + source, mask=(beam < K)[:, None], other=0.0),
        mask=(beam < K)[:, None],
    )
    tl.debug_barrier()

    query_place = num_prefix + own + step
    prefix_base = head * num_prefix * D
    prompt_base = (example * J + head) * max_own * D
    if K * G == 1:
        out_at = (example * J + head) * D + channel[None, :]
        q = tl.load(q_ptr + out_at).to(tl.float32)[:, None, :]
        most = tl.full((1, C), float("-inf"), tl.float32)
        total = tl.zeros((1, C), tl.float32)
        acc = tl.zeros((1, C, D), tl.float32)
        if STARTED:  # out holds what the prefix gives, whose weights' sum is exp(lse)
            first = tl.arange(0, C)[None, :] == 0
            most = tl.where(first, tl.load(lse_ptr + head * tl.num_programs(0) + example), most)
            total = tl.where(first, 1.0, total)
            acc = tl.where(first[:, :, None], tl.load(out_ptr + out_at).to(tl.float32)[:, None, :], acc)
        for stretch in tl.static_range(3):
            if stretch == 0:
                base, between, count, place = prefix_ptr + prefix_base, prefix_kv, num_prefix, 0
            elif stretch == 1:
                base, between, count, place = prompts_ptr + prompt_base, prompts_kv, own, num_prefix
            else:
                base, between, count, place = fed_ptr + fed_base, fed_kv, step + 1, num_prefix + own
            if not (STARTED and stretch == 0):
                most, total, acc = _attend_alone(
                    q,
                    base,
                    base + between,
                    count,
                    place,
                    query_place,
                    most,
                    total,
                    acc,
                    scale,
                    softcap,
                    D,
                    WINDOW,
                    CAPPED,
                    C,
                )
        share = tl.exp(most - tl.max(most, 1)[:, None])
        sums = tl.sum(acc * share[:, :, None], 1) / tl.maximum(tl.sum(total * share, 1), 1e-38)[:, None]
        tl.store(out_ptr + out_at, sums.to(q_ptr.dtype.element_ty))
    else:
        row = tl.arange(0, M)
        row_live, row_beam = row < K * G, row // G
        out_at = ((example * K + row_beam) * J * G + head * G + row % G)[:, None] * D + channel[None, :]
        q = tl.load(q_ptr + out_at, mask=row_live[:, None], other=0.0)
        most = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, D), tl.float32)
        if STARTED:
            lse_at = (head * G + row % G) * tl.num_programs(0) * K + example * K + row_beam
            most = tl.load(lse_ptr + lse_at, mask=row_live, other=0.0)
            total = tl.full((M,), 1.0, tl.float32)
            acc = tl.load(out_ptr + out_at, mask=row_live[:, None], other=0.0).to(tl.float32)
        for stretch in tl.static_range(3):
            if stretch == 0:
                base, between, count, place = prefix_ptr + prefix_base, prefix_kv, num_prefix, 0
            elif stretch == 1:
                base, between, count, place = prompts_ptr + prompt_base, prompts_kv, own, num_prefix
            else:
                base, between, count, place = fed_ptr + fed_base, fed_kv, step + 1, num_prefix + own
                if K > 1:
                    count = tl.load(counts_ptr + example)
            if not (STARTED and stretch == 0):
                most, total, acc = _attend(
                    q,
                    base,
                    base + between,
                    row_live,
                    row_beam,
                    columns_ptr + example * max_steps * K,
                    beams_ptr + example * max_steps * K,
                    count,
                    place,
                    query_place,
                    most,
                    total,
                    acc,
                    scale,
                    softcap,
                    stretch == 2 and K > 1,
                    K,
                    D,
                    WINDOW,
                    CAPPED,
                    C,
                    PRECISION,
                )
        sums = acc / tl.maximum(total, 1e-38)[:, None]
        tl.store(out_ptr + out_at, sums.to(q.dtype), mask=row_live[:, None])
