"""Building blocks of every layer: weight initialisation, matrix multiplication, RMSNorm."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from latent_attention import dequantize
from mla_jax import mesh
from mla_jax.config import ModelConfig


def init_matrix(
    config: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, int], spec: PartitionSpec, deviation: float | None = None
) -> nnx.Param:
    """A matrix [in, out], normal with `deviation` (or `initializer_range`), sharded as `spec` where a mesh is set."""
    init = nnx.initializers.normal(config.initializer_range if deviation is None else deviation)
    sharding = mesh.weight_sharding(spec, shape)
    return nnx.Param(init(rngs.params(), shape, config.param_dtype, out_sharding=sharding))


def init_norm_weight(config: ModelConfig, width: int) -> nnx.Param:
    """The weight of an RMSNorm, all ones."""
    return nnx.Param(jnp.ones(width, config.param_dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InferenceWeight:
    """A matrix [in, out] for inference, stored transposed as [out, in], the order in which the batch-1 kernels read it.

    It stands in a module where an `nnx.Param` does. In 8 bits, each row (output) has a scale.
    """

    rows: jax.Array
    """[out, in], in the compute type or int8."""
    scale_out: jax.Array | None
    """float32 [out] of int8 rows, else None."""

    def __getitem__(self, _: Any) -> "InferenceWeight":
        return self

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The matrix [in, out], dequantised."""
        rows = self.rows if self.scale_out is None else dequantize(self.rows, self.scale_out, dtype)
        return rows.astype(dtype).T


def all_gather_weight(w: nnx.Param | jax.Array | InferenceWeight, dtype: jnp.dtype) -> jax.Array:
    """The whole weight in the compute type on every device; cast before it is sent."""
    return mesh.all_gather(w[...].astype(dtype))


def matmul(x: jax.Array, w: nnx.Param | jax.Array | InferenceWeight, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x [..., in] @ w [in, out] in `out_dtype`, by default the type of x.

    The operands of forward and backward pass are in the type of x; the gradient of w is summed in the type of w.
    """
    w, out_dtype = w[...], out_dtype or x.dtype
    if isinstance(w, InferenceWeight):
        if w.scale_out is not None:  # scaled afterwards, so that the matrix is read as it is
            units = jnp.asarray(_matmul(x, w.rows.T.astype(x.dtype), jnp.float32))
            return (units * mesh.all_gather(w.scale_out)).astype(out_dtype)
        w = w.rows.T
    return _matmul(x, w, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, w: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    return jnp.matmul(x, all_gather_weight(w, x.dtype), preferred_element_type=out_dtype)


def _matmul_backward(
    _: DTypeLike, residuals: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradient that JAX derives, but with dw summed in the type of w, sharded as w is, and not computed transposed.

    The transpose that JAX derives makes XLA lay out d_out anew on CPUs, which costs a third of a training step there.
    """
    x, w = residuals
    d_out = d_out.astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    d_w = jax.lax.dot_general(
        x, d_out, ((leading, leading), ((), ())), preferred_element_type=w.dtype, out_sharding=mesh.sharding_of(w)
    )
    return d_out @ all_gather_weight(w, x.dtype).T, d_w


_matmul.defvjp(lambda x, w, out_dtype: (_matmul(x, w, out_dtype), (x, w)), _matmul_backward)


def split_tokens(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], padded with zeros to a whole number of chunks."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def join_chunks(x: jax.Array, length: int) -> jax.Array:
    """[T / chunk, B, chunk, ...] -> [B, length, ...]: undoes `split_tokens`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def is_norm(path: tuple) -> bool:
    """True where `path`, of `jax.tree.map_with_path` over the parameters, leads to the weight of an RMSNorm."""
    return "norm" in path[-1].key


def rms_norm(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis, in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * weight[...]).astype(x.dtype)
