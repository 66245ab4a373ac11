"""Every implementation of decode that runs on a CPU against float64."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import latent_attention
from kernels_oracle import FEW_DECODE_CASES, DecodeCase, contiguous
from latent_attention.decode import xla as xla_decode


def check(case: DecodeCase, implementation: str, tolerance: float = 1e-5):
    arrays, keywords = case.draw()
    op = functools.partial(latent_attention.decode, scale=keywords.pop("scale"), implementation=implementation)
    out, lse = jax.jit(op)(*arrays, **keywords)
    assert (out.dtype, lse.dtype) == (case.dtype, jnp.float32)
    for ours, expected in zip((out.astype("float32"), lse), case.expected(), strict=True):
        np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", FEW_DECODE_CASES.values(), ids=FEW_DECODE_CASES)
def test_decode_equals_float64(case, implementation):
    check(case, implementation)


@pytest.mark.parametrize("name", ["ragged", "beyond the capacity", "more queries than tokens", "pages", "pages of 64"])
@pytest.mark.parametrize("int8", [False, True])
def test_many_chunks_are_as_one(name, int8, monkeypatch):
    monkeypatch.setattr(xla_decode, "_chunk_tokens", lambda batch: 33)
    check(FEW_DECODE_CASES["int8: " * int8 + name], "xla")


@settings(max_examples=10)
@given(st.data())
def test_any_pages_and_chunks(data):
    page_size, pages, queries = (data.draw(st.integers(1, top)) for top in (40, 6, 4))
    lengths = data.draw(st.lists(st.integers(0, page_size * pages + 3), min_size=1, max_size=5))
    case = DecodeCase(
        tuple(lengths), queries, heads=2, c_width=8, rope_width=4, page_size=page_size, pages_per_row=pages,
        int8=data.draw(st.booleans()),
    )  # fmt: skip
    tokens = data.draw(st.integers(1, 300))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_decode, "_chunk_tokens", lambda batch: tokens)
        check(case, "xla")


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
@pytest.mark.parametrize("int8", [False, True])
def test_16_bits_differ_by_rounding_only(dtype, tolerance, int8):
    check(contiguous((3000, 17, 2, 0), 3000, queries=2, int8=int8, dtype=dtype), "xla", tolerance)


@pytest.mark.parametrize("unit", [1e-7, 1e3])
def test_int8_scales_that_float16_cannot_hold(unit):
    case = dataclasses.replace(FEW_DECODE_CASES["int8: pages"], dtype="float16")
    (q, c, k_rope, lengths), keywords = case.draw()
    expected, _ = case.expected()
    op = jax.jit(functools.partial(latent_attention.decode, implementation="xla"), static_argnames="scale")
    keywords["scales_P2S"] *= unit
    keywords["scale"] /= unit
    out, _ = op(q.astype("float32"), c, k_rope, lengths, **keywords)
    np.testing.assert_allclose(out, expected * unit, atol=1e-5 * unit, rtol=1e-5)
    if unit < 1:
        # Weights times scales, not the result, are what must not underflow: as large as q is, the result is small.
        out, _ = op(q, c, k_rope, lengths, **keywords)
        np.testing.assert_allclose(out.astype("float32"), expected * unit, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_one_layer_of_many_is_read_in_place(dtype):
    """A cache of all layers is a pool of L * B pages, a layer is a block table."""
    layers, batch, capacity = 4, 2, 60000
    shapes = (layers * batch, capacity, 64), (layers * batch, capacity, 32)
    structs = [jax.ShapeDtypeStruct((batch, 1, 4, 96), "bfloat16" if dtype == "int8" else dtype)]
    structs += [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    structs += [jax.ShapeDtypeStruct(shape, "int32") for shape in ((batch,), (batch, 1))]
    scales = jax.ShapeDtypeStruct((layers * batch, 2, capacity), "float32") if dtype == "int8" else None

    @jax.jit
    def op(q, c, k_rope, lengths, table, scales):
        return latent_attention.decode(
            q, c, k_rope, lengths, scale=0.2, block_table_BN=table, scales_P2S=scales, implementation="xla"
        )

    analysis = op.lower(*structs, scales).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < batch * capacity * 96 / 3


def test_chunks_that_nobody_needs_are_not_read():
    """A chunk that is read costs time in proportion; here the work is counted in trips of the loop."""
    case = contiguous((50, 31), 64)
    (q, c, k_rope, lengths), keywords = case.draw()
    trips = []

    def count(x):
        trips.append(1)
        return x

    def counted(*arguments):
        result = online_softmax(*arguments)
        jax.debug.callback(count, result[0].sum())
        return result

    online_softmax = xla_decode.online_softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_decode, "_chunk_tokens", lambda batch: 8)
        patch.setattr(xla_decode, "online_softmax", counted)
        op = jax.jit(functools.partial(latent_attention.decode, scale=keywords["scale"], implementation="xla"))
        jax.block_until_ready(op(q, c, k_rope, lengths))
    jax.effects_barrier()
    assert len(trips) == 7  # of 8
