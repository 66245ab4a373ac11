"""What a warpgroup of `mosaic_layer` does that multiplies: the phases of the layer, one after the other.

What one product writes, the next reads in all blocks: before it, the blocks wait for each other at a counter in memory
(`meet`), while tiles of what follows are already on their way.

Five of these seven meetings lie before the output projection, where there is little to read: the ring is full, and
memory idle, until they are over. So what counts is how soon numbers are where they are needed: long vectors come by
copies, which start as soon as all blocks have met, and nothing else may crowd memory then. While blocks wait, registers
take tiles too, so that there is room in the ring (`ahead`). And code is kept short: it runs once a launch, and what the
instruction cache does not hold has to be read like anything else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention import mosaic_products as products
from latent_attention import mosaic_vector as mv
from latent_attention.mosaic_layer_attention import Attention
from latent_attention.mosaic_layer_memory import VALUES
from latent_attention.mosaic_layer_ring import CONSUMERS, SLOTS, Share, slot_of, tiles_ahead, turns
from latent_attention.mosaic_tiles import read
from latent_attention.shapes import LayerShape


def _nothing() -> None: ...


class Consumer:
    """Of a block; `todo` is what the block has of each reading, that of the down-projections as one named "a"."""

    def __init__(self, shape: LayerShape, blocks: int, dtype, eps: float, scale: float, block, wg, todo, refs, smem):
        self.shape, self.blocks, self.dtype, self.eps, self.block, self.wg = shape, blocks, dtype, eps, block, wg
        self.todo, self.refs, self.smem, self.scratch = todo, refs, smem, smem.scratch.at[wg]
        self.per_head = shape.C // mv.COLUMNS
        """Units of the absorption."""
        self.units = shape.H * self.per_head
        self.value_units = shape.H * shape.V // (CONSUMERS * VALUES)
        self.counted = lax.div(mv.counted(refs.counter), blocks) * blocks
        """What the counter was at when all blocks had met last."""
        self.attention = Attention(shape, blocks, dtype, scale, block, wg, refs, smem, self.meet_in_block)

    def run(self) -> None:
        """The layer: equations 9 to 19 of DeepSeek-V2, its norms and its feed-forward network."""
        D, Q, C, R = self.shape[:4]
        refs, smem, attention = self.refs, self.smem, self.attention
        self.multiply("a", self.normalised(self.vector(refs.h, D), self.vector(refs.input_gain, D)), self.to(refs.a))
        unit = jnp.minimum(self.block, self.units - 1)

        def meanwhile():
            v = self.value_rows(jnp.minimum(self.block, self.value_units - 1))
            cos, sin = (mv.load(ref, mv.angles(R)) for ref in (refs.cos, refs.sin))
            return self.vector(refs.q_gain, Q), self.keys(unit), v, cos, sin, self.vector(refs.kv_gain, C)

        x, (gain, k, v, cos, sin, latent_gain) = self.meet_for(refs.a.at[pl.ds(0, Q)], meanwhile)
        self.multiply("q_b", self.normalised(x, gain), self.to(refs.q))
        self.meet()
        self.absorb(unit, k)
        self.remember(cos, sin, latent_gain)
        self.meet_in_block()
        self.meet(lambda: attention.fetch_queries(self.todo["tokens"]))
        attention.attend_to_new()
        attention.attend(self.todo["tokens"])
        self.meet_in_block()
        ahead = self.meet(lambda: self.fetch_values(0), lambda: self.ahead("o"))
        self.values(v)
        x, _ = self.meet_for(refs.value)
        plgpu.barrier_wait(smem.residual_full)
        self.multiply("o", x, self.added_to(refs.middle), ahead=ahead)
        gain, ahead = self.meet(
            lambda: self._copy(refs.middle, smem.residual, smem.residual_full),
            lambda: (self.vector(refs.post_gain, D), self.ahead("gate_up")),
        )
        plgpu.barrier_wait(smem.residual_full)
        x = self.normalised(self.vector(smem.residual, D), gain)
        self.multiply("gate_up", x, self.gated, of_each=2, ahead=ahead)
        x, ahead = self.meet_for(refs.inner, lambda: self.ahead("down"))
        self.multiply("down", x, self.added_to(refs.out), ahead=ahead)

    def meet_in_block(self) -> None:
        """Both consumers are here, and see what either has written to shared memory."""
        mv.meet_warpgroups(CONSUMERS)

    def meet(self, then: Callable[[], None] = _nothing, meanwhile: Callable[[], Any] = _nothing) -> Any:
        """Consumer 0 tells the other blocks, waits for them and does what comes `then`: it starts copies.

        What consumer 1 has written, and what it still reads, counts only after `meet_in_block`. Both consumers do
        `meanwhile`, and get its result, while word is on its way.
        """

        @pl.when(self.wg == 0)
        def _():
            mv.meet_warpgroup()
            mv.count_up(self.refs.counter)

        self.counted += self.blocks
        result = meanwhile()

        @pl.when(self.wg == 0)
        def _():
            mv.wait_until(self.refs.counter, self.counted)
            if then is not _nothing:
                mv.written_is_seen_by_copies()
                then()

        self.meet_in_block()
        return result

    def _copy(self, ref, place, full) -> None:
        plgpu.copy_gmem_to_smem(ref, place, full, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def meet_for(self, ref, meanwhile: Callable[[], Any] = _nothing) -> tuple[Any, Any]:
        """The vector that all blocks have written, as `operand`; a copy is there sooner than what threads load."""
        (width,) = ref.shape
        place = self.smem.vector.at[pl.ds(0, width)]
        result = self.meet(lambda: self._copy(ref, place, self.smem.vector_full), meanwhile)
        plgpu.barrier_wait(self.smem.vector_full)
        return read(place, products.operand(width)), result

    def _take(self, share: Share, i) -> Any:
        """The block's i-th tile of a matrix, in registers; its slot is empty then."""
        it, slot = share.reading, slot_of(share.number + i)
        plgpu.barrier_wait(self.smem.full.at[slot])
        w = products.load_rows(self.smem.ring.at[slot, pl.ds(0, it.rows * it.width)], it.rows, it.width)
        plgpu.barrier_arrive(self.smem.empty.at[slot])
        return w

    def ahead(self, name: str) -> list:
        """The first tiles of this consumer of a matrix, for `multiply`: until then, the ring has room for others."""
        share = self.todo[name]
        skipped, _ = turns(self.wg, share)
        return [self._take(share, skipped + m * CONSUMERS) for m in range(tiles_ahead(share.reading, self.blocks))]

    def multiply(self, name: str, x, finish: Callable[..., None], of_each: int = 1, ahead: Sequence[Any] = ()) -> None:
        """Multiplies all rows that the block has of a matrix; consumer 0 calls finish(rows [128], their products).

        x is a vector, `ahead` the tiles that this consumer has taken already: their turn comes when those in the ring
        have been taken, so that it is filled again meanwhile. Where tiles have rows of two matrices, `of_each` is 2,
        and `finish` gets the products of both.
        """
        share = self.todo[name]
        it = share.reading
        skipped, steps = turns(self.wg, share)

        def tile(m, w):
            products.dots(x, w, self.smem.parts.at[pl.ds((skipped + m * CONSUMERS) * it.rows, it.rows)])

        def step(m, _):
            tile(m, self._take(share, skipped + m * CONSUMERS))

            @pl.when(m == jnp.minimum(len(ahead) + SLOTS // CONSUMERS, steps) - 1)
            def _():
                for n, w in enumerate(ahead):
                    tile(n, w)

        lax.fori_loop(len(ahead), steps, step, None)
        self.meet_in_block()
        pl.when(self.wg == 0)(lambda: self._add_parts(share, finish, of_each))

    def _add_parts(self, share: Share, finish: Callable[..., None], of_each: int) -> None:
        it, first, count, _ = share
        rows, parts = it.rows // of_each, self.smem.parts

        def some(i, _):
            """128 rows; beyond the last one, that again."""
            n = jnp.minimum(mv.numbers() + i * 128, count * rows - 1)
            tile = lax.div(n, rows)
            row = n - tile * rows
            sums = [products.summed(parts, tile * it.rows + matrix * rows + row) for matrix in range(of_each)]
            finish((first + tile * self.blocks) * rows + row, *sums)

        lax.fori_loop(0, lax.div(count * rows + 127, 128), some, None)

    def vector(self, ref, width: int):
        """[width], as `operand`."""
        return read(ref, products.operand(width))

    def normalised(self, x, gain):
        """RMSNorm."""
        x = x.astype(jnp.float32)
        factor = lax.rsqrt(mv.total(x * x, products.operand(x.size), self.scratch) / x.size + self.eps)
        return (x * factor * gain).astype(self.dtype)

    def to(self, ref) -> Callable[..., None]:
        """What writes products to memory."""
        return lambda rows, y: mv.scatter(ref, rows, y.astype(self.dtype))

    def added_to(self, ref) -> Callable[..., None]:
        """The same, added to the residual."""
        return lambda rows, y: self.to(ref)(rows, y + mv.gathered(self.smem.residual, rows))

    def gated(self, rows, gate, up) -> None:
        """SwiGLU."""
        self.to(self.refs.inner)(rows, gate / (1 + jnp.exp(-gate)) * up)

    def _own(self, count):
        """How many of so many things are this block's, dealt out in turn."""
        return lax.div(jnp.maximum(count - self.block + self.blocks - 1, 0), self.blocks)

    def keys(self, unit):
        """The part of the up-projection of keys that makes a unit of the absorption, of a head and some columns."""
        _, _, _, _, N, V, _, _ = self.shape
        row, column = lax.div(unit, self.per_head) * (N + V), lax.rem(unit, self.per_head) * mv.COLUMNS
        return read(self.refs.kv_b.at[pl.ds(row, N), pl.ds(column, mv.COLUMNS)], mv.TILE)

    def absorb(self, unit, k) -> None:
        """The up-projection of keys moves to the query; of the block's first unit, if it has one, `keys` are given."""
        refs, block, blocks, width = self.refs, self.block, self.blocks, self.shape.N + self.shape.R

        def one(unit, k):
            head, column = lax.div(unit, self.per_head), lax.rem(unit, self.per_head) * mv.COLUMNS
            q = mv.load(refs.q.at[pl.ds(head * width, self.shape.N)], mv.TILE.reduce((1,)))
            y = mv.over_rows(k.astype(jnp.float32), q, self.scratch)
            mv.store(refs.absorbed.at[head, pl.ds(column, mv.COLUMNS)], y.astype(self.dtype), mv.TILE.reduce((0,)))

        @pl.when((self.wg == 0) & (block < self.units))
        def _():
            one(unit, k)
            if self.units > blocks:
                more = self._own(self.units)
                lax.fori_loop(1, more, lambda i, _: one(block + i * blocks, self.keys(block + i * blocks)), None)

    def remember(self, cos, sin, gain) -> None:
        """Rotary parts of the queries, and the new token's latent and rotary key, also to the cache.

        Args:
            cos: of the position. `sin` likewise.
            sin: see `cos`.
            gain: of the norm of latents.
        """
        (Q, C, R, N), H = self.shape[1:5], self.shape.H
        refs, block, blocks = self.refs, self.block, self.blocks

        def turn(ref, to_ref):
            mv.store(to_ref, mv.turned(mv.load(ref, mv.pairs(R)), cos, sin).astype(self.dtype), mv.pairs(R))

        @pl.when(self.wg == 1)
        def _():
            @pl.when(block < H)
            def _():
                turn(refs.q.at[pl.ds(block * (N + R) + N, R)], refs.absorbed.at[block, pl.ds(C, R)])

            @pl.when(block == blocks - 1)
            def _():
                c = self.normalised(self.vector(refs.a.at[pl.ds(Q, C)], C), gain)
                k_rope, at = refs.a.at[pl.ds(Q + C, R)], refs.length[0]
                mv.store(refs.new.at[pl.ds(0, C)], c, products.operand(C))
                turn(k_rope, refs.new.at[pl.ds(C, R)])

                @pl.when(at < refs.c.shape[1])
                def _():
                    mv.store(refs.c.at[0, at], c, products.operand(C))
                    turn(k_rope, refs.rope.at[0, at])

    def value_rows(self, unit) -> Any:
        """This consumer's rows of a unit of the up-projection of values, some rows of a head's."""
        N, V, C = self.shape.N, self.shape.V, self.shape.C
        row = unit * CONSUMERS * VALUES
        row += (lax.div(row, V) + 1) * N + self.wg * VALUES  # rows of values lie behind those of keys in each head
        return read(self.refs.kv_b.at[pl.ds(row, VALUES)], products.layout_of_rows(C))

    def fetch_values(self, i) -> None:
        """Starts to fetch what the block's i-th unit of values is made of, if there is one."""
        unit = self.block + i * self.blocks
        head = lax.div(unit * CONSUMERS * VALUES, self.shape.V)
        pl.when(unit < self.value_units)(lambda: self.attention.fetch(head))

    def values(self, v) -> None:
        """The up-projection of values, of the attention over latents; of the first unit, `value_rows` are given."""
        parts, rows = self.smem.parts, CONSUMERS * VALUES

        def one(i, v):
            unit = self.block + i * self.blocks
            latent = self.attention.latent_of(lax.div(unit * rows, self.shape.V))
            if self.value_units > self.blocks:
                pl.when(self.wg == 0)(lambda: self.fetch_values(i + 1))
            products.dots(latent, v, parts.at[pl.ds(self.wg * VALUES, VALUES)])
            self.meet_in_block()

            @pl.when(self.wg == 0)
            def _():
                n = jnp.minimum(mv.numbers(), rows - 1)
                self.to(self.refs.value)(unit * rows + n, products.summed(parts, n))

        @pl.when(self.block < self.value_units)
        def _():
            one(0, v)
            if self.value_units > self.blocks:
                more = self._own(self.value_units)
                lax.fori_loop(1, more, lambda i, _: one(i, self.value_rows(self.block + i * self.blocks)), None)
