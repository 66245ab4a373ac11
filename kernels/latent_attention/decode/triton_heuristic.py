"""Tiling and launch parameters of the Triton decode kernels, by the shape of a call and the GPU."""

from typing import NamedTuple

from latent_attention.call_shapes import DecodeShape
from latent_attention.gpu import Gpu


class Tiling(NamedTuple):
    """Tile sizes and launch options of `split_kernel`."""

    rows: int
    """Rows (query tokens x heads) of a program: BLOCK_M."""
    tile: int
    """Keys of a tile: BLOCK_N."""
    warps: int
    stages: int
    """Depth of the software pipeline: tiles in shared memory, plus one."""
    ctas_per_sm: int
    """Programs that fit on an SM at a time."""
    min_tiles: int = 1
    """Tiles of a program at least."""


_TUNED = {
    64: {"narrow": [Tiling(16, 32, 8, 2, 1)]},  # Turing
    99: {  # Ampere and newer of consumers
        "narrow": [Tiling(16, 32, 4, 3, 1), Tiling(32, 32, 4, 2, 2)],
        "wide": [Tiling(16, 32, 4, 3, 1), Tiling(32, 32, 8, 2, 1)],
    },
    163: {  # A100
        "narrow": [Tiling(16, 32, 4, 3, 3), Tiling(32, 32, 4, 3, 2), Tiling(64, 32, 8, 3, 1)],
        "wide": [Tiling(16, 32, 8, 3, 1), Tiling(32, 32, 8, 3, 1)],
    },
    227: {  # Hopper
        "narrow": [Tiling(16, 64, 4, 3, 2), Tiling(32, 64, 4, 3, 2), Tiling(64, 64, 8, 3, 1)],
        "wide": [Tiling(16, 32, 4, 3, 2), Tiling(32, 32, 8, 3, 1), Tiling(64, 32, 8, 3, 1)],
    },
}
"""Tilings by the KiB of shared memory that a GPU has at least and by the width of the cache, in order of rows."""
_NARROW = 320
_TENSOR_MEMORY = (10, 0)
"""First compute capability on which Triton multiplies 64 rows and more with tcgen05, which takes more memory and cannot
convert int8."""
_FLOAT32 = Tiling(16, 16, 4, 2, 1)


def select_tiling(shape: DecodeShape, gpu: Gpu) -> Tiling | None:
    """The smallest tuned tiling that holds all rows of a call, else the largest; None if the GPU is too small."""
    memory = max((kib for kib in _TUNED if kib << 10 <= gpu.shared_memory), default=None)
    width = "narrow" if shape.c_width + shape.rope_width <= _NARROW else "wide"
    tilings = [] if memory is None else _TUNED[memory].get(width, [])
    if shape.cache_dtype == "float32" and tilings:
        return _FLOAT32
    if gpu.capability >= _TENSOR_MEMORY:
        tilings = [tiling for tiling in tilings if tiling.rows < 64]
    fitting = [tiling for tiling in tilings if shape.queries * shape.heads <= tiling.rows]
    return next(iter(fitting or tilings[-1:]), None)


class KernelLaunch(NamedTuple):
    """Launch of one kernel, without its arrays."""

    grid: tuple[int, ...]
    constants: dict[str, int | bool]
    warps: int
    stages: int


class LaunchConfig(NamedTuple):
    """Launches of a call: `split` writes up to `splits` partial results of each row, `combine` merges them."""

    programs: int
    """Programs that share the KV tiles of one block of rows."""
    splits: int
    """Size of the split axis of the workspace."""
    capacity: int
    """Tokens that the cache of a sequence has room for."""
    split: KernelLaunch
    combine: KernelLaunch


def launch_config(shape: DecodeShape, gpu: Gpu, strides: dict[str, int], tiling: Tiling | None = None) -> LaunchConfig:
    """Launch parameters of both kernels for a call.

    Args:
        shape: the call.
        gpu: where it runs.
        strides: strides of the arrays, in elements, by the names of the kernels' arguments.
        tiling: instead of `select_tiling`'s.

    Raises:
        ValueError: no tiling fits this GPU.
    """
    tiling = tiling or select_tiling(shape, gpu)
    if tiling is None:
        raise ValueError(f"no tiling of {shape} fits {gpu.name}")
    rows, capacity = shape.queries * shape.heads, shape.pages_per_row * shape.page_size
    row_blocks = -(-rows // tiling.rows)
    programs = min(max(gpu.num_sms * tiling.ctas_per_sm // row_blocks, 1), shape.batch * -(-capacity // tiling.tile))
    c1, c2 = content_tiles(shape)
    shared = {
        "QUERIES": shape.queries,
        "HEADS": shape.heads,
        "C": shape.c_width,
        "TILE": tiling.tile,
        "BATCH": min(max(_next_power_of_2(shape.batch), 16), 256),
        "MIN_TILES": tiling.min_tiles,
    }
    split = {
        "C1": c1,
        "C2": c2,
        "R": shape.rope_width,
        "PAGE": shape.page_size,
        "PAGED": shape.paged,
        "ONE_PAGE": shape.page_size % tiling.tile == 0 or shape.pages_per_row == 1,
        "INT8": shape.cache_dtype == "int8",
        "ROWS": tiling.rows,
    }
    # With few rows, one program a row would leave most SMs idle: split the columns too.
    columns = _next_power_of_2(shape.c_width) if rows * shape.batch >= 2 * gpu.num_sms else 64
    combine = {"COLUMNS": columns, "PARTS": min(_next_power_of_2(programs // shape.batch + 1), 4096 // columns)}
    out_strides = {name: stride for name, stride in strides.items() if name.startswith(("OUT_", "LSE_"))}
    in_strides = {name: stride for name, stride in strides.items() if name not in out_strides}
    return LaunchConfig(
        programs=programs,
        splits=programs + shape.batch,
        capacity=capacity,
        split=KernelLaunch((row_blocks, programs), shared | split | in_strides, tiling.warps, tiling.stages),
        combine=KernelLaunch((-(-shape.c_width // columns), rows, shape.batch), shared | combine | out_strides, 4, 2),
    )


def why_not(shape: DecodeShape, gpu: Gpu) -> str | None:
    """Why the kernels cannot run calls of this shape on this GPU, or None if they can."""
    if gpu.capability < (7, 5):
        return f"Triton needs Turing (sm_75) or newer, this GPU is {gpu.name}"
    if shape.c_width % 64 or not 64 <= shape.c_width <= 512 or shape.rope_width not in (32, 64):
        return f"needs C a multiple of 64 up to 512 and R 32 or 64, not {shape.c_width} and {shape.rope_width}"
    if shape.q_dtype not in ("float16", "bfloat16", "float32"):
        return f"queries must be float16, bfloat16 or float32, not {shape.q_dtype}"
    if shape.cache_dtype != shape.q_dtype and (shape.cache_dtype != "int8" or shape.q_dtype == "float32"):
        return f"the cache must be of the type of the queries or int8 with 16 bits, not {shape.cache_dtype}"
    if select_tiling(shape, gpu) is None:
        width = shape.c_width + shape.rope_width
        return f"width {width} does not fit the {gpu.shared_memory >> 10} KiB of shared memory of this GPU ({gpu.name})"
    return None


def content_tiles(shape: DecodeShape) -> tuple[int, int]:
    """Widths C1 and C2 of the two tiles that hold the latent: powers of two, C1 + C2 >= C, C2 may be 0.

    Even a power of two is halved where one dot over all of it would need more registers than there are.
    """
    c = shape.c_width
    c1 = 1 << (c.bit_length() - 1)
    if c1 == c and (c == 512 or (c > 64 and shape.cache_dtype == "int8")):
        c1 //= 2
    return c1, _next_power_of_2(c - c1) if c > c1 else 0


def _next_power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()
