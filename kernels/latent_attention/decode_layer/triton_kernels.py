"""A layer of MLA for one token in Triton: all but the attention itself, in two kernels that read each weight once.

Imports nothing but Triton; `triton_layer_jax` launches the kernels. Weights are [out, in], as in Hugging Face's files,
in 16 bits, or in 8 with a scale for each output.

Every product here is a matrix times one vector, so that only reading the matrix counts. Each multiprocessor has one
program, and a warp of it reads a row or a part of one, always a few tiles ahead of what it multiplies. What one phase
of a kernel writes, the next reads in all programs: between phases the programs wait for each other at a counter in
memory (`_meet`), with the first weights of the next phase already on their way. All programs, two at least, must run at
one time.

D hidden, Q query latent, C latent, R rotary, N and V content and value width of a head, H heads, F feed-forward.
"""

# pyright: reportGeneralTypeIssues=false
# It takes the functions of triton.language, which run inside kernels only, for ones that never return.

import triton
import triton.language as tl


@triton.jit
def _meet(counter_ptr):
    """Returns when all programs are here; what they wrote before can then be read."""
    programs = tl.num_programs(0)
    tl.debug_barrier()
    target = (tl.atomic_add(counter_ptr, 1, sem="acq_rel") // programs + 1) * programs
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
        pass


@triton.jit
def _share(count, program, programs):
    """First and end of the rows of a program."""
    each = tl.cdiv(count, programs)
    start = program * each
    return start, tl.minimum(start + each, count)


@triton.jit
def _part(w_ptr, held_row, first, K: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles of rows, CHUNK columns each from `first` on; 0 for rows that are not held."""
    tiles = ()
    for j in tl.static_range(COUNT):
        k = first + j * CHUNK + tl.arange(0, CHUNK)
        held = held_row[:, None] & (k < K)[None, :]
        tiles += (tl.load(w_ptr[:, None] + k[None, :], held, other=0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _vector(x_ptr, gain_ptr, eps, K: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr):
    """x [K], chunk by chunk; NORM: RMSNorm of it, rounded to its type."""
    if NORM:
        k = tl.arange(0, triton.next_power_of_2(K))
        x = tl.load(x_ptr + k, k < K, other=0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    chunks = ()
    for first in tl.static_range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + k, k < K, other=0)
        if NORM:
            gain = tl.load(gain_ptr + k, k < K, other=0).to(tl.float32)
            x = (x.to(tl.float32) * factor * gain).to(x.dtype)
        chunks += (x,)
    return chunks


@triton.jit
def _products(
    w_ptr, w2_ptr, scale_ptr, scale2_ptr, x_ptr, gain_ptr, add_ptr, out_ptr, counter_ptr, eps, program, programs,
    OUT: tl.constexpr, K: tl.constexpr, MEET: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    ADD: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The rows of W [OUT, K] that this program has among `programs`, times x [K], to out [OUT].

    MEET: what is at `x` and `add` comes from other programs. NORM: x is normalised. GATED: silu(W x) * (W2 x), rows of
    both in turns. ADD: what is at `add` [OUT] is added.
    """
    chunks: tl.constexpr = (K + CHUNK - 1) // CHUNK
    # Tiles of a part of a row, of which two are in registers: one in use, one on its way.
    count: tl.constexpr = tl.constexpr(5 if chunks % 5 == 0 else 4 if chunks % 4 == 0 else 3 if chunks % 3 == 0 else 1)
    each: tl.constexpr = ROWS // 2 if GATED else ROWS
    start, end = _share(OUT, program, programs)
    lane = tl.arange(0, ROWS)
    row = start + (lane // 2 if GATED else lane)
    rows_ptr = (tl.where(lane % 2 == 0, w_ptr, w2_ptr) if GATED else w_ptr) + row.to(tl.int64) * K
    scale_ptr = (tl.where(lane % 2 == 0, scale_ptr, scale2_ptr) if GATED else scale_ptr) + row
    tiles = _part(rows_ptr, row < end, 0, K, CHUNK, count)
    if MEET:
        _meet(counter_ptr)
    xs = _vector(x_ptr, gain_ptr, eps, K, CHUNK, NORM)  # stays in registers, for all rows
    for r in range(start, end, each):
        out = r + tl.arange(0, each)
        sums = tl.zeros([ROWS, CHUNK], tl.float32)
        if ADD:
            residual = tl.load(add_ptr + out, out < end, other=0).to(tl.float32)
        for first in tl.static_range(0, chunks, count):
            if first + count < chunks:
                following = _part(rows_ptr, row < end, (first + count) * CHUNK, K, CHUNK, count)
            else:
                rows_ptr += each * K
                following = _part(rows_ptr, row + each < end, 0, K, CHUNK, count)
            tl.debug_barrier()  # or the compiler would put off these loads until they are used
            for j in tl.static_range(count):
                sums += tiles[j].to(tl.float32) * xs[first + j].to(tl.float32)[None, :]
            tiles = following
        y = tl.sum(sums, 1)
        if INT8:
            y *= tl.load(scale_ptr, row < end, other=0)
        row += each
        scale_ptr += each
        if GATED:
            gate, up = tl.split(tl.reshape(y, (each, 2)))
            y = gate / (1 + tl.exp(-gate)) * up
        if ADD:
            y += residual
        tl.store(out_ptr + out, y, out < end)


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, HALF: tl.constexpr):
    """Even and odd numbers of x [2 HALF], its interleaved pairs turned."""
    pair = tl.arange(0, HALF)
    cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
    even = tl.load(x_ptr + 2 * pair).to(tl.float32)
    odd = tl.load(x_ptr + 2 * pair + 1).to(tl.float32)
    return even * cos - odd * sin, odd * cos + even * sin


@triton.jit
def _rounded(x):
    """To the next integer, halves to even, for less than 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _units(x, largest):
    """As `int8.quantize`: x in units of a scale of which `largest` has 127."""
    scale = largest / 127
    return tl.clamp(_rounded(x / tl.where(scale == 0, 1.0, scale)), -127.0, 127.0).to(tl.int8), scale


@triton.jit
def _remember(
    kv_ptr, gain_ptr, cos_ptr, sin_ptr, at, capacity, c_ptr, rope_ptr, scales_ptr, eps,
    C: tl.constexpr, C_PADDED: tl.constexpr, R: tl.constexpr, CACHE_INT8: tl.constexpr,
):  # fmt: skip
    """Writes the latent, normalised, and the rotary key, turned, to slot `at` of the cache, if there is one."""
    there = at < capacity
    column, pair = tl.arange(0, C_PADDED), tl.arange(0, R // 2)
    dtype = kv_ptr.dtype.element_ty
    kv = tl.load(kv_ptr + column, column < C, other=0).to(tl.float32)
    kv *= tl.rsqrt(tl.sum(kv * kv, 0) / C + eps) * tl.load(gain_ptr + column, column < C, other=0).to(tl.float32)
    c = kv.to(dtype)
    even, odd = _rotated(kv_ptr + C, cos_ptr, sin_ptr, R // 2)
    even, odd = even.to(dtype), odd.to(dtype)
    if CACHE_INT8:
        c, even, odd = c.to(tl.float32), even.to(tl.float32), odd.to(tl.float32)
        c, c_scale = _units(c, tl.max(tl.abs(c), 0))
        largest = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 0)
        even, rope_scale = _units(even, largest)
        odd, _ = _units(odd, largest)
        tl.store(scales_ptr + at, c_scale, there)
        tl.store(scales_ptr + capacity + at, rope_scale, there)
    at = at.to(tl.int64)
    tl.store(c_ptr + at * C + column, c, there & (column < C))
    tl.store(rope_ptr + at * R + 2 * pair, even, there)
    tl.store(rope_ptr + at * R + 2 * pair + 1, odd, there)


@triton.jit
def before_attention_kernel(
    h_ptr, input_gain_ptr, q_a_ptr, q_a_scale_ptr, kv_a_ptr, kv_a_scale_ptr, q_gain_ptr, q_b_ptr, q_b_scale_ptr,
    kv_gain_ptr, kv_b_ptr, kv_b_scale_ptr, cos_ptr, sin_ptr, length_ptr,
    c_in_ptr, rope_in_ptr, scales_in_ptr, counter_in_ptr, eps, capacity,
    q_out_ptr, q_latent_ptr, kv_ptr, q_ptr, c_ptr, rope_ptr, scales_ptr, counter_ptr,
    D: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    H: tl.constexpr, C_PADDED: tl.constexpr, N_PADDED: tl.constexpr, INT8: tl.constexpr, CACHE_INT8: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Hidden state to absorbed queries [H, C + R] and a new token in the cache; phases FIRST to LAST of 0, 1, 2."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if FIRST <= 0 and LAST >= 0:  # the two down-projections of RMSNorm(h), each by its share of the programs
        for_q = tl.minimum(tl.cdiv(programs * Q, Q + C + R), programs - 1)
        if program < for_q:
            _products(
                q_a_ptr, q_a_ptr, q_a_scale_ptr, q_a_scale_ptr, h_ptr, input_gain_ptr, h_ptr, q_latent_ptr, counter_ptr,
                eps, program, for_q, Q, D, False, True, False, False, INT8, ROWS, CHUNK,
            )  # fmt: skip
        else:
            _products(
                kv_a_ptr, kv_a_ptr, kv_a_scale_ptr, kv_a_scale_ptr, h_ptr, input_gain_ptr, h_ptr, kv_ptr, counter_ptr,
                eps, program - for_q, programs - for_q, C + R, D, False, True, False, False, INT8, ROWS, CHUNK,
            )  # fmt: skip
    if FIRST <= 1 and LAST >= 1:  # the up-projection of queries; the last program, which has least of it, remembers
        _products(
            q_b_ptr, q_b_ptr, q_b_scale_ptr, q_b_scale_ptr, q_latent_ptr, q_gain_ptr, h_ptr, q_ptr, counter_ptr,
            eps, program, programs, H * (N + R), Q, FIRST < 1, True, False, False, INT8, ROWS, CHUNK,
        )  # fmt: skip
        if program == programs - 1:
            _remember(
                kv_ptr, kv_gain_ptr, cos_ptr, sin_ptr, tl.load(length_ptr), capacity, c_ptr, rope_ptr, scales_ptr, eps,
                C, C_PADDED, R, CACHE_INT8,
            )  # fmt: skip
    if FIRST <= 1 and LAST >= 2:
        _meet(counter_ptr)
    if FIRST <= 2 and LAST >= 2:  # the up-projection of keys moves to the query: COLUMNS of a head at a time
        each: tl.constexpr = C_PADDED // COLUMNS
        start, end = _share(H * each, program, programs)
        for part in range(start, end):
            head, column = part // each, part % each * COLUMNS + tl.arange(0, COLUMNS)
            n = tl.arange(0, N_PADDED)
            row = head * (N + V) + n
            q = tl.load(q_ptr + head * (N + R) + n, n < N, other=0).to(tl.float32)
            if INT8:
                q *= tl.load(kv_b_scale_ptr + row, n < N, other=0)
            held = (n < N)[:, None] & (column < C)[None, :]
            k = tl.load(kv_b_ptr + row[:, None] * C + column[None, :], held, other=0)
            tl.store(q_out_ptr + head * (C + R) + column, tl.sum(k.to(tl.float32) * q[:, None], 0), column < C)
            if part % each == 0:
                even, odd = _rotated(q_ptr + head * (N + R) + N, cos_ptr, sin_ptr, R // 2)
                pair = q_out_ptr + head * (C + R) + C + 2 * tl.arange(0, R // 2)
                tl.store(pair, even)
                tl.store(pair + 1, odd)


@triton.jit
def after_attention_kernel(
    h_ptr, latent_ptr, kv_b_ptr, kv_b_scale_ptr, o_ptr, o_scale_ptr, gain_ptr, gate_ptr, gate_scale_ptr, up_ptr,
    up_scale_ptr, down_ptr, down_scale_ptr, counter_in_ptr, eps,
    h_out_ptr, value_ptr, h_middle_ptr, inner_ptr, counter_ptr,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, V: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
    C_PADDED: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Attention over latents [H, C] to the hidden state after the layer; phases FIRST to LAST of 0 to 3."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if FIRST <= 0 and LAST >= 0:  # the up-projection of values, head by head
        start, end = _share(H * V, program, programs)
        r = start
        while r < end:
            head = r // V
            last = tl.minimum(end, head * V + V)
            column, row = tl.arange(0, C_PADDED), r + tl.arange(0, ROWS)
            at = row + (head + 1) * N
            held = (row < last)[:, None] & (column < C)[None, :]
            w = tl.load(kv_b_ptr + at[:, None] * C + column[None, :], held, other=0).to(tl.float32)
            x = tl.load(latent_ptr + head * C + column, column < C, other=0).to(tl.float32)
            y = tl.sum(w * x[None, :], 1)
            if INT8:
                y *= tl.load(kv_b_scale_ptr + at, row < last, other=0)
            tl.store(value_ptr + row, y, row < last)
            r = tl.minimum(r + ROWS, last)
    if FIRST <= 1 and LAST >= 1:  # the output projection, added to the residual
        _products(
            o_ptr, o_ptr, o_scale_ptr, o_scale_ptr, value_ptr, gain_ptr, h_ptr, h_middle_ptr, counter_ptr, eps, program,
            programs, D, H * V, FIRST < 1, False, False, True, INT8, ROWS // 4, CHUNK * 4,
        )  # fmt: skip
    if FIRST <= 2 and LAST >= 2:  # the inner part of SwiGLU
        _products(
            gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, h_middle_ptr, gain_ptr, h_ptr, inner_ptr, counter_ptr, eps,
            program, programs, F, D, FIRST < 2, True, True, False, INT8, ROWS, CHUNK,
        )  # fmt: skip
    if FIRST <= 3 and LAST >= 3:  # the down-projection, added to the residual
        _products(
            down_ptr, down_ptr, down_scale_ptr, down_scale_ptr, inner_ptr, gain_ptr, h_middle_ptr, h_out_ptr,
            counter_ptr, eps, program, programs, D, F, FIRST < 3, False, False, True, INT8, ROWS // 4, CHUNK * 4,
        )  # fmt: skip


@triton.jit
def scores_kernel(
    h_ptr, gain_ptr, head_ptr, eps, scores_ptr, D: tl.constexpr, X: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """float32 scores [X] of RMSNorm(h)."""
    _products(
        head_ptr, head_ptr, head_ptr, head_ptr, h_ptr, gain_ptr, h_ptr, scores_ptr, scores_ptr, eps, tl.program_id(0),
        tl.num_programs(0), X, D, False, True, False, False, False, ROWS, CHUNK,
    )  # fmt: skip
