"""Runs a kernel, which knows nothing of meshes, on each device's shard of the batch and the heads."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, reshard
from jax.sharding import PartitionSpec as P


def per_shard(function: Callable, arrays: dict[str, tuple[jax.Array | None, str]], out_axes: tuple[str, ...]):
    """`function` of the arrays, in their order, on each device of the explicit mesh, if there is one.

    Args:
        function: takes one device's shard of the arrays; None is passed through.
        arrays: by name, each with its axes: `B`, `H`, or `.` for one that is not sharded. The sharding of the first
            over B and H applies to all; arrays of 1 or 2 dimensions, which are small, are resharded to it.
        out_axes: axes of each result.

    Raises:
        ValueError: an array is sharded over another axis, or not as the first is.
    """
    values = [x for x, _ in arrays.values()]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return function(*values)
    first, axes = next(iter(arrays.values()))
    shards = {axis: shard for axis, shard in zip(axes, jax.typeof(first).sharding.spec, strict=True) if axis != "."}

    def spec(axes: str) -> P:
        return P(*(shards.get(axis) for axis in axes))

    present = []
    for name, (x, axes) in arrays.items():
        if x is None:
            continue
        if x.ndim <= 2:
            x = reshard(x, spec(axes))
        if jax.typeof(x).sharding.spec != spec(axes):
            raise ValueError(
                f"{name} is sharded {jax.typeof(x).sharding.spec}, expected {spec(axes)}: only the batch and the heads "
                "may be, those of all arrays alike. Gather the rest first, or run the op inside shard_map and combine "
                "with `merge_over`"
            )
        present.append(x)

    def local(*present):
        rest = iter(present)
        return function(*(None if x is None else next(rest) for x in values))

    # check_vma: the loops inside start from constants, which the check would want marked as varying.
    return jax.shard_map(local, out_specs=tuple(map(spec, out_axes)), check_vma=False)(*present)
