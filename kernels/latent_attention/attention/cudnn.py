"""Expanded attention by cuDNN (Ampere and newer): the fastest where the mask is one that cuDNN knows.

That is: causal from the first key (training, the diagonal of a prefill), or every query sees every key (an earlier
chunk of a prefill); either with `kv_lengths`.

`jax.nn.dot_product_attention` has no place to name the residuals for `jax.checkpoint` and refuses unequal widths, so
this calls the two primitives under it. They are private to JAX: only `_private` and `_bind` depend on them, and
`_private` says so if they changed.

cuDNN's backward pass takes no gradient of the log-sum-exp. Unless that is a symbolic zero (it is where `merge` is not
used, as in training), the backward pass of Triton, or else of XLA, runs instead, on the same residuals.
"""

import functools
import inspect
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from latent_attention.attention import triton, xla
from latent_attention.call_shapes import AttentionShape
from latent_attention.gpu import Gpu, local_gpu

_OPERANDS = "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v".split()
_RESIDUALS = "activation fwd_output grad_output".split()
_OPTIONS = "scale seed dropout_rate variadic_args mask_type layout sliding_window_length".split()
_SIGNATURES = {"fwd": [*_OPERANDS, *_OPTIONS, "is_training"], "bwd": [*_OPERANDS, *_RESIDUALS, *_OPTIONS]}
"""Signatures of the primitives in jax 0.10.2 and 0.11.2."""
_UNEQUAL_WIDTHS = {(192, 128)}
"""(K, V) with K != V that cuDNN supports, from Hopper and version 9.10 on. Others are padded to the larger."""
_UNEQUAL_WIDTHS_SINCE = 91000
_KEY_TILE = 128


@functools.cache
def _private() -> ModuleType | str:
    """JAX's module of the cuDNN primitives, or why it cannot be used."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module

        for name, signature in _SIGNATURES.items():
            found = list(inspect.signature(getattr(module, f"_dot_product_attention_{name}_impl")).parameters)
            if found != signature:
                return f"jax {jax.__version__} changed its cuDNN primitive {name!r} to {found}; use jax 0.10 or 0.11"
            getattr(module, f"_dot_product_attention_{name}_p_wrapper")
    except (ImportError, AttributeError) as e:
        return f"jax {jax.__version__} has no cuDNN primitives where they are expected ({e}); use jax 0.10 or 0.11"
    return module


def _cudnn_version() -> int | None:
    """cuDNN's version, 91001 for 9.10.1; None where there is none, as when lowering for a GPU that is not here."""
    module = _private()
    try:
        return None if isinstance(module, str) else module.check_cudnn_version()
    except RuntimeError:
        return None


def _bind(name: str, mask: str, scale: float, q, k, v, lengths_B: jax.Array | None, *residuals) -> list[jax.Array]:
    """Runs primitive `fwd` or `bwd` with a mask of this name in JAX's `MaskType`."""
    module: Any = _private()
    unused = jnp.zeros(0, q.dtype)
    seqlens = unused, unused
    if lengths_B is not None:
        seqlens = jnp.full(q.shape[0], q.shape[1], jnp.int32), lengths_B
    options: dict[str, Any] = {
        "scale": scale, "seed": 0, "dropout_rate": 0.0, "variadic_args": (False, False),
        "mask_type": module.MaskType[mask], "layout": module.AttentionLayout.BTNH.value, "sliding_window_length": None,
    }  # fmt: skip
    if name == "fwd":
        options["is_training"] = True  # also returns the log-sum-exp
    primitive = getattr(module, f"_dot_product_attention_{name}_p_wrapper")
    return primitive.bind(q, k, v, unused, *seqlens, unused, unused, unused, unused, *residuals, **options)


def _padded(width: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B, T, H, W] with zeros up to this width, which change neither scores nor outputs."""
    return tuple(jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in arrays)


def _run(name: str, mask: str, scale: float, q, k, v, lengths_B: jax.Array | None, *residuals) -> list[jax.Array]:
    """`_bind` for any widths K of q and k, V of v and, among the residuals, of the output and its gradient."""
    widths = k.shape[-1], v.shape[-1]
    qk_width, v_width = widths if widths in _UNEQUAL_WIDTHS else (max(widths),) * 2
    q, k, v = *_padded(qk_width, q, k), *_padded(v_width, v)
    if name == "fwd":
        out, lse = _bind(name, mask, scale, q, k, v, lengths_B)
        return [out[..., : widths[1]], lse]
    lse, *of_v_width = residuals
    gradients = _bind(name, mask, scale, q, k, v, lengths_B, lse, *_padded(v_width, *of_v_width))
    return [x[..., :width] for x, width in zip(gradients, (widths[0], *widths), strict=True)]


def _attend(q, k, v, lengths_B: jax.Array | None, scale: float, mask: str) -> tuple[jax.Array, jax.Array]:
    """Forward pass: (out_BTHV, lse_BHT); lengths_B, if given, must be at least 1."""
    out, lse = _run("fwd", mask, scale, q, k, v, lengths_B)
    return out, lse


_attention = jax.custom_vjp(_attend, nondiff_argnums=(4, 5))


def _forward(q, k, v, lengths_B, scale: float, mask: str):
    q, k, v = q.value, k.value, v.value
    lengths_B = None if lengths_B is None else lengths_B.value
    # Named, so that a remat policy can save them: the backward pass then does not recompute the forward pass.
    out, lse = (checkpoint_name(x, "latent_attention") for x in _attend(q, k, v, lengths_B, scale, mask))
    return (out, lse), (q, k, v, lengths_B, out, lse)


def _backward(scale: float, mask: str, residuals, cotangents):
    q, k, v, lengths_B, out, lse = residuals
    d_out, d_lse = cotangents
    if not isinstance(d_lse, SymbolicZero):
        (batch, queries, heads, width), (_, keys, _, v_width) = q.shape, v.shape
        shape = AttentionShape(batch, queries, keys, heads, width, v_width, q.dtype.name, False, True, None)
        other = xla if triton.why_not_attention(shape, local_gpu()) else triton
        if isinstance(d_out, SymbolicZero):
            d_out = jnp.zeros(out.shape, out.dtype)
        lse, d_lse, offset = lse.swapaxes(1, 2), d_lse.swapaxes(1, 2), 0 if "CAUSAL" in mask else keys
        return *other.attention_gradients(
            q, k, v, out, lse, d_out, d_lse, scale=scale, q_offset=offset, kv_lengths=lengths_B, q_segments=None,
            kv_segments=None,
        ), None  # fmt: skip
    if isinstance(d_out, SymbolicZero):
        return *(jnp.zeros(x.shape, x.dtype) for x in (q, k, v)), None
    return *_run("bwd", mask, scale, q, k, v, lengths_B, lse, out, d_out), None


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _mask(q_BTHK, k_BSHK, q_offset: int, kv_lengths) -> tuple[int, jax.Array | None, str]:
    """The number of keys that some query sees, the lengths that cuDNN is given, and the name of its mask."""
    (batch, queries), keys = q_BTHK.shape[:2], k_BSHK.shape[1]
    causal = q_offset < keys - 1
    keys = min(keys, queries) if causal else keys
    lengths_B = None
    if kv_lengths is not None:
        lengths_B = jnp.clip(kv_lengths, 1, keys).astype(jnp.int32)  # before 9.25 cuDNN gives NaN for length 0
    elif not causal and keys % _KEY_TILE:
        # Without a mask, cuDNN's backward pass takes the padding of its last tile for keys (NVIDIA/cudnn-frontend#160).
        lengths_B = jnp.full(batch, keys, jnp.int32)
    words = (["PADDING"] if lengths_B is not None else []) + (["CAUSAL"] if causal else [])
    return keys, lengths_B, "_".join(words) or "NO_MASK"


def _visible(keys: int, kv_lengths, *of_keys: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B, S, ...] without what no query sees.

    A mask is not enough: entries beyond the length may be NaN, and 0 x NaN is NaN. XLA fuses this with the producer.
    Its transpose zeroes the gradients there, which cuDNN may leave unwritten.
    """
    of_keys = tuple(x[:, :keys] for x in of_keys)
    if kv_lengths is None:
        return of_keys
    valid_BS11 = (jnp.arange(keys) < kv_lengths[:, None])[..., None, None]
    return tuple(jnp.where(valid_BS11, x, 0) for x in of_keys)


def attention(q_BTHK, k_BSHK, v_BSHV, *, scale, q_offset, kv_lengths, q_segments, kv_segments):
    """See `latent_attention.attention`. Returns (out_BTHV, lse_BTH)."""
    keys, lengths_B, mask = _mask(q_BTHK, k_BSHK, q_offset, kv_lengths)
    k, v = _visible(keys, kv_lengths, k_BSHK, v_BSHV)
    out_BTHV, lse_BHT = _attention(q_BTHK, k, v, lengths_B, float(scale), mask)
    lse_BTH = lse_BHT.swapaxes(1, 2)
    if kv_lengths is not None:
        empty_B11 = (kv_lengths <= 0)[:, None, None]
        out_BTHV, lse_BTH = jnp.where(empty_B11[..., None], 0, out_BTHV), jnp.where(empty_B11, -jnp.inf, lse_BTH)
    return out_BTHV, lse_BTH


def attention_gradients(
    q_BTHK, k_BSHK, v_BSHV, out_BTHV, lse_BTH, d_out_BTHV, *, scale, q_offset, kv_lengths, q_segments, kv_segments
):
    """See `latent_attention.attention_gradients`. cuDNN makes probabilities of the log-sum-exp that it is given."""
    keys, lengths_B, mask = _mask(q_BTHK, k_BSHK, q_offset, kv_lengths)
    (k, v), to_all_keys = jax.vjp(functools.partial(_visible, keys, kv_lengths), k_BSHK, v_BSHV)
    if kv_lengths is not None:  # cuDNN is told that rows without keys have one, which must get nothing
        empty_B11 = (kv_lengths <= 0)[:, None, None]
        d_out_BTHV, lse_BTH = jnp.where(empty_B11[..., None], 0, d_out_BTHV), jnp.where(empty_B11, 0, lse_BTH)
    residuals = lse_BTH.swapaxes(1, 2), out_BTHV, d_out_BTHV
    d_q, d_k, d_v = _run("bwd", mask, float(scale), q_BTHK, k, v, lengths_B, *residuals)
    return d_q, *to_all_keys((d_k, d_v))


def why_not_attention(shape: AttentionShape, gpu: Gpu | None) -> str | None:
    """Why cuDNN cannot run calls of this shape on this GPU, or None."""
    private, version = _private(), _cudnn_version()
    widths = shape.qk_width, shape.v_width
    if isinstance(private, str):
        return private
    if gpu is None or gpu.capability < (8, 0):
        return f"cuDNN attention needs an NVIDIA GPU from sm_80 on, this is {gpu.name if gpu else 'not one'}"
    if shape.dtype not in ("float16", "bfloat16"):
        return f"cuDNN attention takes float16 and bfloat16, not {shape.dtype}"
    if shape.segments:
        return "segments go to 'triton', which packs them without a limit on their number"
    if shape.offset is None:
        return "cuDNN must know q_offset when tracing, one for all rows"
    if shape.offset < shape.keys - 1 and (shape.offset != 0 or shape.queries > shape.keys):
        return (
            f"cuDNN's mask starts at the first key and the first query, or is none: {shape.queries} queries at offset "
            f"{shape.offset} over {shape.keys} keys are neither"
        )
    if shape.queries == 1 and (shape.keys == 1 or shape.offset == 0):
        return "cuDNN refuses a single query over a single key"
    if shape.qk_width % 8 or shape.v_width % 8:
        return f"cuDNN attention takes head widths that are multiples of 8, not {widths}"
    if widths in _UNEQUAL_WIDTHS and gpu.capability[0] in (9, 10):
        if version is not None and version < _UNEQUAL_WIDTHS_SINCE:
            return f"unequal head widths need cuDNN 9.10, this is {version}"
    elif max(widths) > (256 if gpu.capability[0] == 9 else 128):
        return f"cuDNN's backward pass takes head widths up to 128 (256 on Hopper), not {max(widths)}"
    return None
