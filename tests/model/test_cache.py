"""The latent cache: valid tokens are never overwritten, and every slot is read from its place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_attention import dequantize, quantize
from mla_jax.model.cache import LayerCache, bytes_per_token, init_layer, read, resize, write
from tiny import MODEL, empty_cache

BATCH, CAPACITY = 3, 10
DTYPES = ["float32", "bfloat16", "int8"]


def numbered_cache(dtype):
    """A cache whose slots differ from each other."""
    rng = np.random.default_rng(0)

    def numbers(x):
        return jnp.asarray(rng.permutation(x.size).reshape(x.shape) % 120, x.dtype)

    return jax.tree.map(numbers, init_layer(MODEL, BATCH, CAPACITY, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_cache_has_the_shapes_types_and_bytes_asked_for(dtype):
    cache = empty_cache(MODEL, BATCH, CAPACITY, dtype)
    assert len(cache.layers) == MODEL.num_hidden_layers
    for layer in cache.layers:
        assert layer.c_BSC.shape == (BATCH, CAPACITY, MODEL.kv_lora_rank)
        assert layer.k_rope_BSR.shape == (BATCH, CAPACITY, MODEL.qk_rope_head_dim)
        assert layer.c_BSC.dtype == layer.k_rope_BSR.dtype == dtype
        assert layer.capacity == CAPACITY
    assert sum(x.nbytes for x in jax.tree.leaves(cache.layers)) == BATCH * CAPACITY * bytes_per_token(MODEL, dtype)
    assert not cache.lengths_B.any()
    assert init_layer(dataclasses.replace(MODEL, dtype="float16"), 1, 1).c_BSC.dtype == "float16"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("valid", [(4, 4, 4), (0, 1, 3)])
@pytest.mark.parametrize("lengths", [(0, 3, 6), (10, 9, 7)])
def test_write_puts_valid_tokens_behind_the_row_and_drops_what_does_not_fit(lengths, valid, dtype):
    before = numbered_cache(dtype)
    new_c, new_k_rope = (-1 - jax.random.uniform(jax.random.key(0), (BATCH, 4, w)) for w in (16, 8))
    after = jax.jit(write)(before, jnp.array(lengths), new_c, new_k_rope, jnp.array(valid))
    new = LayerCache(new_c.astype(dtype), new_k_rope.astype(dtype), None)
    if dtype == "int8":
        (c, c_scale), (k_rope, k_rope_scale) = quantize(new_c), quantize(new_k_rope)
        new = LayerCache(c, k_rope, jnp.stack([c_scale, k_rope_scale], axis=1))
    for old, fresh, got in zip(*map(jax.tree.leaves, (before, new, after)), strict=True):
        axis = got.shape.index(CAPACITY)
        old, fresh, got = (np.moveaxis(np.asarray(x), axis, 1) for x in (old, fresh, got))
        expected = old.copy()
        for b in range(BATCH):
            fit = min(valid[b], CAPACITY - lengths[b])
            expected[b, lengths[b] : lengths[b] + fit] = fresh[b, :fit]
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "size"), [(0, 4), (4, 4), (8, 4), (9, 10), (0, 10), (7, 1)])
def test_read_gives_the_slots_that_exist_in_their_places(start, size, dtype):
    cache = numbered_cache(dtype)
    c, k_rope = jax.jit(read, static_argnums=(2, 3))(cache, jnp.int32(start), size, "float32")
    assert c.shape == (BATCH, size, MODEL.kv_lora_rank)
    exist = min(size, CAPACITY - start)
    for place, (got, held) in enumerate(((c, cache.c_BSC), (k_rope, cache.k_rope_BSR))):
        if cache.scales_B2S is not None:
            held = dequantize(held, cache.scales_B2S[:, place], "float32")
        np.testing.assert_array_equal(got[:, :exist], held[:, start : start + exist])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resized_cache_holds_what_it_held_in_every_row(dtype):
    cache = numbered_cache(dtype)
    grown = resize(cache, BATCH, 17)
    one = jax.tree.map(lambda x: x[1:2], cache)
    copies = resize(one, 5, 12)
    assert (grown.capacity, copies.capacity) == (17, 12)
    whole = read(cache, jnp.int32(0), CAPACITY, "float32")
    for x, y in zip(read(grown, jnp.int32(0), CAPACITY, "float32"), whole, strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(read(copies, jnp.int32(0), CAPACITY, "float32"), whole, strict=True):
        np.testing.assert_array_equal(x, np.repeat(y[1:2], 5, axis=0))
