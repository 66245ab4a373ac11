"""What a warpgroup of `mosaic_layer` does that multiplies: the phases of the layer, one after the other.

What one product writes, the next reads in all blocks: before it, the blocks wait for each other, while tiles of what
follows are already on their way. Most vectors are handed on without a fence, in words that show whether they are there
(`collected`). Where blocks wait long, they meet first (`meet`): looking for words all the time, they slow others down.

Five of these seven waits lie before the output projection, where there is little to read: the ring is full, and memory
idle, until they are over. So what counts is how soon numbers are where they are needed. While blocks wait, registers
take tiles too, so that there is room in the ring (`ahead`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import gemv as products
from latent_attention.decode_layer.producer import (
    CONSUMERS,
    SLOTS,
    Share,
    readings,
    shares,
    slot_of,
    tiles_ahead,
    tokens_held,
    turns,
)
from latent_attention.decode_layer.smem_layout import VALUES, Board, parts_of_values
from latent_attention.decode_layer.split_kv import Attention
from latent_attention.hopper import cta_sync, grid_barrier, mailbox
from latent_attention.hopper import registers as regs
from latent_attention.hopper.smem_tiles import load_as


def _nothing() -> None: ...


class Consumer:
    """Of a block."""

    def __init__(self, shape: LayerShape, blocks: int, dtype, eps: float, scale: float, block, wg, refs, smem):
        self.shape, self.blocks, self.dtype, self.eps, self.block, self.wg = shape, blocks, dtype, eps, block, wg
        self.refs, self.smem, self.scratch = refs, smem, smem.scratch.at[wg]
        self.per_head = shape.C // regs.VECMAT_COLUMNS
        """Units of the absorption."""
        self.units = shape.H * self.per_head
        self.value_units = shape.H * shape.V // (CONSUMERS * VALUES)
        gains = refs.input_gain, refs.q_gain, refs.kv_gain
        self.input_gain, self.q_gain, self.kv_gain = (self.vector(ref, ref.shape[0]) for ref in gains)
        plgpu.griddepcontrol_wait()  # until then, the kernel before may write all but weights
        self.todo = dict(shares(readings(shape, blocks, refs, tokens_held(refs)), block, blocks))
        """What the block has of each reading, of the down-projections as one."""
        q_a, kv_a = self.todo.pop("q_a"), self.todo.pop("kv_a")
        self.todo["a"] = Share(q_a.reading, q_a.first, q_a.count + kv_a.count, q_a.number)
        self.board = Board.of(shape, refs.board)
        meetings = lax.div(grid_barrier.load_counter(self.board.counter), blocks)
        self.counted = meetings * blocks
        """What the counter was at when all blocks had met last."""
        self.tag = (meetings + 1) & 0xFFFF  # not that of the layer before, nor 0 before there is one
        self.attention = Attention(shape, blocks, dtype, scale, block, wg, refs, smem, self.meet_in_block)

    def run(self) -> None:
        """The layer: equations 9 to 19 of DeepSeek-V2, its norms and its feed-forward network."""
        D, Q, _, R = self.shape[:4]
        refs, board, smem, attention = self.refs, self.board, self.smem, self.attention
        x = self.normalised(self.vector(refs.h, D), self.input_gain)
        self.multiply("a", x, self.posted(board.a))
        unit = jnp.minimum(self.block, self.units - 1)
        k, v = self.keys(unit), self.value_rows(jnp.minimum(self.block, self.value_units - 1))
        cos, sin = (regs.load_f32(ref, regs.rope_angles_layout(R)) for ref in (refs.cos, refs.sin))
        x = self.collected(board.a.at[pl.ds(0, Q)], smem.vector)
        self.multiply("q_b", self.normalised(x, self.q_gain), self.posted(board.q))
        self.absorb(unit, k)
        self.turn(cos, sin)
        self.remember(cos, sin)
        self.meet(fence=False)
        attention.collect_queries(board.absorbed, self.tag, self.todo["tokens"])
        attention.attend_to_new(board.absorbed, board.new, self.tag)
        attention.attend(self.todo["tokens"])
        self.meet_in_block()
        ahead = self.meet(lambda: self.fetch_values(0), lambda: self.ahead("o"))
        self.values(v)
        x = self.collected(board.value, smem.vector)
        plgpu.barrier_wait(smem.residual_full)
        self.multiply("o", x, self.added(self.posted(board.middle)), ahead=ahead)
        x, (gain, ahead) = self.meet_for(
            board.middle, smem.residual, lambda: (self.vector(refs.post_gain, D), self.ahead("gate_up"))
        )
        self.multiply("gate_up", self.normalised(x, gain), self.gated(self.posted(board.inner)), 2, ahead)
        x, ahead = self.meet_for(board.inner, smem.vector, lambda: self.ahead("down"))
        self.multiply(
            "down", x, self.added(lambda rows, y: regs.scatter(refs.out, rows, y.astype(self.dtype))), ahead=ahead
        )

    def meet_in_block(self) -> None:
        """Both consumers are here, and see what either has written to shared memory."""
        cta_sync.named_barrier(CONSUMERS)

    def meet(
        self, then: Callable[[], None] = _nothing, meanwhile: Callable[[], Any] = _nothing, fence: bool = True
    ) -> Any:
        """Consumer 0 tells the other blocks, waits for them and does what comes `then`: it starts copies.

        What consumer 1 has written counts only after `meet_in_block`. Without a fence, others see by then only what was
        posted, and that when it is collected. Both consumers do `meanwhile`, and get its result, while word is on its
        way.
        """

        @pl.when(self.wg == 0)
        def _():
            cta_sync.warpgroup_barrier()
            grid_barrier.barrier_arrive(self.board.counter, release=fence)

        self.counted += self.blocks
        result = meanwhile()

        @pl.when(self.wg == 0)
        def _():
            grid_barrier.barrier_wait(self.board.counter, self.counted, acquire=fence)
            if then is not _nothing:
                cta_sync.fence_proxy_async()
                then()

        self.meet_in_block()
        return result

    def meet_for(self, words, place, meanwhile: Callable[[], Any] = _nothing) -> tuple[Any, Any]:
        """`collected`, after a meeting."""
        result = self.meet(meanwhile=meanwhile, fence=False)
        return self.collected(words, place), result

    def collected(self, words, place) -> Any:
        """The vector that all blocks have posted, by way of a place in shared memory, as `operand`."""
        place = place.at[pl.ds(0, words.shape[0])]
        mailbox.receive(words, place, self.tag, 128 * CONSUMERS)
        self.meet_in_block()
        return self.vector(place, words.shape[0])

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
            first = (skipped + m * CONSUMERS) * it.rows
            products.dots(x, w, self.smem.parts.at[pl.ds(first * it.parts, it.rows * it.parts)], it.parts)

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
            n = jnp.minimum(regs.element_indices() + i * 128, count * rows - 1)
            tile = lax.div(n, rows)
            row = n - tile * rows
            sums = [products.summed(parts, tile * it.rows + matrix * rows + row, it.parts) for matrix in range(of_each)]
            finish((first + tile * self.blocks) * rows + row, *sums)

        lax.fori_loop(0, lax.div(count * rows + 127, 128), some, None)

    def vector(self, ref, width: int):
        """[width], as `operand`."""
        return load_as(ref, products.operand(width))

    def normalised(self, x, gain):
        """RMSNorm."""
        x = x.astype(jnp.float32)
        factor = lax.rsqrt(regs.reduce_sum(x * x, products.operand(x.size), self.scratch) / x.size + self.eps)
        return (x * factor * gain).astype(self.dtype)

    def posted(self, words) -> Callable[..., None]:
        """What hands products to all blocks."""
        return lambda rows, y: mailbox.publish(words, rows, y.astype(self.dtype), self.tag)

    def added(self, write: Callable[..., None]) -> Callable[..., None]:
        """What writes products added to the residual."""
        return lambda rows, y: write(rows, y + regs.gather(self.smem.residual, rows))

    def gated(self, write: Callable[..., None]) -> Callable[..., None]:
        """What writes SwiGLU of the products of two matrices."""
        return lambda rows, gate, up: write(rows, gate / (1 + jnp.exp(-gate)) * up)

    def _own(self, count):
        """How many of so many things are this block's, dealt out in turn."""
        return lax.div(jnp.maximum(count - self.block + self.blocks - 1, 0), self.blocks)

    def keys(self, unit):
        """The part of the up-projection of keys that makes a unit of the absorption, of a head and some columns."""
        _, _, _, _, N, V, _, _ = self.shape
        row, column = lax.div(unit, self.per_head) * (N + V), lax.rem(unit, self.per_head) * regs.VECMAT_COLUMNS
        return load_as(self.refs.kv_b.at[pl.ds(row, N), pl.ds(column, regs.VECMAT_COLUMNS)], regs.VECMAT_TILE)

    def absorb(self, unit, k) -> None:
        """The up-projection of keys moves to the query; of the block's first unit, if it has one, `keys` are given."""
        block, blocks, (C, R, N) = self.block, self.blocks, self.shape[2:5]

        def one(unit, k):
            head, column = lax.div(unit, self.per_head), lax.rem(unit, self.per_head) * regs.VECMAT_COLUMNS
            words = self.board.q.at[pl.ds(head * (N + R), N)]
            q = regs.load_f32(self._own_part(words), regs.VECMAT_TILE.reduce((1,)))
            y = regs.vecmat(q, k.astype(jnp.float32), self.scratch)
            result = self.smem.latent.at[self.wg, pl.ds(0, regs.VECMAT_COLUMNS)]
            regs.store(result, y, regs.VECMAT_TILE.reduce((0,)))
            self._post_vector(self.board.absorbed, head * (C + R) + column, result)

        @pl.when((self.wg == 0) & (block < self.units))
        def _():
            one(unit, k)
            if self.units > blocks:
                more = self._own(self.units)
                lax.fori_loop(1, more, lambda i, _: one(block + i * blocks, self.keys(block + i * blocks)), None)

    def turn(self, cos, sin) -> None:
        """Posts the rotary parts of the queries, turned by angles of these cosines and sines."""
        (C, R, N), H, pairs = self.shape[2:5], self.shape.H, regs.rope_pairs_layout(self.shape.R)

        @pl.when((self.wg == 1) & (self.block < H))
        def _():
            words = self.board.q.at[pl.ds(self.block * (N + R) + N, R)]
            result = self.smem.latent.at[self.wg, pl.ds(0, R)]
            regs.store(result, regs.apply_rope(regs.load_f32(self._own_part(words), pairs), cos, sin), pairs)
            self._post_vector(self.board.absorbed, self.block * (C + R) + C, result)

    def remember(self, cos, sin) -> None:
        """The last block posts the new token's latent and rotary key, and writes them to the cache."""
        Q, C, R = self.shape[1:4]
        refs, at, pairs = self.refs, self.refs.length[0], regs.rope_pairs_layout(R)
        before, after = (self.smem.of_new.at[self.wg, i, pl.ds(0, C + R)] for i in range(2))
        latent, rotary = pl.ds(0, C), pl.ds(C, R)

        @pl.when((self.wg == 1) & (self.block == self.blocks - 1))
        def _():
            mailbox.receive(self.board.a.at[pl.ds(Q, C + R)], before, self.tag, 128)
            cta_sync.warpgroup_barrier()
            c = self.normalised(self.vector(before.at[latent], C), self.kv_gain)
            k_rope = regs.apply_rope(regs.load_f32(before.at[rotary], pairs), cos, sin).astype(self.dtype)

            def write(to_latent, to_rotary):
                regs.store(to_latent, c, products.operand(C))
                regs.store(to_rotary, k_rope, pairs)

            write(after.at[latent], after.at[rotary])
            self._post_vector(self.board.new, 0, after)
            pl.when(at < refs.c.shape[1])(lambda: write(refs.c.at[0, at], refs.rope.at[0, at]))

    def _post_vector(self, words, first, ref) -> None:
        """Hands to all blocks, as words from `first` on, a vector that this consumer has just written."""
        cta_sync.warpgroup_barrier()
        (width,) = ref.shape
        for start in range(0, width, 128):
            n = jnp.minimum(regs.element_indices() + start, width - 1)
            self.posted(words)(n + first, regs.gather(ref, n))
        cta_sync.warpgroup_barrier()

    def _own_part(self, words) -> Any:
        """Of one consumer: where in shared memory a part of a vector is then that blocks have posted."""
        most, (width,) = self.shape.N + self.shape.R, words.shape
        place = self.smem.vector.at[pl.ds(self.wg * most, width)]
        cta_sync.warpgroup_barrier()  # what is there has been read
        mailbox.receive(words, place, self.tag, 128)
        cta_sync.warpgroup_barrier()
        return place

    def value_rows(self, unit) -> Any:
        """This consumer's rows of a unit of the up-projection of values, some rows of a head's."""
        N, V, C = self.shape.N, self.shape.V, self.shape.C
        row = unit * CONSUMERS * VALUES
        row += (lax.div(row, V) + 1) * N + self.wg * VALUES  # rows of values lie behind those of keys in each head
        return load_as(self.refs.kv_b.at[pl.ds(row, VALUES)], products.layout_of_rows(C))

    def fetch_values(self, i) -> None:
        """Starts to fetch what the block's i-th unit of values is made of, if there is one."""
        unit = self.block + i * self.blocks
        head = lax.div(unit * CONSUMERS * VALUES, self.shape.V)
        pl.when(unit < self.value_units)(lambda: self.attention.fetch(head))

    def values(self, v) -> None:
        """The up-projection of values, of the attention over latents; of the first unit, `value_rows` are given."""
        parts, rows = self.smem.parts, CONSUMERS * VALUES
        per_row = parts_of_values(self.shape)

        def one(i, v):
            unit = self.block + i * self.blocks
            latent = self.attention.latent_of(lax.div(unit * rows, self.shape.V))
            if self.value_units > self.blocks:
                pl.when(self.wg == 0)(lambda: self.fetch_values(i + 1))
            products.dots(latent, v, parts.at[pl.ds(self.wg * VALUES * per_row, VALUES * per_row)], per_row)
            self.meet_in_block()

            @pl.when(self.wg == 0)
            def _():
                n = jnp.minimum(regs.element_indices(), rows - 1)
                self.posted(self.board.value)(unit * rows + n, products.summed(parts, n, per_row))

        @pl.when(self.block < self.value_units)
        def _():
            one(0, v)
            if self.value_units > self.blocks:
                more = self._own(self.value_units)
                lax.fori_loop(1, more, lambda i, _: one(i, self.value_rows(self.block + i * self.blocks)), None)
