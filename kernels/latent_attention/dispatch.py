"""The public ops. Which implementation runs is decided here, once per platform and shape."""

import os

import jax
import jax.numpy as jnp

from latent_attention import reference, xla

ENVIRONMENT = "LATENT_ATTENTION_IMPLEMENTATION"
_MODULES = {"xla": xla, "reference": reference}
IMPLEMENTATIONS = tuple(_MODULES)


class UnavailableError(ValueError):
    """The requested implementation is unknown, or cannot run here; the message says why."""


def resolve(implementation: str, *, batch: int, heads: int, queries: int, keys: int) -> str:
    """Name of the implementation to run: the argument, else the environment, else the fastest that can run.

    Raises:
        UnavailableError: the name is unknown, or that implementation cannot run at this shape.
    """
    source = "implementation"
    if implementation == "auto":
        source, implementation = ENVIRONMENT, os.environ.get(ENVIRONMENT, "auto")
    if implementation == "auto":
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UnavailableError(f"{source}={implementation!r} is unknown; known: auto, {', '.join(IMPLEMENTATIONS)}")
    reason = reference.why_not(batch, heads, queries, keys) if implementation == "reference" else None
    if reason is not None:
        raise UnavailableError(f"{source}={implementation!r} cannot run: {reason}")
    return implementation


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    *,
    scale: float,
    q_offset: int | jax.Array = 0,
    kv_lengths: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal multi-head attention over expanded keys and values, for training and prefill.

    Query t, at index `q_offset + t`, sees key s if `s <= q_offset + t`, `s < kv_lengths` and their segments are equal.
    Softmax is float32. Differentiable in q, k and v; memory grows with T + S, not T x S.

    Args:
        q_BTHK: queries; K may differ from V.
        k_BSHK: keys.
        v_BSHV: values.
        scale: factor of the scores before the softmax.
        q_offset: index of the first query, one for all rows of the batch or int32 [B].
        kv_lengths: valid keys of each row, int32 [B]; None for all. What lies beyond is never read, NaN or not.
        q_segments: segment of each query, int32 [B, T]; needs `kv_segments`.
        kv_segments: segment of each key, int32 [B, S].
        implementation: `auto`, or one of IMPLEMENTATIONS.
        return_lse: also return the log-sum-exp of the scores, to `merge` partial results.

    Returns:
        out_BTHV in the type of q, and lse_BTH float32 if asked. A query that sees nothing gives 0 and -inf.

    Raises:
        UnavailableError: see `resolve`.
        ValueError: shapes do not fit together.
    """
    (b, t, h, k), (_, s, _, v) = q_BTHK.shape, v_BSHV.shape
    if k_BSHK.shape != (b, s, h, k) or v_BSHV.shape != (b, s, h, v):
        raise ValueError(f"shapes q {q_BTHK.shape}, k {k_BSHK.shape}, v {v_BSHV.shape} are not BTHK, BSHK, BSHV")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segments and kv_segments must be given together")
    name = resolve(implementation, batch=b, heads=h, queries=t, keys=s)
    out_BTHV, lse_BTH = _MODULES[name].attention(
        q_BTHK, k_BSHK, v_BSHV, scale=scale, q_offset=q_offset, kv_lengths=kv_lengths, q_segments=q_segments,
        kv_segments=kv_segments,
    )  # fmt: skip
    return (out_BTHV, lse_BTH) if return_lse else out_BTHV


def decode(
    q_BTHW: jax.Array,
    c_BSC: jax.Array,
    k_rope_BSR: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Absorbed MLA attention over the latent cache: every head reads the same latents (DeepSeek-V2, section 2.1.2).

    Args:
        q_BTHW: queries [content C | rotary R], the content part already multiplied by the key up-projection.
        c_BSC: cached latents.
        k_rope_BSR: cached rotary keys.
        lengths_B: valid cache entries, int32, counting the T query tokens, which are the last T entries and causal
            among themselves. More than S counts as S keys.
        scale: factor of the scores before the softmax.
        implementation: `auto`, or one of IMPLEMENTATIONS.

    Returns:
        out_BTHC in the type of q, still to be multiplied by the value up-projection, and lse_BTH float32.

    Raises:
        UnavailableError: see `resolve`.
        ValueError: shapes do not fit together.
    """
    (b, t, h, w), (_, s, c), r = q_BTHW.shape, c_BSC.shape, k_rope_BSR.shape[-1]
    if c_BSC.shape[0] != b or k_rope_BSR.shape != (b, s, r) or w != c + r or lengths_B.shape != (b,):
        raise ValueError(
            f"shapes q {q_BTHW.shape}, c {c_BSC.shape}, k_rope {k_rope_BSR.shape}, lengths {lengths_B.shape} are not "
            "BTHW, BSC, BSR, B with W = C + R"
        )
    name = resolve(implementation, batch=b, heads=h, queries=t, keys=s)
    return _MODULES[name].decode(q_BTHW, c_BSC, k_rope_BSR, lengths_B, scale=scale)


def merge(out1: jax.Array, lse1: jax.Array, out2: jax.Array, lse2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combines attention over two disjoint sets of keys: out [..., V] and lse [...] of each into those of the union."""
    lse = jnp.logaddexp(lse1, lse2)
    safe = jnp.where(lse == -jnp.inf, 0, lse)
    share1, share2 = jnp.exp(lse1 - safe)[..., None], jnp.exp(lse2 - safe)[..., None]
    out = share1 * out1.astype(jnp.float32) + share2 * out2.astype(jnp.float32)
    return out.astype(out1.dtype), lse
