"""The tile schedule of `tile_scheduler.py` as Triton device functions: each program derives its run from the lengths.

BATCH sequences are read at a time.
"""

import triton
import triton.language as tl


@triton.jit
def kv_len_of(lengths_ptr, b, batch, capacity):
    """Valid tokens in the cache of sequences b; 0 beyond the batch."""
    return tl.maximum(tl.minimum(tl.load(lengths_ptr + b, mask=b < batch, other=0), capacity), 0)


@triton.jit
def tiles_of(kv_len, TILE: tl.constexpr):
    """Number of tiles that cover kv_len tokens."""
    return kv_len // TILE + (kv_len % TILE != 0).to(tl.int32)


@triton.jit
def tiles_per_program(
    lengths_ptr, batch, capacity, programs, TILE: tl.constexpr, BATCH: tl.constexpr, MIN_TILES: tl.constexpr
):
    """Number of tiles of the whole batch, and of one program."""
    total = 0
    for b0 in range(0, batch, BATCH):
        total += tl.sum(tiles_of(kv_len_of(lengths_ptr, b0 + tl.arange(0, BATCH), batch, capacity), TILE), 0)
    return total, tl.maximum(tl.cdiv(total, programs), MIN_TILES)


@triton.jit
def find_sequence(lengths_ptr, batch, capacity, tile, TILE: tl.constexpr, BATCH: tl.constexpr):
    """The sequence that a tile of the list belongs to (`batch` beyond the list), and the number of tiles before it."""
    seq = 0
    before = 0
    total = 0
    for b0 in range(0, batch, BATCH):
        b = b0 + tl.arange(0, BATCH)
        tiles = tiles_of(kv_len_of(lengths_ptr, b, batch, capacity), TILE)
        ends = total + tl.cumsum(tiles, 0)
        passed = (ends <= tile) & (b < batch)
        seq += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        total += tl.sum(tiles, 0)
    return seq, before
