"""The Triton attention kernels as far as a machine without a GPU can tell."""

import functools
import os

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from latent_attention.attention.mask import make_mask
from latent_attention.attention.triton import Tiling, _widths, ranges, select_tiling, why_not_attention
from latent_attention.call_shapes import AttentionShape
from latent_attention.gpu import make_gpu
from triton_checks import check_interpreted

SHAPE = AttentionShape(1, 128, 128, 2, 192, 128, "bfloat16", False, False, 0)
HOPPER = make_gpu((9, 0), 132)


def test_in_the_interpreter():
    check_interpreted("attention/triton_attention_interpreted.py")


POINTERS = {"lse_ptr": "*fp32", "delta_ptr": "*fp32"} | {
    f"{name}_ptr": "*i32" for name in ("offsets", "lengths", "ranges", "q_segments", "kv_segments")
}


def compiled(kernel: str, capability: tuple[int, int], widths: tuple[int, int], segments: bool = True):
    """The kernel, compiled for a GPU that need not be here, with what the front end tells jax-triton."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from latent_attention.attention import triton_kernels

    function = getattr(triton_kernels, f"{kernel}_kernel")
    parts = _widths(*widths)
    tiling = select_tiling(kernel, parts["K1"] + parts["K2"] + parts["V1"], make_gpu(capability, 1))
    constants = {
        **parts, "HEADS": 32, "SEGMENTS": segments, "Q_BLOCK": tiling.queries, "KV_BLOCK": tiling.keys,
    }  # fmt: skip

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return POINTERS.get(name, "*bf16")
        return "fp32" if name.startswith("scale") else "i32"

    source = ASTSource(
        function,
        {name: type_of(name) for name in function.arg_names},
        constants,
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name.endswith("_ptr")},
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options={"num_warps": tiling.warps, "num_stages": tiling.stages})


@pytest.fixture(autouse=True, scope="module")
def no_cache_of_earlier_runs(tmp_path_factory):
    old = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    os.environ.pop("TRITON_CACHE_DIR")
    if old is not None:
        os.environ["TRITON_CACHE_DIR"] = old


TARGETS = [((8, 0), (192, 128)), ((8, 6), (192, 128)), ((8, 6), (256, 256)), ((9, 0), (192, 128))]


@pytest.mark.parametrize(("capability", "widths"), TARGETS)
@pytest.mark.parametrize("kernel", ["forward", "d_q", "d_kv"])
def test_it_compiles_into_the_shared_memory_of_a_cta(kernel, capability, widths):
    result = compiled(kernel, capability, widths)
    assert 0 < result.metadata.shared <= make_gpu(capability, 1).shared_memory
    tensor_core = "wgmma.mma_async" if capability == (9, 0) else "mma.sync"
    assert tensor_core in result.asm["ptx"]
    # The inner loops load 16 bytes a thread, ahead of their use: Triton knows that rows are aligned.
    assert "cp.async.cg.shared.global" in result.asm["ptx"] or result.metadata.num_stages == 1


def test_widths_are_read_as_powers_of_two():
    def tiles(k, v=128):
        return tuple(_widths(k, v)[name] for name in ("K1", "K2", "V1"))

    assert tiles(192) == (128, 64, 128)
    assert tiles(128) == (128, 0, 128)
    assert tiles(96, 64) == (64, 32, 64)
    assert tiles(12, 20) == (16, 0, 32)
    assert tiles(1, 1) == (16, 0, 16)
    assert tiles(112) == (128, 0, 128)  # 64 + 64 would be no less
    for k in range(1, 257):
        k1, k2, _ = tiles(k)
        assert k1 + k2 >= k and k1 & (k1 - 1) == 0 and k2 & (k2 - 1) == 0 and (k2 == 0 or k1 < k)


BLOCKS = Tiling(16, 8, 1, 1)


def block_counts(visible, blocks):
    """[B, query blocks, key blocks]: of the pairs of tokens in each pair of blocks, how many see each other."""
    padded = np.pad(visible, ((0, 0), (0, -visible.shape[1] % 16), (0, -visible.shape[2] % 8)))
    shape = visible.shape[0], padded.shape[1] // blocks.queries, blocks.queries, -1, blocks.keys
    return padded.reshape(shape).sum((2, 4))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def jitted_ranges(queries, keys, by_query, offset, lengths, q_segments, kv_segments):
    q, k = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (queries, keys))
    return ranges(make_mask(q, k, offset, lengths, q_segments, kv_segments), queries, keys, BLOCKS, by_query)


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (37, 90), (90, 19)])
@pytest.mark.parametrize("with_segments", [False, True])
@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_no_block_that_counts_is_left_out_and_none_that_needs_a_mask_goes_without(queries, keys, with_segments, random):
    rng = np.random.default_rng(random.randrange(2**32))
    offset, lengths = rng.integers(-100, 100, 2), rng.integers(0, keys + 1, 2)
    t, s = np.arange(queries)[:, None], np.arange(keys)
    visible = (s <= offset[:, None, None] + t) & (s < lengths[:, None, None])
    q_segments = kv_segments = None
    if with_segments:
        kinds = rng.integers(1, 5)
        q_segments, kv_segments = (rng.integers(0, kinds, (2, n)) for n in (queries, keys))
        if rng.integers(2):
            q_segments, kv_segments = np.sort(q_segments), np.sort(kv_segments)
        visible &= q_segments[:, :, None] == kv_segments[:, None]
    counts = block_counts(visible, BLOCKS)
    for by_query in (True, False):
        found = np.asarray(jitted_ranges(queries, keys, by_query, offset, lengths, q_segments, kv_segments))
        seen = counts if by_query else counts.swapaxes(1, 2)
        assert found.shape == (*seen.shape[:2], 4)
        assert np.all(np.diff(found) >= 0) and np.all(found >= 0) and np.all(found <= seen.shape[2])
        n = np.arange(seen.shape[2])
        visited = (n >= found[..., :1]) & (n < found[..., 3:])
        full = (n >= found[..., 1:2]) & (n < found[..., 2:3])
        assert not np.any(seen[~visited])
        # In a full block all see all. Rows beyond the last query do no harm to a block of queries: nothing stores them.
        rows = np.minimum(queries - np.arange(counts.shape[1]) * BLOCKS.queries, BLOCKS.queries)[:, None]
        assert np.all((seen == BLOCKS.keys * (rows if by_query else BLOCKS.queries)) | ~full)
        if not with_segments:  # then nothing is visited or masked in vain
            assert np.array_equal(visited, seen > 0)


def test_blocks_of_other_segments_are_skipped():
    ids = np.repeat(np.arange(4), 32)[None]
    mask = make_mask(jnp.zeros((1, 128)), jnp.zeros((1, 128)), 0, None, ids, ids)
    assert ranges(mask, 128, 128, BLOCKS, True)[0].tolist() == [
        ends for first in (0, 4, 8, 12)
        for ends in ([first] + 3 * [first + 2], [first, first, first + 2, first + 4])
    ]  # fmt: skip
    # Keys 32 to 39 are seen by the queries of their segment, 32 to 63; the first block of them needs the mask.
    assert ranges(mask, 128, 128, BLOCKS, False)[0, 4].tolist() == [2, 3, 4, 4]


def test_ranges_at_a_million_tokens_are_computed_without_a_matrix_of_blocks():
    ids = jax.ShapeDtypeStruct((1, 1 << 20), jnp.int32)
    tiling = Tiling(128, 64, 8, 3)

    def op(q_segments, kv_segments):
        return ranges(make_mask(ids, ids, 0, None, q_segments, kv_segments), 1 << 20, 1 << 20, tiling, True)

    analysis = jax.jit(op).lower(ids, ids).compile().memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 128 << 20  # one matrix of blocks would be 512 MiB


def test_reasons(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert why_not_attention(SHAPE, HOPPER) is None
    assert why_not_attention(SHAPE._replace(segments=True, lengths=True, offset=None), make_gpu((8, 6), 82)) is None
    for shape, gpu, words in [
        (SHAPE, None, "there is none"),
        (SHAPE, make_gpu((7, 5), 40), "this is sm_75"),
        (SHAPE._replace(dtype="float32"), HOPPER, "not float32"),
        (SHAPE._replace(qk_width=576, v_width=512), HOPPER, "up to 256, not 576 and 512"),
        (SHAPE._replace(batch=4096, heads=32), HOPPER, "this has 131072"),
    ]:
        assert words in (why_not_attention(shape, gpu) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jax_triton" else object())
    assert "jax_triton is not installed" in (why_not_attention(SHAPE, HOPPER) or "")


def test_there_is_a_tiling_for_every_gpu_and_width():
    for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)]:
        for width in (16, 64, 128, 192, 256):
            parts = _widths(width, width)
            for kernel in ("forward", "d_q", "d_kv"):
                tiling = select_tiling(kernel, parts["K1"] + parts["K2"] + parts["V1"], make_gpu(capability, 1))
                assert tiling.queries >= 16 and tiling.keys >= 16
