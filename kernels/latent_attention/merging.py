"""Combines partial attention results by their log-sum-exp."""

import jax
import jax.numpy as jnp


def merge(out1: jax.Array, lse1: jax.Array, out2: jax.Array, lse2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combines attention over two disjoint sets of keys: out [..., V] and lse [...] of each into those of the union."""
    lse = jnp.logaddexp(lse1, lse2)
    safe = jnp.where(lse == -jnp.inf, 0, lse)
    weight1, weight2 = jnp.exp(lse1 - safe)[..., None], jnp.exp(lse2 - safe)[..., None]
    out = weight1 * out1.astype(jnp.float32) + weight2 * out2.astype(jnp.float32)
    return out.astype(out1.dtype), lse


def merge_over(axis_name: str, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combines attention over keys that are spread over a mesh axis; inside `jax.shard_map`.

    Context parallelism at decode: each device attends to its own part of the cache, with the lengths of that part, and
    only out [..., V] and lse [...] cross the network.
    """
    max_lse = jax.lax.pmax(jax.lax.stop_gradient(lse), axis_name)  # what is subtracted has no part in the result
    weight = jnp.exp(lse - jnp.where(max_lse == -jnp.inf, 0, max_lse))
    total = jax.lax.psum(weight, axis_name)
    mean = jax.lax.psum(out.astype(jnp.float32) * weight[..., None], axis_name)
    unseen, total = total == 0, jnp.where(total == 0, 1, total)
    return (mean / total[..., None]).astype(out.dtype), jnp.where(unseen, -jnp.inf, max_lse + jnp.log(total))
