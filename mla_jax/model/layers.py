"""What every layer is made of: weights, matrix products, RMSNorm."""

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


def weight(config: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, int], spec: PartitionSpec) -> nnx.Param:
    """A matrix [in, out], normal with `initializer_range`, sharded as `spec` where a mesh is set."""
    init = nnx.initializers.normal(config.initializer_range)
    sharding = mesh.weight_sharding(spec, shape)
    return nnx.Param(init(rngs.params(), shape, config.param_dtype, out_sharding=sharding))


def norm_scale(config: ModelConfig, width: int) -> nnx.Param:
    """The weight of an RMSNorm."""
    return nnx.Param(jnp.ones(width, config.param_dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InferenceWeight:
    """A matrix [in, out] for inference, kept as its rows, which kernels for one token read; stands where a weight does.

    In 8 bits, each row has a scale.
    """

    rows: jax.Array
    """[out, in], in the compute type or int8."""
    scale_out: jax.Array | None
    """float32 [out], of int8."""

    def __getitem__(self, everything: Any) -> "InferenceWeight":
        return self

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The matrix it stands for."""
        rows = self.rows if self.scale_out is None else dequantize(self.rows, self.scale_out, dtype)
        return rows.astype(dtype).T


def gathered(w: nnx.Param | jax.Array | InferenceWeight, dtype: jnp.dtype) -> jax.Array:
    """A whole weight in the compute type on every device; cast before it is sent."""
    return mesh.gather(w[...].astype(dtype))


def product(x: jax.Array, w: nnx.Param | jax.Array | InferenceWeight, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x [..., in] @ w [in, out] in `out_dtype`, by default the type of x, which multiplies in both directions."""
    w, out_dtype = w[...], out_dtype or x.dtype
    if isinstance(w, InferenceWeight):
        if w.scale_out is not None:  # scaled afterwards, so that the matrix is read as it is
            units = jnp.asarray(_product(x, w.rows.T.astype(x.dtype), jnp.float32))
            return (units * mesh.gather(w.scale_out)).astype(out_dtype)
        w = w.rows.T
    return _product(x, w, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    return jnp.matmul(x, gathered(w, x.dtype), preferred_element_type=out_dtype)


def _product_backward(
    _: DTypeLike, residuals: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What JAX would derive, but for dw: summed in the type of w, left sharded as w is, and not computed transposed.

    The transpose that JAX derives makes XLA lay out d_out anew on CPUs, which costs a third of a training step there.
    """
    x, w = residuals
    d_out = d_out.astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    d_w = jax.lax.dot_general(
        x, d_out, ((leading, leading), ((), ())), preferred_element_type=w.dtype, out_sharding=mesh.sharding_of(w)
    )
    return d_out @ gathered(w, x.dtype).T, d_w


_product.defvjp(lambda x, w, out_dtype: (_product(x, w, out_dtype), (x, w)), _product_backward)


def split_tokens(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], padded with zeros to a whole number of chunks."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale[...]).astype(x.dtype)
