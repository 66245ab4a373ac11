"""The compiled decode loops: some tokens a call, by XLA for any batch or by the fused kernels for one row.

Each loop carries what its kernels need besides the model's state (`fused_decode.init_workspace`); callers see
`DecodeState` only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mla_jax.config import ModelConfig
from mla_jax.inference.sampling import SamplingPlan, sample
from mla_jax.model import decoder, fused_decode
from mla_jax.model.cache import LatentCache, LayerCache
from mla_jax.model.rope import rope_cos_sin

_UNROLL = 4
"""Tokens that one iteration of the fused loop adds: the time of an iteration itself counts beside its kernels."""
NO_CUDA_GRAPHS = {"xla_gpu_graph_min_graph_size": 2**30}
"""XLA leaves kernels of Triton out of CUDA graphs: there would be one between any two, which takes longer to start than
what is in it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The arrays that one call of a decode loop passes to the next."""

    tokens_B: jax.Array
    """int32, the last token of each row: not in the cache yet."""
    layers: tuple[LayerCache, ...]
    lengths_B: jax.Array
    """int32, the number of cached tokens of each row."""
    seen_BX: jax.Array | None
    """bool, the tokens that occur in each row; None without a repetition penalty."""


def decode_block(
    config: ModelConfig, weights: dict, state: DecodeState, done_B: jax.Array, params: dict[str, jax.Array],
    key: jax.Array, first: jax.Array, *, plan: SamplingPlan, steps: int,
) -> tuple[jax.Array, DecodeState]:  # fmt: skip
    """The next `steps` tokens of each row. Not for use inside another `jit`, as it has options for the compiler.

    Args:
        config: the model.
        weights: see `decoder.inference_weights`.
        state: caches must have room for `steps` more tokens. Caches and `seen_BX` are donated.
        done_B: bool, rows that stay as they are.
        params: see `SamplingParams.arrays`.
        key: of the random draws.
        first: int32, the number of tokens that earlier calls have added, so that the draws of a seed do not depend on
            how many tokens a call adds.
        plan: see `SamplingParams.plan`.
        steps: tokens to add.

    Returns:
        int32 tokens [steps, B], and the state for the next call.
    """
    why_not = fused_decode.why_not(config, state.layers, fused_decode.has_int8(weights))
    loop = fused_loop if why_not is None else xla_loop
    return loop(
        config, weights, state.tokens_B, state.layers, state.lengths_B, done_B, state.seen_BX, params, key, first,
        plan=plan, steps=steps,
    )  # fmt: skip


_jit = functools.partial(jax.jit, static_argnames=("config", "plan", "steps"), donate_argnames=("layers", "seen_BX"))


@_jit
def xla_loop(config, weights, tokens_B, layers, lengths_B, done_B, seen_BX, params, key, first, *, plan, steps):
    """Any number of rows, on a mesh too."""

    def next_token(carry, number):
        tokens_B, cache, seen_BX = carry
        h_B1D, cache = decoder.extend(
            config, weights, tokens_B[:, None], cache, (~done_B).astype(jnp.int32), absorbed=True
        )
        logits_BX = decoder.logits(config, weights, h_B1D[:, 0])
        tokens_B, seen_BX = _sample(plan, params, logits_BX, seen_BX, key, number)
        return (tokens_B, cache, seen_BX), tokens_B

    start = tokens_B, LatentCache(layers, lengths_B), seen_BX
    (tokens_B, cache, seen_BX), new_NB = jax.lax.scan(next_token, start, first + jnp.arange(steps))
    return new_NB, DecodeState(tokens_B, cache.layers, cache.lengths_B, seen_BX)


@functools.partial(_jit, compiler_options=NO_CUDA_GRAPHS)
def fused_loop(config, weights, tokens_B, layers, lengths_B, done_B, seen_BX, params, key, first, *, plan, steps):
    """One row, which is not done, by fused kernels; their workspace lives as long as the call."""

    def next_token(carry, step):
        (tokens_B, layers, seen_BX, workspace), (number, cos_sin, length_B) = carry, step
        cache = LatentCache(layers, length_B)
        logits_BX, cache, workspace = fused_decode.step(config, weights, tokens_B, cos_sin, cache, workspace)
        tokens_B, seen_BX = _sample(plan, params, logits_BX, seen_BX, key, number)
        return (tokens_B, cache.layers, seen_BX, workspace), tokens_B

    coming = jnp.arange(steps)
    start = tokens_B, layers, seen_BX, fused_decode.init_workspace(config, weights, layers)
    each = first + coming, rope_cos_sin(config, lengths_B[0] + coming), lengths_B + coming[:, None]
    (tokens_B, layers, seen_BX, _), new_NB = jax.lax.scan(next_token, start, each, unroll=_UNROLL)
    return new_NB, DecodeState(tokens_B, layers, lengths_B + steps, seen_BX)


def _sample(plan: SamplingPlan, params, logits_BX, seen_BX, key, number) -> tuple[jax.Array, jax.Array | None]:
    """The next token of each row, added to `seen_BX`."""
    tokens_B = sample(plan, params, logits_BX, seen_BX, jax.random.fold_in(key, number))
    if seen_BX is not None:
        seen_BX |= jax.nn.one_hot(tokens_B, seen_BX.shape[1], dtype=bool)
    return tokens_B, seen_BX
