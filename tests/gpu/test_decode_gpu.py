"""Every implementation of decode that runs on this GPU against float64."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, reject, settings

import latent_attention
from kernels_oracle import DecodeCase, contiguous, decode_oracle
from latent_attention import IMPLEMENTATIONS, UnavailableError, quantize_cache, resolve
from latent_attention.call_shapes import DecodeShape
from latent_attention.decode import mosaic
from latent_attention.decode.mosaic_smem import Config
from latent_attention.gpu import local_gpu
from tools.bench import float64

TORCH = "triton in PyTorch"
IMPLEMENTATIONS_HERE = [*(name for name in IMPLEMENTATIONS["decode"] if name != "reference"), TORCH]
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS_HERE)
# Norm of the error over the norm, of each row [C] of the output; probabilities are rounded to these types.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}
RANDOM = functools.partial(settings, phases=[Phase.generate])

CASES = {
    "256+64: lengths around tiles": DecodeCase(
        (0, 1, 63, 64, 65, 129, 1000), heads=32, c_width=256, rope_width=64, page_size=64, pages_per_row=17
    ),
    "256+64: 8 queries, more than tokens": DecodeCase(
        (3, 0, 8, 9, 700), 8, heads=32, c_width=256, rope_width=64, page_size=64, pages_per_row=11
    ),
    "512+64: ragged": DecodeCase(
        (577, 1, 2048, 300), heads=16, c_width=512, rope_width=64, page_size=64, pages_per_row=32
    ),
    "512+64: 128 heads, 2 queries": contiguous((700, 64, 1), 704, queries=2, heads=128, c_width=512, rope_width=64),
    "64+32: one head": contiguous((100, 64, 1, 5000), 5000, heads=1),
    "64+32: more splits than tokens": DecodeCase((3,), heads=8, page_size=64, pages_per_row=1),
    "128+64: 8 x 128 rows": contiguous((333, 9), 384, queries=8, heads=128, c_width=128, rope_width=64),
    "192+64: odd heads and queries": DecodeCase((130, 77, 0), 3, heads=5, c_width=192, rope_width=64, page_size=64),
    "192+32: pages of 16": DecodeCase((500, 33, 16, 15), 4, heads=16, c_width=192, pages_per_row=32),
    "320+64: one query beyond the capacity": DecodeCase(
        (2**31 - 1, 320, 321), heads=20, c_width=320, rope_width=64, page_size=64
    ),
    "384+32: 7 queries": contiguous((1025, 6, 7), 1104, queries=7, heads=12, c_width=384),
    "448+64: huge pages": DecodeCase((5000, 2049, 2048), 2, 64, 448, 64, page_size=2048, pages_per_row=3),
    "many short rows": DecodeCase(
        tuple(range(1, 200)), heads=16, c_width=256, rope_width=64, page_size=64, pages_per_row=4
    ),
    "one long row among short ones": DecodeCase(
        (20000, 1, 1, 50), heads=32, c_width=256, rope_width=64, page_size=64, pages_per_row=320
    ),
}


@functools.cache
def jitted(implementation: str, scale: float):
    return jax.jit(functools.partial(latent_attention.decode, scale=scale, implementation=implementation))


def run(implementation: str, arrays, *, scale, **keywords):
    """(out, lse) as NumPy arrays, the same in two runs. UnavailableError (a skipped test) if it cannot run this."""
    if implementation == TORCH:
        return _run_in_torch(arrays, scale=scale, **keywords)
    results = [jitted(implementation, scale)(*arrays, **keywords) for _ in range(2)]
    assert [x.dtype for x in results[0]] == [arrays[0].dtype, jnp.float32]
    return _same(*([np.asarray(x.astype(jnp.float32)) for x in result] for result in results))


def _run_in_torch(arrays, *, scale, block_table_BN=None, scales_P2S=None):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    front = pytest.importorskip("latent_attention.decode.triton_torch")
    *arrays, block_table, scales = (
        None if x is None else torch.from_dlpack(jax.block_until_ready(x))
        for x in (*arrays, block_table_BN, scales_P2S)
    )
    results = []
    for _ in range(2):
        poison = torch.full((arrays[0].numel() * 4,), torch.nan, device="cuda")
        del poison  # what is allocated next holds NaN until it is written
        result = front.decode(*arrays, scale=scale, block_table=block_table, scales=scales)
        results.append([x.float().cpu().numpy() for x in result])
    return _same(*results)


def _same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    return first


def check(results, theirs, dtype: str):
    """The error of each row of the output, and of the log-sum-exp."""
    (out, lse), (expected_out, expected_lse) = results, theirs
    norms = np.linalg.norm(expected_out, axis=-1)
    errors = np.linalg.norm(out - expected_out, axis=-1) / np.where(norms == 0, 1, norms)
    assert np.all(errors <= TOLERANCE[dtype]), (
        f"{np.max(errors)} at {np.unravel_index(np.argmax(errors), errors.shape)}"
    )
    np.testing.assert_allclose(lse, expected_lse, atol=2e-3)


expected = functools.cache(DecodeCase.expected)


def combinations():
    """Combinations of case, cache and implementation; not all, because most of the time goes into compiling."""
    for i, name in enumerate(CASES):
        for implementation in IMPLEMENTATIONS_HERE:
            caches = {"bfloat16", ("float16", "int8")[i % 2]}
            if implementation in ("xla", TORCH):  # simple, or a kernel that `triton` tests
                caches = {("bfloat16", "int8", "float16")[i % 3]}
            for cache in sorted(caches):
                yield pytest.param(name, cache, implementation, id=f"{name}-{cache}-{implementation}")


@pytest.mark.parametrize(("name", "cache", "implementation"), list(combinations()))
def test_decode_equals_float64(name, cache, implementation):
    dtype = "bfloat16" if cache == "int8" else cache
    case = dataclasses.replace(CASES[name], dtype=dtype, int8=cache == "int8")
    arrays, keywords = case.draw()
    check(run(implementation, arrays, **keywords), expected(case), dtype)


@EACH
def test_random_shapes(implementation):
    if implementation != TORCH:  # one that runs nothing here is skipped, one that refuses some shapes tries others
        resolve("decode", implementation, DecodeShape(1, 1, 32, 256, 64, 8, 64, "bfloat16", "bfloat16", True))

    @RANDOM(max_examples=5)
    @given(st.data())
    def one(data):
        page_size, pages = data.draw(st.sampled_from([16, 64, 128])), data.draw(st.integers(1, 20))
        lengths = data.draw(st.lists(st.integers(0, page_size * pages), min_size=1, max_size=5))
        case = DecodeCase(
            tuple(lengths), data.draw(st.integers(1, 8)), data.draw(st.integers(1, 128)),
            data.draw(st.sampled_from(range(64, 513, 64))), data.draw(st.sampled_from([32, 64])),
            page_size, pages, int8=data.draw(st.booleans()), dtype=data.draw(st.sampled_from(list(TOLERANCE))),
        )  # fmt: skip
        arrays, keywords = case.draw()
        try:
            results = run(implementation, arrays, **keywords)
        except UnavailableError:
            reject()
        check(results, case.expected(), case.dtype)

    one()


@EACH
def test_random_lengths(implementation):
    rows, pages, size = 6, 24, 64
    case = DecodeCase((size * pages,) * rows, 2, 16, 128, 64, size, pages, dtype="float16")
    (*arrays, _), keywords = case.draw()

    @RANDOM(max_examples=15)
    @given(st.lists(st.integers(0, size * pages), min_size=rows, max_size=rows))
    def one(lengths):
        called = [*arrays, jnp.asarray(lengths, jnp.int32)]
        check(run(implementation, called, **keywords), decode_oracle(*called, **keywords), case.dtype)

    one()


@EACH
@pytest.mark.parametrize("paged", [True, False], ids=["pages", "contiguous"])
def test_the_last_pages_of_a_pool_of_more_than_2_31_numbers(paged, implementation):
    c_width, rope_width, heads, page_size, used = 512, 64, 16, 64 if paged else 2**15, 4
    pages = 2**31 // (page_size * c_width) + 2 * used
    tokens = 200
    rng = np.random.default_rng(0)
    q_BTHW, *cache = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((used, 1, heads, c_width + rope_width), (used, tokens, c_width), (used, tokens, rope_width))
    )

    @jax.jit
    def pool(x_BSX):
        """NaN but for the last `used` pages, or for as many pages as the tokens take."""
        if paged:
            x_BSX = jnp.pad(x_BSX, ((0, 0), (0, -tokens % page_size), (0, 0)), constant_values=jnp.nan)
            x_BSX = x_BSX.reshape(-1, page_size, x_BSX.shape[-1])
        empty = jnp.full((pages, page_size, x_BSX.shape[-1]), jnp.nan, jnp.bfloat16)
        return jax.lax.dynamic_update_slice(empty, x_BSX, (pages - len(x_BSX), 0, 0))

    c_PSC, k_rope_PSR = (pool(x) for x in cache)
    assert c_PSC.size > 2**31
    lengths, table_BN = np.full(used, tokens, np.int32), None
    if paged:
        per_row = -(-tokens // page_size)
        table_BN = jnp.arange(pages - used * per_row, pages, dtype=jnp.int32).reshape(used, per_row)
    else:
        lengths = np.pad(lengths, (pages - used, 0))
        q_BTHW = jnp.pad(q_BTHW, ((pages - used, 0), (0, 0), (0, 0), (0, 0)))
    arrays = q_BTHW, c_PSC, k_rope_PSR, jnp.asarray(lengths)
    out, lse = run(implementation, arrays, scale=0.1, block_table_BN=table_BN)
    theirs = decode_oracle(q_BTHW[-used:], *cache, lengths[-used:], scale=0.1)
    check((out[-used:], lse[-used:]), theirs, "bfloat16")


@EACH
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_a_million_tokens(cache, implementation):
    pages, size, heads, c_width, rope_width = 2**14, 64, 32, 256, 64
    keys = jax.random.split(jax.random.key(0), 4)
    q_BTHW = jax.random.normal(keys[0], (1, 1, heads, c_width + rope_width), jnp.bfloat16)
    arrays = (jax.random.normal(keys[i], (pages, size, w), jnp.bfloat16) for i, w in ((1, c_width), (2, rope_width)))
    c_PSC, k_rope_PSR, *scales = arrays if cache == "bfloat16" else jax.jit(quantize_cache)(*arrays)
    table_BN = jax.random.permutation(keys[3], pages).astype(jnp.int32)[None]
    keywords = {"scale": 0.1, "block_table_BN": table_BN, "scales_P2S": scales[0] if scales else None}
    out, lse = run(implementation, (q_BTHW, c_PSC, k_rope_PSR, jnp.array([pages * size], jnp.int32)), **keywords)
    assert np.all(np.isfinite(lse))
    theirs = float64.decode(q_BTHW, c_PSC, k_rope_PSR, table_BN, scale=0.1, scales_P2S=keywords["scales_P2S"])
    assert float64.relative_error(out, theirs) < 5e-3


@EACH
def test_a_query_that_is_nan_harms_no_other(implementation):
    case = contiguous((4000,), 4000, queries=2, heads=8, c_width=256, rope_width=64, dtype="bfloat16")
    (q_BTHW, *rest), keywords = case.draw()
    out, lse = run(implementation, (q_BTHW.at[0, 0, 3].set(jnp.nan), *rest), **keywords)
    theirs_out, theirs_lse = expected(case)
    others = np.arange(16).reshape(1, 2, 8) != 3
    check((out[others], lse[others]), (theirs_out[others], theirs_lse[others]), case.dtype)


@EACH
def test_a_cache_of_zeros_in_8_bits(implementation):
    tokens, heads = 2**14, 8
    q_BTHW = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, heads, 320)), jnp.bfloat16)
    c_PSC, k_rope_PSR, scales_P2S = quantize_cache(jnp.zeros((1, tokens, 256)), jnp.zeros((1, tokens, 64)))
    out, lse = run(implementation, (q_BTHW, c_PSC, k_rope_PSR, jnp.array([tokens])), scale=0.1, scales_P2S=scales_P2S)
    assert np.all(out == 0)
    np.testing.assert_allclose(lse, np.log(tokens), atol=1e-3)


@EACH
def test_inside_a_scan_over_layers(implementation):
    if implementation == TORCH:
        pytest.skip("scan is JAX's")
    case = DecodeCase((300, 65), heads=16, c_width=256, rope_width=64, page_size=64, dtype="bfloat16")
    (q_BTHW, *cache, lengths_B), keywords = case.draw()
    factors = jnp.asarray([1, 0.5, -0.25], jnp.bfloat16)  # of each layer; exact
    q_LBTHW, c_LPSC, k_rope_LPSR = (x * factors.reshape(-1, *[1] * x.ndim) for x in (q_BTHW, *cache))

    @jax.jit
    def all_layers(q_LBTHW, c_LPSC, k_rope_LPSR):
        def layer(carry, x):
            q, c, k_rope = x
            out, lse = latent_attention.decode(q, c, k_rope, lengths_B, **keywords, implementation=implementation)
            return carry + jnp.sum(lse), (out, lse)

        return jax.lax.scan(layer, jnp.float32(0), (q_LBTHW, c_LPSC, k_rope_LPSR))[1]

    out, lse = all_layers(q_LBTHW, c_LPSC, k_rope_LPSR)
    for i in range(len(factors)):
        theirs = decode_oracle(q_LBTHW[i], c_LPSC[i], k_rope_LPSR[i], lengths_B, **keywords)
        check((np.asarray(out[i].astype(jnp.float32)), np.asarray(lse[i])), theirs, case.dtype)


@pytest.mark.parametrize("consumers", [1, 2])
@pytest.mark.parametrize("int8", [False, True])
def test_tuning_of_mosaic_changes_no_result(int8, consumers):
    case = contiguous((3000, 0, 65, 1), 4000, heads=8, c_width=256, rope_width=64, dtype="bfloat16", int8=int8)
    (q_BTHW, c_PSC, k_rope_PSR, lengths_B), keywords = case.draw()
    reason = mosaic.why_not_decode(DecodeShape.of(q_BTHW, c_PSC, k_rope_PSR, None), local_gpu())
    if reason is not None:
        pytest.skip(reason)
    config = Config(stages=consumers, num_ctas=5, consumers=consumers, q_stages=1)
    out, lse = jax.jit(functools.partial(mosaic.decode, **{"scales_P2S": None} | keywords, config=config))(
        q_BTHW, c_PSC, k_rope_PSR, lengths_B
    )
    check((np.asarray(out.astype(jnp.float32)), np.asarray(lse)), expected(case), case.dtype)


@pytest.mark.parametrize(
    "case",
    [
        contiguous((700, 64, 1), 704, queries=2, heads=128, c_width=512, rope_width=64, dtype="bfloat16"),
        DecodeCase(
            (8000, 0, 1, 129), heads=128, c_width=512, rope_width=64, page_size=64, pages_per_row=128, dtype="float16"
        ),
        DecodeCase((500, 33, 16, 15), 4, heads=16, c_width=256, page_size=16, pages_per_row=32, dtype="bfloat16"),
    ],
    ids=["2 queries", "512+64", "pages of 16"],
)
def test_rows_on_m(case):
    arrays, keywords = case.draw()
    shape, gpu = DecodeShape.of(*arrays[:3], keywords["block_table_BN"]), local_gpu()
    if reason := mosaic.why_not_rows_on_m(shape, gpu):
        pytest.skip(reason)
    config = mosaic.configure_rows_on_m(shape, gpu)
    step = jax.jit(functools.partial(mosaic.decode, **{"scales_P2S": None} | keywords, config=config))
    results = [[np.asarray(x.astype(jnp.float32)) for x in step(*arrays)] for _ in range(2)]
    check(_same(*results), expected(case), case.dtype)


@pytest.mark.parametrize(("c_width", "heads"), [(256, 32), (512, 16)])
def test_auto_takes_the_fastest(c_width, heads):
    gpu = local_gpu()
    assert gpu is not None
    shape = DecodeShape(1, 1, heads, c_width, 64, 128, 64, "bfloat16", "bfloat16", True)
    fastest = "mosaic" if gpu.capability == (9, 0) else "triton" if gpu.capability >= (8, 0) else "xla"
    assert resolve("decode", "auto", shape) == fastest
