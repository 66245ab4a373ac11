"""Context parallelism: attention over sequences whose tokens are sharded over devices.

A device all-gathers the latents of its sequences, which are small, and expands those of one device at a time into keys
and values, so that its memory falls with the number of devices. The partial outputs are merged by their log-sum-exp.
The backward pass visits the same keys again, expands them anew and needs nothing of one part to differentiate another.

Tokens are in zig-zag order (see mesh.py): each device has an early and a late half. Its own tokens are causal among
themselves. Of a device before it, the early half lies before both its halves and the late half behind them; the tokens
of a device after it all lie between its two halves. So of other devices a query sees a half in full or not at all, what
it does not see is not visited, and all devices have as much to do.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import latent_attention
from mla_jax import mesh


class Ops(NamedTuple):
    """The operations of a layer. None of these may close over an array."""

    expand: Callable
    """Keys k_BSHK and values v_BSHV of c_BSC, k_rope_BSR and the up-projection kv_b_CX."""
    attention: Callable
    """`latent_attention.attention`, but for arrays and mask."""
    gradients: Callable
    """`latent_attention.attention_gradients`, but for arrays and mask."""


class _Inputs(NamedTuple):
    q_BTHK: jax.Array
    latents: tuple[jax.Array, ...]
    """c_BTC and k_rope_BTR of this device."""
    kv_b_CX: jax.Array
    all_latents: tuple[jax.Array, ...]
    """The same of each device, [devices, B, T, ...]."""
    segments_BT: jax.Array | None
    all_segments: jax.Array | None
    """Of each device, [devices, B, T]."""


class _Part(NamedTuple):
    """Tokens `keys` of every device in [first, last), which our `queries` see in full."""

    queries: slice
    keys: slice
    first: int | jax.Array
    last: int | jax.Array


class _Block(NamedTuple):
    """Queries of this device and keys, both contiguous in what their devices hold, and the mask between them."""

    queries: slice
    latents: tuple[jax.Array, ...]
    mask: dict[str, Any]


def attention(
    ops: Ops, q_BTHK: jax.Array, latents: tuple[jax.Array, jax.Array], kv_b_CX: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    """out_BTHV of the queries of this device over whole sequences; inside `mesh.per_device`.

    The output and log-sum-exp that the backward pass needs are named `latent_attention`, as those of the op are.
    """
    all_latents, all_segments = jax.tree.map(mesh.all_gather_sequence, (latents, segments_BT))
    return _attend(ops, _Inputs(q_BTHK, latents, kv_b_CX, all_latents, segments_BT, all_segments))


def _mask(q_offset: int, q_segments: jax.Array | None, kv_segments: jax.Array | None) -> dict[str, Any]:
    """The mask between a block of queries and a block of keys, as arguments of the ops."""
    return {"q_offset": q_offset, "q_segments": q_segments, "kv_segments": kv_segments}


def _own(x: _Inputs) -> _Block:
    return _Block(slice(None), x.latents, _mask(0, x.segments_BT, x.segments_BT))


def _parts(x: _Inputs) -> tuple[_Part, _Part]:
    tokens, devices, index = x.q_BTHK.shape[1], len(x.all_latents[0]), mesh.sequence_shard()
    early, late, both = slice(0, tokens // 2), slice(tokens // 2, tokens), slice(0, tokens)
    return _Part(both, early, 0, index), _Part(late, both, index + 1, devices)


def _of_device(x: _Inputs, part: _Part, device: jax.Array) -> _Block:
    def keys(of_all: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(of_all, device, keepdims=False)[:, part.keys]

    latents, kv_segments = jax.tree.map(keys, (x.all_latents, x.all_segments))
    q_segments = None if x.segments_BT is None else x.segments_BT[:, part.queries]
    behind_all = part.keys.stop - part.keys.start
    return _Block(part.queries, latents, _mask(behind_all, q_segments, kv_segments))


def _put(x: jax.Array, part_x: jax.Array, part: _Part) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part_x, part.queries.start, axis=1)


def _merged(ops: Ops, x: _Inputs) -> tuple[jax.Array, jax.Array]:
    """The output out_BTHV and log-sum-exp lse_BTH over all keys."""

    def attend(block: _Block) -> tuple[jax.Array, jax.Array]:
        k, v = ops.expand(*block.latents, x.kv_b_CX)
        out, lse = ops.attention(x.q_BTHK[:, block.queries], k, v, return_lse=True, **block.mask)
        return out, lse

    def add(part: _Part, device: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return latent_attention.merge(*so_far, *attend(_of_device(x, part, device)))

    out, lse = attend(_own(x))
    out = out.astype(jnp.float32)  # with many devices, rounding errors would add up
    for part in _parts(x):
        seen = out[:, part.queries], lse[:, part.queries]
        seen = jax.lax.fori_loop(part.first, part.last, functools.partial(add, part), seen)
        out, lse = _put(out, seen[0], part), _put(lse, seen[1], part)
    return out.astype(x.q_BTHK.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ops: Ops, x: _Inputs) -> jax.Array:
    return _merged(ops, x)[0]


def _forward(ops: Ops, x: _Inputs):
    # Named, so that a remat policy can save them: the backward pass then does not recompute the forward pass.
    out, lse = (checkpoint_name(y, "latent_attention") for y in _merged(ops, x))
    return out, (x, out, lse)


def _backward(ops: Ops, residuals, d_out: jax.Array):
    x, *of_queries = residuals
    of_queries = *of_queries, d_out

    def gradients(block: _Block):
        (k, v), to_latents = jax.vjp(ops.expand, *block.latents, x.kv_b_CX)
        q, *rest = (y[:, block.queries] for y in (x.q_BTHK, *of_queries))
        d_q, d_k, d_v = ops.gradients(q, k, v, *rest, **block.mask)
        *d_latents, d_kv_b = to_latents((d_k, d_v))
        return d_q, d_latents, d_kv_b

    def add(part, device, sums):
        d_q, d_all, d_kv_b = sums
        d_q_here, d_latents, d_kv_b_here = gradients(_of_device(x, part, device))
        at = device, 0, part.keys.start, 0
        d_all = [
            jax.lax.dynamic_update_slice(all_x, d_x[None], at) for all_x, d_x in zip(d_all, d_latents, strict=True)
        ]
        return d_q + d_q_here, d_all, d_kv_b + d_kv_b_here

    d_q, d_own, d_kv_b = gradients(_own(x))
    d_q, d_all = d_q.astype(jnp.float32), [jnp.zeros_like(y) for y in x.all_latents]
    for part in _parts(x):
        sums = d_q[:, part.queries], d_all, d_kv_b
        d_q_part, d_all, d_kv_b = jax.lax.fori_loop(part.first, part.last, functools.partial(add, part), sums)
        d_q = _put(d_q, d_q_part, part)
    return (_Inputs(d_q.astype(x.q_BTHK.dtype), tuple(d_own), d_kv_b, tuple(d_all), None, None),)


_attend.defvjp(_forward, _backward)
