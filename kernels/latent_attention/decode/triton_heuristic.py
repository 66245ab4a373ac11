"""How the kernels of `triton_decode` are cut for a call on a GPU: tiles, warps, stages, programs, strides."""

from typing import NamedTuple

from latent_attention.call_shapes import DecodeShape
from latent_attention.gpu import Gpu


class Config(NamedTuple):
    """What is tuned."""

    rows: int
    """Rows (query tokens x heads) of a program."""
    tile: int
    """Keys that a program reads at a time."""
    warps: int
    stages: int
    """Tiles in shared memory, and one: loads run ahead of the products."""
    per_core: int
    """Programs that run on a multiprocessor at a time."""
    least: int = 1
    """Tiles a program gets at least."""


_TUNED = {
    64: {"narrow": [Config(16, 32, 8, 2, 1)]},  # Turing
    99: {  # Ampere and newer of consumers
        "narrow": [Config(16, 32, 4, 3, 1), Config(32, 32, 4, 2, 2)],
        "wide": [Config(16, 32, 4, 3, 1), Config(32, 32, 8, 2, 1)],
    },
    163: {  # A100
        "narrow": [Config(16, 32, 4, 3, 3), Config(32, 32, 4, 3, 2), Config(64, 32, 8, 3, 1)],
        "wide": [Config(16, 32, 8, 3, 1), Config(32, 32, 8, 3, 1)],
    },
    227: {  # Hopper
        "narrow": [Config(16, 64, 4, 3, 2), Config(32, 64, 4, 3, 2), Config(64, 64, 8, 3, 1)],
        "wide": [Config(16, 32, 4, 3, 2), Config(32, 32, 8, 3, 1), Config(64, 32, 8, 3, 1)],
    },
}
"""By the KiB of shared memory a GPU has at least and by width, growing with the rows."""
_NARROW = 320
_TENSOR_MEMORY = (10, 0)
"""From here on Triton has other products for 64 rows and more, which take more memory and refuse int8's conversion."""
_FLOAT32 = Config(16, 16, 4, 2, 1)


def choose(shape: DecodeShape, gpu: Gpu) -> Config | None:
    """The cut for a call: the first that takes all its rows at once, else the largest; None if the GPU is too small."""
    memory = max((kib for kib in _TUNED if kib << 10 <= gpu.shared_memory), default=None)
    width = "narrow" if shape.c_width + shape.rope_width <= _NARROW else "wide"
    configs = [] if memory is None else _TUNED[memory].get(width, [])
    if shape.cache_dtype == "float32" and configs:
        return _FLOAT32
    if gpu.capability >= _TENSOR_MEMORY:
        configs = [config for config in configs if config.rows < 64]
    fitting = [config for config in configs if shape.queries * shape.heads <= config.rows]
    return next(iter(fitting or configs[-1:]), None)


class Launch(NamedTuple):
    """One kernel launch, besides its arrays."""

    grid: tuple[int, ...]
    constants: dict[str, int | bool]
    warps: int
    stages: int


class Plan(NamedTuple):
    """A call: `split` writes partial results of each row into `slots`, `combine` merges them."""

    programs: int
    slots: int
    capacity: int
    split: Launch
    combine: Launch


def plan(shape: DecodeShape, gpu: Gpu, strides: dict[str, int], config: Config | None = None) -> Plan:
    """The launches of a call.

    Args:
        shape: the call.
        gpu: where it runs.
        strides: elements between entries of the arrays, by the names that the kernels give them.
        config: instead of what `choose` says.

    Raises:
        ValueError: there is no known cut.
    """
    config = config or choose(shape, gpu)
    if config is None:
        raise ValueError(f"no cut of {shape} fits {gpu.name}")
    rows, capacity = shape.queries * shape.heads, shape.pages_per_row * shape.page_size
    row_blocks = -(-rows // config.rows)
    programs = min(max(gpu.num_sms * config.per_core // row_blocks, 1), shape.batch * -(-capacity // config.tile))
    c1, c2 = content_tiles(shape)
    shared = {
        "QUERIES": shape.queries,
        "HEADS": shape.heads,
        "C": shape.c_width,
        "TILE": config.tile,
        "BATCH": min(max(_power_above(shape.batch), 16), 256),
        "LEAST": config.least,
    }
    split = {
        "C1": c1,
        "C2": c2,
        "R": shape.rope_width,
        "PAGE": shape.page_size,
        "PAGED": shape.paged,
        "ONE_PAGE": shape.page_size % config.tile == 0 or shape.pages_per_row == 1,
        "INT8": shape.cache_dtype == "int8",
        "ROWS": config.rows,
    }
    # Few rows leave most of the GPU idle unless their columns are shared out too.
    columns = _power_above(shape.c_width) if rows * shape.batch >= 2 * gpu.num_sms else 64
    combine = {"COLUMNS": columns, "PARTS": min(_power_above(programs // shape.batch + 1), 4096 // columns)}
    out_strides = {name: stride for name, stride in strides.items() if name.startswith(("OUT_", "LSE_"))}
    in_strides = {name: stride for name, stride in strides.items() if name not in out_strides}
    return Plan(
        programs=programs,
        slots=programs + shape.batch,
        capacity=capacity,
        split=Launch((row_blocks, programs), shared | split | in_strides, config.warps, config.stages),
        combine=Launch((-(-shape.c_width // columns), rows, shape.batch), shared | combine | out_strides, 4, 2),
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
    if choose(shape, gpu) is None:
        width = shape.c_width + shape.rope_width
        return f"width {width} does not fit the {gpu.shared_memory >> 10} KiB of shared memory of this GPU ({gpu.name})"
    return None


def content_tiles(shape: DecodeShape) -> tuple[int, int]:
    """Widths of the two tiles that hold the content; the second may be padded, or be 0.

    Even a power of two is halved if one product over all of it would need more registers than there are.
    """
    c = shape.c_width
    c1 = 1 << (c.bit_length() - 1)
    if c1 == c and (c == 512 or (c > 64 and shape.cache_dtype == "int8")):
        c1 //= 2
    return c1, _power_above(c - c1) if c > c1 else 0


def _power_above(x: int) -> int:
    return 1 << (x - 1).bit_length()
