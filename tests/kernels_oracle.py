"""Oracles of both attention ops in float64 NumPy, and calls that cover the edges; for every implementation."""

import dataclasses

import jax.numpy as jnp
import numpy as np

GARBAGE = (-1, 2**31 - 1, -(2**31))
"""Block table entries that must never be followed."""


def attention_oracle(q, k, v, *, scale, offset=0, lengths=None, q_segments=None, kv_segments=None):
    """(out, lse) of causal attention, a row at a time; see `latent_attention.attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    out, lse = np.zeros((batch, queries, heads, v.shape[-1])), np.full((batch, queries, heads), -np.inf)
    offset = np.broadcast_to(offset, batch)
    for b in range(batch):
        for t in range(queries):
            seen = np.arange(keys) <= offset[b] + t
            if lengths is not None:
                seen &= np.arange(keys) < lengths[b]
            if q_segments is not None and kv_segments is not None:
                seen &= kv_segments[b] == q_segments[b, t]
            if seen.any():
                scores = np.einsum("hk,shk->hs", q[b, t], k[b, seen]) * scale
                out[b, t], lse[b, t] = _softmax(scores, lambda p, values=v[b, seen]: np.einsum("hs,shv->hv", p, values))
    return out, lse


def decode_oracle(q_BTHW, c_PSC, k_rope_PSR, lengths_B, *, scale, block_table_BN=None, scales_P2S=None):
    """(out, lse) of absorbed attention over the pages, a query at a time; see `latent_attention.decode`."""
    q = np.asarray(q_BTHW, np.float64)
    c_PSC, k_rope_PSR = np.asarray(c_PSC), np.asarray(k_rope_PSR)
    batch, queries, heads, _ = q.shape
    page_size, c_width = c_PSC.shape[1:]
    if block_table_BN is None:
        block_table_BN = np.arange(batch)[:, None]
    block_table_BN = np.asarray(block_table_BN)
    out, lse = np.zeros((batch, queries, heads, c_width)), np.full((batch, queries, heads), -np.inf)
    for b, length in enumerate(np.asarray(lengths_B).tolist()):
        keys = min(length, block_table_BN.shape[1] * page_size)
        pages = block_table_BN[b, : -(-keys // page_size)]

        def tokens(x, pages=pages, keys=keys):
            return x[pages].reshape(-1, *x.shape[2:])[:keys].astype(np.float64)

        c_SC, k_rope_SR = tokens(c_PSC), tokens(k_rope_PSR)
        if scales_P2S is not None:
            scales_S2 = tokens(np.asarray(scales_P2S).swapaxes(1, 2))
            c_SC, k_rope_SR = c_SC * scales_S2[:, :1], k_rope_SR * scales_S2[:, 1:]
        key_SW = np.concatenate([c_SC, k_rope_SR], -1)
        for t in range(queries):
            seen = min(length - queries + t + 1, keys)
            if seen > 0:
                scores = q[b, t] @ key_SW[:seen].T * scale
                out[b, t], lse[b, t] = _softmax(scores, lambda p, values=c_SC[:seen]: p @ values)
    return out, lse


def _softmax(scores_HS, mean):
    max_H1 = scores_HS.max(-1, keepdims=True)
    p_HS = np.exp(scores_HS - max_H1)
    sum_H1 = p_HS.sum(-1, keepdims=True)
    return mean(p_HS / sum_H1), (max_H1 + np.log(sum_H1))[:, 0]


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One call of `decode`, whose arrays `draw` makes."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    queries: int = 1
    heads: int = 4
    c_width: int = 64
    rope_width: int = 32
    page_size: int = 16
    pages_per_row: int = 5
    paged: bool = True
    int8: bool = False
    dtype: str = "float32"

    def draw(self, seed: int = 0):
        """(positional arguments, keyword arguments) of `decode`.

        Entries beyond the lengths and unused pages are NaN (in int8: 127 with a scale of NaN). Entries of the block
        table beyond the length are garbage; pages are in random order.
        """
        rng = np.random.default_rng(seed)
        rows, size = len(self.lengths), self.page_size
        kv_len = np.minimum(self.lengths, self.pages_per_row * size)
        used = -(-kv_len // size)
        pages = int(used.sum()) + 2 if self.paged else rows
        if self.paged:
            table_BN = rng.choice(GARBAGE, (rows, self.pages_per_row))
            order = rng.permutation(pages)
            for b, end in enumerate(np.cumsum(used)):
                table_BN[b, : used[b]] = order[end - used[b] : end]
        else:
            if self.pages_per_row != 1:
                raise ValueError("a contiguous cache has one page a row")
            table_BN = np.arange(rows)[:, None]
        valid_PS = np.zeros((pages, size), bool)
        for b in range(rows):
            for n in range(used[b]):
                valid_PS[table_BN[b, n], : kv_len[b] - n * size] = True
        q_BTHW = rng.normal(size=(rows, self.queries, self.heads, self.c_width + self.rope_width))
        cache = [rng.normal(size=(pages, size, width)) for width in (self.c_width, self.rope_width)]
        keywords = {"scale": 0.2, "block_table_BN": jnp.asarray(table_BN, jnp.int32) if self.paged else None}
        if self.int8:
            units = (np.where(valid_PS[..., None], np.clip(np.round(50 * x), -127, 127), 127) for x in cache)
            c_PSC, k_rope_PSR = (jnp.asarray(x, jnp.int8) for x in units)
            scales_P2S = np.where(valid_PS[:, None], rng.uniform(0.005, 0.05, (pages, 2, size)), np.nan)
            keywords["scales_P2S"] = jnp.asarray(scales_P2S, jnp.float32)
        else:
            c_PSC, k_rope_PSR = (jnp.asarray(np.where(valid_PS[..., None], x, np.nan), self.dtype) for x in cache)
        lengths_B = jnp.asarray(self.lengths, jnp.int32)
        return (jnp.asarray(q_BTHW, self.dtype), c_PSC, k_rope_PSR, lengths_B), keywords

    def expected(self, seed: int = 0):
        """(out, lse) of `draw` in float64, from the inputs as they are after rounding to `dtype`."""
        arrays, keywords = self.draw(seed)
        return decode_oracle(*arrays, **keywords)


def contiguous(lengths: tuple[int, ...], capacity: int, **options) -> DecodeCase:
    """A cache without a block table."""
    return DecodeCase(lengths, page_size=capacity, pages_per_row=1, paged=False, **options)


DECODE_CASES = {
    "one token": contiguous((1,), 1),
    "lengths 0 and 1": contiguous((0, 1, 77, 30), 77),
    "all empty": contiguous((0, 0), 64),
    "ragged": contiguous((77, 1, 40, 64, 65, 63), 77),
    "long": contiguous((5000, 3, 2049), 5000, heads=2),
    "beyond the capacity": contiguous((42, 41, 40, 2**31 - 1), 40, queries=2),
    "more queries than tokens": contiguous((3, 0, 8, 9), 40, queries=8),
    "one head": contiguous((50, 7), 64, heads=1),
    "heads that fill no power of two": contiguous((50, 7), 64, heads=5, queries=3),
    "wide": contiguous((130, 129), 192, c_width=192, rope_width=64, heads=2),
    "pages": DecodeCase((80, 17, 16, 15)),
    "pages: lengths 0 and 1": DecodeCase((0, 1, 80)),
    "pages: all empty": DecodeCase((0, 0)),
    "pages of one token": DecodeCase((5, 2), page_size=1),
    "pages of 64": DecodeCase((700, 64, 65, 1), page_size=64, pages_per_row=11, heads=2),
    "pages: beyond the capacity": DecodeCase((82, 81, 80, 2**31 - 1), queries=2),
    "pages: more queries than tokens": DecodeCase((3, 0, 8, 80), queries=8),
    "one page a row": DecodeCase((40, 33, 0), page_size=40, pages_per_row=1),
    **{f"{t} queries": contiguous((70, t, 33), 70, queries=t) for t in range(2, 9)},
    **{f"pages: {t} queries": DecodeCase((70, t, 33), queries=t) for t in range(2, 9)},
}
DECODE_CASES |= {f"int8: {name}": dataclasses.replace(case, int8=True) for name, case in DECODE_CASES.items()}
"""Cases by name, in float32; `dataclasses.replace(case, dtype="bfloat16")` for other types."""
FEW_DECODE_CASES = {
    name: case
    for name, case in DECODE_CASES.items()
    if not name.endswith(tuple(f"{t} queries" for t in (3, 4, 5, 6, 7)))
}
"""A selection, for where each case takes long."""
