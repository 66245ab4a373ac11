"""The Triton decode kernels in Triton's interpreter, on a CPU, launched by both front ends.

`test_triton_decode.py` runs this with TRITON_INTERPRET=1. No bfloat16: the interpreter computes garbage with it.
"""

import dataclasses
import os
import sys
import types

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kernels_oracle import FEW_DECODE_CASES, DecodeCase, contiguous, decode_oracle
from latent_attention.decode import triton, triton_kernels, triton_torch
from latent_attention.decode.triton_heuristic import Tiling
from latent_attention.gpu import make_gpu

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_decode.py"

# As if on a GPU of so few SMs that programs cross sequences.
GPU = make_gpu((9, 0), 3)
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")


def triton_call(*arguments, kernel, out_shape, grid, num_warps, num_stages, compute_capability, **constants):
    """Emulates jax_triton.triton_call on a CPU; outputs are NaN before the kernel runs."""
    assert compute_capability == 90

    def run(*arrays):
        arrays = iter(arrays)
        given = [torch.from_numpy(np.array(next(arrays))) if isinstance(x, jax.Array) else x for x in arguments]
        outputs = [torch.full(x.shape, torch.nan, dtype=getattr(torch, x.dtype.name)) for x in out_shape]
        kernel[grid](*(float(x) if isinstance(x, np.float32) else x for x in given), *outputs, **constants)
        return tuple(x.numpy() for x in outputs)

    return jax.pure_callback(run, tuple(out_shape), *(x for x in arguments if isinstance(x, jax.Array)))


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=triton_call))
        patch.setattr(triton, "local_gpu", lambda: GPU)
        patch.setattr(triton_torch, "_gpu", lambda device: GPU)
        patch.setattr(triton_kernels, "_opaque", lambda x: x)  # inline assembly
        yield


def tensor(x):
    return None if x is None else torch.from_numpy(np.array(x))


def by_torch(case: DecodeCase, tiling: Tiling | None = None):
    arrays, keywords = case.draw()
    table, scales = (tensor(keywords.get(name)) for name in ("block_table_BN", "scales_P2S"))
    arrays = [tensor(x) for x in arrays]
    out = torch.full((*arrays[0].shape[:3], case.c_width), torch.nan, dtype=arrays[0].dtype)
    result = triton_torch.decode(
        *arrays, scale=keywords["scale"], block_table=table, scales=scales, out=out, tiling=tiling
    )
    assert result[0] is out and result[1].dtype == torch.float32
    return out.float(), result[1]


def by_jax(case: DecodeCase, tiling: Tiling | None = None):
    arrays, keywords = case.draw()
    scales = keywords.pop("scales_P2S", None)
    op = jax.jit(lambda *arrays: triton.decode(*arrays, **keywords, scales_P2S=scales, tiling=tiling))
    out, lse = op(*arrays)
    assert (out.dtype, lse.dtype) == (case.dtype, "float32")
    return out.astype("float32"), lse


def check(case: DecodeCase, run=by_torch, tiling: Tiling | None = None):
    # int8 goes with 16 bits.
    case = dataclasses.replace(case, dtype="float16") if case.int8 else case
    tolerance = 1e-5 if case.dtype == "float32" else 3e-3
    for ours, expected in zip(run(case, tiling), case.expected(), strict=True):
        np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", FEW_DECODE_CASES.values(), ids=FEW_DECODE_CASES)
def test_decode_equals_float64(case):
    check(case)


@pytest.mark.parametrize("name", ["ragged", "int8: pages", "3 queries"])
def test_both_front_ends_launch_the_same(name):
    check({**FEW_DECODE_CASES, "3 queries": contiguous((70, 3), 70, queries=3)}[name], by_jax)


@pytest.mark.parametrize("c_width", [64, 192, 256, 320, 448, 512])
@pytest.mark.parametrize("int8", [False, True])
def test_widths_of_one_and_two_tiles(c_width, int8):
    check(DecodeCase((33, 70), c_width=c_width, rope_width=64, heads=2, int8=int8))


def test_rows_of_many_programs():
    check(DecodeCase((33, 70), heads=24, queries=2, dtype="float16"), tiling=Tiling(16, 32, 4, 2, 2))


@pytest.mark.parametrize("min_tiles", [1, 2, 5])
def test_the_least_number_of_tiles_of_a_program_changes_nothing(min_tiles):
    check(DecodeCase((80, 0, 17, 64), heads=2), tiling=Tiling(16, 16, 4, 2, 4, min_tiles))


@settings(max_examples=10)
@given(st.data())
def test_any_batch(data):
    page_size, pages, queries = (data.draw(st.integers(1, top)) for top in (40, 6, 4))
    lengths = data.draw(st.lists(st.integers(0, page_size * pages + 3), min_size=1, max_size=20))
    tiling = Tiling(16, data.draw(st.sampled_from([16, 32])), 4, 2, data.draw(st.integers(1, 5)))
    case = DecodeCase(
        tuple(lengths), queries, data.draw(st.integers(1, 3)), page_size=page_size, pages_per_row=pages,
        int8=data.draw(st.booleans()),
    )  # fmt: skip
    check(case, tiling=tiling)


def test_a_cache_that_holds_content_and_rotary_key_in_one_row():
    case = DecodeCase((80, 17, 16, 0), queries=2, dtype="float16")
    arrays, keywords = case.draw()
    q, c, k_rope, lengths = (tensor(x) for x in arrays)
    # Queries come with their heads first, and pages lie apart, as in the cache of one layer of many.
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.full((len(c), 2, case.page_size, 96), torch.nan, dtype=torch.float16)[:, 1]
    cache[...] = torch.cat([c, k_rope], -1)
    table = torch.full((4, 9), -1, dtype=torch.int32)[:, :5]
    table[...] = tensor(keywords["block_table_BN"])
    out, lse = triton_torch.decode(
        q, cache[..., :64], cache[..., 64:], lengths, scale=keywords["scale"], block_table=table
    )
    expected = case.expected()
    np.testing.assert_allclose(out.float(), expected[0], atol=3e-3)
    np.testing.assert_allclose(lse, expected[1], atol=3e-3)


def test_offsets_beyond_32_bits():
    """The operating system backs only the touched pages of an array of more than 2^31 elements."""
    page_size, width = 16, 96
    far = 2**31 // (page_size * width) + 5
    cache = torch.empty((far + 1, page_size, width), dtype=torch.int8)
    rng = np.random.default_rng(0)
    cache[far] = tensor(rng.integers(-127, 128, cache.shape[1:]))
    scales = torch.zeros((far + 1, 2, page_size))
    scales[far] = 0.02
    q, table = torch.from_numpy(rng.normal(size=(1, 1, 2, width))).half(), torch.tensor([[far]], dtype=torch.int32)
    length = torch.tensor([11], dtype=torch.int32)
    out, lse = triton_torch.decode(
        q, cache[..., :64], cache[..., 64:], length, scale=0.2, block_table=table, scales=scales
    )
    page, zero = cache[far:], np.zeros((1, 1), int)
    expected = decode_oracle(
        q, page[..., :64], page[..., 64:], length, scale=0.2, block_table_BN=zero, scales_P2S=scales[far:]
    )
    np.testing.assert_allclose(out.float(), expected[0], atol=3e-3)
    np.testing.assert_allclose(lse, expected[1], atol=3e-3)


def test_what_does_not_fit_together_is_named():
    arrays, keywords = DecodeCase((5, 2), dtype="float16").draw()
    q, c, k_rope, lengths = (tensor(x) for x in arrays)
    table, scale = tensor(keywords["block_table_BN"]), 0.2
    for replaced, words in [
        ({"lengths": lengths.long()}, r"lengths is torch.int64 \(2,\), expected torch.int32 \(2,\)"),
        ({"k_rope": k_rope[:, :4]}, r"k_rope is torch.float16 \(4, 4, 32\), expected torch.float16 \(4, 16, 32\)"),
        ({"block_table": table[:1]}, r"block_table is torch.int32 \(1, 5\)"),
        ({"block_table": None}, "4 pages for 2 rows need a block table"),
        ({"scales": torch.ones(4, 2, 16)}, "an int8 cache needs scales, others none"),
        ({"q": q.transpose(0, 3).contiguous().transpose(0, 3)}, "last axis"),
        ({"q": q.float()}, "the cache must be of the type of the queries"),
        ({"q": q[..., :66], "k_rope": k_rope[..., :2]}, "R 32 or 64, not 64 and 2"),
    ]:
        arguments = {"q": q, "c": c, "k_rope": k_rope, "lengths": lengths, "block_table": table, **replaced}
        with pytest.raises(ValueError, match=words):
            triton_torch.decode(**arguments, scale=scale)
