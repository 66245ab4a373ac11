"""The kernel of a whole layer as far as a machine without such a GPU can tell; tests/gpu has its numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention import mosaic_layer, triton_layer_jax
from latent_attention.mosaic_layer_memory import shared, shared_bytes
from latent_attention.mosaic_layer_ring import (
    CONSUMERS,
    SLOT,
    SLOTS,
    TOKENS,
    readings,
    rows_of_tile,
    rows_of_tiles,
    shares,
    turns,
)
from latent_attention.shapes import LayerShape, make_gpu
from one_token_layer import random_weights

INFINITE_1B = LayerShape(D=2560, Q=768, C=256, R=64, N=64, V=128, H=32, F=7680)
SMALL = LayerShape(D=1280, Q=512, C=256, R=64, N=32, V=128, H=16, F=1536)
HOPPER = make_gpu((9, 0), 132)


@pytest.mark.parametrize(
    ("shape", "dtype", "cores"),
    [
        (INFINITE_1B, "bfloat16", 132),
        (INFINITE_1B._replace(Q=1536, N=128), "float16", 78),
        (INFINITE_1B._replace(D=5120, H=24), "bfloat16", 114),
        (SMALL, "float16", 132),
        (SMALL._replace(H=8, V=192, F=10240), "bfloat16", 132),
    ],
    ids=str,
)
def test_what_it_takes_lowers_for_cuda(shape, dtype, cores):
    assert mosaic_layer.why_not(shape, dtype, dtype, 1024, make_gpu((9, 0), cores)) is None
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=cores)
    weights = jax.eval_shape(lambda: random_weights(shape, dtype, jax.random.key(0)))
    of = jax.ShapeDtypeStruct
    angles, cache = of((shape.R // 2,), jnp.float32), (of((1, 1024, shape.C), dtype), of((1, 1024, shape.R), dtype))
    counter = jax.eval_shape(triton_layer_jax.init_counter)
    op = functools.partial(mosaic_layer.layer, shape, eps=1e-6, scale=0.1)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h200)):
        lowered = (
            jax.jit(op)
            .trace(weights, of((shape.D,), dtype), angles, angles, of((1,), jnp.int32), cache, counter)
            .lower(lowering_platforms=("cuda",))
        )
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("shape", "others", "reason"),
    [
        ({}, {"gpu": make_gpu((8, 0), 108)}, "Hopper"),
        ({}, {"gpu": None}, "no GPU"),
        ({}, {"dtype": "float32", "cache_dtype": "float32"}, "16-bit numbers"),
        ({}, {"cache_dtype": "int8"}, "bfloat16 and int8"),
        ({}, {"capacity": 1000}, "multiple of 64"),
        ({"C": 512}, {}, "C of 256"),
        ({"R": 32}, {}, "R of 64"),
        ({"H": 64}, {}, "up to 32 heads"),
        ({"H": 12}, {}, "in eights"),
        ({"N": 60}, {}, "in eights"),
        ({}, {"gpu": make_gpu((9, 0), 16)}, "a multiprocessor a head"),
        ({"D": 7168}, {}, "do not fit"),
        ({"D": 1024}, {}, "do not fit"),
        ({"F": 12288}, {}, "do not fit"),
        ({"Q": 700}, {}, "do not fit"),
        ({}, {"gpu": HOPPER._replace(shared_memory=99 << 10)}, "shared memory"),
    ],
    ids=str,
)
def test_it_says_why_it_cannot_run(shape, others, reason):
    usual = {"dtype": "bfloat16", "cache_dtype": "bfloat16", "capacity": 1024, "gpu": HOPPER}
    assert mosaic_layer.why_not(INFINITE_1B, **usual) is None
    assert reason in (mosaic_layer.why_not(INFINITE_1B._replace(**shape), **usual | others) or "")


class Names:
    """Whatever reference is asked for."""

    def __getattr__(self, name):
        return None


@pytest.mark.parametrize("blocks", [132, 114, 78])
@pytest.mark.parametrize("held", [0, 1, 1000, 131_072])
def test_each_tile_is_dealt_to_one_block_and_slots_follow_each_other(blocks, held):
    of = readings(INFINITE_1B, blocks, Names(), jnp.int32(held))

    @jax.vmap
    def dealt(block):
        return {name: share[1:] for name, share in shares(of, block, blocks)}

    first_count_number = jax.jit(dealt)(jnp.arange(blocks))
    taken = np.zeros(blocks, int)
    for name, reading in of.items():
        first, count, number = map(np.asarray, first_count_number[name])
        tiles = np.concatenate([np.arange(n) * blocks + start for start, n in zip(first, count, strict=True)])
        assert sorted(tiles) == list(range(int(reading.tiles)))
        assert count.max() - count.min() <= 1
        assert np.all(number == taken + taken % reading.slots)
        taken = number + count * reading.slots
    # All tiles are one list: a block has one more than another at most, of all of them together.
    together = sum(np.asarray(count) for _, count, _ in first_count_number.values())
    assert together.max() - together.min() <= 1


@pytest.mark.parametrize("shape", [INFINITE_1B, SMALL], ids=["1b", "small"])
@pytest.mark.parametrize("held", [0, 1, 1000, 131_072])
def test_each_slot_is_filled_and_emptied_in_turn_by_one_consumer(shape, held):
    """What the producer and the consumers do with the ring, block by block."""
    blocks = 132
    of = readings(shape, blocks, Names(), jnp.int32(held))

    @jax.vmap
    def planned(block):
        dealt = dict(shares(of, block, blocks))
        return {name: (share[1:], [turns(wg, share) for wg in range(CONSUMERS)]) for name, share in dealt.items()}

    plan = jax.tree.map(np.asarray, jax.jit(planned)(jnp.arange(blocks)))
    for block in range(blocks):
        uses, done = {slot: [] for slot in range(SLOTS)}, 0
        for name, reading in of.items():
            (_, count, number), of_consumers = jax.tree.map(lambda x: int(x[block]), plan[name])  # noqa: B023
            assert number - done in (0, 1) and (number == done or reading.slots == 2)
            seen = []
            for wg, (skipped, steps) in enumerate(of_consumers):
                own = [skipped + CONSUMERS * m for m in range(steps)]
                seen += own
                for i in own:
                    slots = [(number + i * reading.slots + j) % SLOTS for j in range(reading.slots)]
                    assert slots[-1] - slots[0] == reading.slots - 1  # a pair is not torn
                    uses[slots[0]].append((name, number + i * reading.slots, wg))
            assert sorted(seen) == list(range(count))
            done = number + count * reading.slots
        for slot, of_slot in uses.items():
            for single in (True, False):  # a barrier of its own each
                users = {wg for name, _, wg in of_slot if (name != "tokens") == single}
                assert len(users) <= 1, (block, slot, users)


@pytest.mark.parametrize("shape", [INFINITE_1B, SMALL, INFINITE_1B._replace(D=5120)], ids=["1b", "small", "wide"])
def test_shared_memory_is_counted(shape):
    def size(x) -> int:
        if isinstance(x, plgpu.Barrier):
            return 8 * int(np.prod(x.num_barriers))
        return int(np.prod(x.shape)) * x.dtype.itemsize

    taken = sum(map(size, shared(shape, 132, jnp.bfloat16).values()))
    assert taken <= shared_bytes(shape, 132) < taken + 4096


def test_tiles_fit_the_ring_and_finish_the_busiest_block_first():
    assert SLOTS % 4 == 0 and TOKENS * (256 + 64) <= 2 * SLOT
    rows = rows_of_tiles(INFINITE_1B, 132)
    assert rows == (4, 8, 32, 2, 2, 1)
    assert rows_of_tile((2560,), 4096, 132) == 2  # the busiest block has 10 tiles; of one row, 20
    assert rows_of_tile((7,), 4096, 132) == 1
    assert rows_of_tile((100,), 2 * SLOT, 132) == 0
    assert rows_of_tile((12,), 256, 132) == 0  # narrow rows come in eights
