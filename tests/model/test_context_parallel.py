"""Attention over sequences whose tokens are sharded: memory, work, numbers, and the kernels that a GPU runs."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import latent_attention
from cudnn_kernels import cudnn_kernels, stand_in
from kernels_gradients import attention_gradients_oracle
from kernels_oracle import attention_oracle
from latent_attention import dispatch
from latent_attention.attention import cudnn
from latent_attention.gpu import make_gpu
from mla_jax import mesh
from mla_jax.config import MeshConfig, OptimConfig
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.model import context_parallel
from mla_jax.model.transformer import abstract_params, bind
from mla_jax.optim import make_optimizer
from mla_jax.state import init_state
from mla_jax.training.step import make_train_step
from tiny import MODEL

WIDE = dataclasses.replace(
    MODEL, vocab_size=64, num_attention_heads=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
    max_position_embeddings=8192, remat="full", attention="xla",
)  # fmt: skip
"""Keys and values are what takes memory: 1,024 numbers a token, 32 times the latent and the hidden state."""
TYPES = {
    "tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32, "segments": jnp.int32, "weights": jnp.float32,
    "answers": jnp.bool_,
}  # fmt: skip
HEADS, N, R, V, C = 3, 8, 4, 6, 5
SCALE = 0.3


def on_mesh(context: int):
    return jax.set_mesh(mesh.make_mesh(MeshConfig(data=8 // context, context=context)))


def batch(rows: int, tokens: int, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a micro-batch that is sharded as it should be."""
    sharding = NamedSharding(jax.sharding.get_mesh(), mesh.BATCH)
    return {name: jax.ShapeDtypeStruct((1, rows, tokens), TYPES[name], sharding=sharding) for name in names or TYPES}


def step_memory(context: int, tokens: int) -> int:
    """Bytes of temporaries of a device in a step over rows of this length, a row for each group of devices."""
    optimizer = make_optimizer(OptimConfig(name="adamw"))
    with on_mesh(context):
        state = mesh.with_concrete_shardings(jax.eval_shape(lambda: init_state(WIDE, optimizer, 0)))
        step = make_train_step(WIDE, optimizer, CrossEntropy(512))
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        analysis = step.lower(state, batch(8 // context, tokens), rate).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("contexts", [(8,), pytest.param((2, 4), marks=pytest.mark.integration)])
def test_memory_of_a_step_falls_with_the_devices_that_share_a_sequence(contexts):
    tokens = 8192
    keys_and_values = tokens * 16 * (32 + 32) * 4
    alone = step_memory(1, tokens)
    assert alone > 4 * keys_and_values  # their gradients too, and as much for queries and outputs
    for context in contexts:
        assert step_memory(context, tokens) < 1.5 * alone / context


def expand(c_BSC, k_rope_BSR, kv_b_CX):
    """Keys and values of latents, as `MLA.expand`; of NumPy arrays too."""
    xp = np if isinstance(c_BSC, np.ndarray) else jnp
    kv_BSHX = (c_BSC @ kv_b_CX).reshape(*c_BSC.shape[:2], HEADS, N + V)
    k_rope_BSHR = xp.broadcast_to(k_rope_BSR[:, :, None], (*kv_BSHX.shape[:3], R))
    return xp.concatenate([kv_BSHX[..., :N], k_rope_BSHR], -1), kv_BSHX[..., N:]


def in_zig_zag(*arrays):
    """Arrays [B, T, ...] with their tokens where devices hold them, and the order that puts results back."""
    rows, tokens = arrays[0].shape[:2]
    indices = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens))
    order = np.asarray(mesh.place_batch({"": indices}, 1)[""])[0, 0]
    put = [jnp.asarray(x[:, order], x.dtype if x.dtype == np.int32 else jnp.float32) for x in arrays]
    return [reshard(x, P("data", "context")) for x in put], np.argsort(order)


@pytest.mark.parametrize(
    ("context", "implementation", "documents", "tokens"),
    [
        *((context, "xla", documents, 48) for context in (2, 8) for documents in (False, True)),
        *((4, "reference", documents, 48) for documents in (False, True)),
        (4, "xla", True, 520),  # chunks of several blocks, the last not whole
        *((context, "cudnn", False, 48) for context in (2, 4, 8)),
        (2, "cudnn", False, 512),  # whole tiles of keys: no mask where all are seen
        (8, "cudnn", False, 16),  # chunks of one token
    ],
)
def test_outputs_and_gradients_equal_float64(context, implementation, documents, tokens, monkeypatch):
    """Of queries and keys 12 wide and values 6 wide, which are padded for cuDNN; its kernels have a stand-in."""
    monkeypatch.setattr(cudnn, "_bind", stand_in)
    monkeypatch.setattr(cudnn, "why_not_attention", lambda shape, gpu: "segments" if shape.segments else None)
    rng, rows = np.random.default_rng(0), 8 // context
    q, c, k_rope, d_out = (
        rng.normal(size=(rows, tokens, *widths)) for widths in ((HEADS, N + R), (C,), (R,), (HEADS, V))
    )
    kv_b = rng.normal(size=(C, HEADS * (N + V)))
    borders = np.sort(rng.integers(1, tokens, (rows, 3)))
    segments = np.stack([np.searchsorted(row, np.arange(tokens), side="right") for row in borders]).astype(np.int32)
    ids: dict[str, Any] = {"q_segments": segments, "kv_segments": segments} if documents else {}
    expected = attention_oracle(q, *expand(c, k_rope, kv_b), scale=SCALE, **ids)[0]
    d_q, d_k, d_v = attention_gradients_oracle(
        q, *expand(c, k_rope, kv_b), d_out, np.zeros(q.shape[:3]), scale=SCALE, **ids
    )
    d_kv = np.concatenate([d_k[..., :N], d_v], -1).reshape(rows, tokens, -1)
    expected_gradients = d_q, d_kv @ kv_b.T, d_k[..., N:].sum(2), np.einsum("btc,btx->cx", c, d_kv)

    options = {"scale": SCALE, "implementation": implementation}
    ops = context_parallel.Ops(
        expand, functools.partial(latent_attention.attention, **options),
        functools.partial(latent_attention.attention_gradients, **options),
    )  # fmt: skip

    @jax.jit
    def run(q, c, k_rope, kv_b, segments, d_out):
        def over_all(q, c, k_rope, kv_b):
            attend = functools.partial(context_parallel.attention, ops)
            return mesh.per_device(attend, q, (c, k_rope), kv_b, segments if documents else None)

        out, vjp = jax.vjp(over_all, q, c, k_rope, kv_b)
        return out, *vjp(d_out)

    with on_mesh(context):
        (q, c, k_rope, segments, d_out), back = in_zig_zag(q, c, k_rope, segments, d_out)
        out, *gradients = run(q, c, k_rope, jnp.asarray(kv_b, jnp.float32), segments, d_out)
    np.testing.assert_allclose(np.asarray(out)[:, back], expected, atol=1e-5)
    for name, ours, right in zip(("dq", "dc", "dk_rope", "dkv_b"), gradients, expected_gradients, strict=True):
        ours = np.asarray(ours) if name == "dkv_b" else np.asarray(ours)[:, back]
        np.testing.assert_allclose(ours, right, atol=3e-6 * np.abs(right).max(), err_msg=name)


@pytest.mark.parametrize("context", [2, 8])
def test_all_devices_visit_as_many_pairs_of_tokens_and_none_that_causality_hides(context):
    """Counts pairs of queries and keys, and expanded tokens, of the forward and of the backward pass of each device."""
    pairs, expanded, tokens = collections.Counter(), collections.Counter(), 16 * context

    def counting(op):
        def count(q, k, v, *rest, q_offset, **options):
            queries, keys = q.shape[1], k.shape[1]
            # Of queries and keys at the same place, causality shows half; else these are all before those.
            assert q_offset in ((0, keys) if queries == keys else (keys,))
            seen = queries * keys // 2 if q_offset == 0 else queries * keys

            def add(device):
                pairs[op.__name__, int(device)] += seen
                expanded[op.__name__, int(device)] += keys

            jax.debug.callback(add, jax.lax.axis_index("context"))
            return op(q, k, v, *rest, q_offset=q_offset, scale=SCALE, **options)

        return count

    ops = context_parallel.Ops(
        expand, counting(latent_attention.attention), counting(latent_attention.attention_gradients)
    )
    rng = np.random.default_rng(0)

    @jax.jit
    def gradient(q, c, k_rope, kv_b):
        attend = functools.partial(context_parallel.attention, ops, segments_BT=None)
        return jax.grad(lambda *x: jnp.sum(mesh.per_device(lambda q, *y: attend(q, y[:2], y[2]), *x)))(
            q, c, k_rope, kv_b
        )

    with jax.set_mesh(mesh.make_mesh(MeshConfig(data=1, context=context), jax.devices()[:context])):
        arrays = (rng.normal(size=(1, tokens, *widths)) for widths in ((HEADS, N + R), (C,), (R,)))
        arrays, _ = in_zig_zag(*arrays)
        jax.block_until_ready(gradient(*arrays, jnp.asarray(rng.normal(size=(C, HEADS * (N + V))), jnp.float32)))
        jax.effects_barrier()
    for op in ("attention", "attention_gradients"):
        assert [pairs[op, i] for i in range(context)] == [tokens**2 // 2 // context] * context
        # The first device sees all tokens, the last those up to its late half.
        assert [expanded[op, i] for i in range(context)] == [tokens - i * 8 for i in range(context)]


@pytest.mark.parametrize("widths", [(64, 64, 128), (64, 32, 64)], ids=["infinite_1b", "small"])
def test_on_a_gpu_every_part_runs_on_cudnn(widths, monkeypatch):
    """A causal kernel for the tokens of the device itself and one without a mask for each kind of other tokens."""
    monkeypatch.setattr(dispatch, "local_gpu", lambda: make_gpu((9, 0), 132))
    heads = dict(zip(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), widths, strict=True))
    config = dataclasses.replace(MODEL, **heads, dtype="bfloat16", remat="names", saved=("latent_attention",))
    with on_mesh(8):
        params = mesh.with_concrete_shardings(abstract_params(config))

        def loss(params, tokens, positions):
            return jnp.sum(bind(config, params)(tokens[0], positions[0]).astype(jnp.float32))

        traced = jax.jit(jax.grad(loss)).trace(params, *batch(1, 4096, "tokens", "positions").values())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = cudnn_kernels(text)
    assert kernels == {f"Softmax{x} {mask}": n for x in ("", "Backward") for mask, n in (("CAUSAL", 1), ("NO_MASK", 2))}
