"""Absorbed MLA decode in Triton, for NVIDIA GPUs from Turing on: the kernels.

Imports nothing but Triton. `triton_decode_jax` and `triton_decode_torch` launch them from JAX and from PyTorch, cut as
`triton_decode_plan` says.

Query tokens and heads are one axis of rows (row t * H + h), because all heads read the same latents. The keys of the
whole batch, cut into tiles, are one list that is dealt out evenly to the programs (split-KV), so a program may start in
one sequence and end in another. What program p found out about sequence b goes to slot p + b, which no other pair has,
and `combine_kernel` merges the slots of each sequence. Both kernels work the schedule out from the lengths.

Capitals like C_P are strides, in elements: of the latents, from page to page.
"""

# pyright: reportGeneralTypeIssues=false
# It takes the functions of triton.language, which run inside kernels only, for ones that never return.

import triton
import triton.language as tl


@triton.jit
def _keys(lengths_ptr, b, batch, capacity):
    """Keys that the cache holds of sequences b; 0 beyond the batch."""
    return tl.maximum(tl.minimum(tl.load(lengths_ptr + b, mask=b < batch, other=0), capacity), 0)


@triton.jit
def _tiles(keys, TILE: tl.constexpr):
    return keys // TILE + (keys % TILE != 0).to(tl.int32)


@triton.jit
def _budget(lengths_ptr, batch, capacity, programs, TILE: tl.constexpr, BATCH: tl.constexpr, LEAST: tl.constexpr):
    """Tiles of the whole batch, and tiles of one program."""
    total = 0
    for b0 in range(0, batch, BATCH):
        total += tl.sum(_tiles(_keys(lengths_ptr, b0 + tl.arange(0, BATCH), batch, capacity), TILE), 0)
    return total, tl.maximum(tl.cdiv(total, programs), LEAST)


@triton.jit
def _find(lengths_ptr, batch, capacity, tile, TILE: tl.constexpr, BATCH: tl.constexpr):
    """The sequence that this tile of the list belongs to (`batch` beyond the list), and the tiles before that one."""
    seq = 0
    before = 0
    total = 0
    for b0 in range(0, batch, BATCH):
        b = b0 + tl.arange(0, BATCH)
        tiles = _tiles(_keys(lengths_ptr, b, batch, capacity), TILE)
        ends = total + tl.cumsum(tiles, 0)
        passed = (ends <= tile) & (b < batch)
        seq += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        total += tl.sum(tiles, 0)
    return seq, before


@triton.jit
def _page(table_ptr, seq, token, keys, TABLE_B: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr):
    """Page that holds a token of a sequence; 0 for tokens beyond its keys, whose table entries may be garbage."""
    if PAGED:
        page = tl.load(table_ptr + tl.cast(seq, tl.int64) * TABLE_B + token // PAGE, mask=token < keys, other=0)
    else:
        page = seq
    return tl.cast(page, tl.int64)


@triton.jit
def _load(ptr, at, held, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] of rows at the given offsets: 0 for rows that are not held and for columns beyond WIDTH."""
    column = tl.arange(0, PADDED)[None, :]
    if WIDTH == PADDED:
        return tl.load(ptr + at[:, None] + column, mask=held[:, None], other=0)
    else:
        return tl.load(ptr + at[:, None] + column, mask=held[:, None] & (column < WIDTH), other=0)


@triton.jit
def _pinned(x):
    """What is given (16 bits wide). From here on both products read it from shared memory.

    Without this, Triton converts int8 twice, in the layout of each product, and cannot load it asynchronously.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit(do_not_specialize=["batch", "capacity"])
def split_kernel(
    q_ptr,
    c_ptr,
    rope_ptr,
    scales_ptr,
    table_ptr,
    lengths_ptr,
    scale_log2e,
    batch,
    capacity,
    partial_ptr,
    partial_lse_ptr,
    Q_B: tl.constexpr,
    Q_T: tl.constexpr,
    Q_H: tl.constexpr,
    C_P: tl.constexpr,
    C_S: tl.constexpr,
    ROPE_P: tl.constexpr,
    ROPE_S: tl.constexpr,
    SCALES_P: tl.constexpr,
    SCALES_2: tl.constexpr,
    SCALES_S: tl.constexpr,
    TABLE_B: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BATCH: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Program (i, p): rows [i * ROWS, (i + 1) * ROWS) against share p of the tiles.

    Writes out float32 [slots, rows, C] and its log-sum-exp in base 2 [slots, rows]. The content width C is read as a
    power of two C1 and the rest, padded to a power of two C2 (0: no rest), because tiles have such sizes. ONE_PAGE says
    that all tokens of a tile are of one page.
    """
    dtype = q_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query = row // HEADS
    real = row < QUERIES * HEADS
    share = tl.program_id(1)
    total, budget = _budget(lengths_ptr, batch, capacity, tl.num_programs(1), TILE, BATCH, LEAST)
    start = share * budget
    end = tl.minimum(start + budget, total)
    seq_first, before = _find(lengths_ptr, batch, capacity, start, TILE, BATCH)
    seq_last, _ = _find(lengths_ptr, batch, capacity, end - 1, TILE, BATCH)
    seq_last = tl.where(start < end, seq_last, seq_first - 1)
    lane = tl.arange(0, TILE)

    for seq in range(seq_first, seq_last + 1):
        length = tl.load(lengths_ptr + seq)
        keys = tl.maximum(tl.minimum(length, capacity), 0)
        first = tl.maximum(start - before, 0)
        last = tl.minimum(end - before, _tiles(keys, TILE))
        if first < last:
            q_at = tl.cast(seq, tl.int64) * Q_B + query * Q_T + (row % HEADS) * Q_H
            q1 = _load(q_ptr, q_at, real, C1, C1)
            if C2 > 0:
                q2 = _load(q_ptr + C1, q_at, real, C - C1, C2)
                acc2 = tl.zeros([ROWS, C2], tl.float32)
            q_rope = _load(q_ptr + C, q_at, real, R, R)
            acc1 = tl.zeros([ROWS, C1], tl.float32)
            peak = tl.full([ROWS], float("-inf"), tl.float32)
            # Sums of weights by column of the tile, added up only at the end: one reduction less a tile.
            totals = tl.zeros([ROWS, TILE], tl.float32)
            visible = tl.minimum(length - QUERIES + query + 1, keys)

            which = 0 if ONE_PAGE else lane
            page = _page(table_ptr, seq, first * TILE + which, keys, TABLE_B, PAGE, PAGED)
            for tile in range(first, last):
                token = tile * TILE + lane
                held = token < keys
                slot = tile * TILE % PAGE + lane if ONE_PAGE else token % PAGE
                c_at = page * C_P + slot.to(tl.int64) * C_S
                rope_at = page * ROPE_P + slot.to(tl.int64) * ROPE_S
                scales_at = page * SCALES_P + slot.to(tl.int64) * SCALES_S
                # The next page number is fetched a tile ahead, so that loads of the cache never wait for it.
                page = _page(table_ptr, seq, (tile + 1) * TILE + which, keys, TABLE_B, PAGE, PAGED)

                c1 = _load(c_ptr, c_at, held, C1, C1).to(dtype)
                if INT8:
                    c1 = _pinned(c1)
                scores = tl.dot(q1, tl.trans(c1), input_precision="ieee")
                if C2 > 0:
                    c2 = _load(c_ptr + C1, c_at, held, C - C1, C2).to(dtype)
                    if INT8:
                        c2 = _pinned(c2)
                    scores = tl.dot(q2, tl.trans(c2), scores, input_precision="ieee")
                rope = _load(rope_ptr, rope_at, held, R, R).to(dtype)
                if INT8:
                    # int8 is exact in 16 bits: the products read it as it is, scores and weights are scaled.
                    c_scale = tl.load(scales_ptr + scales_at, mask=held, other=0)
                    rope_scale = tl.load(scales_ptr + SCALES_2 + scales_at, mask=held, other=0)
                    scores *= c_scale[None, :]
                    scores += tl.dot(q_rope, tl.trans(rope), input_precision="ieee") * rope_scale[None, :]
                else:
                    scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee")
                scores = tl.where(token[None, :] < visible[:, None], scores * scale_log2e, float("-inf"))

                new_peak = tl.maximum(peak, tl.max(scores, 1))
                finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                weights = tl.exp2(scores - finite[:, None])
                shrink = tl.exp2(peak - finite)[:, None]
                totals = totals * shrink + weights
                peak = new_peak
                if INT8:
                    # 64 keeps small products normal in float16, and the largest (64 * 65504 / 127) below its limit.
                    weights *= (64 * c_scale)[None, :]
                weights = weights.to(dtype)
                acc1 = tl.dot(weights, c1, acc1 * shrink, input_precision="ieee")
                if C2 > 0:
                    acc2 = tl.dot(weights, c2, acc2 * shrink, input_precision="ieee")

            sums = tl.sum(totals, 1)
            share_of = 1 / tl.where(sums == 0, 1.0, sums)
            if INT8:
                share_of *= 1 / 64
            out_row = (share + seq).to(tl.int64) * (QUERIES * HEADS) + row
            column1 = tl.arange(0, C1)[None, :]
            tl.store(partial_ptr + out_row[:, None] * C + column1, acc1 * share_of[:, None], mask=real[:, None])
            if C2 > 0:
                column2 = C1 + tl.arange(0, C2)[None, :]
                mask2 = real[:, None] & (column2 < C)
                tl.store(partial_ptr + out_row[:, None] * C + column2, acc2 * share_of[:, None], mask=mask2)
            lse = tl.where(sums == 0, float("-inf"), peak + tl.log2(sums))
            tl.store(partial_lse_ptr + out_row, lse, mask=real)
        before += _tiles(keys, TILE)


@triton.jit(do_not_specialize=["batch", "capacity", "programs"])
def combine_kernel(
    partial_ptr,
    partial_lse_ptr,
    lengths_ptr,
    batch,
    capacity,
    programs,
    out_ptr,
    lse_ptr,
    OUT_B: tl.constexpr,
    OUT_T: tl.constexpr,
    OUT_H: tl.constexpr,
    LSE_B: tl.constexpr,
    LSE_T: tl.constexpr,
    LSE_H: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BATCH: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Program (j, row, b): columns [j * COLUMNS, (j + 1) * COLUMNS) of one row, from the slots of sequence b.

    Every lane of the PARTS axis keeps a softmax of its own over the slots it saw; nothing is reduced before the end.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    seq = tl.program_id(2)
    _, budget = _budget(lengths_ptr, batch, capacity, programs, TILE, BATCH, LEAST)
    before = 0
    for b0 in range(0, seq, BATCH):
        b = b0 + tl.arange(0, BATCH)
        before += tl.sum(tl.where(b < seq, _tiles(_keys(lengths_ptr, b, batch, capacity), TILE), 0), 0)
    tiles = _tiles(tl.maximum(tl.minimum(tl.load(lengths_ptr + seq), capacity), 0), TILE)
    first = before // budget
    end = tl.where(tiles == 0, first, (before + tiles - 1) // budget + 1)

    peak = tl.full([PARTS], float("-inf"), tl.float32)
    sums = tl.zeros([PARTS], tl.float32)
    acc = tl.zeros([PARTS, COLUMNS], tl.float32)
    for part0 in range(first, end, PARTS):
        part = part0 + tl.arange(0, PARTS)
        at = (part + seq).to(tl.int64) * (QUERIES * HEADS) + row
        lse = tl.load(partial_lse_ptr + at, mask=part < end, other=float("-inf"))
        mask = (part < end)[:, None] & (column < C)[None, :]
        out = tl.load(partial_ptr + at[:, None] * C + column[None, :], mask=mask, other=0)
        new_peak = tl.maximum(peak, lse)
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - finite)
        weight = tl.exp2(lse - finite)
        sums = sums * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * out
        peak = new_peak

    top = tl.max(peak, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(peak - finite)
    total = tl.sum(sums * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    t, h = row // HEADS, row % HEADS
    out_row = out_ptr + tl.cast(seq, tl.int64) * OUT_B + t * OUT_T + h * OUT_H
    tl.store(out_row + column, out.to(out_ptr.dtype.element_ty), mask=column < C)
    if tl.program_id(0) == 0:
        LN2: tl.constexpr = 0.6931471805599453
        lse = tl.where(total == 0, float("-inf"), (finite + tl.log2(total)) * LN2)
        tl.store(lse_ptr + tl.cast(seq, tl.int64) * LSE_B + t * LSE_T + h * LSE_H, lse)
