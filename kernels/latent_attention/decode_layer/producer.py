"""What a block of `mosaic_layer` reads, in which order, and the warpgroup that copies it: the producer.

It comes in tiles, some whole rows of a matrix, which are contiguous, or 64 tokens of the cache; but what is small, and
the up-projection of keys and values, consumers load themselves. The tiles of all readings are dealt out to the blocks
in turn, as if they were one list, so that each block reads as many, give or take one. A tile of a matrix takes a slot
of the ring, one of the cache two, of which the first is even.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import gemv as products
from latent_attention.hopper.cta_sync import fence_proxy_async

SLOT = 10240
"""16-bit numbers of a slot, 20 KiB."""
SLOTS = 8
"""Each belongs to one of the two consumers, as does each pair of them: a multiple of 4."""
CONSUMERS = 2
TOKENS = 64
"""Of a tile of the cache: M of wgmma."""
IN_FLIGHT = 3
"""Tiles of matrices on their way at a time. They suffice for the full rate; behind more, whatever else goes to memory
waits longer."""
_UNHURRIED = 6
"""Tiles that come one at a time, as they are needed long after there is room for them: what else goes to memory hardly
waits."""
_AHEAD = 2
"""Tiles in the registers of a consumer; more do not fit there."""
_NARROW_ROWS = 8
"""Tiles of narrow rows have a multiple of so many, two for each warp."""
_COST_OF_TILE = 4096
"""Numbers that are read in the time that a tile takes besides."""


class Rows(NamedTuple):
    """Of a tile of each matrix."""

    down: int
    """Of the down-projections of queries and of keys and values, whose tiles form one list."""
    q_b: int
    o: int
    gate: int
    """And as many of the up-projection beside it."""
    ff_down: int


class Reading(NamedTuple):
    """Tiles of `rows` rows of `width` numbers."""

    tiles: Any
    rows: int
    width: int
    halves: Callable[[Any], list]
    """References to the two halves of a tile; none of a tile of the cache."""
    parts: int
    """Of a product with a row of a matrix, see `mosaic_products.parts_of_row`."""
    slots: int = 1
    """That a tile takes."""
    unhurried: int = 0
    """Tiles at the start, as of `_UNHURRIED`."""


class Share(NamedTuple):
    """Of a reading, what a block has."""

    reading: Reading
    first: Any
    """Its first tile; the others follow at a distance of as many as there are blocks."""
    count: Any
    number: Any
    """Of the first slot that it takes, counted from the start of the kernel."""


def rows_of_tile(outs: tuple[int, ...], width: int, blocks: int, step: int = 1) -> int:
    """Rows of a tile of matrices [out, width], with which the busiest block is done first; 0 if none fits."""
    common = math.gcd(*outs)
    step *= _NARROW_ROWS if products.is_narrow(width) else 1
    fitting = [rows for rows in range(step, SLOT // width + 1, step) if common % rows == 0]
    return min(fitting, key=lambda rows: -(-sum(outs) // rows // blocks) * (rows * width + _COST_OF_TILE), default=0)


def rows_of_tiles(shape: LayerShape, blocks: int) -> Rows:
    """Of all matrices."""
    D, Q, C, R, N, V, H, F = shape
    return Rows(
        down=rows_of_tile((Q, C + R), D, blocks), q_b=rows_of_tile((H * (N + R),), Q, blocks),
        o=rows_of_tile((D,), H * V, blocks), gate=rows_of_tile((2 * F,), D, blocks, 2) // 2,
        ff_down=rows_of_tile((D,), F, blocks),
    )  # fmt: skip


def parts_of_rows(shape: LayerShape, blocks: int) -> tuple[Rows, int]:
    """`mosaic_products.parts_of_row` of each matrix, and how many parts a block has at most."""
    D, Q, C, R, N, V, H, F = shape
    rows = rows_of_tiles(shape, blocks)
    both = rows._replace(gate=2 * rows.gate)
    outs, widths = Rows(Q + C + R, H * (N + R), D, 2 * F, D), Rows(D, Q, H * V, D, F)
    most = [-(-out // n // blocks) * n for out, n in zip(outs, both, strict=True)]
    parts = Rows(*map(products.parts_of_row, widths, both, most))
    return parts, max(n * each for n, each in zip(most, parts, strict=True))


def readings(shape: LayerShape, blocks: int, refs, held) -> dict[str, Reading]:
    """In the order in which they are read; `held` are the tokens in the cache. The matrices of `refs` are flat."""
    D, Q, C, R, N, V, H, F = shape
    rows, (parts, _) = rows_of_tiles(shape, blocks), parts_of_rows(shape, blocks)

    def matrix(ref, out: int, width: int, rows: int, parts: int) -> Reading:
        half = rows * width // 2

        def halves(tile) -> list:
            at = 2 * half * tile
            return [ref.at[pl.ds(at, half)], ref.at[pl.ds(at + half, half)]]

        return Reading(out // rows, rows, width, halves, parts)

    def gate_and_up(tile) -> list:
        n = rows.gate * D
        return [ref.at[pl.ds(tile * n, n)] for ref in (refs.gate, refs.up)]

    return {
        "q_a": matrix(refs.q_a, Q, D, rows.down, parts.down),
        "kv_a": matrix(refs.kv_a, C + R, D, rows.down, parts.down),
        "q_b": matrix(refs.q_b, H * (N + R), Q, rows.q_b, parts.q_b),
        "tokens": Reading(lax.div(held + TOKENS - 1, TOKENS), TOKENS, C + R, lambda tile: [], 0, slots=2),
        "o": matrix(refs.o, D, H * V, rows.o, parts.o)._replace(unhurried=_UNHURRIED),
        "gate_up": Reading(F // rows.gate, 2 * rows.gate, D, gate_and_up, parts.gate),
        "down": matrix(refs.down, D, F, rows.ff_down, parts.ff_down),
    }


def shares(of: dict[str, Reading], block, blocks: int) -> Iterator[tuple[str, Share]]:
    """What a block has of each reading."""
    number, offset = jnp.int32(0), jnp.int32(0)
    for name, it in of.items():
        first = lax.rem(block + blocks - offset, blocks)
        count = lax.div(jnp.maximum(it.tiles - first + blocks - 1, 0), blocks)
        number += lax.rem(number, it.slots)
        yield name, Share(it, first, count, number)
        number, offset = number + count * it.slots, lax.rem(offset + it.tiles, blocks)


def owner(number):
    """The consumer of a slot, or of a pair of them, by its number: each belongs to one, who sees all its uses."""
    return lax.rem(number, CONSUMERS)


def turns(wg, share: Share) -> tuple[Any, Any]:
    """How many of a block's tiles come before the first of a consumer, and how many are its own: every other one."""
    skipped = lax.rem(wg + owner(lax.div(share.number, share.reading.slots)), CONSUMERS)
    return skipped, lax.div(share.count - skipped + CONSUMERS - 1, CONSUMERS)


def tiles_ahead(it: Reading, blocks: int) -> int:
    """How many a consumer takes of a matrix before it has what it multiplies them with: fewer than it has of it."""
    return max(min(it.tiles // blocks // CONSUMERS - 1, _AHEAD), 0)


def slot_of(number):
    """Of the ring."""
    return lax.rem(number, SLOTS)


def token_tile(shape: LayerShape, smem, pair) -> tuple[Any, Any]:
    """Latents [TOKENS, C] and rotary keys [TOKENS, R] in a pair of slots."""
    behind = pl.ds(TOKENS * shape.C // shape.R, TOKENS)
    return smem.c_tiles.at[pair, pl.ds(0, TOKENS)], smem.rope_tiles.at[pair, behind]


def tokens_held(refs) -> Any:
    """How many the cache holds."""
    return jnp.minimum(refs.length[0], refs.c.shape[1])


def produce(shape: LayerShape, blocks: int, block, refs, smem) -> None:
    """Copies all tiles of a block into the ring, each as soon as its slot is empty, and the input as first residual.

    The weights that come before the tokens do not wait for the end of the kernel before, which may write all the rest.
    """

    def copy_tokens(tile, slot) -> None:
        pair, at = lax.div(slot, 2), pl.ds(tile * TOKENS, TOKENS)
        for ref, place in zip((refs.c, refs.rope), token_tile(shape, smem, pair), strict=True):
            plgpu.copy_gmem_to_smem(ref.at[0, at], place, smem.tokens_full.at[pair])

    def copy_rows(it: Reading, tile, slot) -> None:
        half = it.rows * it.width // 2
        for i, source in enumerate(it.halves(tile)):
            plgpu.copy_gmem_to_smem(
                source, smem.ring.at[slot, pl.ds(i * half, half)], smem.full.at[slot],
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )  # fmt: skip

    def parted(held) -> tuple[list[Share], list[Share]]:
        """What comes before the tokens, and these and what follows."""
        everything = dict(shares(readings(shape, blocks, refs, held), block, blocks))
        tokens = list(everything).index("tokens")
        return list(everything.values())[:tokens], list(everything.values())[tokens:]

    def copy(these: list[Share], after, landed) -> Any:
        """Copies these; `after` is the number of the first slot behind the tokens.

        Up to slot `landed`, tiles of matrices have been waited for: each, as waits see turns' parity. Returns it anew.
        """
        copies = [copy_tokens if it.slots == 2 else functools.partial(copy_rows, it) for it, *_ in these]

        def wait(number, _) -> None:
            """For a tile of a matrix; those numbers between matrices are of tokens, or left out before them."""
            of_matrix = (number < end_before) | (number >= after)
            pl.when(of_matrix)(lambda: plgpu.barrier_wait(smem.full.at[slot_of(number)]))

        def step(n, landed):
            which = i = first = number = slots = unhurried = end = jnp.int32(0)
            for k, (it, its_first, count, its_number) in enumerate(these):
                reached = n >= end
                which, i = jnp.where(reached, k, which), jnp.where(reached, n - end, i)
                first, number = jnp.where(reached, its_first, first), jnp.where(reached, its_number, number)
                slots, unhurried = jnp.where(reached, it.slots, slots), jnp.where(reached, it.unhurried, unhurried)
                end += count
            of_tokens, at = slots == 2, number + i * slots
            slot = slot_of(at)
            plgpu.barrier_wait(smem.empty.at[slot])
            pl.when(of_tokens)(lambda: plgpu.barrier_wait(smem.empty.at[slot + 1]))
            until = jnp.where(of_tokens, end_before, at + 1 - jnp.where(i < unhurried, 1, IN_FLIGHT))
            lax.fori_loop(landed, until, wait, None)
            lax.switch(which, copies, first + i * blocks, slot)
            return jnp.where(of_tokens, at + 2, jnp.maximum(landed, until))

        return lax.fori_loop(0, sum(share.count for share in these), step, landed)

    before, _ = parted(jnp.int32(0))  # it does not depend on how many tokens follow
    end_before = before[-1].number + before[-1].count
    landed = copy(before, end_before, jnp.int32(0))
    plgpu.griddepcontrol_wait()
    fence_proxy_async()
    plgpu.copy_gmem_to_smem(refs.h, smem.residual, smem.residual_full, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
    _, others = parted(tokens_held(refs))
    copy(others, others[1].number, landed)
