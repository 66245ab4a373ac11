"""The device mesh and every PartitionSpec; no other file names a mesh axis.

Axes: `data` (replicas of the weights), `fsdp` (a share of each weight a device), `context` (a share of each sequence
a device; weights are shared out over it too). Devices are laid out process by process, so `context` and `fsdp` stay in
a node as long as they fit, and `data` goes across nodes.

The mesh is explicit: array types carry their sharding, and a weight that is shared out must be gathered before use.
Without a mesh (`jax.set_mesh` not called) every function here leaves its argument as it is, so the model runs on one
device with no ceremony.

Sequences on a mesh with `context` = n > 1 are in zig-zag order: of 2 n equal chunks, device i holds the chunks i and
2 n - 1 - i, so that under the causal mask all devices have as much to do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

from mla_jax.config import MeshConfig
from mla_jax.errors import UsageError

AXES = ("data", "fsdp", "context")

ROWS = ("data", "fsdp")
"""What rows of a training batch are spread over; their tokens are spread over `context`."""
BATCH = P(None, ROWS, "context")
"""Micro-batches [A, B, T]."""
SHARES = ("fsdp", "context")
"""What weights are shared out over."""
SHARD_IN = P(SHARES, None)
"""A weight [in, out] whose input axis is the model width."""
SHARD_OUT = P(None, SHARES)
"""A weight [in, out] whose output axis is the model width; the embedding table too."""
REPLICATED = P()


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Explicit mesh over `devices` (default: all of all processes).

    Raises:
        UsageError: the sizes do not multiply to the number of devices.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        named = " ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        raise UsageError(f"{named} does not cover {len(devices)} devices")
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def has_mesh() -> bool:
    """Whether arrays carry a sharding here: a mesh is set, and this is not inside `per_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and AxisType.Manual not in mesh.axis_types


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
    for axes, length in zip(spec, shape, strict=False):
        shares = math.prod(sizes[axis] for axis in axes or ())
        if length % shares:
            named = " x ".join(f"mesh.{axis}" for axis in axes)
            raise UsageError(f"{named} = {shares} does not divide {length}, an axis of a weight {list(shape)}")
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
    """Runs `function` on every device with that device's part of the batch (and with the whole of what is replicated).

    Kernels, scatters and loops over tokens, which know nothing of meshes, run inside.

    Args:
        function: takes `arrays`, returns a pytree of arrays.
        arrays: pytrees; the first is an array [B, T, ...], whose sharding over B and T is that of the results.
        out_axes: where B and T follow each other in the results, a prefix of the pytree that `function` returns.
    """
    if not has_mesh():
        return function(*arrays)
    leading = jax.typeof(arrays[0]).sharding.spec[:2]
    out_specs = jax.tree.map(lambda axis: P(*(None,) * axis, *leading), out_axes)
    # check_vma: the loops inside start from constants, which the check would want marked as varying.
    return jax.shard_map(function, out_specs=out_specs, check_vma=False)(*arrays)


def sequence_shares(x_BTX: jax.Array) -> int:
    """Over how many devices the tokens of each sequence are spread."""
    spec = jax.typeof(x_BTX).sharding.spec if has_mesh() else ()
    return jax.sharding.get_abstract_mesh().shape["context"] if len(spec) > 1 and spec[1] == "context" else 1


def sequence_parts(arrays: Any, shares: int) -> list[tuple[jax.Array | int, Any]]:
    """Inside `per_device`: (place of its first token in the sequence, arrays [B, t, ...]) of each run of tokens."""
    if shares == 1:
        return [(0, arrays)]
    index, length = jax.lax.axis_index("context"), jax.tree.leaves(arrays)[0].shape[1] // 2
    starts = index * length, (2 * shares - 1 - index) * length
    return [(start, jax.tree.map(lambda x, i=i: jnp.split(x, 2, axis=1)[i], arrays)) for i, start in enumerate(starts)]


def whole_sequence(x_BTX: jax.Array, shares: int) -> jax.Array:
    """Inside `per_device`: the tokens of all devices, in the order of the sequence.

    The backward pass adds up what devices have found for each token and leaves it where the token is held.
    """
    if shares == 1:
        return x_BTX
    by_device = jax.lax.all_gather(x_BTX, "context", axis=1, tiled=True)
    chunks = by_device.reshape(x_BTX.shape[0], shares, 2, -1, *x_BTX.shape[2:])
    in_order = jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
    return in_order.reshape(by_device.shape)


def automatic(function: Callable, result_like: Any) -> Callable:
    """`function` with the compiler choosing shardings inside; its results are sharded as the arrays of `result_like`.

    For code written without meshes in mind that multiplies sharded matrices, such as Muon.
    """
    if not has_mesh():
        return function
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, result_like)
    return auto_axes(function, out_sharding=shardings)


def _default_device() -> Any:
    return jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]


def placed(abstract: Any) -> Any:
    """ShapeDtypeStructs with the concrete sharding each array has, on the mesh or else on the default device."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if has_mesh():
            sharding = NamedSharding(jax.sharding.get_mesh(), x.sharding.spec if x.sharding else REPLICATED)
        else:
            sharding = SingleDeviceSharding(_default_device())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)


def check_batch(rows: int, tokens: int, accumulation: int) -> None:
    """Raises UsageError unless a batch [rows, tokens] of micro-batches spreads evenly over the mesh."""
    mesh = jax.sharding.get_mesh()
    shares, micro = math.prod(mesh.shape[axis] for axis in ROWS), rows // accumulation
    if micro % shares:
        raise UsageError(
            f"{micro} sequences (batch_size / train.grad_accumulation) do not spread evenly over {shares} devices "
            "(mesh.data x mesh.fsdp)"
        )
    parts = mesh.shape["context"]
    if parts > 1 and tokens % (2 * parts):
        raise UsageError(f"seq_len {tokens} is no multiple of {2 * parts}, twice mesh.context")


def rows_here(rows: int, accumulation: int = 1) -> np.ndarray:
    """Which rows of a batch of micro-batches, one after the other, the devices of this process hold; ascending."""
    mesh, micro = jax.sharding.get_mesh(), rows // accumulation
    slices = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((micro,)).values()
    mine = np.unique(np.concatenate([np.arange(micro)[index] for index in slices]))
    return (np.arange(accumulation)[:, None] * micro + mine).ravel()


def place_batch(batch: dict[str, np.ndarray], accumulation: int) -> dict[str, jax.Array]:
    """Puts the rows [b, T] that `rows_here` named on the mesh, as micro-batches [A, B / A, T]; see `check_batch`."""
    mesh = jax.sharding.get_mesh()
    held, length = next(iter(batch.values())).shape
    parts, shares = mesh.shape["context"], math.prod(mesh.shape[axis] for axis in ROWS)
    order = _zig_zag(length, parts)
    mine = rows_here(shares)
    micro = held // accumulation * shares // len(mine)
    mine = rows_here(micro)
    sharding = NamedSharding(mesh, BATCH)

    def put(rows_BT: np.ndarray) -> jax.Array:
        micro_batches = rows_BT.reshape(accumulation, len(mine), length)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # every device holds some
            all_micro, rows, tokens = index
            return micro_batches[all_micro][:, np.searchsorted(mine, np.arange(micro)[rows])][..., order[tokens]]

        return jax.make_array_from_callback((accumulation, micro, length), sharding, part)

    return {name: put(x) for name, x in batch.items()}


def _zig_zag(length: int, parts: int) -> np.ndarray:
    """Places of the tokens in the order in which devices hold them; see the head of this file."""
    if parts == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).ravel()
