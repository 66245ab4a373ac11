"""The latent cache: nothing held is overwritten, nothing is read from a wrong slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.model.cache import LatentCache, init_cache, read, write
from tiny import MODEL

LAYERS, BATCH, CAPACITY = MODEL.num_hidden_layers, 3, 10


def numbered_cache(lengths):
    """Every number differs from every other."""

    def numbered(x):
        return jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)

    cache = init_cache(MODEL, BATCH, CAPACITY)
    return LatentCache(numbered(cache.c_LBSC), numbered(cache.k_rope_LBSR), jnp.array(lengths, jnp.int32))


def test_an_empty_cache_has_the_shapes_and_types_asked_for():
    cache = init_cache(MODEL, BATCH, CAPACITY)
    assert cache.c_LBSC.shape == (LAYERS, BATCH, CAPACITY, MODEL.kv_lora_rank)
    assert cache.k_rope_LBSR.shape == (LAYERS, BATCH, CAPACITY, MODEL.qk_rope_head_dim)
    assert (cache.capacity, cache.c_LBSC.dtype) == (CAPACITY, MODEL.dtype)
    assert not cache.lengths_B.any()
    assert init_cache(MODEL, BATCH, CAPACITY, dtype="bfloat16").k_rope_LBSR.dtype == jnp.bfloat16


@pytest.mark.parametrize("valid", [(4, 4, 4), (0, 1, 3)])
@pytest.mark.parametrize("lengths", [(0, 3, 6), (10, 9, 7)])
def test_write_puts_valid_tokens_behind_the_row_and_drops_what_does_not_fit(lengths, valid):
    before = numbered_cache(lengths)
    new_c, new_k_rope = (-1 - jax.random.uniform(jax.random.key(0), (BATCH, 4, w)) for w in (16, 8))
    after = jax.jit(write)(before, 1, new_c, new_k_rope, jnp.array(valid))
    for old, new, got in ((before.c_LBSC, new_c, after.c_LBSC), (before.k_rope_LBSR, new_k_rope, after.k_rope_LBSR)):
        expected = np.array(old)
        for b in range(BATCH):
            fit = min(valid[b], CAPACITY - lengths[b])
            expected[1, b, lengths[b] : lengths[b] + fit] = new[b, :fit]
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(after.lengths_B, lengths)


@pytest.mark.parametrize(("start", "size"), [(0, 4), (4, 4), (8, 4), (9, 10), (0, 10), (7, 1)])
def test_read_gives_the_slots_that_exist_in_their_places(start, size):
    c_LBSC = numbered_cache((0, 0, 0)).c_LBSC
    got = jax.jit(read, static_argnums=3)(c_LBSC, jnp.int32(1), jnp.int32(start), size)
    assert got.shape == (BATCH, size, MODEL.kv_lora_rank)
    exist = min(size, CAPACITY - start)
    np.testing.assert_array_equal(got[:, :exist], c_LBSC[1, :, start : start + exist])
