"""How a batch of ragged sequences is cut into equal shares of work, one a program (FlashMLA's split-KV scheduler).

The cache of every sequence is cut into tiles; the tiles of all sequences, one after the other, are dealt out in
equal runs. A run may end inside one sequence and go on in the next. What program p finds for sequence b is a partial
result in slot p + b: p or b grows from one partial result to the next, so no two share a slot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_STRETCH = 32
"""A share may grow by 1 / 32 so as to take a whole sequence."""


class Schedule(NamedTuple):
    """The shares of all programs; int32."""

    programs_P7: jax.Array
    """Of each program: its first sequence and one past its last; the first sequence's tiles [begin, end) that are its
    own, length, and tokens held; and one past the last tile of its share, counted over all sequences."""
    sequences_B4: jax.Array
    """Of each sequence: its first tile, one past its last, its length, and how many tokens its cache holds."""
    slots_B2: jax.Array
    """First slot with a partial result of each sequence, and how many there are."""


def schedule(lengths_B: jax.Array, capacity: int, tile: int, programs: int, least: int) -> Schedule:
    """Deals out the tiles of `tile` tokens, `least` a program at least.

    Lengths may exceed the `capacity` of the cache, which then is what a sequence holds.
    """
    held_B = jnp.clip(lengths_B, 0, capacity)
    tiles_B = (held_B + tile - 1) // tile
    ends_B = jnp.cumsum(tiles_B, dtype=jnp.int32)
    starts_B = ends_B - tiles_B
    total, longest = ends_B[-1], jnp.max(tiles_B)
    share = jnp.maximum((total + programs - 1) // programs, least)
    # Equal sequences that nearly fill a share each are worth idle programs: half of the results to combine.
    share = jnp.where((longest > share) & (longest <= share + share // _STRETCH), longest, share)

    begin_P = jnp.arange(programs, dtype=jnp.int32) * share
    end_P = jnp.minimum(begin_P + share, total)
    first_P = jnp.sum(ends_B[None, :] <= begin_P[:, None], axis=1, dtype=jnp.int32)
    # One past the last sequence that starts before the share ends.
    last_P = jnp.sum(starts_B[None, :] < end_P[:, None], axis=1, dtype=jnp.int32)
    sequences_B4 = jnp.stack([starts_B, ends_B, lengths_B, held_B], axis=1)
    start_P, stop_P, length_P, held_P = sequences_B4[jnp.minimum(first_P, len(lengths_B) - 1)].T
    own_P2 = begin_P - start_P, jnp.minimum(end_P, stop_P) - start_P
    programs_P7 = jnp.stack([first_P, jnp.maximum(last_P, first_P), *own_P2, length_P, held_P, end_P], axis=1)

    b = jnp.arange(len(lengths_B), dtype=jnp.int32)
    first_program_B = starts_B // share
    count_B = jnp.where(tiles_B > 0, (ends_B - 1) // share - first_program_B + 1, 0)
    return Schedule(programs_P7, sequences_B4, jnp.stack([first_program_B + b, count_B], axis=1))
