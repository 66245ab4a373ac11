"""Absorbed MLA decode in Triton, for NVIDIA GPUs from Turing on: split-KV (FlashDecoding) over a ragged batch.

Depends on Triton alone. `decode/triton.py` launches the kernels from JAX and `decode/triton_torch.py` from PyTorch,
with the tiling of `triton_heuristic.py`.

All heads read the same latents, so query tokens and heads are one axis of rows (row t * H + h), the M axis of all dots.
The KV tiles of all sequences are one list, of which every program gets an equal run, as `tile_scheduler.py` explains: a
program may start in one sequence and end in another, and the result of program p for sequence b has the split index
p + b in the workspace. `combine_kernel` merges the splits of each sequence. Both derive the schedule from the lengths.

Capitals like C_P are strides, in elements: of the latents, from page to page.
"""

# pyright: reportGeneralTypeIssues=false
# It takes the functions of triton.language, which run inside kernels only, for ones that never return.

import triton
import triton.language as tl

from latent_attention.decode.triton_schedule import find_sequence, kv_len_of, tiles_of, tiles_per_program


@triton.jit
def _page(table_ptr, seq, token, kv_len, TABLE_B: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr):
    """Page that holds a token of a sequence; 0 beyond kv_len, where entries of the block table may be garbage."""
    if PAGED:
        page = tl.load(table_ptr + tl.cast(seq, tl.int64) * TABLE_B + token // PAGE, mask=token < kv_len, other=0)
    else:
        page = seq
    return tl.cast(page, tl.int64)


@triton.jit
def _load(ptr, at, valid, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Loads [rows, PADDED] at these offsets of rows: 0 for rows that are not valid and for columns beyond WIDTH."""
    column = tl.arange(0, PADDED)[None, :]
    if WIDTH == PADDED:
        return tl.load(ptr + at[:, None] + column, mask=valid[:, None], other=0)
    else:
        return tl.load(ptr + at[:, None] + column, mask=valid[:, None] & (column < WIDTH), other=0)


@triton.jit
def _opaque(x):
    """Identity that the compiler cannot look through, for 16-bit types: both dots read its result from shared memory.

    Without it, Triton converts int8 twice, in the layout of each dot, and cannot load it asynchronously.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def _load_queries(
    q_ptr, seq, row, query, in_range, Q_B: tl.constexpr, Q_T: tl.constexpr, Q_H: tl.constexpr, C: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Queries of the program's rows: content [ROWS, C1] and [ROWS, C2] (q1 again if C2 is 0), rotary [ROWS, R]."""
    q_at = tl.cast(seq, tl.int64) * Q_B + query * Q_T + (row % HEADS) * Q_H
    q1 = _load(q_ptr, q_at, in_range, C1, C1)
    q2 = q1
    if C2 > 0:
        q2 = _load(q_ptr + C1, q_at, in_range, C - C1, C2)
    return q1, q2, _load(q_ptr + C, q_at, in_range, R, R)


@triton.jit
def _scores(
    q1, q2, q_rope, c_ptr, rope_ptr, scales_ptr, c_at, rope_at, scales_at, valid, SCALES_2: tl.constexpr,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, R: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Loads a tile of the cache, the valid tokens at these offsets, and multiplies it with the queries.

    Returns:
        S = q_c c^T + q_r k_rope^T [ROWS, TILE]; the latents c1 [TILE, C1] and c2 [TILE, C2] (c1 again if C2 is 0),
        which are the values too; and the scales of the latents [TILE] (0 if not INT8).
    """
    dtype = q1.dtype
    c1 = _load(c_ptr, c_at, valid, C1, C1).to(dtype)
    if INT8:
        c1 = _opaque(c1)
    scores = tl.dot(q1, tl.trans(c1), input_precision="ieee")
    c2 = c1
    if C2 > 0:
        c2 = _load(c_ptr + C1, c_at, valid, C - C1, C2).to(dtype)
        if INT8:
            c2 = _opaque(c2)
        scores = tl.dot(q2, tl.trans(c2), scores, input_precision="ieee")
    rope = _load(rope_ptr, rope_at, valid, R, R).to(dtype)
    c_scale = 0.0
    if INT8:
        # int8 is exact in 16 bits: dots take it unscaled, and the scales multiply scores and probabilities.
        c_scale = tl.load(scales_ptr + scales_at, mask=valid, other=0)
        rope_scale = tl.load(scales_ptr + SCALES_2 + scales_at, mask=valid, other=0)
        scores *= c_scale[None, :]
        scores += tl.dot(q_rope, tl.trans(rope), input_precision="ieee") * rope_scale[None, :]
    else:
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee")
    return scores, c1, c2, c_scale


@triton.jit
def _online_softmax(scores, m_i):
    """One step of the online softmax in base 2: probabilities P, the rescale factor alpha, the new running max m_i."""
    new_m_i = tl.maximum(m_i, tl.max(scores, 1))
    finite = tl.where(new_m_i == float("-inf"), 0.0, new_m_i)
    p = tl.exp2(scores - finite[:, None])
    return p, tl.exp2(m_i - finite)[:, None], new_m_i


@triton.jit
def _store_partial(
    partial_ptr, partial_lse_ptr, program, seq, row, in_range, acc1, acc2, m_i, p_sum, QUERIES: tl.constexpr,
    HEADS: tl.constexpr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Epilogue: writes the normalized output of the rows and its log-sum-exp, base 2, at split index program + seq."""
    l_i = tl.sum(p_sum, 1)
    normalizer = 1 / tl.where(l_i == 0, 1.0, l_i)
    if INT8:
        normalizer *= 1 / 64
    out_row = (program + seq).to(tl.int64) * (QUERIES * HEADS) + row
    column1 = tl.arange(0, C1)[None, :]
    tl.store(partial_ptr + out_row[:, None] * C + column1, acc1 * normalizer[:, None], mask=in_range[:, None])
    if C2 > 0:
        column2 = C1 + tl.arange(0, C2)[None, :]
        mask2 = in_range[:, None] & (column2 < C)
        tl.store(partial_ptr + out_row[:, None] * C + column2, acc2 * normalizer[:, None], mask=mask2)
    lse = tl.where(l_i == 0, float("-inf"), m_i + tl.log2(l_i))
    tl.store(partial_lse_ptr + out_row, lse, mask=in_range)


@triton.jit
def _attend(
    q1, q2, q_rope, c_ptr, rope_ptr, scales_ptr, table_ptr, scale_log2e, seq, length, kv_len, query, lane,
    first, last,
    C_P: tl.constexpr, C_S: tl.constexpr, ROPE_P: tl.constexpr, ROPE_S: tl.constexpr, SCALES_P: tl.constexpr,
    SCALES_2: tl.constexpr, SCALES_S: tl.constexpr, TABLE_B: tl.constexpr, C: tl.constexpr, C1: tl.constexpr,
    C2: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr,
    INT8: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Main loop over the tiles [first, last) of a sequence.

    Returns:
        The accumulators [ROWS, C1] and [ROWS, C2] (0 if C2 is 0), the running max m_i [ROWS], and sums of P by column
        of the tile [ROWS, TILE], of which the epilogue makes l_i: one reduction less a tile.
    """
    acc2 = 0.0
    if C2 > 0:
        acc2 = tl.zeros([ROWS, C2], tl.float32)
    acc1 = tl.zeros([ROWS, C1], tl.float32)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    p_sum = tl.zeros([ROWS, TILE], tl.float32)
    visible = tl.minimum(length - QUERIES + query + 1, kv_len)  # tokens that each row sees
    offset = 0 if ONE_PAGE else lane
    page = _page(table_ptr, seq, first * TILE + offset, kv_len, TABLE_B, PAGE, PAGED)
    for tile in range(first, last):
        token = tile * TILE + lane
        valid = token < kv_len
        page_offset = tile * TILE % PAGE + lane if ONE_PAGE else token % PAGE
        c_at = page * C_P + page_offset.to(tl.int64) * C_S
        rope_at = page * ROPE_P + page_offset.to(tl.int64) * ROPE_S
        scales_at = page * SCALES_P + page_offset.to(tl.int64) * SCALES_S
        # The next page number is loaded a tile ahead, so that loads of the cache never wait for it.
        page = _page(table_ptr, seq, (tile + 1) * TILE + offset, kv_len, TABLE_B, PAGE, PAGED)
        scores, c1, c2, c_scale = _scores(
            q1, q2, q_rope, c_ptr, rope_ptr, scales_ptr, c_at, rope_at, scales_at, valid, SCALES_2, C, C1, C2, R, INT8
        )  # fmt: skip
        scores = tl.where(token[None, :] < visible[:, None], scores * scale_log2e, float("-inf"))
        p, alpha, m_i = _online_softmax(scores, m_i)
        p_sum = p_sum * alpha + p
        if INT8:
            # 64 keeps small probabilities normal in float16, and the largest (64 * 65504 / 127) below its limit.
            p *= (64 * c_scale)[None, :]
        p = p.to(c1.dtype)
        acc1 = tl.dot(p, c1, acc1 * alpha, input_precision="ieee")
        if C2 > 0:
            acc2 = tl.dot(p, c2, acc2 * alpha, input_precision="ieee")
    return acc1, acc2, m_i, p_sum


@triton.jit(do_not_specialize=["batch", "capacity"])
def split_kernel(
    q_ptr, c_ptr, rope_ptr, scales_ptr, table_ptr, lengths_ptr, scale_log2e, batch, capacity, partial_ptr,
    partial_lse_ptr,
    Q_B: tl.constexpr, Q_T: tl.constexpr, Q_H: tl.constexpr, C_P: tl.constexpr, C_S: tl.constexpr,
    ROPE_P: tl.constexpr, ROPE_S: tl.constexpr, SCALES_P: tl.constexpr, SCALES_2: tl.constexpr,
    SCALES_S: tl.constexpr, TABLE_B: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
    ONE_PAGE: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BATCH: tl.constexpr,
    MIN_TILES: tl.constexpr,
):  # fmt: skip
    """Program (i, p): rows [i * ROWS, (i + 1) * ROWS) against run p of the list of tiles.

    Writes partial outputs float32 [splits, rows, C] and their log-sum-exp in base 2 [splits, rows]. Triton tiles are
    powers of two: the content width C is read as C1 and the rest, padded to C2 (0: no rest). ONE_PAGE: all tokens of a
    tile are of one page. BATCH: sequences whose lengths are read at a time.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query = row // HEADS
    in_range = row < QUERIES * HEADS
    program = tl.program_id(1)
    total, per_program = tiles_per_program(lengths_ptr, batch, capacity, tl.num_programs(1), TILE, BATCH, MIN_TILES)
    start = program * per_program
    end = tl.minimum(start + per_program, total)
    seq_first, before = find_sequence(lengths_ptr, batch, capacity, start, TILE, BATCH)
    seq_last, _ = find_sequence(lengths_ptr, batch, capacity, end - 1, TILE, BATCH)
    seq_last = tl.where(start < end, seq_last, seq_first - 1)
    lane = tl.arange(0, TILE)

    for seq in range(seq_first, seq_last + 1):
        length = tl.load(lengths_ptr + seq)
        kv_len = tl.maximum(tl.minimum(length, capacity), 0)
        first = tl.maximum(start - before, 0)
        last = tl.minimum(end - before, tiles_of(kv_len, TILE))
        if first < last:
            q1, q2, q_rope = _load_queries(q_ptr, seq, row, query, in_range, Q_B, Q_T, Q_H, C, C1, C2, R, HEADS)
            acc1, acc2, m_i, p_sum = _attend(
                q1, q2, q_rope, c_ptr, rope_ptr, scales_ptr, table_ptr, scale_log2e, seq, length, kv_len, query, lane,
                first, last, C_P, C_S, ROPE_P, ROPE_S, SCALES_P, SCALES_2, SCALES_S, TABLE_B, C, C1, C2, R, PAGE, PAGED,
                ONE_PAGE, INT8, QUERIES, ROWS, TILE,
            )  # fmt: skip
            _store_partial(
                partial_ptr, partial_lse_ptr, program, seq, row, in_range, acc1, acc2, m_i, p_sum, QUERIES, HEADS, C,
                C1, C2, INT8,
            )  # fmt: skip
        before += tiles_of(kv_len, TILE)


@triton.jit(do_not_specialize=["batch", "capacity", "programs"])
def combine_kernel(
    partial_ptr, partial_lse_ptr, lengths_ptr, batch, capacity, programs, out_ptr, lse_ptr,
    OUT_B: tl.constexpr, OUT_T: tl.constexpr, OUT_H: tl.constexpr, LSE_B: tl.constexpr, LSE_T: tl.constexpr,
    LSE_H: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, BATCH: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    """Program (j, row, b): columns [j * COLUMNS, (j + 1) * COLUMNS) of one row, merged over the splits of sequence b.

    PARTS splits are loaded at a time. Every lane of this axis has an online softmax of its own; they are reduced at the
    end only.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    seq = tl.program_id(2)
    _, per_program = tiles_per_program(lengths_ptr, batch, capacity, programs, TILE, BATCH, MIN_TILES)
    before = 0
    for b0 in range(0, seq, BATCH):
        b = b0 + tl.arange(0, BATCH)
        before += tl.sum(tl.where(b < seq, tiles_of(kv_len_of(lengths_ptr, b, batch, capacity), TILE), 0), 0)
    tiles = tiles_of(tl.maximum(tl.minimum(tl.load(lengths_ptr + seq), capacity), 0), TILE)
    first = before // per_program
    end = tl.where(tiles == 0, first, (before + tiles - 1) // per_program + 1)

    m_i = tl.full([PARTS], float("-inf"), tl.float32)
    l_i = tl.zeros([PARTS], tl.float32)
    acc = tl.zeros([PARTS, COLUMNS], tl.float32)
    for part0 in range(first, end, PARTS):
        part = part0 + tl.arange(0, PARTS)
        at = (part + seq).to(tl.int64) * (QUERIES * HEADS) + row
        lse = tl.load(partial_lse_ptr + at, mask=part < end, other=float("-inf"))
        mask = (part < end)[:, None] & (column < C)[None, :]
        out = tl.load(partial_ptr + at[:, None] * C + column[None, :], mask=mask, other=0)
        new_m_i = tl.maximum(m_i, lse)
        finite = tl.where(new_m_i == float("-inf"), 0.0, new_m_i)
        alpha = tl.exp2(m_i - finite)
        weight = tl.exp2(lse - finite)
        l_i = l_i * alpha + weight
        acc = acc * alpha[:, None] + weight[:, None] * out
        m_i = new_m_i

    top = tl.max(m_i, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(m_i - finite)
    total = tl.sum(l_i * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    t, h = row // HEADS, row % HEADS
    out_row = out_ptr + tl.cast(seq, tl.int64) * OUT_B + t * OUT_T + h * OUT_H
    tl.store(out_row + column, out.to(out_ptr.dtype.element_ty), mask=column < C)
    if tl.program_id(0) == 0:
        LN2: tl.constexpr = 0.6931471805599453
        lse = tl.where(total == 0, float("-inf"), (finite + tl.log2(total)) * LN2)
        tl.store(lse_ptr + tl.cast(seq, tl.int64) * LSE_B + t * LSE_T + h * LSE_H, lse)
