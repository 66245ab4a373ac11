"""The ops on an explicit mesh, and attention whose keys are spread over one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import latent_attention
from kernels_oracle import DecodeCase, attention_oracle, contiguous, decode_oracle
from latent_attention import merge_over

SCALE = 0.2


def mesh(*shape: int, kind=AxisType.Explicit):
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape))


def put(x, *axes):
    return None if x is None else jax.device_put(x, P(*axes))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("axes", [("data", None), (None, "model"), ("data", "model"), (None, None)])
def test_attention_with_sharded_batch_and_heads_is_that_of_the_whole(axes, implementation):
    batch, heads = axes
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 9, 4, width)), jnp.float32) for width in (12, 12, 20))
    segments = jnp.asarray(rng.integers(0, 2, (4, 9)), jnp.int32)
    offset, lengths = jnp.array([0, 3, -2, 9], jnp.int32), jnp.array([9, 0, 5, 1], jnp.int32)
    options = {"offset": offset, "lengths": lengths, "q_segments": segments, "kv_segments": segments}
    expected = attention_oracle(q, k, v, scale=SCALE, **options)
    with jax.set_mesh(mesh(4, 2)):
        out, lse = jax.jit(
            functools.partial(
                latent_attention.attention, scale=SCALE, return_lse=True, implementation=implementation
            )
        )(
            *(put(x, batch, None, heads) for x in (q, k, v)), q_offset=put(offset, batch),
            kv_lengths=put(lengths, batch), q_segments=put(segments, batch), kv_segments=put(segments, batch),
        )  # fmt: skip
    assert (out.sharding.spec, lse.sharding.spec) == (P(batch, None, heads, None), P(batch, None, heads))
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


def test_gradients_of_sharded_attention_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 9, 4, 8)), jnp.float32) for _ in range(3))

    def grads(q, k, v):
        return jax.grad(lambda *x: jnp.sum(latent_attention.attention(*x, scale=SCALE) ** 2), (0, 1, 2))(q, k, v)

    expected = jax.jit(grads)(q, k, v)
    with jax.set_mesh(mesh(4, 2)):
        ours = jax.jit(grads)(*(put(x, "data", None, "model") for x in (q, k, v)))
    for a, b in zip(ours, expected, strict=True):
        assert a.sharding.spec == P("data", None, "model", None)
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("axes", [("data", None), (None, "model"), ("data", "model")])
@pytest.mark.parametrize("int8", [False, True])
def test_decode_with_sharded_batch_and_heads_is_that_of_the_whole(axes, int8, implementation):
    batch, heads = axes
    case = contiguous((40, 0, 17, 33), 40, queries=2, int8=int8)
    (q, c, k_rope, lengths), keywords = case.draw()
    op = functools.partial(latent_attention.decode, scale=keywords["scale"], implementation=implementation)
    with jax.set_mesh(mesh(4, 2)):
        out, lse = jax.jit(op)(
            put(q, batch, None, heads), *(put(x, batch) for x in (c, k_rope, lengths)),
            scales_P2S=put(keywords.get("scales_P2S"), batch),
        )  # fmt: skip
    assert (out.sharding.spec, lse.sharding.spec) == (P(batch, None, heads, None), P(batch, None, heads))
    for ours, expected in zip((out, lse), case.expected(), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


def test_block_tables_count_the_pages_of_their_own_device():
    case = DecodeCase((80, 17, 0, 33))
    (q, c, k_rope, lengths), keywords = case.draw()
    table = np.array(keywords["block_table_BN"])
    pages = [table[b, : -(-length // 16)] for b, length in enumerate(case.lengths)]
    # Every device gets as many pages as the longest row needs, in its own order.
    pool = np.concatenate([np.pad(p, (0, 5 - len(p)), constant_values=p[0] if len(p) else 0) for p in pages])
    own = np.full_like(table, -1)
    for b, used in enumerate(pages):
        own[b, : len(used)] = np.arange(len(used))
    with jax.set_mesh(mesh(4, 2)):
        op = jax.jit(functools.partial(latent_attention.decode, scale=keywords["scale"]))
        arrays = (put(x, "data") for x in (c[pool], k_rope[pool], lengths))
        ours = op(put(q, "data", None, "model"), *arrays, block_table_BN=put(own, "data"))
    for a, b in zip(ours, case.expected(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("axes", [(None, "data"), (None, None, None, "model")])
def test_other_axes_may_not_be_sharded(axes):
    with jax.set_mesh(mesh(4, 2)):
        q = put(jnp.ones((4, 4, 4, 96)), *axes)
        cache, lengths = (put(jnp.ones(shape)) for shape in ((4, 8, 64), (4, 8, 32))), put(jnp.ones(4, jnp.int32))
        with pytest.raises(ValueError, match="only the batch"):
            latent_attention.decode(q, *cache, lengths, scale=SCALE)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("lengths", [(64, 3), (0, 0), (17, 40)])
def test_keys_spread_over_devices_are_merged(lengths, kind):
    """Context parallelism: device i holds tokens [8 i, 8 i + 8) of both rows; many devices hold none."""
    rng = np.random.default_rng(0)
    shapes = (2, 1, 3, 24), (2, 64, 16), (2, 64, 8)
    q, c, k_rope = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    expected = decode_oracle(q, c, k_rope, np.array(lengths), scale=SCALE)
    over = mesh(8, kind=kind)

    @functools.partial(
        jax.shard_map, mesh=over, in_specs=(P(), P(None, "data"), P(None, "data")), out_specs=P(), check_vma=False
    )
    def op(q, c, k_rope):
        kv_len = jnp.clip(jnp.array(lengths) - 8 * jax.lax.axis_index("data"), 0, 8)
        return merge_over("data", *latent_attention.decode(q, c, k_rope, kv_len, scale=SCALE))

    def placed(x, *axes):
        return jax.device_put(x, NamedSharding(over, P(*axes)))

    out, lse = jax.jit(op)(placed(q), placed(c, None, "data"), placed(k_rope, None, "data"))
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


def test_merged_results_have_the_gradients_of_attention_to_all_keys():
    """By queries, keys and values; the queries of one row see keys of one device only, those of another none."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, n, 2, 8)), jnp.float32) for n in (4, 64, 64))
    weights, by_lse = rng.normal(size=(3, 4, 2, 8)), rng.normal(size=(3, 4, 2))
    q_segments, kv_segments = np.array([[1] * 4, [2] * 4, [3] * 4]), np.array([[1] * 64, [2] * 5 + [0] * 59, [0] * 64])
    over = mesh(8, kind=AxisType.Auto)

    def attend(q, k, v, segments):
        options = {"q_offset": k.shape[1], "q_segments": q_segments, "kv_segments": segments, "return_lse": True}
        return latent_attention.attention(q, k, v, scale=SCALE, **options)

    def parts(q, k, v, segments):
        """Every device counts an eighth of the sum, as what it merged is the same on all."""
        return tuple(x[None] / 8 for x in merge_over("data", *attend(q, k, v, segments)))

    spread = P(None, "data")
    merged = jax.shard_map(
        parts, mesh=over, in_specs=(P(), spread, spread, spread), out_specs=P("data"), check_vma=False
    )

    def gradients(op):
        def loss(q, k, v):
            out, lse = op(q, k, v, kv_segments)
            return jnp.sum(out * weights) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse) * by_lse)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for found, expected in zip(gradients(merged), gradients(attend), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_merged_16_bit_results_are_weighed_in_32():
    over = mesh(8, kind=AxisType.Auto)
    rng = np.random.default_rng(0)
    out, lse = jnp.asarray(rng.normal(size=(8, 5, 16)), jnp.bfloat16), jnp.asarray(rng.normal(size=(8, 5)) * 3)
    lse = lse.at[:, 1].set(-jnp.inf).at[3, 0].set(-jnp.inf)
    spec = P("data")
    merged, total = jax.jit(
        jax.shard_map(functools.partial(merge_over, "data"), mesh=over, in_specs=(spec, spec), out_specs=P())
    )(out, lse)
    assert merged.dtype == jnp.bfloat16
    weights = np.exp(np.asarray(lse, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nan_to_num((np.asarray(out, np.float64) * weights[..., None]).sum(0) / weights.sum(0)[:, None])
        np.testing.assert_allclose(merged[0].astype("float32"), expected, rtol=2**-8, atol=2e-3)
        np.testing.assert_allclose(total[0], np.log(weights.sum(0)), rtol=1e-5)


def inputs(batch=4):
    (q, c, k_rope, lengths), keywords = contiguous((40, 9, 17, 33)[:batch], 40).draw()
    return q, c, k_rope, lengths, functools.partial(latent_attention.decode, scale=keywords["scale"])


def test_small_arrays_of_the_batch_need_not_be_sharded():
    q, c, k_rope, lengths, decode = inputs()
    decode = jax.jit(decode)
    expected = decode(q, c, k_rope, lengths)
    k = jnp.repeat(c[:, :, None], 4, 2)
    attention = jax.jit(functools.partial(latent_attention.attention, scale=SCALE))
    expected_attention = attention(k, k, k, q_offset=jnp.int32(0), kv_lengths=lengths)
    with jax.set_mesh(mesh(4)):
        out, lse = decode(*(put(x, "data") for x in (q, c, k_rope)), lengths)
        k = put(k, "data")
        out_attention = attention(k, k, k, q_offset=jnp.int32(0), kv_lengths=lengths)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)
    np.testing.assert_allclose(out_attention, expected_attention, atol=1e-5)


@pytest.mark.parametrize(
    ("of_q", "of_cache", "name"),
    [(("data",), (), "c"), ((), (None, "data"), "c"), ((None, None, None, "data"), (), "q")],
    ids=["q sharded, the cache whole", "tokens of the cache sharded", "the width of q sharded"],
)
def test_arrays_that_are_not_sharded_alike_are_refused(of_q, of_cache, name):
    q, c, k_rope, lengths, decode = inputs()
    with jax.set_mesh(mesh(4)), pytest.raises(ValueError, match=f"{name} is sharded .*, expected"):
        decode(put(q, *of_q), put(c, *of_cache), put(k_rope, *of_cache), lengths)
