"""Runs a kernel, which knows nothing of meshes, on every device's share of the batch and the heads."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def per_shard(function: Callable, q: jax.Array, *arrays: jax.Array | None, out_axes: tuple[str, ...]):
    """`function(q, *arrays)` on each device of the explicit mesh, if there is one.

    Args:
        function: takes one device's share of the arrays.
        q: [B, T, H, ...], whose sharding over B and H that of the results is.
        arrays: sharded over B or H only; None is passed on.
        out_axes: of each result, its axes: `B`, `H` or `.` for one that is whole on every device.

    Raises:
        ValueError: q is sharded over another axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return function(q, *arrays)
    batch, queries, heads, *rest = jax.typeof(q).sharding.spec
    if queries is not None or any(axis is not None for axis in rest):
        raise ValueError(
            f"queries are sharded {jax.typeof(q).sharding.spec}; only the batch (first) and the heads (third axis) may "
            "be: gather the others first, or run the op inside shard_map and combine with `merge_over`"
        )
    out_specs = tuple(P(*({"B": batch, "H": heads}.get(axis) for axis in axes)) for axes in out_axes)
    given = [x for x in arrays if x is not None]

    def share(q, *given):
        rest = iter(given)
        return function(q, *(None if x is None else next(rest) for x in arrays))

    # check_vma: the loops inside start from constants, which the check would want marked as varying.
    return jax.shard_map(share, out_specs=out_specs, check_vma=False)(q, *given)
