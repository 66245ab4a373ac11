"""Expanded attention in Triton, forward and backward, for NVIDIA GPUs from Ampere on: FlashAttention-2 (2307.08691).

Depends on Triton alone; `attention/triton.py` launches these kernels. Arrays are contiguous: q and out
[B, T, H, .], k and v [B, S, H, .], log-sum-exp and delta float32 [B, H, T].

A program of `forward_kernel` and `d_q_kernel` owns a block of queries of one head and runs over key blocks; one of
`d_kv_kernel` owns a block of keys and runs over query blocks. There are no atomics, so results are deterministic.
`ranges` [B, own blocks, 4] int32 says which blocks to visit: [from, to), of which [full from, full to) need no mask.
Blocks outside are never loaded.

Row n of the batch sees key s from query t if `s < min(offsets[n] + t + 1, lengths[n])` and their segments are equal.
Keys from `lengths[n]` on are never read.

Triton tiles are powers of two: the width K is read as K1 and the rest, padded to K2 (0: no rest), V as V1.
Offsets within a tile fit 32 bits, offsets of tiles need 64: 1M tokens x 32 heads x 192 is more than 2^31.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, valid, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECKED: tl.constexpr):
    """Loads [rows, PADDED] from ptr: 0 for columns beyond WIDTH and, if CHECKED, for rows that are not valid."""
    column = tl.arange(0, PADDED)
    tile = ptr + (tl.arange(0, valid.shape[0])[:, None] * STRIDE + column[None, :])
    if CHECKED and WIDTH < PADDED:
        return tl.load(tile, mask=valid[:, None] & (column < WIDTH)[None, :], other=0)
    elif CHECKED:
        return tl.load(tile, mask=valid[:, None], other=0)
    elif WIDTH < PADDED:
        return tl.load(tile, mask=(column < WIDTH)[None, :], other=0)
    else:
        return tl.load(tile)


@triton.jit
def _store(ptr, x, valid, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    tile = ptr + (tl.arange(0, valid.shape[0])[:, None] * STRIDE + column[None, :])
    tl.store(tile, x.to(ptr.dtype.element_ty), mask=valid[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _range(ranges_ptr, b, block):
    """One row of `ranges`: from, full from, full to, to."""
    ptr = ranges_ptr + (b * tl.num_programs(0) + block) * 4
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def _forward_blocks(
    acc, m_i, l_i, q1, q2, bound, q_segment, k_ptr, v_ptr, kv_segments_ptr, length, scale_log2e, first, last,
    HEADS: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax over key blocks [first, last): the new accumulator, running max and row sum."""
    for block in range(first, last):
        s = block * KV_BLOCK + tl.arange(0, KV_BLOCK)
        row = tl.cast(block, tl.int64) * (KV_BLOCK * HEADS)
        k1 = _load(k_ptr + row * K, s < length, HEADS * K, K, K1, MASKED)
        scores = tl.dot(q1, tl.trans(k1))
        if K2 > 0:
            k2 = _load(k_ptr + row * K + K1, s < length, HEADS * K, K - K1, K2, MASKED)
            scores = tl.dot(q2, tl.trans(k2), scores)
        if MASKED:
            visible = s[None, :] < bound[:, None]
            if SEGMENTS:
                kv_segment = tl.load(kv_segments_ptr + s, mask=s < length, other=0)
                visible = visible & (q_segment[:, None] == kv_segment[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        new_m_i = tl.maximum(m_i, tl.max(scores, 1) * scale_log2e)
        finite = new_m_i
        if MASKED:
            finite = tl.where(new_m_i == float("-inf"), 0.0, new_m_i)
        p = tl.exp2(scores * scale_log2e - finite[:, None])
        alpha = tl.exp2(m_i - finite)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _load(v_ptr + row * V, s < length, HEADS * V, V, V1, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc)
        m_i = new_m_i
    return acc, m_i, l_i


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, offsets_ptr, lengths_ptr, ranges_ptr, q_segments_ptr, kv_segments_ptr,
    scale_log2e, queries, keys, out_ptr, lse_ptr,
    HEADS: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr,
    SEGMENTS: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, b * HEADS + h): a block of queries; the last block first, because it sees most keys."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = tl.program_id(1) % HEADS
    t = block * Q_BLOCK + tl.arange(0, Q_BLOCK)
    in_range = t < queries
    q_row = (b * queries + block * Q_BLOCK) * HEADS + h
    kv_row = b * keys * HEADS + h
    k_ptr += kv_row * K
    v_ptr += kv_row * V
    kv_segments_ptr += b * keys
    length = tl.load(lengths_ptr + b)
    bound = tl.minimum(tl.load(offsets_ptr + b) + t + 1, length)
    ends = _range(ranges_ptr, b, block)

    q1 = _load(q_ptr + q_row * K, in_range, HEADS * K, K, K1, True)
    q2 = q1
    if K2 > 0:
        q2 = _load(q_ptr + q_row * K + K1, in_range, HEADS * K, K - K1, K2, True)
    q_segment = t
    if SEGMENTS:
        q_segment = tl.load(q_segments_ptr + b * queries + t, mask=in_range, other=0)
    acc = tl.zeros([Q_BLOCK, V1], tl.float32)
    m_i = tl.full([Q_BLOCK], float("-inf"), tl.float32)
    l_i = tl.zeros([Q_BLOCK], tl.float32)
    for part in tl.static_range(0 if SEGMENTS else 1, 3):
        acc, m_i, l_i = _forward_blocks(
            acc, m_i, l_i, q1, q2, bound, q_segment, k_ptr, v_ptr, kv_segments_ptr, length, scale_log2e,
            ends[part], ends[part + 1], HEADS, K, K1, K2, V, V1, SEGMENTS, part != 1, KV_BLOCK,
        )  # fmt: skip

    seen = l_i > 0
    acc = acc / tl.where(seen, l_i, 1.0)[:, None]
    _store(out_ptr + q_row * V, acc, in_range, HEADS * V, V, V1)
    LN2: tl.constexpr = 0.6931471805599453
    lse = tl.where(seen, (m_i + tl.log2(l_i)) * LN2, float("-inf"))
    tl.store(lse_ptr + (b * HEADS + h) * queries + t, lse, mask=in_range)


@triton.jit
def _d_q_blocks(
    d_q1, d_q2, q1, q2, d_out, lse, delta, bound, q_segment, k_ptr, v_ptr, kv_segments_ptr, length, scale_log2e,
    first, last,
    HEADS: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Loop of `d_q_kernel` over key blocks [first, last): dq plus their contributions, not scaled yet."""
    for block in range(first, last):
        s = block * KV_BLOCK + tl.arange(0, KV_BLOCK)
        row = tl.cast(block, tl.int64) * (KV_BLOCK * HEADS)
        k1 = _load(k_ptr + row * K, s < length, HEADS * K, K, K1, MASKED)
        scores = tl.dot(q1, tl.trans(k1))
        if K2 > 0:
            k2 = _load(k_ptr + row * K + K1, s < length, HEADS * K, K - K1, K2, MASKED)
            scores = tl.dot(q2, tl.trans(k2), scores)
        p = tl.exp2(scores * scale_log2e - lse[:, None])
        if MASKED:
            visible = s[None, :] < bound[:, None]
            if SEGMENTS:
                kv_segment = tl.load(kv_segments_ptr + s, mask=s < length, other=0)
                visible = visible & (q_segment[:, None] == kv_segment[None, :])
            p = tl.where(visible, p, 0.0)
        v = _load(v_ptr + row * V, s < length, HEADS * V, V, V1, MASKED)
        d_p = tl.dot(d_out, tl.trans(v))
        d_scores = (p * (d_p - delta[:, None])).to(k1.dtype)
        d_q1 = tl.dot(d_scores, k1, d_q1)
        if K2 > 0:
            d_q2 = tl.dot(d_scores, k2, d_q2)
    return d_q1, d_q2


@triton.jit
def d_q_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, offsets_ptr, lengths_ptr, ranges_ptr, q_segments_ptr,
    kv_segments_ptr, scale, scale_log2e, queries, keys, d_q_ptr,
    HEADS: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr,
    SEGMENTS: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, b * HEADS + h): dq of a block of queries. lse is in base 2, +inf for queries that see nothing."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = tl.program_id(1) % HEADS
    t = block * Q_BLOCK + tl.arange(0, Q_BLOCK)
    in_range = t < queries
    q_row = (b * queries + block * Q_BLOCK) * HEADS + h
    kv_row = b * keys * HEADS + h
    k_ptr += kv_row * K
    v_ptr += kv_row * V
    kv_segments_ptr += b * keys
    length = tl.load(lengths_ptr + b)
    bound = tl.minimum(tl.load(offsets_ptr + b) + t + 1, length)
    ends = _range(ranges_ptr, b, block)

    q1 = _load(q_ptr + q_row * K, in_range, HEADS * K, K, K1, True)
    q2 = q1
    d_q1 = tl.zeros([Q_BLOCK, K1], tl.float32)
    d_q2 = 0.0
    if K2 > 0:
        q2 = _load(q_ptr + q_row * K + K1, in_range, HEADS * K, K - K1, K2, True)
        d_q2 = tl.zeros([Q_BLOCK, K2], tl.float32)
    d_out = _load(d_out_ptr + q_row * V, in_range, HEADS * V, V, V1, True)
    lse = tl.load(lse_ptr + (b * HEADS + h) * queries + t, mask=in_range, other=float("inf"))
    delta = tl.load(delta_ptr + (b * HEADS + h) * queries + t, mask=in_range, other=0)
    q_segment = t
    if SEGMENTS:
        q_segment = tl.load(q_segments_ptr + b * queries + t, mask=in_range, other=0)
    for part in tl.static_range(0 if SEGMENTS else 1, 3):
        d_q1, d_q2 = _d_q_blocks(
            d_q1, d_q2, q1, q2, d_out, lse, delta, bound, q_segment, k_ptr, v_ptr, kv_segments_ptr, length,
            scale_log2e, ends[part], ends[part + 1], HEADS, K, K1, K2, V, V1, SEGMENTS, part != 1, KV_BLOCK,
        )  # fmt: skip
    _store(d_q_ptr + q_row * K, d_q1 * scale, in_range, HEADS * K, K, K1)
    if K2 > 0:
        _store(d_q_ptr + q_row * K + K1, d_q2 * scale, in_range, HEADS * K, K - K1, K2)


@triton.jit
def _d_kv_blocks(
    d_k1, d_k2, d_v, k1, k2, v, s, length, kv_segment, q_ptr, d_out_ptr, lse_ptr, delta_ptr, q_segments_ptr, offset,
    queries, scale_log2e, first, last,
    HEADS: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, Q_BLOCK: tl.constexpr,
):  # fmt: skip
    """Loop of `d_kv_kernel` over query blocks. Scores are transposed, [keys, queries], as dk and dv need them."""
    for block in range(first, last):
        t = block * Q_BLOCK + tl.arange(0, Q_BLOCK)
        row = tl.cast(block, tl.int64) * (Q_BLOCK * HEADS)
        q1 = _load(q_ptr + row * K, t < queries, HEADS * K, K, K1, MASKED)
        scores = tl.dot(k1, tl.trans(q1))
        if K2 > 0:
            q2 = _load(q_ptr + row * K + K1, t < queries, HEADS * K, K - K1, K2, MASKED)
            scores = tl.dot(k2, tl.trans(q2), scores)
        if MASKED:
            lse = tl.load(lse_ptr + t, mask=t < queries, other=float("inf"))
            delta = tl.load(delta_ptr + t, mask=t < queries, other=0)
        else:
            lse = tl.load(lse_ptr + t)
            delta = tl.load(delta_ptr + t)
        p = tl.exp2(scores * scale_log2e - lse[None, :])
        if MASKED:
            visible = s[:, None] < tl.minimum(offset + t + 1, length)[None, :]
            if SEGMENTS:
                q_segment = tl.load(q_segments_ptr + t, mask=t < queries, other=0)
                visible = visible & (kv_segment[:, None] == q_segment[None, :])
            p = tl.where(visible, p, 0.0)
        d_out = _load(d_out_ptr + row * V, t < queries, HEADS * V, V, V1, MASKED)
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v)
        d_p = tl.dot(v, tl.trans(d_out))
        d_scores = (p * (d_p - delta[None, :])).to(q1.dtype)
        d_k1 = tl.dot(d_scores, q1, d_k1)
        if K2 > 0:
            d_k2 = tl.dot(d_scores, q2, d_k2)
    return d_k1, d_k2, d_v


@triton.jit
def d_kv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, offsets_ptr, lengths_ptr, ranges_ptr, q_segments_ptr,
    kv_segments_ptr, scale, scale_log2e, queries, keys, d_k_ptr, d_v_ptr,
    HEADS: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr,
    SEGMENTS: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (j, b * HEADS + h): dk, dv of a block of keys. lse is in base 2, +inf for queries that see nothing."""
    block = tl.program_id(0)
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = tl.program_id(1) % HEADS
    s = block * KV_BLOCK + tl.arange(0, KV_BLOCK)
    kv_row = (b * keys + block * KV_BLOCK) * HEADS + h
    q_row = b * queries * HEADS + h
    q_ptr += q_row * K
    d_out_ptr += q_row * V
    lse_ptr += (b * HEADS + h) * queries
    delta_ptr += (b * HEADS + h) * queries
    q_segments_ptr += b * queries
    length = tl.load(lengths_ptr + b)
    offset = tl.load(offsets_ptr + b)
    valid = s < length
    ends = _range(ranges_ptr, b, block)

    k1 = _load(k_ptr + kv_row * K, valid, HEADS * K, K, K1, True)
    k2 = k1
    d_k1 = tl.zeros([KV_BLOCK, K1], tl.float32)
    d_k2 = 0.0
    if K2 > 0:
        k2 = _load(k_ptr + kv_row * K + K1, valid, HEADS * K, K - K1, K2, True)
        d_k2 = tl.zeros([KV_BLOCK, K2], tl.float32)
    v = _load(v_ptr + kv_row * V, valid, HEADS * V, V, V1, True)
    d_v = tl.zeros([KV_BLOCK, V1], tl.float32)
    kv_segment = s
    if SEGMENTS:
        kv_segment = tl.load(kv_segments_ptr + b * keys + s, mask=valid, other=0)
    for part in tl.static_range(3):
        d_k1, d_k2, d_v = _d_kv_blocks(
            d_k1, d_k2, d_v, k1, k2, v, s, length, kv_segment, q_ptr, d_out_ptr, lse_ptr, delta_ptr, q_segments_ptr,
            offset, queries, scale_log2e, ends[part], ends[part + 1], HEADS, K, K1, K2, V, V1, SEGMENTS, part != 1,
            Q_BLOCK,
        )  # fmt: skip
    in_range = s < keys
    _store(d_k_ptr + kv_row * K, d_k1 * scale, in_range, HEADS * K, K, K1)
    if K2 > 0:
        _store(d_k_ptr + kv_row * K + K1, d_k2 * scale, in_range, HEADS * K, K - K1, K2)
    _store(d_v_ptr + kv_row * V, d_v, in_range, HEADS * V, V, V1)
