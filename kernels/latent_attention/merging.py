"""Combines partial attention results by their log-sum-exp."""

import jax
import jax.numpy as jnp


def merge(out1: jax.Array, lse1: jax.Array, out2: jax.Array, lse2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combines attention over two disjoint sets of keys: out [..., V] and lse [...] of each into those of the union."""
    lse = jnp.logaddexp(lse1, lse2)
    safe = jnp.where(lse == -jnp.inf, 0, lse)
    share1, share2 = jnp.exp(lse1 - safe)[..., None], jnp.exp(lse2 - safe)[..., None]
    out = share1 * out1.astype(jnp.float32) + share2 * out2.astype(jnp.float32)
    return out.astype(out1.dtype), lse


def merge_over(axis_name: str, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combines attention over keys that are spread over a mesh axis; inside `jax.shard_map`.

    This is what context parallelism needs for decode: each device attends to its part of the cache (with the lengths
    of that part), and only out [..., V] and lse [...] cross the network.
    """
    peak = jax.lax.pmax(lse, axis_name)
    weight = jnp.exp(lse - jnp.where(peak == -jnp.inf, 0, peak))
    total = jax.lax.psum(weight, axis_name)
    mean = jax.lax.psum(out.astype(jnp.float32) * weight[..., None], axis_name)
    mean /= jnp.where(total == 0, 1, total)[..., None]
    return mean.astype(out.dtype), jnp.where(total == 0, -jnp.inf, peak + jnp.log(total))
