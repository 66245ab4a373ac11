"""Static tile schedule of split-KV decode over a ragged batch: equally many KV tiles for every CTA, as in FlashMLA.

The tiles of all sequences are concatenated in one list, of which CTA p gets the run [p * n, (p + 1) * n), where

    n = max(ceil(sum over b of ceil(kv_len[b] / tile) / num_ctas), min_tiles)

A run may end inside one sequence and continue in the next. The partial result of CTA p for sequence b has the split
index p + b, its row in the workspace of num_ctas + batch rows: from one partial result to the next p or b grows, so no
two have the same. The splits of one sequence are consecutive.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

_STRETCH = 32
"""A run may grow by 1 / 32 to contain a whole sequence."""


class Schedule(NamedTuple):
    """Work of all CTAs, int32; computed on the device, because lengths are known there only."""

    ctas_P7: jax.Array
    """For each CTA: its first sequence and one past its last; of the first sequence, the CTA's tiles [begin, end), the
    length and kv_len; one past the last tile of its run, counted over all sequences."""
    sequences_B4: jax.Array
    """For each sequence: its first tile and one past its last in the list, its length and kv_len (valid tokens)."""
    splits_B2: jax.Array
    """For each sequence: its first split index and the number of its splits."""


def schedule(lengths_B: jax.Array, capacity: int, tile: int, num_ctas: int, min_tiles: int) -> Schedule:
    """Distributes the KV tiles over CTAs.

    Args:
        lengths_B: length of each sequence, int32; may exceed the capacity, then kv_len is the capacity.
        capacity: tokens that the cache of a sequence has room for.
        tile: tokens of a tile.
        num_ctas: CTAs to distribute the tiles over; the last ones may stay without work.
        min_tiles: tiles of a CTA at least.
    """
    kv_len_B = jnp.clip(lengths_B, 0, capacity)
    tiles_B = (kv_len_B + tile - 1) // tile
    ends_B = jnp.cumsum(tiles_B, dtype=jnp.int32)
    starts_B = ends_B - tiles_B
    total, longest = ends_B[-1], jnp.max(tiles_B)
    tiles_per_cta = jnp.maximum((total + num_ctas - 1) // num_ctas, min_tiles)
    # Equal sequences that nearly fill a run each are worth idle CTAs: half as many partial results to combine.
    tiles_per_cta = jnp.where(
        (longest > tiles_per_cta) & (longest <= tiles_per_cta + tiles_per_cta // _STRETCH), longest, tiles_per_cta
    )

    begin_P = jnp.arange(num_ctas, dtype=jnp.int32) * tiles_per_cta
    end_P = jnp.minimum(begin_P + tiles_per_cta, total)
    first_P = jnp.sum(ends_B[None, :] <= begin_P[:, None], axis=1, dtype=jnp.int32)
    # One past the last sequence that starts before the run ends.
    last_P = jnp.sum(starts_B[None, :] < end_P[:, None], axis=1, dtype=jnp.int32)
    sequences_B4 = jnp.stack([starts_B, ends_B, lengths_B, kv_len_B], axis=1)
    start_P, stop_P, length_P, kv_len_P = sequences_B4[jnp.minimum(first_P, len(lengths_B) - 1)].T
    own_P2 = begin_P - start_P, jnp.minimum(end_P, stop_P) - start_P
    ctas_P7 = jnp.stack([first_P, jnp.maximum(last_P, first_P), *own_P2, length_P, kv_len_P, end_P], axis=1)

    b = jnp.arange(len(lengths_B), dtype=jnp.int32)
    first_cta_B = starts_B // tiles_per_cta
    count_B = jnp.where(tiles_B > 0, (ends_B - 1) // tiles_per_cta - first_cta_B + 1, 0)
    return Schedule(ctas_P7, sequences_B4, jnp.stack([first_cta_B + b, count_B], axis=1))


class Split(NamedTuple):
    """The tiles of one sequence that belong to one CTA."""

    b: Any
    """The sequence."""
    begin: Any
    """First tile, counted from the sequence's first, and one past the last."""
    end: Any
    length: Any
    kv_len: Any
    tiles_before: Any
    """Tiles of the CTA's splits before this one."""
    splits_before: Any
    """Splits of the CTA before this one."""


class CtaSplits:
    """In a Pallas kernel: the splits of a CTA, read from references to `Schedule.ctas_P7` and `sequences_B4`."""

    def __init__(self, ctas_ref, sequences_ref, cta, batch: int):
        self.sequences_ref, self.batch = sequences_ref, batch
        self.first, self.last, *self.first_split, self.run_end = (ctas_ref[cta, i] for i in range(7))

    def for_each(self, body: Callable[[Split], None]) -> None:
        """Calls body(split) for all splits that have tiles."""

        def step(b, carry):
            tiles_before, splits_before, begin, end, length, kv_len = carry

            @pl.when(end > begin)
            def _():
                body(Split(b, begin, end, length, kv_len, tiles_before, splits_before))

            following = jnp.minimum(b + 1, self.batch - 1)
            start, stop, next_length, next_kv_len = (self.sequences_ref[following, i] for i in range(4))
            next_end = jnp.minimum(self.run_end, stop) - start
            tiles = jnp.maximum(end - begin, 0)
            return tiles_before + tiles, splits_before + jnp.minimum(tiles, 1), 0, next_end, next_length, next_kv_len

        lax.fori_loop(self.first, self.last, step, (0, 0, *self.first_split))
