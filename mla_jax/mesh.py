"""The device mesh and every PartitionSpec; no other file names a mesh axis.

The mesh is explicit: array types carry their sharding, and a weight that is sharded over `fsdp` must be gathered
before use. Without a mesh (`jax.set_mesh` not called) every function here leaves its argument as it is, so the model
runs on one device with no ceremony.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

from mla_jax.config import MeshConfig
from mla_jax.errors import UsageError

AXES = ("data", "fsdp")

BATCH = P(AXES)
"""Leading axis of activations and batches: rows are spread over all devices."""
SHARD_IN = P("fsdp", None)
"""A weight [in, out] whose input axis is the model width."""
SHARD_OUT = P(None, "fsdp")
"""A weight [in, out] whose output axis is the model width; the embedding table too."""
REPLICATED = P()


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Explicit mesh (data, fsdp) over `devices` (default: all).

    Raises:
        UsageError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp]
    known = 1
    for size in sizes:
        known *= max(size, 1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if sizes[0] * sizes[1] != len(devices):
        raise UsageError(f"mesh.data={config.data} mesh.fsdp={config.fsdp} does not cover {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 2, devices=devices)


def has_mesh() -> bool:
    """Whether a mesh is set for the computation being traced or run."""
    return not jax.sharding.get_abstract_mesh().empty


def size() -> int:
    """Devices of the mesh; 1 without one. A sharded axis is a multiple of this."""
    return jax.sharding.get_abstract_mesh().size if has_mesh() else 1


def weight_sharding(spec: P, shape: tuple[int, ...]) -> P | None:
    """`spec` for an initializer's `out_sharding`, None without a mesh.

    Raises:
        UsageError: an axis of the weight does not divide over the mesh.
    """
    if not has_mesh():
        return None
    sizes = jax.sharding.get_abstract_mesh().shape
    for axis, size in zip(spec, shape, strict=False):
        if axis is not None and size % sizes[axis]:
            raise UsageError(f"mesh.{axis}={sizes[axis]} does not divide {size}, an axis of a weight {list(shape)}")
    return spec


def gather(w: jax.Array) -> jax.Array:
    """The whole weight on every device; the backward pass scatters its gradient."""
    return reshard(w, P(*(None,) * w.ndim)) if has_mesh() else w


def sharding_of(x: jax.Array) -> P | None:
    """The `out_sharding` of a result that shall be sharded as x is, None without a mesh."""
    return jax.typeof(x).sharding.spec if has_mesh() else None


def shard_batch(x: jax.Array | np.ndarray, axis: int = 0) -> jax.Array:
    """Spreads one axis of an array over the devices."""
    return reshard(x, P(*(None,) * axis, AXES)) if has_mesh() else jnp.asarray(x)


def per_device(function: Callable, *arrays: Any, out_axes: Any = 0) -> Any:
    """Runs `function` on every device with that device's rows of the batch (and with the whole of what is replicated).

    Kernels and scatters, which know nothing of meshes, run inside.

    Args:
        function: takes `arrays`, returns a pytree of arrays.
        arrays: pytrees; the first is an array [B, ...], whose sharding over the batch is that of the results.
        out_axes: the batch axis of the results, a prefix of the pytree that `function` returns.
    """
    if not has_mesh():
        return function(*arrays)
    batch = jax.typeof(arrays[0]).sharding.spec[0]
    out_specs = jax.tree.map(lambda axis: P(*(None,) * axis, batch), out_axes)
    # check_vma: the loops inside start from constants, which the check would want marked as varying.
    return jax.shard_map(function, out_specs=out_specs, check_vma=False)(*arrays)


def automatic(function: Callable, result_like: Any) -> Callable:
    """`function` with the compiler choosing shardings inside; its results are sharded as the arrays of `result_like`.

    For code written without meshes in mind that multiplies sharded matrices, such as Muon.
    """
    if not has_mesh():
        return function
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, result_like)
    return auto_axes(function, out_sharding=shardings)


def placed(abstract: Any) -> Any:
    """ShapeDtypeStructs with the concrete sharding each array has: on the mesh, or on the first device without one."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if has_mesh():
            sharding = NamedSharding(jax.sharding.get_mesh(), x.sharding.spec if x.sharding else REPLICATED)
        else:
            sharding = SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)


def place_batch(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts micro-batches [A, B, T] on the mesh, rows spread over all devices.

    Raises:
        UsageError: B is no multiple of the number of devices.
    """
    mesh = jax.sharding.get_mesh()
    rows = next(iter(batch.values())).shape[1]
    if rows % mesh.size:
        raise UsageError(
            f"{rows} sequences (batch_size / train.grad_accumulation) do not spread evenly over {mesh.size} devices"
        )
    return jax.device_put(batch, NamedSharding(mesh, P(None, AXES)))
