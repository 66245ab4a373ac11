"""Parameters larger than memory: read from and written to a checkpoint slice by slice.

Orbax reads and writes whole leaves, which are stacked over layers. Its files are arrays in chunks (zarr) in a database
(OCDBT); TensorStore, which it uses for both, opens one of them and reads or writes any slice of it.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from mla_jax.errors import InputError, first_line

CHUNK_BYTES = 1 << 20
"""The most bytes in a chunk, which is compressed as a whole."""
SLICE_BYTES = 4 << 20
"""The most bytes of chunks that are read or written together; at least one chunk is."""

Leaf = np.ndarray | ts.TensorStore

# The C library keeps for each thread some of the memory that it has freed.
_FEW_THREADS = {
    "file_io_concurrency": {"limit": 1},
    "data_copy_concurrency": {"limit": 1},
    "cache_pool#ocdbt": {"total_bytes_limit": CHUNK_BYTES},
}
_NODE_BYTES = 1 << 16
"""Size of a node of the OCDBT index: each slice that is written rewrites one."""


@dataclass(frozen=True)
class LazyArray:
    """An array to be saved that is computed slice by slice while it is written, and never whole in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    """True if the first axis is the layers."""
    fill: Callable[[Leaf], None]
    """Sets all values of an array of this shape, one of `chunk_slices` after the other."""

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk on disk: whole rows of one layer."""
        *layers, rows, width = self.shape if len(self.shape) > 1 else (1, *self.shape)
        if self.stacked and not layers:
            return 1, width
        fitting = max(1, min(rows, CHUNK_BYTES // (width * self.dtype.itemsize)))
        return ((1,) * len(layers) + (fitting, width))[-len(self.shape) :]


@contextlib.contextmanager
def deferred_write_errors(params: dict) -> Iterator[dict]:
    """Wraps every `LazyArray.fill` so that its error, Ctrl-C too, is raised only when the body, which saves, has ended.

    Orbax writes in several threads, and would go on in those while the folder is being removed.

    Yields:
        The parameters to save.

    Raises:
        InputError: the storage library could not write. Other errors of `fill` as they are.
    """
    failures: list[BaseException] = []

    def guarded(leaf: Any) -> Any:
        def fill(array: Leaf) -> None:
            try:
                if not failures:
                    leaf.fill(array)
            except BaseException as e:
                failures.append(e)
            if failures:
                array[next(chunk_slices(array))] = 0  # Orbax complains at length of leaves without values

        return dataclasses.replace(leaf, fill=fill) if isinstance(leaf, LazyArray) else leaf

    yield jax.tree.map(guarded, params)
    match failures:
        case [ValueError() as e, *_]:  # TensorStore's
            raise InputError(f"could not write the parameters ({first_line(e)}); nothing was left behind") from e
        case [failure, *_]:
            raise failure


def chunk_slices(array: Leaf) -> Iterator[tuple[slice, ...]]:
    """Indices that cover an array: of one on disk some chunks each, of one in memory all at once."""
    shape = list(array.shape)
    if isinstance(array, ts.TensorStore):
        shape = list(_chunk(array))
        most_cut = max(range(len(shape)), key=lambda axis: array.shape[axis] / shape[axis])
        shape[most_cut] *= max(1, SLICE_BYTES // (math.prod(shape) * array.dtype.numpy_dtype.itemsize))
    slices = (
        [slice(start, min(start + step, length)) for start in range(0, length, step)]
        for length, step in zip(array.shape, shape, strict=True)
    )
    return itertools.product(*slices)


def open_params(folder: Path, abstract: dict) -> dict:
    """Opens the parameters in an item's folder as arrays that stay on disk.

    Leaves whose chunks span several layers, as earlier versions wrote them, are read whole: reading one layer would
    cost as much.

    Args:
        folder: RUN/checkpoints/STEP/params.
        abstract: their shapes and types.

    Raises:
        ValueError: shapes or types differ from `abstract`, or they cannot be read.
    """
    context = ts.Context(_FEW_THREADS)

    def open_leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> Leaf:
        name = ".".join(key.key for key in path)
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        array = ts.open(spec, read=True, open=True, context=context).result()
        if (array.shape, array.dtype.numpy_dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{name} is {list(array.shape)} {array.dtype.name} and not {list(leaf.shape)} {leaf.dtype}"
            )
        return array if len(array.shape) < 3 or _chunk(array)[0] == 1 else array.read().result()

    return jax.tree_util.tree_map_with_path(open_leaf, abstract)


def _chunk(array: ts.TensorStore) -> tuple[int, ...]:
    chunk = array.chunk_layout.read_chunk.shape
    assert chunk is not None
    return tuple(map(int, chunk))  # pyright: ignore[reportArgumentType]


def params_save(params: dict) -> ocp.args.CheckpointArgs:
    """Orbax's save arguments for parameters: arrays, or leaves that are all `LazyArray`."""
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, LazyArray) for leaf in leaves):
        return _LazySave(params)
    return ocp.args.StandardSave(params, save_args=jax.tree.map(_chunking, params))


def _chunking(array: jax.Array | np.ndarray) -> ocp.SaveArgs:
    """Chunks within a layer, so that one can be read without the others.

    Orbax cuts an axis by its divisors: one that has few would be cut to slivers, so such an axis stays whole.
    """
    divisible = all(length % 64 == 0 for length in array.shape[-2:])
    layers = (0,) if array.ndim == 3 else ()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES if divisible else None, shard_axes=layers)


class _LazyWriter(ocp.type_handlers.NumpyHandler):
    """Writes `LazyArray` leaves as NumpyHandler does arrays, but one after the other and in the caller's thread."""

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[ocp.type_handlers.ParamInfo], args: Any = None
    ) -> list:
        CommitFutureAwaitingContractedSignals(asyncio.sleep(0)).result()  # the folder is there then
        context = ts.Context(_FEW_THREADS)
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=leaf.shape,
                local_shape=leaf.shape,
                dtype=leaf.dtype,
                process_index=jax.process_index(),
            )
            spec["metadata"]["chunks"] = leaf.chunk
            spec["kvstore"]["config"]["max_decoded_node_bytes"] = _NODE_BYTES
            leaf.fill(ts.open(spec, create=True, open=True, context=context).result())
        return []


class _LazyHandler(ocp.PyTreeCheckpointHandler):
    def __init__(self, **kwargs):
        registry = ocp.type_handlers.create_type_handler_registry(
            (LazyArray, _LazyWriter()), (jax.Array, ocp.type_handlers.ArrayHandler())
        )
        super().__init__(type_handler_registry=registry, **kwargs)


# For restoring too only because Orbax asks for it: what is written is read as `StandardSave` writes it.
@ocp.args.register_with_handler(_LazyHandler, for_save=True, for_restore=True)
@dataclass
class _LazySave(ocp.args.PyTreeSave):
    pass
