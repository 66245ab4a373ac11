"""Tools that time training steps and count what devices send each other."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, reshard
from jax.sharding import PartitionSpec as P

from mla_jax.errors import UsageError
from tiny import MODEL
from tools.bench import train as bench_train
from tools.bench.steps import Shape
from tools.bench.train import keeping
from tools.comm_volume import collectives, compiled_step


def test_collectives_are_counted_with_their_groups_and_bytes():
    """An all-gather over four of eight devices, and sums over all and over two of them."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)

    def step(w, x):
        whole = reshard(w, P(None, None))

        def local(x):
            return jax.lax.psum(x, ("x", "y")), jax.lax.psum(x[:, 0], "x")

        return whole, jax.shard_map(local, in_specs=P("x", "y"), out_specs=(P(), P("y")))(x)

    with jax.set_mesh(mesh):
        w = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P("y", None)))
        x = jax.ShapeDtypeStruct((6, 12), jnp.float32, sharding=jax.NamedSharding(mesh, P("x", "y")))
        found = collectives(jax.jit(step).lower(w, x).compile().as_text())
    sizes = {(c.kind, c.group): (c.whole, c.sent) for c in found}
    assert sizes["all-gather", 4] == (64 * 8 * 4, 64 * 8 * 4 * 3 / 4)
    assert sizes["all-reduce", 8] == (3 * 3 * 4, 2 * 3 * 3 * 4 * 7 / 8)
    assert sizes["all-reduce", 2] == (3 * 4, 3 * 4)
    assert len(found) == 3


def test_accumulated_gradients_are_not_counted():
    with pytest.raises(UsageError, match="train.grad_accumulation puts communication into a loop"):
        compiled_step(
            ["train.grad_accumulation=2", "train.stages=[{seq_len: 96, batch_size: 16, steps: 1, learning_rate: 1}]"],
            "8x96",
        )


def test_what_is_kept_is_read_from_text():
    assert keeping(MODEL, "dots").remat == "dots"
    kept = keeping(MODEL, "queries+gate/layer_input")
    assert (kept.remat, kept.saved, kept.offloaded) == ("names", ("queries", "gate"), ("layer_input",))
    with pytest.raises(UsageError, match="model.saved must be one of"):
        keeping(MODEL, "everything")
    with pytest.raises(UsageError, match="shape '4k' is not BATCHxTOKENS"):
        Shape.parse("4k")


@pytest.mark.integration
def test_every_way_of_keeping_finds_the_same_loss(monkeypatch, capsys, tmp_path):
    arguments = [
        "model=nano",
        "--shapes",
        "8x64",
        "--keep",
        "full",
        "latent_attention+queries",
        "--json",
        str(tmp_path / "x"),
    ]
    monkeypatch.setattr("sys.argv", ["bench_train", *arguments])
    bench_train.main()
    out = capsys.readouterr().out
    assert "| full, unroll 1" in out and "| latent_attention+queries, unroll 1" in out and "wrong" not in out
