"""The public ops, `attention` and `decode`, and the choice of the implementation that runs a call.

An implementation of OP called NAME is the module `latent_attention/OP/NAME.py` (`reference.py` beside this file serves
both ops). It defines

    OP(...)                        the arrays of the public op below, positional, and its options as keywords
    attention_gradients(...)       likewise, if OP is `attention`
    why_not_OP(shape, gpu)         None if it can run such a call on this GPU, else the reason, for the error message

and is listed in IMPLEMENTATIONS, fastest first. `resolve` asks each for its reason, in that order, when a call is
traced; the first that has none runs. To add one, write the module and list it here.
"""

import importlib
import os
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from latent_attention.call_shapes import AttentionShape, DecodeShape
from latent_attention.gpu import Gpu, local_gpu
from latent_attention.sharding import per_shard

IMPLEMENTATIONS = {
    "attention": ("cudnn", "triton", "xla", "reference"),
    "decode": ("mosaic", "triton", "xla", "reference"),
}
"""Implementations of each op, fastest first; each is a module in the op's folder, see above."""
ENVIRONMENT = {"attention": "LATENT_ATTENTION_IMPLEMENTATION", "decode": "LATENT_DECODE_IMPLEMENTATION"}
"""Environment variable that names the implementation of each op where the call says `auto`."""
_choices: dict[str, dict[str, dict[str, str]]] = {op: {} for op in IMPLEMENTATIONS}
_TRITON_TENSOR_CORES = (8, 0)
"""First compute capability on which Triton uses tensor cores (since its version 3.3)."""


class UnavailableError(ValueError):
    """The requested implementation is unknown, or cannot run here; the message says why."""


def resolve(op: str, implementation: str, shape: AttentionShape | DecodeShape) -> str:
    """Name of the implementation of `op` to run: the argument, else the environment, else the fastest that can run.

    Raises:
        UnavailableError: the name is unknown, or that implementation cannot run at this shape or on this machine.
    """
    source = "implementation"
    if implementation == "auto":
        source, implementation = ENVIRONMENT[op], os.environ.get(ENVIRONMENT[op], "auto")
    gpu = local_gpu()
    if implementation == "auto":
        refused: dict[str, str] = {}
        for name in IMPLEMENTATIONS[op]:
            reason = _why_not_auto(op, name, gpu) or _why_not(op, name, shape, gpu)
            if reason is None:
                break
            refused[name] = reason
        _choices[op][name] = refused
        return name
    if implementation not in IMPLEMENTATIONS[op]:
        known = ", ".join(IMPLEMENTATIONS[op])
        raise UnavailableError(f"{source}={implementation!r} is unknown for {op}; known: auto, {known}")
    reason = _why_not(op, implementation, shape, gpu)
    if reason is not None:
        raise UnavailableError(f"{source}={implementation!r} cannot run {op}: {reason}")
    return implementation


def choices(op: str) -> dict[str, dict[str, str]]:
    """The choices of `auto` for `op` in this process: by implementation, why the faster ones could not run."""
    return {name: dict(refused) for name, refused in _choices[op].items()}


def _why_not_auto(op: str, name: str, gpu: Gpu | None) -> str | None:
    """Why `auto` does not even try it. Below Ampere XLA is the fastest: its cuBLAS uses tensor cores there."""
    if name in ("xla", "reference"):
        return None
    if gpu is None:
        return "there is no GPU"
    if gpu.capability < _TRITON_TENSOR_CORES:
        return "XLA is faster on GPUs before Ampere"
    return None


def _module(op: str, name: str) -> ModuleType:
    # Imported lazily: Triton and Mosaic need packages and seconds of import time that XLA does not.
    folder = "latent_attention" if name == "reference" else f"latent_attention.{op}"
    return importlib.import_module(f"{folder}.{name}")


def _why_not(op: str, name: str, shape: AttentionShape | DecodeShape, gpu: Gpu | None) -> str | None:
    try:
        module = _module(op, name)
    except (ImportError, AttributeError) as e:  # Mosaic GPU is experimental: its API differs between versions of JAX
        return f"it does not load with jax {jax.__version__}: {e}"
    return getattr(module, f"why_not_{op}")(shape, gpu)


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
    Softmax is float32. Differentiable in q, k and v; memory grows with T + S, not T x S. The output and log-sum-exp
    that the backward pass needs are named `latent_attention` for `jax.checkpoint` policies.

    On an explicit mesh the batch and the heads may be sharded; each device then runs its own shard.

    Args:
        q_BTHK: queries; K may differ from V.
        k_BSHK: keys.
        v_BSHV: values.
        scale: softmax scale, the factor of q k^T before the softmax.
        q_offset: index of the first query, one for all rows of the batch or int32 [B].
        kv_lengths: valid keys of each row, int32 [B]; None for all. Entries beyond it are ignored and may be NaN.
        q_segments: segment of each query, int32 [B, T]; needs `kv_segments`.
        kv_segments: segment of each key, int32 [B, S].
        implementation: `auto`, or one of IMPLEMENTATIONS["attention"].
        return_lse: also return the log-sum-exp of the scores, to `merge` partial results.

    Returns:
        out_BTHV in the type of q, and lse_BTH float32 if asked. A query that sees nothing gives 0 and -inf.

    Raises:
        UnavailableError: see `resolve`.
        ValueError: shapes do not fit together.
    """
    out_BTHV, lse_BTH = _run_attention(
        "attention", {"q": q_BTHK, "k": k_BSHK, "v": v_BSHV}, ("B.H.", "B.H"), scale, implementation,
        q_offset=q_offset, kv_lengths=kv_lengths, q_segments=q_segments, kv_segments=kv_segments,
    )  # fmt: skip
    return (out_BTHV, lse_BTH) if return_lse else out_BTHV


def attention_gradients(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    out_BTHV: jax.Array,
    lse_BTH: jax.Array,
    d_out_BTHV: jax.Array,
    *,
    scale: float,
    implementation: str = "auto",
    **mask: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of attention to many keys, of which these are some: what these contribute to dq, and their dk and dv.

    For attention whose keys are visited part by part, the results merged: given the output and the log-sum-exp over
    all keys, a part needs nothing of the others, since probabilities are exp(score - log-sum-exp). dq is the sum.

    Args:
        q_BTHK: queries.
        k_BSHK: keys of this part.
        v_BSHV: values of this part.
        out_BTHV: output over all keys.
        lse_BTH: log-sum-exp over all keys, float32.
        d_out_BTHV: gradient by `out_BTHV`. Nothing may depend on `lse_BTH`.
        scale: as for `attention`.
        implementation: as for `attention`.
        **mask: `q_offset`, `kv_lengths`, `q_segments` and `kv_segments` of this part, as for `attention`.

    Returns:
        dq_BTHK, dk_BSHK and dv_BSHV, in the type of q.

    Raises:
        UnavailableError: see `resolve`.
        ValueError: shapes do not fit together.
    """
    arrays = {"q": q_BTHK, "k": k_BSHK, "v": v_BSHV, "out": out_BTHV, "lse": lse_BTH, "d_out": d_out_BTHV}
    return _run_attention("attention_gradients", arrays, ("B.H.",) * 3, scale, implementation, **mask)


def _run_attention(
    function: str, arrays: dict[str, jax.Array], out_axes: tuple[str, ...], scale: float, implementation: str, *,
    q_offset: int | jax.Array = 0, kv_lengths=None, q_segments=None, kv_segments=None,
):  # fmt: skip
    """Runs this function of an implementation of `attention` on each device's shard of the batch and the heads."""
    q_BTHK, k_BSHK, v_BSHV = (arrays[name] for name in "qkv")
    _check_ranks({"q": (q_BTHK, 4), "k": (k_BSHK, 4), "v": (v_BSHV, 4)})
    (b, t, h, k), (_, s, _, v) = q_BTHK.shape, v_BSHV.shape
    if k_BSHK.shape != (b, s, h, k) or v_BSHV.shape != (b, s, h, v):
        raise ValueError(f"shapes q {q_BTHK.shape}, k {k_BSHK.shape}, v {v_BSHV.shape} are not BTHK, BSHK, BSHV")
    for name, expected in {"out": (b, t, h, v), "lse": (b, t, h), "d_out": (b, t, h, v)}.items():
        if name in arrays and arrays[name].shape != expected:
            raise ValueError(f"{name} has the shape {arrays[name].shape}, expected {expected}")
    types = {name: x.dtype.name for name, x in arrays.items() if name != "lse"}
    if len(set(types.values())) > 1:
        raise ValueError(f"{', '.join(f'{x} is {dtype}' for x, dtype in types.items())}: they must have one type")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segments and kv_segments must be given together")
    static_offset = q_offset if isinstance(q_offset, int) else None
    mask = {
        "q_offset": None if isinstance(q_offset, int) else _int32("q_offset", jnp.broadcast_to(q_offset, b), (b,)),
        "kv_lengths": _int32("kv_lengths", kv_lengths, (b,)),
        "q_segments": _int32("q_segments", q_segments, (b, t)),
        "kv_segments": _int32("kv_segments", kv_segments, (b, s)),
    }

    def run(q, k, v, *rest):
        (batch, queries, heads, qk_width), (_, keys, _, v_width) = q.shape, v.shape
        shape = AttentionShape(
            batch, queries, keys, heads, qk_width, v_width, q.dtype.name, q_segments is not None,
            kv_lengths is not None, static_offset,
        )  # fmt: skip
        module = _module("attention", resolve("attention", implementation, shape))
        rest, local_mask = rest[: -len(mask)], dict(zip(mask, rest[-len(mask) :], strict=True))
        if static_offset is not None:
            local_mask["q_offset"] = static_offset
        return getattr(module, function)(q, k, v, *rest, scale=scale, **local_mask)

    axes: dict[str, tuple[jax.Array | None, str]] = {name: (x, "B.H."[: x.ndim]) for name, x in arrays.items()}
    axes |= {name: (x, "B." if "segments" in name else "B") for name, x in mask.items()}
    return per_shard(run, axes, out_axes=out_axes)


def decode(
    q_BTHW: jax.Array,
    c_PSC: jax.Array,
    k_rope_PSR: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    block_table_BN: jax.Array | None = None,
    scales_P2S: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Absorbed MLA attention over the latent cache: every head reads the same latents (DeepSeek-V2, section 2.1.2).

    The cache is a pool of P pages of S tokens. Without a block table, row b of the batch holds page b (P = B). With
    one, token s of row b is token `s % S` of page `block_table_BN[b, s // S]`.

    On an explicit mesh the batch and the heads may be sharded, and the pages with the batch: the block table then
    counts the pages of its own device. There are no gradients through this op; training uses `attention`.

    Args:
        q_BTHW: queries [content C | rotary R], the content part already multiplied by the key up-projection.
        c_PSC: cached latents, 16 or 32 bits, or int8 from `quantize`.
        k_rope_PSR: cached rotary keys, of the type of c_PSC.
        lengths_B: valid cache entries, int32, counting the T query tokens, which are the last T entries and causal
            among themselves; clamped to the capacity of the cache. Entries beyond it are ignored and may be NaN.
        scale: softmax scale, the factor of q k^T before the softmax.
        block_table_BN: pages of each row, int32; entries beyond the length may be anything.
        scales_P2S: scales of an int8 cache, float32: one for the latent and one for the rotary key of each token.
        implementation: `auto`, or one of IMPLEMENTATIONS["decode"].

    Returns:
        out_BTHC in the type of q, still to be multiplied by the value up-projection, and lse_BTH float32. A query that
        sees nothing gives 0 and -inf.

    Raises:
        UnavailableError: see `resolve`.
        ValueError: shapes or types do not fit together.
    """
    _check_ranks({"q": (q_BTHW, 4), "c": (c_PSC, 3), "k_rope": (k_rope_PSR, 3), "block_table": (block_table_BN, 2)})
    (b, *_, w), (p, s, c), r = q_BTHW.shape, c_PSC.shape, k_rope_PSR.shape[-1]
    pages = p if block_table_BN is None else block_table_BN.shape[0]
    if pages != b or k_rope_PSR.shape != (p, s, r) or w != c + r:
        table = "" if block_table_BN is None else f", block_table {block_table_BN.shape}"
        raise ValueError(
            f"shapes q {q_BTHW.shape}, c {c_PSC.shape}, k_rope {k_rope_PSR.shape}{table} are not BTHW, PSC, PSR, BN "
            "with W = C + R (and P = B without a block table)"
        )
    lengths = _int32("lengths", lengths_B, (b,))
    block_table = None if block_table_BN is None else _int32("block_table", block_table_BN, block_table_BN.shape)
    int8 = c_PSC.dtype == jnp.int8
    if k_rope_PSR.dtype != c_PSC.dtype or int8 != (scales_P2S is not None):
        raise ValueError(
            f"c is {c_PSC.dtype}, k_rope is {k_rope_PSR.dtype}, scales are {'not ' * (scales_P2S is None)}given: "
            "the two must have one type, and scales go with int8"
        )
    if scales_P2S is not None and scales_P2S.shape != (p, 2, s):
        raise ValueError(f"scales {scales_P2S.shape} are not P2S {(p, 2, s)}")

    def run(q, c, k_rope, lengths, block_table, scales):
        shape = DecodeShape.of(q, c, k_rope, block_table)
        module = _module("decode", resolve("decode", implementation, shape))
        return module.decode(q, c, k_rope, lengths, scale=scale, block_table_BN=block_table, scales_P2S=scales)

    arrays = {
        "q": (q_BTHW, "B.H."), "c": (c_PSC, "B.."), "k_rope": (k_rope_PSR, "B.."), "lengths": (lengths, "B"),
        "block_table": (block_table, "B."), "scales": (scales_P2S, "B.."),
    }  # fmt: skip
    return per_shard(run, arrays, out_axes=("B.H.", "B.H"))


def _check_ranks(arrays: dict[str, tuple[jax.Array | None, int]]) -> None:
    for name, (x, rank) in arrays.items():
        if x is not None and x.ndim != rank:
            raise ValueError(f"{name} has the shape {x.shape}, expected {rank} dimensions")


def _int32(name: str, x: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    if x is None:
        return None
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} is {x.dtype} {x.shape}, expected int32 {shape}")
    return jnp.asarray(x, jnp.int32)
