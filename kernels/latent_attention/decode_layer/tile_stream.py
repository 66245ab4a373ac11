"""The tile stream: all that a CTA copies through the pipeline, in order, by a static round-robin schedule.

Each weight matrix, and the cache, is a `TileStream`: tiles of some whole rows, which are contiguous, or of 64 tokens.
(The up-projection of keys and values, `kv_b`, and what is small is not streamed: consumers load it from global memory.)
The tiles of all streams, as if they were one list, go to the CTAs round-robin, so that any two CTAs have the same
number of them, give or take one. A CTA's part of a stream is its `CtaPartition`, and the two consumers take its tiles
in turn (`consumer_tile_range`). Producer and consumers compute all of this alike; nothing of it is communicated.

A tile of a matrix takes one stage of the pipeline, one of a cache in 16 bits two, the first of which is even. A tile of
a cache in 8 bits takes one, and its scales have a place of their own beside the stage.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import gemv, layouts

STAGE_BYTES = 20 << 10
"""Bytes of a pipeline stage. Two stages hold exactly TILE_TOKENS * (C + R) elements of 16 bits, and one as many of 8
bits; one holds four rows of D = 2560, or eight in 8 bits."""
NUM_STAGES = 8
"""Stages of the pipeline. A multiple of 4, as matrix tiles in stages, and cache tiles in pairs of them, alternate
between the two consumers. At least MAX_TILES_IN_FLIGHT, or the producer would refill a stage before it has seen its
last phase."""
NUM_CONSUMERS = 2
"""Consumer warpgroups of a CTA; the phases are written for two (consumer 0 does this, consumer 1 that)."""
TILE_TOKENS = 64
"""Tokens of a tile of the cache: M of wgmma."""
MAX_TILES_IN_FLIGHT = 3
"""Tiles of matrices being copied at a time. They suffice for full bandwidth; with more, all other memory traffic of the
kernel (mailboxes, barriers, partial results) waits longer."""
_THROTTLED_TILES = 6
"""First tiles of `o` in each CTA, which are copied one at a time: they have room in the pipeline long before they are
needed, and so delay other traffic least."""
_MAX_PREFETCHED = 2
"""Tiles at most that a consumer prefetches into registers: each takes up to STAGE_BYTES / 512 = 40 of the 232
of a thread."""
_NARROW_ROW_STEP = 8
"""Tiles of narrow rows (`layouts.is_narrow`) have a multiple of this many rows, two for each warp."""
_TILE_OVERHEAD = 8192
"""Fixed cost of a tile, as the number of bytes that are read in that time."""

assert NUM_STAGES % (2 * NUM_CONSUMERS) == 0 and NUM_STAGES >= MAX_TILES_IN_FLIGHT


class PerMatrix(NamedTuple):
    """A number for each matrix: rows of a tile, widths and others."""

    qkv_a: int
    """The down-projections of queries (`q_a`) and of keys and values (`kv_a`), whose tiles form one list."""
    q_b: int
    o: int
    gate: int
    """Of `gate`, and as many of `up`: a tile has rows of both."""
    down: int


class TileStream(NamedTuple):
    """A matrix, or the cache, as tiles of `rows` rows of `width` elements."""

    num_tiles: Any
    rows: int
    width: int
    halves: Callable[[Any], list]
    """Global references to the two halves of tile i; empty for a tile of the cache. `gate` and `up` are two arrays, so
    their tiles take two copies, and the others have two as well, so that each phase of `Smem.produced` expects as
    many."""
    sums_per_row: int
    """Partial sums for each row, see `gemv.sums_per_row`."""
    stages: int = 1
    """Pipeline stages of a tile."""
    throttled: int = 0
    """How many of a CTA's first tiles are copied one at a time."""
    is_tokens: bool = False
    """Whether this is the cache."""


class CtaPartition(NamedTuple):
    """The tiles of a stream that one CTA has: first_tile + i * num_ctas for i < num_tiles."""

    stream: TileStream
    first_tile: Any
    num_tiles: Any
    first_index: Any
    """Running index of the pipeline stage of its first tile, counted from the start of the kernel (`stage_of`)."""


def choose_tile_rows(outs: tuple[int, ...], row_bytes: int, num_ctas: int, step: int = 1) -> int:
    """Rows of a tile of matrices with which the busiest CTA finishes earliest; 0 if none fits a stage.

    Args:
        outs: rows of each matrix.
        row_bytes: bytes of a row.
        num_ctas: see `tile_streams`.
        step: what the number of rows must be a multiple of.
    """
    common = math.gcd(*outs)
    fitting = [rows for rows in range(step, STAGE_BYTES // row_bytes + 1, step) if common % rows == 0]
    return min(
        fitting, key=lambda rows: -(-sum(outs) // rows // num_ctas) * (rows * row_bytes + _TILE_OVERHEAD), default=0
    )


def tile_rows(shape: LayerShape, num_ctas: int, int8: bool) -> PerMatrix:
    """Rows of a tile of every matrix, in 8 bits or in 16."""
    D, Q, C, R, N, V, H, F = shape

    def rows(outs: tuple[int, ...], width: int, step: int = 1) -> int:
        step *= _NARROW_ROW_STEP if layouts.is_narrow(width) else 1
        return choose_tile_rows(outs, width * (1 if int8 else 2), num_ctas, step)

    return PerMatrix(
        qkv_a=rows((Q, C + R), D), q_b=rows((H * (N + R),), Q), o=rows((D,), H * V), gate=rows((2 * F,), D, 2) // 2,
        down=rows((D,), F),
    )  # fmt: skip


def sums_per_row(shape: LayerShape, num_ctas: int, int8: bool) -> tuple[PerMatrix, int]:
    """`gemv.sums_per_row` of each matrix, and the most partial sums that a CTA has of any one of them."""
    D, Q, C, R, N, V, H, F = shape
    rows = tile_rows(shape, num_ctas, int8)
    both = rows._replace(gate=2 * rows.gate)
    outs, widths = PerMatrix(Q + C + R, H * (N + R), D, 2 * F, D), PerMatrix(D, Q, H * V, D, F)
    most = [-(-out // n // num_ctas) * n for out, n in zip(outs, both, strict=True)]
    sums = PerMatrix(*map(gemv.sums_per_row, widths, both, most))
    return sums, max(n * each for n, each in zip(most, sums, strict=True))


def tile_streams(shape: LayerShape, num_ctas: int, refs, kv_len) -> dict[str, TileStream]:
    """All streams, in the order in which they are copied. The matrices of `refs` are flat."""
    D, Q, C, R, N, V, H, F = shape
    int8 = refs.scales is not None
    rows, (sums, _) = tile_rows(shape, num_ctas, int8), sums_per_row(shape, num_ctas, int8)

    def matrix(ref, out: int, width: int, rows: int, sums_per_row: int) -> TileStream:
        half = rows * width // 2

        def halves(tile) -> list:
            start = 2 * half * tile
            return [ref.at[pl.ds(start, half)], ref.at[pl.ds(start + half, half)]]

        return TileStream(out // rows, rows, width, halves, sums_per_row)

    def gate_and_up(tile) -> list:
        n = rows.gate * D
        return [ref.at[pl.ds(tile * n, n)] for ref in (refs.gate, refs.up)]

    return {
        "q_a": matrix(refs.q_a, Q, D, rows.qkv_a, sums.qkv_a),
        "kv_a": matrix(refs.kv_a, C + R, D, rows.qkv_a, sums.qkv_a),
        "q_b": matrix(refs.q_b, H * (N + R), Q, rows.q_b, sums.q_b),
        "tokens": TileStream(
            lax.div(kv_len + TILE_TOKENS - 1, TILE_TOKENS),
            TILE_TOKENS,
            C + R,
            lambda tile: [],
            0,
            stages=token_stages(refs.cache_scales is not None),
            is_tokens=True,
        ),
        "o": matrix(refs.o, D, H * V, rows.o, sums.o)._replace(throttled=_THROTTLED_TILES),
        "gate_up": TileStream(F // rows.gate, 2 * rows.gate, D, gate_and_up, sums.gate),
        "down": matrix(refs.down, D, F, rows.down, sums.down),
    }


def partition(streams: dict[str, TileStream], cta, num_ctas: int) -> Iterator[tuple[str, CtaPartition]]:
    """The part of every stream that this CTA has."""
    index, offset = jnp.int32(0), jnp.int32(0)
    for name, stream in streams.items():
        first_tile = lax.rem(cta + num_ctas - offset, num_ctas)
        num_tiles = lax.div(jnp.maximum(stream.num_tiles - first_tile + num_ctas - 1, 0), num_ctas)
        index += lax.rem(index, stream.stages)  # a pair of stages starts at an even one
        yield name, CtaPartition(stream, first_tile, num_tiles, index)
        index, offset = index + num_tiles * stream.stages, lax.rem(offset + stream.num_tiles, num_ctas)


def consumer_partition(shape: LayerShape, num_ctas: int, refs, cta) -> dict[str, CtaPartition]:
    """`partition` with the two down-projections as one, `qkv_a`: same operand, and tiles that form one list."""
    parts = dict(partition(tile_streams(shape, num_ctas, refs, cache_length(refs)), cta, num_ctas))
    q_a, kv_a = parts.pop("q_a"), parts.pop("kv_a")
    parts["qkv_a"] = q_a._replace(num_tiles=q_a.num_tiles + kv_a.num_tiles)
    return parts


def token_stages(int8_cache: bool) -> int:
    """Pipeline stages of a tile of the cache."""
    return 1 if int8_cache else 2


def stage_of(index):
    """The pipeline stage of a running index."""
    return lax.rem(index, NUM_STAGES)


def owner(index):
    """The consumer of the tile in a stage, or in a pair of stages, by its running index (of pairs: half of it).

    The same one for each `produced` mbarrier and each `tokens_produced` mbarrier, so that it sees every phase of it. A
    stage itself can be of one consumer for a matrix and of the other for the cache: stage 1 is consumer 1's, but stages
    0 and 1 as a pair are consumer 0's.
    """
    return lax.rem(index, NUM_CONSUMERS)


def consumer_tile_range(wg, part: CtaPartition) -> tuple[Any, Any]:
    """(first, count) of a consumer's tiles among the CTA's: first, first + 2, first + 4, ..."""
    first = lax.rem(wg + owner(lax.div(part.first_index, part.stream.stages)), NUM_CONSUMERS)
    return first, lax.div(part.num_tiles - first + NUM_CONSUMERS - 1, NUM_CONSUMERS)


def num_prefetched(stream: TileStream, num_ctas: int) -> int:
    """Tiles of a matrix that each consumer prefetches into registers.

    Fewer than any consumer has of it, as `Projections.multiply` multiplies them after at least one other.
    """
    return max(min(stream.num_tiles // num_ctas // NUM_CONSUMERS - 1, _MAX_PREFETCHED), 0)


def token_tile(shape: LayerShape, smem, place) -> tuple[Any, Any]:
    """Latents [TILE_TOKENS, C] and, after them, rotary keys [TILE_TOKENS, R] in a pair of stages, of 8 bits in one."""
    rope_rows = pl.ds(TILE_TOKENS * shape.C // shape.R, TILE_TOKENS)
    return smem.c_tiles.at[place, pl.ds(0, TILE_TOKENS)], smem.rope_tiles.at[place, rope_rows]


def cache_length(refs) -> Any:
    """kv_len: the number of valid tokens in the cache, before the new one."""
    return jnp.minimum(refs.length[0], refs.c.shape[1])
