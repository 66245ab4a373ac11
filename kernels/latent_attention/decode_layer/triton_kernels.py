"""A decoder layer of a batch-1 decode step in Triton: all but the attention, in two kernels that read each weight once.

Depends on Triton alone; `decode_layer/triton.py` launches the kernels. Weights are [out, in], as in Hugging Face's
files, in 16 bits, or in int8 with a scale for each output.

Every matmul here is a GEMV, bound by reading the matrix. One program runs on each SM; each of its warps reads a row or
a part of one, some tiles ahead of those it multiplies (prefetched in registers). A phase of a kernel reads what all
programs wrote in the phase before: between them is a grid barrier, `grid_barrier`, with the first weights of the next
phase already in flight. All programs, two at least, must be resident at the same time.

D hidden, Q query latent, C latent, R rotary, N and V content and value width of a head, H heads, F feed-forward. A
*_norm_ptr is the weight (gamma) of an RMSNorm.
"""

# pyright: reportGeneralTypeIssues=false
# It takes the functions of triton.language, which run inside kernels only, for ones that never return.

import triton
import triton.language as tl

from latent_attention.decode_layer.triton_gemv import gemv, grid_barrier, partition, round_to_integer


@triton.jit
def _apply_rope(x_ptr, cos_ptr, sin_ptr, HALF: tl.constexpr):
    """Loads x [2 HALF] and rotates its interleaved pairs: the even and the odd elements."""
    pair = tl.arange(0, HALF)
    cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
    even = tl.load(x_ptr + 2 * pair).to(tl.float32)
    odd = tl.load(x_ptr + 2 * pair + 1).to(tl.float32)
    return even * cos - odd * sin, odd * cos + even * sin


@triton.jit
def _quantize(x, largest):
    """`int8.quantize` of x, of which `largest` is the largest magnitude: int8 and the scale."""
    scale = largest / 127
    return tl.clamp(round_to_integer(x / tl.where(scale == 0, 1.0, scale)), -127.0, 127.0).to(tl.int8), scale


@triton.jit
def _append_to_cache(
    kv_ptr, norm_ptr, cos_ptr, sin_ptr, at, capacity, c_ptr, rope_ptr, scales_ptr, eps,
    C: tl.constexpr, C_PADDED: tl.constexpr, R: tl.constexpr, CACHE_INT8: tl.constexpr,
):  # fmt: skip
    """Writes RMSNorm(latent) and RoPE(rotary key) of the new token at position `at` of the cache, unless it is full."""
    fits = at < capacity
    column, pair = tl.arange(0, C_PADDED), tl.arange(0, R // 2)
    dtype = kv_ptr.dtype.element_ty
    kv = tl.load(kv_ptr + column, column < C, other=0).to(tl.float32)
    kv *= tl.rsqrt(tl.sum(kv * kv, 0) / C + eps) * tl.load(norm_ptr + column, column < C, other=0).to(tl.float32)
    c = kv.to(dtype)
    even, odd = _apply_rope(kv_ptr + C, cos_ptr, sin_ptr, R // 2)
    even, odd = even.to(dtype), odd.to(dtype)
    if CACHE_INT8:
        c, even, odd = c.to(tl.float32), even.to(tl.float32), odd.to(tl.float32)
        c, c_scale = _quantize(c, tl.max(tl.abs(c), 0))
        largest = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 0)
        even, rope_scale = _quantize(even, largest)
        odd, _ = _quantize(odd, largest)
        tl.store(scales_ptr + at, c_scale, fits)
        tl.store(scales_ptr + capacity + at, rope_scale, fits)
    at = at.to(tl.int64)
    tl.store(c_ptr + at * C + column, c, fits & (column < C))
    tl.store(rope_ptr + at * R + 2 * pair, even, fits)
    tl.store(rope_ptr + at * R + 2 * pair + 1, odd, fits)


@triton.jit
def down_projections(
    h_ptr, norm_ptr, q_a_ptr, q_a_scale_ptr, kv_a_ptr, kv_a_scale_ptr, q_latent_ptr, kv_ptr, counter_ptr, eps,
    D: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, R: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Query latent [Q], and latent and rotary key [C + R], of RMSNorm(h): each by its part of the programs."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for_q = tl.minimum(tl.cdiv(programs * Q, Q + C + R), programs - 1)
    if program < for_q:
        gemv(
            q_a_ptr, q_a_ptr, q_a_scale_ptr, q_a_scale_ptr, h_ptr, norm_ptr, h_ptr, q_latent_ptr, counter_ptr,
            eps, program, for_q, Q, D, False, True, False, False, INT8, ROWS, CHUNK,
        )  # fmt: skip
    else:
        gemv(
            kv_a_ptr, kv_a_ptr, kv_a_scale_ptr, kv_a_scale_ptr, h_ptr, norm_ptr, h_ptr, kv_ptr, counter_ptr,
            eps, program - for_q, programs - for_q, C + R, D, False, True, False, False, INT8, ROWS, CHUNK,
        )  # fmt: skip


@triton.jit
def query_up_projection(
    q_latent_ptr, q_norm_ptr, q_b_ptr, q_b_scale_ptr, q_ptr, kv_ptr, kv_norm_ptr, cos_ptr, sin_ptr, length_ptr,
    capacity, c_ptr, rope_ptr, scales_ptr, counter_ptr, eps, Q: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, C_PADDED: tl.constexpr, INT8: tl.constexpr, CACHE_INT8: tl.constexpr,
    SYNC: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Queries [H (N + R)] of RMSNorm(query latent). The last program, with the fewest rows, appends to the cache."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    gemv(
        q_b_ptr, q_b_ptr, q_b_scale_ptr, q_b_scale_ptr, q_latent_ptr, q_norm_ptr, q_ptr, q_ptr, counter_ptr,
        eps, program, programs, H * (N + R), Q, SYNC, True, False, False, INT8, ROWS, CHUNK,
    )  # fmt: skip
    if program == programs - 1:
        _append_to_cache(
            kv_ptr, kv_norm_ptr, cos_ptr, sin_ptr, tl.load(length_ptr), capacity, c_ptr, rope_ptr, scales_ptr, eps,
            C, C_PADDED, R, CACHE_INT8,
        )  # fmt: skip


@triton.jit
def absorb_queries(
    q_ptr, kv_b_ptr, kv_b_scale_ptr, cos_ptr, sin_ptr, q_out_ptr, C: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    V: tl.constexpr, H: tl.constexpr, C_PADDED: tl.constexpr, N_PADDED: tl.constexpr, INT8: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Absorbed queries [H, C + R]: W_UK^T q of each head, COLUMNS of a head at a time, and RoPE(q)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    each: tl.constexpr = C_PADDED // COLUMNS
    start, end = partition(H * each, program, programs)
    for part in range(start, end):
        head, column = part // each, part % each * COLUMNS + tl.arange(0, COLUMNS)
        n = tl.arange(0, N_PADDED)
        row = head * (N + V) + n
        q = tl.load(q_ptr + head * (N + R) + n, n < N, other=0).to(tl.float32)
        if INT8:
            q *= tl.load(kv_b_scale_ptr + row, n < N, other=0)
        valid = (n < N)[:, None] & (column < C)[None, :]
        k = tl.load(kv_b_ptr + row[:, None] * C + column[None, :], valid, other=0)
        tl.store(q_out_ptr + head * (C + R) + column, tl.sum(k.to(tl.float32) * q[:, None], 0), column < C)
        if part % each == 0:
            even, odd = _apply_rope(q_ptr + head * (N + R) + N, cos_ptr, sin_ptr, R // 2)
            pair = q_out_ptr + head * (C + R) + C + 2 * tl.arange(0, R // 2)
            tl.store(pair, even)
            tl.store(pair + 1, odd)


@triton.jit
def before_attention_kernel(
    h_ptr, input_norm_ptr, q_a_ptr, q_a_scale_ptr, kv_a_ptr, kv_a_scale_ptr, q_norm_ptr, q_b_ptr, q_b_scale_ptr,
    kv_norm_ptr, kv_b_ptr, kv_b_scale_ptr, cos_ptr, sin_ptr, length_ptr,
    c_in_ptr, rope_in_ptr, scales_in_ptr, counter_in_ptr, eps, capacity,
    q_out_ptr, q_latent_ptr, kv_ptr, q_ptr, c_ptr, rope_ptr, scales_ptr, counter_ptr,
    D: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    H: tl.constexpr, C_PADDED: tl.constexpr, N_PADDED: tl.constexpr, INT8: tl.constexpr, CACHE_INT8: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Hidden state to absorbed queries [H, C + R] and a new token in the cache. *_in_ptr alias outputs, for JAX."""
    down_projections(
        h_ptr, input_norm_ptr, q_a_ptr, q_a_scale_ptr, kv_a_ptr, kv_a_scale_ptr, q_latent_ptr, kv_ptr, counter_ptr, eps,
        D, Q, C, R, INT8, ROWS, CHUNK,
    )  # fmt: skip
    query_up_projection(
        q_latent_ptr, q_norm_ptr, q_b_ptr, q_b_scale_ptr, q_ptr, kv_ptr, kv_norm_ptr, cos_ptr, sin_ptr, length_ptr,
        capacity, c_ptr, rope_ptr, scales_ptr, counter_ptr, eps, Q, C, R, N, H, C_PADDED, INT8, CACHE_INT8, True, ROWS,
        CHUNK,
    )  # fmt: skip
    grid_barrier(counter_ptr)
    absorb_queries(
        q_ptr, kv_b_ptr, kv_b_scale_ptr, cos_ptr, sin_ptr, q_out_ptr, C, R, N, V, H, C_PADDED, N_PADDED, INT8, COLUMNS
    )


@triton.jit
def value_up_projection(
    latent_ptr, kv_b_ptr, kv_b_scale_ptr, value_ptr, C: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    H: tl.constexpr, C_PADDED: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Values [H V]: W_UV times the attention over latents, head by head."""
    start, end = partition(H * V, tl.program_id(0), tl.num_programs(0))
    r = start
    while r < end:
        head = r // V
        last = tl.minimum(end, head * V + V)
        column, row = tl.arange(0, C_PADDED), r + tl.arange(0, ROWS)
        at = row + (head + 1) * N
        valid = (row < last)[:, None] & (column < C)[None, :]
        w = tl.load(kv_b_ptr + at[:, None] * C + column[None, :], valid, other=0).to(tl.float32)
        x = tl.load(latent_ptr + head * C + column, column < C, other=0).to(tl.float32)
        y = tl.sum(w * x[None, :], 1)
        if INT8:
            y *= tl.load(kv_b_scale_ptr + at, row < last, other=0)
        tl.store(value_ptr + row, y, row < last)
        r = tl.minimum(r + ROWS, last)


@triton.jit
def projection_and_residual(
    x_ptr, w_ptr, scale_ptr, residual_ptr, out_ptr, counter_ptr, eps, OUT: tl.constexpr, K: tl.constexpr,
    SYNC: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The residual plus W x: the output projection, and the down-projection of SwiGLU."""
    gemv(
        w_ptr, w_ptr, scale_ptr, scale_ptr, x_ptr, residual_ptr, residual_ptr, out_ptr, counter_ptr, eps,
        tl.program_id(0), tl.num_programs(0), OUT, K, SYNC, False, False, True, INT8, ROWS // 4, CHUNK * 4,
    )  # fmt: skip


@triton.jit
def gate_and_up_projection(
    h_ptr, norm_ptr, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, inner_ptr, counter_ptr, eps, D: tl.constexpr,
    F: tl.constexpr, SYNC: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """SwiGLU's inner activations [F] of RMSNorm(h): silu(W_gate x) * (W_up x)."""
    gemv(
        gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, h_ptr, norm_ptr, h_ptr, inner_ptr, counter_ptr, eps,
        tl.program_id(0), tl.num_programs(0), F, D, SYNC, True, True, False, INT8, ROWS, CHUNK,
    )  # fmt: skip


@triton.jit
def after_attention_kernel(
    h_ptr, latent_ptr, kv_b_ptr, kv_b_scale_ptr, o_ptr, o_scale_ptr, norm_ptr, gate_ptr, gate_scale_ptr, up_ptr,
    up_scale_ptr, down_ptr, down_scale_ptr, counter_in_ptr, eps,
    h_out_ptr, value_ptr, h_middle_ptr, inner_ptr, counter_ptr,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, V: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
    C_PADDED: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Attention over latents [H, C] to the hidden state after the layer."""
    value_up_projection(latent_ptr, kv_b_ptr, kv_b_scale_ptr, value_ptr, C, N, V, H, C_PADDED, INT8, ROWS)
    projection_and_residual(
        value_ptr, o_ptr, o_scale_ptr, h_ptr, h_middle_ptr, counter_ptr, eps, D, H * V, True, INT8, ROWS, CHUNK
    )
    gate_and_up_projection(
        h_middle_ptr, norm_ptr, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, inner_ptr, counter_ptr, eps, D, F, True,
        INT8, ROWS, CHUNK,
    )  # fmt: skip
    projection_and_residual(
        inner_ptr, down_ptr, down_scale_ptr, h_middle_ptr, h_out_ptr, counter_ptr, eps, D, F, True, INT8, ROWS, CHUNK
    )


@triton.jit
def logits_kernel(
    h_ptr, norm_ptr, head_ptr, eps, logits_ptr, D: tl.constexpr, X: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """float32 logits [X] of RMSNorm(h)."""
    gemv(
        head_ptr, head_ptr, head_ptr, head_ptr, h_ptr, norm_ptr, h_ptr, logits_ptr, logits_ptr, eps, tl.program_id(0),
        tl.num_programs(0), X, D, False, True, False, False, False, ROWS, CHUNK,
    )  # fmt: skip
