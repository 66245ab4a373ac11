"""The device mesh and every PartitionSpec; no other file names a mesh axis.

Axes: `data` (replicas of the weights), `fsdp` (weights are sharded), `context` (sequences are sharded, and weights over
it too). Devices are laid out process by process, so `context` and `fsdp` stay in a node as long as they fit, and
`data` goes across nodes.

The mesh is explicit: array types carry their sharding, and a sharded weight must be all-gathered before use.
Without a mesh (`jax.set_mesh` not called) every function here leaves its argument as it is, so the model runs on one
device with no ceremony.

Sequences on a mesh with `context` = n > 1 are in zig-zag order: of 2 n equal chunks, device i holds the chunks i and
2 n - 1 - i, so that under the causal mask all devices have as much to do. Of rows with a branch region (see
`model.branches`) that is the order of the prompt region; behind it device i holds part i of n of the branch region.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

from latent_attention import merge_over
from mla_jax.config import MeshConfig
from mla_jax.errors import UsageError

AXES = ("data", "fsdp", "context")

ROW_AXES = ("data", "fsdp")
"""Mesh axes over which the rows of a training batch are sharded; their tokens are sharded over `context`."""
BATCH = P(None, ROW_AXES, "context")
"""Sharding of micro-batches [A, B, T]."""
SHARD_AXES = ("fsdp", "context")
"""Mesh axes over which weights are sharded."""
SHARD_IN = P(SHARD_AXES, None)
"""Sharding of a weight [in, out] whose input axis is the model width."""
SHARD_OUT = P(None, SHARD_AXES)
"""Sharding of a weight [in, out] whose output axis is the model width; the embedding table too."""
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
    """True where arrays carry a sharding: a mesh is set, and this is not inside `per_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and AxisType.Manual not in mesh.axis_types


def replica_axis() -> int | None:
    """Index of the mesh axis along which weights are replicated, where each process has devices of one replica only.

    None for one process, for one replica, and where a process has devices of several.
    """
    mesh = jax.sharding.get_mesh() if has_mesh() else None
    if mesh is None or jax.process_count() == 1 or mesh.shape["data"] == 1:
        return None
    return AXES.index("data") if mesh.size // mesh.shape["data"] % jax.local_device_count() == 0 else None


def size() -> int:
    """Number of devices of the mesh; 1 without one. A sharded axis is a multiple of this."""
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
        shards = math.prod(sizes[axis] for axis in axes or ())
        if length % shards:
            named = " x ".join(f"mesh.{axis}" for axis in axes)
            raise UsageError(f"{named} = {shards} does not divide {length}, an axis of a weight {list(shape)}")
    return spec


def all_gather(w: jax.Array) -> jax.Array:
    """The whole weight on every device; the backward pass reduce-scatters its gradient."""
    return reshard(w, P(*(None,) * w.ndim)) if has_mesh() else w


def replicate(arrays: Any) -> Any:
    """Puts a pytree of arrays of the host on every device of the mesh."""
    return jax.device_put(arrays, NamedSharding(jax.sharding.get_mesh(), REPLICATED))


def sharding_of(x: jax.Array) -> P | None:
    """The `out_sharding` for a result that is sharded as x is, None without a mesh."""
    return jax.typeof(x).sharding.spec if has_mesh() else None


def shard_batch(x: jax.Array | np.ndarray, axis: int = 0) -> jax.Array:
    """Shards one axis of an array over all devices."""
    return reshard(x, P(*(None,) * axis, AXES)) if has_mesh() else jnp.asarray(x)


def per_device(function: Callable, *arrays: Any, out_axes: Any = 0) -> Any:
    """Runs `function` on every device, on its shard of the batch (and on the whole of what is replicated).

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


def num_sequence_shards(x_BTX: jax.Array) -> int:
    """Number of devices over which the tokens of each sequence are sharded."""
    spec = jax.typeof(x_BTX).sharding.spec if has_mesh() else ()
    return jax.sharding.get_abstract_mesh().shape["context"] if len(spec) > 1 and spec[1] == "context" else 1


def sequence_shard() -> jax.Array:
    """Index of this device among those that share its sequences, inside `per_device`."""
    return jax.lax.axis_index("context")


def all_gather_sequence(x_BTX: jax.Array) -> jax.Array:
    """The tokens of each device that shares these sequences, [devices, B, T, ...], inside `per_device`.

    The backward pass is a reduce-scatter: gradients end on the device that holds the token.
    """
    return jax.lax.all_gather(x_BTX, "context")


def all_gather_tokens(x_BTX: jax.Array) -> jax.Array:
    """All-gathers the tokens of all devices of a sequence, device by device, inside `per_device`."""
    return jax.lax.all_gather(x_BTX, "context", axis=1, tiled=True)


def merge_tokens(out_BTHV: jax.Array, lse_BTH: jax.Array, shards: int) -> tuple[jax.Array, jax.Array]:
    """Merges attention to the keys of each device, inside `per_device`; the part of this device's own queries.

    Args:
        out_BTHV: output of the queries that `all_gather_tokens` gathered, over the keys of this device.
        lse_BTH: log-sum-exp of their scores.
        shards: devices of a sequence.
    """
    tokens = out_BTHV.shape[1] // shards
    out, lse = merge_over("context", out_BTHV, lse_BTH)

    def own(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, sequence_shard() * tokens, tokens, axis=1)

    return own(out), own(lse)


def with_auto_sharding(function: Callable, result_like: Any) -> Callable:
    """`function` with the compiler choosing shardings inside; its results are sharded as the arrays of `result_like`.

    For code written without meshes in mind that multiplies sharded matrices, such as Muon.
    """
    if not has_mesh():
        return function
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, result_like)
    return auto_axes(function, out_sharding=shardings)


def fetch_branches(x_BR: jax.Array) -> np.ndarray:
    """The branch region of a micro-batch, whole on every process."""
    return np.asarray(reshard(x_BR, P(None, None)).addressable_data(0))


def _default_device() -> Any:
    return jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]


def with_concrete_shardings(abstract: Any) -> Any:
    """ShapeDtypeStructs with concrete shardings, on the mesh or else on the default device."""

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if has_mesh():
            sharding = NamedSharding(jax.sharding.get_mesh(), x.sharding.spec if x.sharding else REPLICATED)
        else:
            sharding = SingleDeviceSharding(_default_device())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(concrete, abstract)


def check_batch(rows: int, tokens: int, accumulation: int, branch_tokens: int = 0) -> None:
    """Raises UsageError unless a batch [rows, tokens] of micro-batches spreads evenly over the mesh.

    The last `branch_tokens` of each row are its branch region.
    """
    mesh = jax.sharding.get_mesh()
    shards, micro = math.prod(mesh.shape[axis] for axis in ROW_AXES), rows // accumulation
    if micro % shards:
        raise UsageError(
            f"{micro} sequences (batch_size / train.grad_accumulation) do not spread evenly over {shards} devices "
            "(mesh.data x mesh.fsdp)"
        )
    parts, less = mesh.shape["context"], f" less data.branch_tokens {branch_tokens}" if branch_tokens else ""
    if parts > 1 and (tokens - branch_tokens) % (2 * parts):
        raise UsageError(f"seq_len {tokens}{less} is no multiple of {2 * parts}, twice mesh.context")
    if branch_tokens % parts:
        raise UsageError(f"data.branch_tokens {branch_tokens} is no multiple of mesh.context={parts}")


def rows_here(rows: int, accumulation: int = 1) -> np.ndarray:
    """Indices, ascending, of the rows of a batch (micro-batch after micro-batch) that this process's devices hold."""
    mesh, micro = jax.sharding.get_mesh(), rows // accumulation
    slices = NamedSharding(mesh, P(ROW_AXES)).addressable_devices_indices_map((micro,)).values()
    mine = np.unique(np.concatenate([np.arange(micro)[index] for index in slices]))
    return (np.arange(accumulation)[:, None] * micro + mine).ravel()


def place_batch(batch: dict[str, np.ndarray], accumulation: int, branch_tokens: int = 0) -> dict[str, jax.Array]:
    """Puts the rows [b, T] that `rows_here` named on the mesh, as micro-batches [A, B / A, T]; see `check_batch`."""
    mesh = jax.sharding.get_mesh()
    local, length = next(iter(batch.values())).shape
    parts, shards = mesh.shape["context"], math.prod(mesh.shape[axis] for axis in ROW_AXES)
    order = _device_order(length, parts, branch_tokens)
    mine = rows_here(shards)
    micro = local // accumulation * shards // len(mine)
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


def _device_order(length: int, parts: int, branch_tokens: int) -> np.ndarray:
    """Positions of the tokens in the order in which devices hold them; see the head of this file."""
    if parts == 1:
        return np.arange(length)
    prompt, branches = np.split(np.arange(length), [length - branch_tokens])
    chunks = prompt.reshape(2 * parts, -1)
    return np.concatenate([chunks[:parts], chunks[: parts - 1 : -1], branches.reshape(parts, -1)], axis=1).ravel()
