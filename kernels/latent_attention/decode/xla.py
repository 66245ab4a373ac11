"""Absorbed decode in plain XLA: online softmax over chunks of the cache, gathered one at a time.

A chunk consists of pieces: whole small pages, or a part of a large one. The loop ends with the longest row.
Matmuls take their operands in the type of q and accumulate in float32, which tensor cores do from Turing on.
"""

import jax
import jax.numpy as jnp

from latent_attention.attention.xla import dot, normalize, online_softmax
from latent_attention.call_shapes import DecodeShape
from latent_attention.gpu import Gpu, local_gpu


def why_not_decode(shape: DecodeShape, gpu: Gpu | None) -> str | None:
    """None: XLA runs everywhere."""
    return None


def _chunk_tokens(batch: int) -> int:
    """Tokens of a chunk of each row: their scores fit the caches of a CPU, or occupy a GPU."""
    return 2048 if local_gpu() is None else max((1 << 16) // batch, 256)


def decode(q_BTHW, c_PSC, k_rope_PSR, lengths_B, *, scale, block_table_BN, scales_P2S):
    """See `latent_attention.decode`. Returns (out_BTHC, lse_BTH)."""
    (batch, queries, heads, _), (_, page_size, c_width) = q_BTHW.shape, c_PSC.shape
    dtype, rows = q_BTHW.dtype, queries * heads
    q_content, q_rope = jnp.split(q_BTHW.reshape(batch, rows, -1), [c_width], axis=-1)
    table_BN = jnp.arange(batch)[:, None] if block_table_BN is None else block_table_BN
    capacity = table_BN.shape[1] * page_size
    kv_len_B = jnp.minimum(lengths_B, capacity)
    # Query token r // heads is row r of the matmuls.
    last_BR1 = (lengths_B - queries)[:, None, None] + jnp.arange(rows)[:, None] // heads

    size = min(page_size, _chunk_tokens(batch))
    per_page = -(-page_size // size)
    pieces = min(max(_chunk_tokens(batch) // size, 1), table_BN.shape[1] * per_page)

    def chunk(j, carry):
        acc, m_i, l_i = carry
        n = j * pieces + jnp.arange(pieces)
        wanted_N = n % per_page * size
        # The last piece of a page starts early so as to end with it; the tokens it shares with the previous are masked.
        start_N = jnp.minimum(wanted_N, page_size - size)
        offset_NS = start_N[:, None] + jnp.arange(size)
        token_NS = (n // per_page)[:, None] * page_size + offset_NS
        s = jnp.where(offset_NS >= wanted_N[:, None], token_NS, capacity).reshape(-1)
        # Entries beyond the length may be anything: indices are clamped.
        page_BN = jnp.take(table_BN, n // per_page, axis=1, mode="clip")

        def gather(x, axis):
            """Gathers the pieces [B, N, ...] of x [P, ...], whose token axis is `axis`."""
            if x.dtype == jnp.bfloat16 and local_gpu() is None:
                # Else XLA converts all of the cache to float32 before the loop.
                x, _ = jax.lax.optimization_barrier((x, j))
            shape = (1, *x.shape[1:axis], size, *x.shape[axis + 1 :])

            def piece(page, start):
                # One slice of page and tokens at once: of two, XLA would hoist the one of whole pages out of the loop.
                return jax.lax.dynamic_slice(x, [page, *(start if i == axis else 0 for i in (1, 2))], shape)[0]

            return jax.vmap(jax.vmap(piece), (0, None))(page_BN, start_N)

        c, k_rope = (gather(x, 1).reshape(batch, pieces * size, -1) for x in (c_PSC, k_rope_PSR))
        # Entries beyond the length may be NaN, and 0 x NaN is NaN.
        c = jnp.where((s < kv_len_B[:, None])[..., None], c, 0).astype(dtype)
        content, rope = dot("brc,bsc->brs", q_content, c), dot("brw,bsw->brs", q_rope, k_rope.astype(dtype))
        if scales_P2S is not None:
            # int8 is exact in 16 bits: matmuls take it unscaled, and the scales multiply scores and probabilities.
            scales_2BS = jnp.moveaxis(gather(scales_P2S, 2), 2, 0).reshape(2, batch, -1)
            c_scale, rope_scale = jnp.where(s < kv_len_B[:, None], scales_2BS, 0)[:, :, None]
            content, rope = content * c_scale, rope * rope_scale
        scores = jnp.where(s <= jnp.minimum(last_BR1, kv_len_B[:, None, None] - 1), (content + rope) * scale, -jnp.inf)
        p, alpha, m_i, l_i = online_softmax(scores, m_i, l_i)
        acc *= alpha[..., None]
        if scales_P2S is None:
            return acc + dot("brs,bsc->brc", p.astype(dtype), c), m_i, l_i
        # Relative to the largest scale: a probability times a small scale may underflow in float16.
        largest = jnp.maximum(jnp.max(c_scale, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        p = (p * (c_scale / largest)).astype(dtype)
        return acc + dot("brs,bsc->brc", p, c) * largest, m_i, l_i

    start = jnp.zeros((batch, rows, c_width)), jnp.full((batch, rows), -jnp.inf), jnp.zeros((batch, rows))
    if pieces == table_BN.shape[1] * per_page:
        result = chunk(0, start)
    else:
        # Only chunks that hold tokens of some row.
        last = jnp.max(kv_len_B)
        end = last // page_size * per_page + (last % page_size + size - 1) // size
        result = jax.lax.fori_loop(0, (end + pieces - 1) // pieces, chunk, start)
    out, lse = normalize(*result)
    shape = batch, queries, heads
    return out.astype(dtype).reshape(*shape, c_width), lse.reshape(shape)
