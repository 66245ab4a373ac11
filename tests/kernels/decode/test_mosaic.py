"""The Hopper kernels as far as a machine without such a GPU can tell: they lower, and what surrounds them is right.

Their results are tested in tests/gpu.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_attention
from latent_attention import UnavailableError
from latent_attention.call_shapes import DecodeShape
from latent_attention.decode import mosaic
from latent_attention.decode.mosaic import configure, configure_rows_on_m, row_blocks, why_not_decode, why_not_rows_on_m
from latent_attention.gpu import make_gpu
from latent_attention.hopper.int8_tiles import restore_order
from latent_attention.int8 import RADIX, split_queries

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
HOPPER = make_gpu((9, 0), 132)
SHAPE = DecodeShape(
    batch=1, queries=1, heads=32, c_width=256, rope_width=64, pages_per_row=1, page_size=8192, q_dtype="bfloat16",
    cache_dtype="bfloat16", paged=False,
)  # fmt: skip


def lower(op, *, batch=1, queries=1, heads=32, c=256, r=64, tokens=1000, pages=None, dtype="bfloat16"):
    """Lowers `decode`, or an implementation of it, for CUDA with an H200 in mind.

    `pages` a row if there is a block table.
    """
    pool = batch * (pages or 1)
    arrays = {
        "q_BTHW": jax.ShapeDtypeStruct((batch, queries, heads, c + r), "bfloat16" if dtype == "int8" else dtype),
        "c_PSC": jax.ShapeDtypeStruct((pool, tokens, c), dtype),
        "k_rope_PSR": jax.ShapeDtypeStruct((pool, tokens, r), dtype),
        "lengths_B": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "block_table_BN": jax.ShapeDtypeStruct((batch, pages), jnp.int32) if pages else None,
        "scales_P2S": jax.ShapeDtypeStruct((pool, 2, tokens), jnp.float32) if dtype == "int8" else None,
    }
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=H200)):
        return jax.jit(lambda x: op(**x, scale=0.1)).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"dtype": "int8"},
        {"c": 512, "heads": 128, "dtype": "float16"},
        {"c": 192, "r": 32, "heads": 3, "queries": 5, "batch": 3, "tokens": 16, "pages": 9},
        {"c": 448, "heads": 8, "batch": 40, "tokens": 64, "pages": 3, "dtype": "int8"},
    ],
    ids=str,
)
def test_it_lowers_for_cuda(call):
    assert lower(functools.partial(latent_attention.decode, implementation="mosaic"), **call).count("mosaic_gpu") >= 2


@pytest.mark.parametrize(
    "call",
    [{"c": 512, "heads": 128}, {"c": 384, "r": 32, "heads": 50, "queries": 2, "tokens": 16, "pages": 9}],
    ids=str,
)
def test_it_lowers_with_rows_on_m(call):
    shape = SHAPE._replace(heads=call["heads"], queries=call.get("queries", 1))
    op = functools.partial(mosaic.decode, config=configure_rows_on_m(shape, HOPPER))
    assert lower(op, **call).count("mosaic_gpu") >= 2


def test_it_is_chosen_on_hopper():
    assert "mosaic_gpu" in lower(functools.partial(latent_attention.decode, implementation="auto"), c=64, heads=8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q_dtype": "float32", "cache_dtype": "float32"}, "16-bit queries"),
        ({"cache_dtype": "float16"}, "of the same type or int8, not bfloat16, float16"),
        ({"c_width": 576}, "C of 64, 128, .. 512"),
        ({"rope_width": 48}, "R of 32 or 64"),
        ({"page_size": 40}, "a multiple of 8 tokens a row, 64 or more, not 40"),
        ({"page_size": 1100}, "a multiple of 8 tokens a row, 64 or more, not 1100"),
        ({"pages_per_row": 4, "page_size": 24}, "pages of 8, 16, 32 or a multiple of 64"),
        ({"pages_per_row": 4, "page_size": 16, "cache_dtype": "int8"}, "at least 32 tokens"),
    ],
)
def test_it_says_why_it_cannot_run(change, reason):
    assert why_not_decode(SHAPE, HOPPER) is None
    assert reason in (why_not_decode(SHAPE._replace(**change), HOPPER) or "")


@pytest.mark.parametrize("change", [{"cache_dtype": "int8"}, {"c_width": 192}])
def test_rows_on_m_are_for_some_shapes_only(change):
    assert why_not_rows_on_m(SHAPE, HOPPER) is None
    assert "16-bit cache and C of 128, 256" in (why_not_rows_on_m(SHAPE._replace(**change), HOPPER) or "")


@pytest.mark.parametrize(
    ("gpu", "name"), [(None, "no GPU"), (make_gpu((8, 6), 84), "sm_86"), (make_gpu((10, 0), 148), "sm_100")]
)
def test_it_is_for_hopper_only(gpu, name):
    assert f"this is {name}" in (why_not_decode(SHAPE, gpu) or "")


def test_asking_for_it_on_a_cpu_is_an_error_that_says_so():
    q, c, k_rope = (
        jnp.ones((1, 1, 8, 96), "bfloat16"),
        jnp.ones((1, 64, 64), "bfloat16"),
        jnp.ones((1, 64, 32), "bfloat16"),
    )
    with pytest.raises(UnavailableError, match=r"implementation='mosaic' cannot run decode: .*this is no GPU"):
        latent_attention.decode(q, c, k_rope, jnp.array([64]), scale=1.0, implementation="mosaic")


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("c_width", range(64, 513, 64))
@pytest.mark.parametrize("rows", [1, 8, 16, 33, 128, 1024])
def test_every_shape_gets_a_pipeline(rows, c_width, cache_dtype):
    shape = SHAPE._replace(heads=min(rows, 128), queries=-(-rows // 128), c_width=c_width, cache_dtype=cache_dtype)
    config = configure(shape, HOPPER)
    assert config.stages >= 2 and config.stages % config.consumers == 0
    row_block, blocks = row_blocks(shape.queries * shape.heads, c_width, cache_dtype == "int8")
    assert row_block * blocks >= rows and row_block % 8 == 0
    assert 1 <= config.num_ctas * blocks <= HOPPER.num_sms  # all CTAs are resident at once


def test_queries_split_in_two_int8_keep_15_bits():
    rng = np.random.default_rng(0)
    q_BRW = rng.normal(size=(2, 16, 96)).astype(np.float32)
    q_BRW[0, 3], q_BRW[1, 5, 7] = 0, 1000
    both, scale_BR = (np.asarray(x, np.float64) for x in split_queries(jnp.asarray(q_BRW), 8))
    both = both.reshape(2, 2, 2, 8, 96)  # [B, blocks, high | low, rows of a block, W]
    again = (both[:, :, 0] * RADIX + both[:, :, 1]).reshape(2, 16, 96) * scale_BR[..., None]
    largest = np.abs(q_BRW).max(-1, keepdims=True)
    assert np.all(np.abs(again - q_BRW) <= largest / 2**15)


@pytest.mark.parametrize("width", range(64, 513, 64))
def test_rows_of_a_transposed_tile_are_put_in_order_again(width):
    rows, first = np.empty(width, int), 0
    for blocks in (8, 4, 2, 1):  # the largest powers of two that fit
        if width - first < 64 * blocks:
            continue
        # Thread (warp, lane) has 2 * blocks columns in a row, in the rows `lane` and `lane + 8` of its warp's blocks.
        for warp in range(4):
            for lane in range(8):
                for j in range(2 * blocks):
                    block, half = divmod(j, 2)
                    row = first + block * 64 + warp * 16 + half * 8 + lane
                    rows[row] = first + (warp * 8 + lane) * 2 * blocks + j
        first += 64 * blocks
    np.testing.assert_array_equal(restore_order(jnp.asarray(rows)), np.arange(width))
