"""The benchmark of steps as devices that share sequences run them: one device computes what they do."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import latent_attention
from cudnn_kernels import cudnn_kernels
from latent_attention import dispatch
from latent_attention.gpu import make_gpu
from mla_jax import mesh
from mla_jax.config import MeshConfig
from mla_jax.model import context_parallel
from mla_jax.model.transformer import abstract_params, bind
from mla_jax.observability.flops import train_flops
from tiny import MODEL
from tools.bench import context, steps


def on_mesh(devices: int):
    return jax.set_mesh(mesh.make_mesh(MeshConfig(data=1, context=devices), jax.devices()[:devices]))


@pytest.mark.parametrize(("devices", "index"), [(2, 1), (4, 0), (4, 2)])
def test_it_attends_as_one_of_several_devices(devices, index):
    """Compares outputs and gradients of its queries with a mesh of them, where the others hold its latents rolled."""
    rng = np.random.default_rng(0)
    q, c, k_rope, kv_b, d_out = (
        rng.normal(size=size).astype(np.float32)
        for size in ((1, 24, 2, 8), (1, 24, 4), (1, 24, 8), (4, 16), (1, 24, 2, 8))
    )

    def expand(c_BSC, k_rope_BSR, kv_b_CX):
        v_BSHV = (c_BSC @ kv_b_CX).reshape(*c_BSC.shape[:2], 2, 8)
        return v_BSHV + k_rope_BSR[:, :, None], v_BSHV

    ops = context_parallel.Ops(
        expand, functools.partial(latent_attention.attention, scale=0.3),
        functools.partial(latent_attention.attention_gradients, scale=0.3),
    )  # fmt: skip

    @jax.jit
    def run(q, c, k_rope, kv_b, d_out):
        def attend(q):
            return mesh.per_device(
                lambda *x: context_parallel.attention(ops, x[0], x[1:3], x[3], None), q, c, k_rope, kv_b
            )

        out, vjp = jax.vjp(attend, q)
        return out, *vjp(d_out)

    with on_mesh(devices):
        rolled = [
            np.concatenate([np.roll(x, i * (i != index), axis=1) for i in range(devices)], 1) for x in (c, k_rope)
        ]
        tiled = [np.tile(x, (1, devices, 1, 1)) for x in (q, d_out)]
        *tokens, d = (jax.device_put(x, P(None, "context")) for x in (tiled[0], *rolled, tiled[1]))
        expected = [np.asarray(x)[:, index * 24 :][:, :24] for x in run(*tokens, kv_b, d)]
    with on_mesh(1), context.one_of(devices, index):
        *tokens, d = (jax.device_put(x, P(None, "context")) for x in (q, c, k_rope, d_out))
        ours = run(*tokens, kv_b, d)
    for x, right in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, right, atol=1e-5)


def test_a_step_has_the_kernels_of_several_devices(monkeypatch):
    monkeypatch.setattr(dispatch, "local_gpu", lambda: make_gpu((9, 0), 132))
    config = dataclasses.replace(MODEL, dtype="bfloat16", remat="names", saved=("latent_attention",))

    def loss(params, tokens, positions):
        return jnp.sum(bind(config, params)(tokens, positions).astype(jnp.float32))

    with on_mesh(1), context.one_of(4, 2):
        params = mesh.with_concrete_shardings(abstract_params(config))
        tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=jax.NamedSharding(jax.sharding.get_mesh(), P()))
        text = jax.jit(jax.grad(loss)).trace(params, tokens, tokens).lower(lowering_platforms=("cuda",)).as_text()
    kernels = {f"Softmax{x} {mask}": n for x in ("", "Backward") for mask, n in (("CAUSAL", 1), ("NO_MASK", 2))}
    assert cudnn_kernels(text) == kernels


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["context", *arguments])
    context.main()


def test_it_counts_the_share_of_the_work_of_each_device(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(steps, "SECONDS", 0.0)
    small = "model=nano model.num_hidden_layers=1 model.hidden_size=64 model.intermediate_size=64".split()
    more = "--shapes 1x64 --devices 2 --index -1 --attention xla reference --json".split()
    run(monkeypatch, *small, *more, str(tmp_path / "x.json"))
    found = json.loads((tmp_path / "x.json").read_text())
    rows = [(row["index"], row["implementation"], row["peer"]) for row in found["rows"]]
    assert rows == [(1, "xla", False), (1, "reference", True)]
    for row in found["rows"]:
        work = row["mfu_of_measured"] * found["matmul_ceiling"] * row["seconds"]
        assert work == pytest.approx(train_flops(context.compose_config(small).model, 1, 64) / 2)
    out = capsys.readouterr().out
    assert "**1 x 64, device 1 of 2**" in out and "reference / this" in out and "wrong" not in out


def test_tokens_that_do_not_divide_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, "model=nano", "--shapes", "1x100", "--devices", "2", "8")
    assert exit_.value.code == 2
    assert "100 tokens are no multiple of 16, twice the devices" in capsys.readouterr().err
