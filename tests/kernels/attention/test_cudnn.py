"""cuDNN attention as far as a machine without a GPU can tell: what is called, and what is made of the results."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import latent_attention
from cudnn_kernels import cudnn_kernels, stand_in
from kernels_gradients import attention_gradients_oracle, gradients_by_parts
from kernels_oracle import attention_oracle
from latent_attention import dispatch
from latent_attention.attention import cudnn, xla
from latent_attention.attention.cudnn import why_not_attention
from latent_attention.call_shapes import AttentionShape
from latent_attention.gpu import make_gpu

SCALE = 0.3
SHAPE = AttentionShape(2, 256, 256, 4, 128, 128, "bfloat16", False, False, 0)
AMPERE, HOPPER = make_gpu((8, 0), 108), make_gpu((9, 0), 132)


def arrays(queries, keys, k_width=128, v_width=128, batch=2, heads=4):
    shapes = (batch, queries, heads, k_width), (batch, keys, heads, k_width), (batch, keys, heads, v_width)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)


def loss(q, k, v, lengths=None, *, q_offset=0, with_lse=False):
    out, lse = cudnn.attention(
        q, k, v, scale=SCALE, q_offset=q_offset, kv_lengths=lengths, q_segments=None, kv_segments=None
    )
    return jnp.sum(out.astype(jnp.float32) ** 2) + (jnp.sum(lse) if with_lse else 0)


def calls(function, *inputs) -> collections.Counter[str]:
    """Counts cuDNN's kernels in the program for a GPU, by name and mask."""
    return cudnn_kernels(jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.parametrize(
    ("sizes", "lengths", "q_offset", "mask"),
    [
        ((256, 256), False, 0, "CAUSAL"),
        ((100, 100), False, 0, "CAUSAL"),
        ((256, 256, 192, 128), False, 0, "CAUSAL"),
        ((256, 256, 96, 64), False, 0, "CAUSAL"),
        ((256, 512, 64, 96), False, 512, "NO_MASK"),
        ((256, 512), False, 0, "CAUSAL"),
        ((256, 256), True, 0, "PADDING_CAUSAL"),
        ((256, 512), False, 512, "NO_MASK"),
        ((256, 512), True, 511, "PADDING"),
        ((256, 500), False, 512, "PADDING"),  # no whole tiles: NVIDIA/cudnn-frontend#160
        ((2**20, 2**20, 192, 128, 1, 32), False, 0, "CAUSAL"),
        ((2048, 2**20, 128, 128, 1, 32), True, 2**20, "PADDING"),
    ],
)
def test_forward_and_backward_are_cudnns(sizes, lengths, q_offset, mask):
    inputs = arrays(*sizes)
    extra = (jax.ShapeDtypeStruct(inputs[0].shape[:1], jnp.int32),) if lengths else ()
    grad = jax.grad(functools.partial(loss, q_offset=q_offset), (0, 1, 2))
    assert calls(grad, *inputs, *extra) == {f"Softmax {mask}": 1, f"SoftmaxBackward {mask}": 1}


def test_a_gradient_by_lse_goes_elsewhere():
    assert calls(jax.grad(functools.partial(loss, with_lse=True)), *arrays(256, 256)) == {"Softmax CAUSAL": 1}


@pytest.mark.parametrize(("policy", "forwards"), [("nothing_saveable", 2), ("latent_attention", 1)])
def test_a_remat_policy_keeps_the_residuals_and_spares_the_forward_kernel(policy, forwards):
    policies = jax.checkpoint_policies
    policy = getattr(policies, policy, None) or policies.save_only_these_names(policy)

    def layers(x):
        def layer(x, _):
            op = functools.partial(latent_attention.attention, scale=SCALE, implementation="cudnn")
            return jax.checkpoint(lambda x: op(x, x, x), policy=policy)(x), None

        return jnp.sum(jax.lax.scan(layer, x, length=3)[0].astype(jnp.float32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "local_gpu", lambda: HOPPER)
        found = calls(jax.grad(layers), arrays(256, 256)[0])
    assert found == {"Softmax CAUSAL": forwards, "SoftmaxBackward CAUSAL": 1}


def test_on_a_mesh_every_device_runs_its_share(monkeypatch):
    monkeypatch.setattr(dispatch, "local_gpu", lambda: HOPPER)
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    with jax.sharding.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data", None, "heads", None))
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays(256, 256, batch=8)]
        op = functools.partial(latent_attention.attention, scale=SCALE, implementation="cudnn")
        grad = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.asarray(op(*x), jnp.float32)), (0, 1, 2)))
        text = grad.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    (types,) = re.findall(r"@__cudnn\$fmhaSoftmaxBackward\(.*: \((.*?)\) ->", text)
    assert types.startswith("tensor<2x256x2x128xbf16>, ")


@pytest.mark.parametrize(
    ("queries", "keys", "q_offset", "lengths", "with_lse"),
    [
        (40, 40, 0, None, False),
        (20, 60, 0, None, False),
        (1, 2, 1, None, False),
        (40, 40, 0, (0, 17), False),
        (20, 60, 0, (0, 59), False),
        (20, 60, 0, (0, 59), True),
        (40, 40, 0, (1, 99), False),
        (20, 60, 60, None, False),
        (20, 60, 60, None, True),
        (20, 60, 59, (0, 33), False),
        (20, 128, 2**31 - 1, (0, 0), False),
    ],
)
@pytest.mark.parametrize("widths", [(8, 8), (12, 8), (8, 12)])
def test_masks_and_lengths_mean_what_the_op_says(queries, keys, q_offset, lengths, with_lse, widths, monkeypatch):
    monkeypatch.setattr(cudnn, "_bind", stand_in)
    shape = AttentionShape(2, queries, keys, 3, 128, 128, "bfloat16", False, lengths is not None, q_offset)
    assert why_not_attention(shape, HOPPER) is None
    rng = np.random.default_rng(0)
    sizes = (queries, widths[0]), (keys, widths[0]), (keys, widths[1])
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 3, width)), jnp.float32) for n, width in sizes)
    lengths = None if lengths is None else np.array(lengths, np.int32)
    expected = attention_oracle(q, k, v, scale=SCALE, offset=q_offset, lengths=lengths)
    weights = [rng.normal(size=x.shape) for x in expected]

    def weighted(op):
        def loss(q, k, v):
            out, lse = op(
                q, k, v, scale=SCALE, q_offset=q_offset, kv_lengths=lengths, q_segments=None, kv_segments=None
            )
            by_lse = jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse) * weights[1]) if with_lse else 0
            return jnp.sum(out * weights[0]) + by_lse, (out, lse)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

    right, _ = weighted(xla.attention)(q, k, v)
    if lengths is not None:
        k, v = (jnp.where((np.arange(keys) < lengths[:, None])[..., None, None], x, jnp.nan) for x in (k, v))
    grads, results = weighted(cudnn.attention)(q, k, v)
    for ours, theirs in zip((*results, *grads), (*expected, *right), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, (7, 45)])
def test_gradients_of_parts_of_the_keys_add_up(lengths, monkeypatch):
    """20 queries see 40 keys before them and, causally, 20 more; a row has no keys in the second part."""
    monkeypatch.setattr(cudnn, "_bind", stand_in)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, n, 3, width)), jnp.float32) for n, width in ((20, 12), (60, 12), (60, 8))
    )
    lengths = None if lengths is None else np.array(lengths, np.int32)
    out, lse = attention_oracle(q, k, v, scale=SCALE, offset=40, lengths=lengths)
    d_out = rng.normal(size=out.shape)
    expected = attention_gradients_oracle(
        q, k, v, d_out, np.zeros(lse.shape), scale=SCALE, offset=40, lengths=lengths
    )  # fmt: skip
    arrays = q, k, v, *(jnp.asarray(x, jnp.float32) for x in (out, lse, d_out))
    ours = gradients_by_parts(
        cudnn.attention_gradients, 40, arrays, scale=SCALE, q_offset=40, kv_lengths=lengths
    )  # fmt: skip
    for x, right in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, right, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "gpu", "words"),
    [
        ({}, None, "this is not one"),
        ({}, make_gpu((7, 5), 40), "this is sm_75"),
        ({"dtype": "float32"}, HOPPER, "not float32"),
        ({"segments": True}, HOPPER, "'triton'"),
        ({"offset": None}, HOPPER, "q_offset"),
        ({"offset": 100}, HOPPER, "256 queries at offset 100 over 256 keys"),
        ({"offset": -1}, HOPPER, "at offset -1"),
        ({"queries": 300}, HOPPER, "300 queries at offset 0"),
        ({"queries": 1, "keys": 1}, HOPPER, "a single query over a single key"),
        ({"queries": 1}, HOPPER, "a single query over a single key"),
        ({"qk_width": 100, "v_width": 100}, HOPPER, "multiples of 8, not (100, 100)"),
        ({"qk_width": 192}, AMPERE, "up to 128 (256 on Hopper), not 192"),
        ({"v_width": 512}, HOPPER, "not 512"),
        ({"qk_width": 256, "v_width": 256}, AMPERE, "not 256"),
    ],
)
def test_reasons(change, gpu, words):
    assert words in (why_not_attention(SHAPE._replace(**change), gpu) or "")


def test_it_says_yes():
    for change, gpu in [
        ({}, AMPERE),
        ({"lengths": True, "dtype": "float16"}, AMPERE),
        ({"qk_width": 192}, HOPPER),
        ({"qk_width": 96, "v_width": 64}, AMPERE),
        ({"qk_width": 256, "v_width": 256}, HOPPER),
        ({"offset": 255}, AMPERE),
        ({"keys": 1000}, AMPERE),
    ]:
        assert why_not_attention(SHAPE._replace(**change), gpu) is None


def test_an_old_cudnn_takes_equal_widths_only(monkeypatch):
    monkeypatch.setattr(cudnn, "_cudnn_version", lambda: 90900)
    assert why_not_attention(SHAPE, HOPPER) is None
    assert "cuDNN 9.10" in (why_not_attention(SHAPE._replace(qk_width=192), HOPPER) or "")


def test_a_jax_whose_private_functions_changed_is_named(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as module

    cudnn._private.cache_clear()
    monkeypatch.setattr(module, "_dot_product_attention_bwd_impl", lambda query, key: None)
    assert f"jax {jax.__version__} changed its cuDNN primitive 'bwd'" in (why_not_attention(SHAPE, HOPPER) or "")
    cudnn._private.cache_clear()
    monkeypatch.delattr(module, "_dot_product_attention_bwd_impl")
    assert "has no cuDNN primitives" in (why_not_attention(SHAPE, HOPPER) or "")
    monkeypatch.undo()
    cudnn._private.cache_clear()
    assert why_not_attention(SHAPE, HOPPER) is None
