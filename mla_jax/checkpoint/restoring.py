"""Restores items of a checkpoint; where weights are replicated over processes, one replica reads for all.

Otherwise every replica would read all of a checkpoint: 64 of them 64 times its bytes, from one file system.

Each call has a `Checkpointer` of its own: one that saves keeps the way in which an item was restored, and would write
it that way too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import type_handlers
from orbax.checkpoint._src.multihost import multislice  # has no public name yet

from mla_jax.distributed.decisions import on_all
from mla_jax.mesh import replica_axis

BROADCAST_BYTES = 1 << 30
"""The most bytes on a device that are sent together; a larger array is sent alone."""


def restore_arrays(folder: Path, abstract: Any) -> Any:
    """Arrays of an item, placed as `abstract` says; all processes call it at the same point.

    Args:
        folder: RUN/checkpoints/STEP/ITEM.
        abstract: a tree of ShapeDtypeStruct with concrete shardings, all on the current mesh if there is one.
    """
    axis = replica_axis()
    if axis is None:
        return _restore(folder, ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(abstract))

    def placed(x: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)

    registry = type_handlers.create_type_handler_registry(
        (jax.Array, _FirstReplicaReader(jax.sharding.get_mesh(), axis))
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    return _restore(folder, handler, ocp.args.PyTreeRestore(abstract, restore_args=jax.tree.map(placed, abstract)))


def restore_json(folder: Path) -> Any:
    """The value of an item that was saved as JSON."""
    return _restore(folder, ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())


def _restore(folder: Path, handler: ocp.CheckpointHandler, args: ocp.args.CheckpointArgs) -> Any:
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(folder, args=args)


class _FirstReplicaReader(type_handlers.ArrayHandler):
    """Reads in the processes of the first replica, and sends to the others once all of those have read.

    Orbax's SingleReplicaArrayHandler does so too, but where one process cannot read, the others wait for it in vain.
    """

    def __init__(self, mesh: Mesh, axis: int):
        super().__init__()
        self._mesh, self._axis = mesh, axis
        self._first = Mesh(mesh.devices.take([0], axis=axis), mesh.axis_names)

    async def deserialize(
        self, infos: Sequence[type_handlers.ParamInfo], args: Sequence[ocp.RestoreArgs] | None = None
    ) -> Sequence[jax.Array]:
        assert args is not None
        wanted = [self._in_first_replica(each) for each in args]
        reads = multislice.in_replica(jax.process_index(), self._mesh, replica_axis_index=self._axis)
        arrays, error = wanted, None
        try:
            if reads:
                here = [ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype) for x in wanted]
                arrays = await super().deserialize(infos, here)
        except Exception as e:  # which all must hear of
            error = e
        on_all(lambda: _raise(error))
        sent, _ = multislice.broadcast_one_replica_to_all(
            tuple(arrays), self._mesh, self._axis, reads, memory_limit_bytes=BROADCAST_BYTES
        )
        return sent

    def _in_first_replica(self, args: ocp.RestoreArgs) -> jax.ShapeDtypeStruct:
        assert isinstance(args, ocp.ArrayRestoreArgs) and isinstance(args.sharding, NamedSharding)
        assert args.global_shape is not None
        sharding = NamedSharding(self._first, args.sharding.spec)
        return jax.ShapeDtypeStruct(args.global_shape, args.dtype, sharding=sharding)


def _raise(error: Exception | None) -> None:
    if error:
        raise error
