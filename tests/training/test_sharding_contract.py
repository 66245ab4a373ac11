"""The whole training step of `infinite_1b`, lowered for meshes of many GPUs that are not here."""

import math

import jax
import jax.numpy as jnp
import pytest
from hydra import compose, initialize_config_dir
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from omegaconf import OmegaConf

from experiments.entry import CONF
from mla_jax.config import register_schemas
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.mesh import AXES, BATCH
from mla_jax.optim import make_optimizer
from mla_jax.state import init_state
from mla_jax.training.step import make_train_step


@pytest.mark.parametrize(
    ("data", "fsdp", "context", "batch", "tokens"),
    [(1, 8, 1, 8, 8192), (64, 8, 1, 512, 8192), (8, 8, 8, 64, 2**20)],
    ids=["8 GPUs", "512 GPUs", "512 GPUs, 1M tokens"],
)
def test_no_weight_or_moment_is_replicated_within_a_replica(data, fsdp, context, batch, tokens):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        config = OmegaConf.to_object(compose("sft", ["experiment=infinite_1b", "model.attention=xla"]))
    optimizer = make_optimizer(config.optim)
    mesh = AbstractMesh((data, fsdp, context), AXES, axis_types=(AxisType.Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(config.model, optimizer, 0))
        step = make_train_step(config.model, optimizer, CrossEntropy(config.train.loss_chunk))
        types = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32, "weights": jnp.float32}
        types["answers"] = jnp.bool_
        sharding = NamedSharding(mesh, BATCH)
        rows = {
            name: jax.ShapeDtypeStruct((1, batch, tokens), dtype, sharding=sharding) for name, dtype in types.items()
        }
        traced = step.trace(state, rows, jax.ShapeDtypeStruct((), jnp.float32))
        lowered = traced.lower(lowering_platforms=("cuda",))
    new_state, _ = traced.out_info
    matrices = [x for x in jax.tree.leaves(new_state) if x.ndim >= 2 and x.shape[-1] * x.shape[-2] > 10**5]
    assert len(matrices) == 3 * len([x for x in jax.tree.leaves(state.params) if x.ndim >= 2 and x.shape[-2] > 12])
    for x in matrices:
        shares = math.prod(mesh.shape[axis] for axes in x.sharding.spec if axes for axis in axes)
        assert shares == fsdp * context, (x.shape, x.sharding.spec)
    text = lowered.as_text()
    assert f"num_partitions = {data * fsdp * context}" in text
