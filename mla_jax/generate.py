"""Generation through the latent cache: prefill in chunks (expanded), decode in one compiled loop (absorbed)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.errors import InputError
from mla_jax.model import transformer
from mla_jax.model.cache import LatentCache, init_cache

GRANULE = 64
"""Chunks and capacities are rounded up to multiples of this, so that few shapes are compiled."""


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _check(config: ModelConfig, prompts: list[list[int]], max_new_tokens: int, chunk: int, temperature: float) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", chunk)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not temperature >= 0:
        raise InputError(f"temperature must be 0 (greedy) or above, got {temperature}")
    limit = config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {i} is empty; it needs at least one token")
        if len(prompt) + max_new_tokens > limit:
            raise InputError(
                f"prompt {i} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's "
                f"max_position_embeddings {limit}; shorten the prompt or generate fewer"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise InputError(
                f"prompt {i} has token {min(prompt) if min(prompt) < 0 else max(prompt)}, outside the vocabulary of "
                f"{config.vocab_size}; was it made with this model's tokenizer?"
            )


@functools.partial(jax.jit, static_argnums=0)
def _compute_weights(config: ModelConfig, params: dict) -> dict:
    """Matrices in the compute type, so that decoding reads no more bytes than it must; norms as they are."""
    return jax.tree.map_with_path(lambda path, x: x if "norm" in path[-1].key else x.astype(config.dtype), params)


_init_cache = jax.jit(init_cache, static_argnums=(0, 1, 2))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(config: ModelConfig, params: dict, tokens_BT, cache: LatentCache, valid_B) -> LatentCache:
    return transformer.bind(config, params).extend(tokens_BT, cache, valid_B, absorbed=False)[1]


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=3)
def _decode(config, params, tokens_B, cache: LatentCache, max_new_tokens, greedy, eos_id, temperature, done_B, key):
    """Up to `max_new_tokens` [B, N] from the last token of each prompt, and how many of them count (before eos)."""
    model = transformer.bind(config, params)

    def not_over(state):
        step, _, _, _, done_B, _ = state
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def one_token(state):
        step, tokens_B, cache, new_BN, done_B, counts_B = state
        h_B1D, cache = model.extend(tokens_B[:, None], cache, (~done_B).astype(jnp.int32), absorbed=True)
        logits_BX = model.logits(h_B1D[:, 0])
        if greedy:
            tokens_B = jnp.argmax(logits_BX, axis=-1).astype(jnp.int32)
        else:
            tokens_B = jax.random.categorical(jax.random.fold_in(key, step), logits_BX / temperature)
        done_B |= tokens_B == eos_id
        new_BN = jax.lax.dynamic_update_index_in_dim(new_BN, tokens_B, step, 1)
        return step + 1, tokens_B, cache, new_BN, done_B, counts_B + ~done_B

    new_BN = jnp.broadcast_to(tokens_B[:, None], (tokens_B.size, max_new_tokens))
    state = jnp.int32(0), tokens_B, cache, new_BN, done_B, jnp.zeros_like(tokens_B)
    _, _, cache, new_BN, _, counts_B = jax.lax.while_loop(not_over, one_token, state)
    return new_BN, counts_B, cache  # the cache too: a donated buffer must come back to be used in place


def generate(
    config: ModelConfig,
    params: dict,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    prefill_chunk: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt; prompts may differ in length.

    Args:
        config: the model.
        params: its parameters, see `transformer.init_params`.
        prompts: token ids.
        max_new_tokens: the most tokens to add to a prompt.
        eos_id: the token that ends a continuation; None never ends one early.
        prefill_chunk: prompt tokens processed at one time; bounds the memory of activations.
        temperature: 0 for the most likely token, else samples from softmax(logits / temperature).
        seed: of the samples.

    Returns:
        The new tokens of each prompt, without eos.

    Raises:
        InputError: an empty prompt, a token outside the vocabulary, or a prompt that leaves no room for the new tokens.
    """
    _check(config, prompts, max_new_tokens, prefill_chunk, temperature)
    if not prompts:
        return []
    batch = _round_up(len(prompts), mesh.size())
    # The last token of a prompt starts the decode loop; those before it are prefilled.
    held = np.zeros(batch, np.int32)
    held[: len(prompts)] = [len(prompt) - 1 for prompt in prompts]
    longest = int(held.max())
    chunk = _round_up(min(prefill_chunk, max(longest, 1)), GRANULE)
    tokens = np.zeros((batch, _round_up(longest, chunk)), np.int32)
    last = np.zeros(batch, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : held[i]], last[i] = prompt[:-1], prompt[-1]

    params = _compute_weights(config, params)
    cache = _init_cache(config, batch, _round_up(longest + max_new_tokens, GRANULE))
    for start in range(0, longest, chunk):
        valid_B = mesh.shard_batch(np.clip(held - start, 0, chunk))
        cache = _prefill(config, params, mesh.shard_batch(tokens[:, start : start + chunk]), cache, valid_B)
    unused = mesh.shard_batch(np.arange(batch) >= len(prompts))
    new_BN, counts_B, _ = _decode(
        config, params, mesh.shard_batch(last), cache, max_new_tokens, temperature == 0,
        -1 if eos_id is None else eos_id, temperature, unused, jax.random.key(seed),
    )  # fmt: skip
    new, counts = np.asarray(new_BN), np.asarray(counts_B)
    return [new[i, : counts[i]].tolist() for i in range(len(prompts))]
