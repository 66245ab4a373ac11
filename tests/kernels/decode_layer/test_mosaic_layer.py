"""The fused decoder layer as far as a machine without a Hopper GPU can tell; tests/gpu checks its results."""

import functools

import jax
import jax.numpy as jnp
import pytest

from decode_layer_weights import random_weights
from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import mosaic, timeline
from latent_attention.gpu import make_gpu

INFINITE_1B = LayerShape(D=2560, Q=768, C=256, R=64, N=64, V=128, H=32, F=7680)
SMALL = LayerShape(D=1280, Q=512, C=256, R=64, N=32, V=128, H=16, F=1536)
HOPPER = make_gpu((9, 0), 132)


@pytest.mark.parametrize("int8", [False, True], ids=["16-bit weights", "int8 weights"])
@pytest.mark.parametrize(
    ("shape", "dtype", "num_sms"),
    [
        (INFINITE_1B, "bfloat16", 132),
        (INFINITE_1B._replace(Q=1536, N=128), "float16", 78),
        (INFINITE_1B._replace(D=5120, H=24), "bfloat16", 114),
        (INFINITE_1B._replace(D=5120), "float16", 36),  # with shared memory for 784 bytes more
        (SMALL, "float16", 132),
        (SMALL._replace(H=8, V=192, F=10240), "bfloat16", 132),
    ],
    ids=str,
)
@pytest.mark.parametrize("int8_cache", [False, True], ids=["16-bit cache", "int8 cache"])
def test_supported_shapes_lower_for_cuda(shape, dtype, num_sms, int8, int8_cache):
    if int8 and shape.D == SMALL.D:
        shape = shape._replace(D=1536)  # whole words for each thread
    gpu, cache_dtype = make_gpu((9, 0), num_sms), "int8" if int8_cache else dtype
    if int8_cache and num_sms == 36:  # scales take 4 KiB
        assert "shared memory" in (mosaic.why_not(shape, dtype, cache_dtype, 1024, gpu, int8) or "")
        return
    assert mosaic.why_not(shape, dtype, cache_dtype, 1024, gpu, int8) is None
    assert "mosaic_gpu" in lower(mosaic.decode_layer, shape, dtype, num_sms, int8, int8_cache).as_text()


def lower(op, shape, dtype, num_sms, int8=False, int8_cache=False):
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=num_sms)
    weights = jax.eval_shape(lambda: random_weights(shape, dtype, jax.random.key(0), int8))
    of = jax.ShapeDtypeStruct
    angles = of((shape.R // 2,), jnp.float32)
    cache = tuple(of((1, 1024, width), jnp.int8 if int8_cache else dtype) for width in (shape.C, shape.R))
    cache += (of((1, 2, 1024), jnp.float32) if int8_cache else None,)
    workspace = jax.eval_shape(lambda: mosaic.init_workspace(shape))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h200)):
        return (
            jax.jit(functools.partial(op, shape, eps=1e-6, scale=0.1))
            .trace(weights, of((shape.D,), dtype), angles, angles, of((1,), jnp.int32), cache, workspace)
            .lower(lowering_platforms=("cuda",))
        )


def test_the_timeline_has_every_phase_once_in_order(monkeypatch):
    phases, record = [], timeline.record

    def recorded(timeline_ref, cta, wg, phase, *clocks):
        phases.append(phase)
        record(timeline_ref, cta, wg, phase, *clocks)

    monkeypatch.setattr(timeline, "record", recorded)
    *_, stamps = lower(mosaic.decode_layer_timeline, SMALL, "bfloat16", 132).out_info
    assert phases == list(timeline.PHASES)
    assert (stamps.shape, stamps.dtype) == ((132, 2, len(timeline.PHASES), 2), jnp.int32)


@pytest.mark.parametrize(
    ("shape", "others", "reason"),
    [
        ({}, {"gpu": make_gpu((8, 0), 108)}, "Hopper"),
        ({}, {"gpu": None}, "no GPU"),
        ({}, {"dtype": "float32", "cache_dtype": "float32"}, "bfloat16 or float16"),
        ({}, {"cache_dtype": "float16"}, "bfloat16 and float16"),
        ({}, {"capacity": 1000}, "multiple of 64"),
        ({"C": 512}, {}, "C of 256"),
        ({"R": 32}, {}, "R of 64"),
        ({"H": 64}, {}, "up to 32 heads"),
        ({"H": 12}, {}, "multiples of 8 for H and N"),
        ({"N": 60}, {}, "multiples of 8 for H and N"),
        ({"N": 328}, {}, "N up to 320"),
        ({}, {"gpu": make_gpu((9, 0), 16)}, "an SM per head"),
        ({"D": 7168}, {}, "do not fit"),
        ({"D": 1024}, {}, "do not fit"),
        ({"F": 12288}, {}, "do not fit"),
        ({"Q": 700}, {}, "do not fit"),
        ({"D": 1280}, {"int8": True}, "do not fit"),
        ({"V": 80}, {}, "multiples of 32"),
        ({}, {"gpu": HOPPER._replace(shared_memory=99 << 10)}, "shared memory"),
        ({"D": 5120, "Q": 256}, {"gpu": make_gpu((9, 0), 33)}, "shared memory"),  # 240 bytes too much
    ],
    ids=str,
)
def test_why_not_names_the_reason(shape, others, reason):
    usual = {"dtype": "bfloat16", "cache_dtype": "bfloat16", "capacity": 1024, "gpu": HOPPER}
    assert mosaic.why_not(INFINITE_1B, **usual) is None
    assert reason in (mosaic.why_not(INFINITE_1B._replace(**shape), **usual | others) or "")
