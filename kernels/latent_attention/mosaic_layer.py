"""A layer of MLA for one token on Hopper: one Pallas Mosaic GPU kernel that reads ahead while its products wait.

Every product is a matrix [out, in] times one vector, so that only reading the matrix counts. A block a multiprocessor
stays for the whole layer. In it a warpgroup, the producer, copies what the block has to read into a ring in shared
memory and stops only when the ring is full (`mosaic_layer_ring`); two others, the consumers, take turns at the tiles.
What one product writes, the next reads in all blocks: before it, the blocks wait for each other at a counter in memory
(`meet`), while tiles of what follows are already on their way.

Five of these seven meetings lie before the output projection, where there is little to read: the ring is full, and
memory idle, until they are over. So what counts is how soon numbers are where they are needed: long vectors come by
copies, which start as soon as all blocks have met, and nothing else may crowd memory then.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention import mosaic_products as products
from latent_attention import mosaic_vector as mv
from latent_attention.mosaic_layer_attention import Attention
from latent_attention.mosaic_layer_memory import Refs, Shared, out_types, shared, shared_bytes
from latent_attention.mosaic_layer_ring import (
    CONSUMERS,
    SLOTS,
    TOKENS,
    Share,
    owner,
    produce,
    readings,
    rows_of_tiles,
    shares,
    slot_of,
    turns,
)
from latent_attention.mosaic_tiles import read
from latent_attention.shapes import Gpu, LayerShape, local_gpu

_REGISTERS = 24, 240
"""Of a thread of the producer and of the consumers."""


def why_not(shape: LayerShape, dtype: str, cache_dtype: str, capacity: int, gpu: Gpu | None) -> str | None:
    """Why the kernel cannot run a layer of this shape, with 16-bit weights, on this GPU, or None if it can."""
    D, Q, C, R, N, V, H, F = shape
    if gpu is None or gpu.capability[0] != 9:
        return f"it is for Hopper GPUs (sm_90); this is {'no GPU' if gpu is None else gpu.name}"
    if dtype not in ("bfloat16", "float16") or cache_dtype != dtype:
        return f"it takes 16-bit numbers and a cache of the same type, not {dtype} and {cache_dtype}"
    if (C, R) != (256, 64) or H > 32 or H % 8 or N % 8:
        return f"it takes C of 256, R of 64 and up to 32 heads, H and N in eights, not {C}, {R}, {H} and {N}"
    wide = [width for width in (D, H * V, F) if width % 256 or products.is_narrow(width)]
    if wide or Q % 256 or not all(rows_of_tiles(shape, gpu.cores)):
        return f"its tiles do not fit these widths: {shape}"
    if H > gpu.cores or capacity % TOKENS:
        return f"it takes a cache of a multiple of {TOKENS} tokens and a multiprocessor a head"
    if shared_bytes(shape, gpu.cores) > gpu.shared_memory:
        return "its shared memory does not suffice for these widths"
    return None


def _consume(shape: LayerShape, blocks: int, dtype, eps: float, scale: float, block, wg, todo, refs, smem) -> None:
    D, Q, C, R, N, V, H, _ = shape
    mine = smem.scratch.at[wg]

    def meet_in_block() -> None:
        plgpu.barrier_arrive(smem.met)
        plgpu.barrier_wait(smem.met)

    def meet(then: Callable[[], None] | None = None) -> None:
        """Consumer 0 tells the other blocks, waits for them and does what comes `then`: it starts copies.

        What consumer 1 has written, and what it still reads, counts only after `meet_in_block`.
        """

        @pl.when(wg == 0)
        def _():
            mv.meet_warpgroup()
            mv.meet_all(refs.counter, blocks)
            if then is not None:
                mv.written_is_seen_by_copies()
                then()

        meet_in_block()

    def copy(ref, place, full) -> None:
        plgpu.copy_gmem_to_smem(ref, place, full, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def meet_for(ref):
        """The vector that all blocks have written; a copy is there sooner than what threads load."""
        (width,) = ref.shape
        place = smem.vector.at[pl.ds(0, width)]
        meet(lambda: copy(ref, place, smem.vector_full))
        plgpu.barrier_wait(smem.vector_full)
        return read(place, products.operand(width))

    def multiply(name: str, x, finish: Callable[..., None], of_each: int = 1) -> None:
        """Multiplies all rows that the block has of a matrix; consumer 0 calls finish(rows [128], their products).

        x is a vector or x(i), that of the block's i-th tile, which both consumers make. Where tiles have rows of two
        matrices, `of_each` is 2, and `finish` gets the products of both.
        """
        it, _, count, number = todo[name]

        def tile(i, x):
            slot = slot_of(number + i)
            plgpu.barrier_wait(smem.full.at[slot])
            rows, parts = smem.ring.at[slot, pl.ds(0, it.rows * it.width)], smem.parts.at[pl.ds(i * it.rows, it.rows)]
            products.dots(x, rows, it.rows, parts)
            plgpu.barrier_arrive(smem.empty.at[slot])

        def together(i, _):
            of_tile = x(i)
            pl.when(owner(number + i) == wg)(lambda: tile(i, of_tile))

        if callable(x):
            lax.fori_loop(0, count, together, None)
        else:
            skipped, steps = turns(wg, todo[name])
            lax.fori_loop(0, steps, lambda m, _: tile(skipped + m * CONSUMERS, x), None)
        meet_in_block()
        pl.when(wg == 0)(lambda: add_parts(todo[name], finish, of_each))

    def add_parts(share: Share, finish: Callable[..., None], of_each: int) -> None:
        it, first, count, _ = share
        rows = it.rows // of_each

        def some(i, _):
            """128 rows; beyond the last one, that again."""
            n = jnp.minimum(mv.numbers() + i * 128, count * rows - 1)
            tile = lax.div(n, rows)
            row = n - tile * rows
            sums = [products.summed(smem.parts, tile * it.rows + matrix * rows + row) for matrix in range(of_each)]
            finish((first + tile * blocks) * rows + row, *sums)

        lax.fori_loop(0, lax.div(count * rows + 127, 128), some, None)

    def vector(ref, width: int):
        return read(ref, products.operand(width))

    def normalised(x, gain):
        x = x.astype(jnp.float32)
        factor = lax.rsqrt(mv.total(x * x, products.operand(x.size), mine) / x.size + eps)
        return (x * factor * gain).astype(dtype)

    def to(ref) -> Callable[..., None]:
        return lambda rows, y: mv.scatter(ref, rows, y.astype(dtype))

    def added_to(ref) -> Callable[..., None]:
        return lambda rows, y: to(ref)(rows, y + mv.gathered(smem.residual, rows))

    def down_projections() -> None:
        """RMSNorm(h) to the latents. The tiles of the two matrices are one list, and what they give lies together."""
        multiply("a", normalised(vector(refs.h, D), vector(refs.input_gain, D)), to(refs.a))

    def keys(unit):
        """Rows of the up-projection of keys that a head's query is multiplied with, for some columns of the result."""
        row, column = lax.div(unit, per_head) * (N + V), lax.rem(unit, per_head) * mv.COLUMNS
        return read(refs.kv_b_rows.at[pl.ds(row, N), pl.ds(column, mv.COLUMNS)], mv.TILE)

    def absorb_and_remember(k, cos, sin, gain) -> None:
        """The up-projection of keys moves to the query; the new token's latent and rotary key.

        Args:
            k: the first `keys` of this block.
            cos: of the position. `sin` likewise.
            sin: see `cos`.
            gain: of the norm of latents.
        """

        def absorb(unit, k):
            head, column = lax.div(unit, per_head), lax.rem(unit, per_head) * mv.COLUMNS
            q = mv.load(refs.q.at[pl.ds(head * (N + R), N)], mv.TILE.reduce((1,)))
            y = mv.over_rows(k.astype(jnp.float32), q, mine)
            mv.store(refs.absorbed.at[head, pl.ds(column, mv.COLUMNS)], y.astype(dtype), mv.TILE.reduce((0,)))

        def own(count):
            return lax.div(jnp.maximum(count - block + blocks - 1, 0), blocks)

        def turn(ref, to_ref):
            mv.store(to_ref, mv.turned(mv.load(ref, mv.pairs(R)), cos, sin).astype(dtype), mv.pairs(R))

        @pl.when((wg == 0) & (block < units))
        def _():
            absorb(unit, k)
            lax.fori_loop(1, own(units), lambda i, _: absorb(block + i * blocks, keys(block + i * blocks)), None)

        @pl.when(wg == 1)
        def _():
            def rotary(i, _):
                head = block + i * blocks
                turn(refs.q.at[pl.ds(head * (N + R) + N, R)], refs.absorbed.at[head, pl.ds(C, R)])

            lax.fori_loop(0, own(H), rotary, None)

            @pl.when(block == blocks - 1)
            def _():
                c = normalised(vector(refs.a.at[pl.ds(Q, C)], C), gain)
                k_rope, at = refs.a.at[pl.ds(Q + C, R)], refs.length[0]
                mv.store(refs.new.at[pl.ds(0, C)], c, products.operand(C))
                turn(k_rope, refs.new.at[pl.ds(C, R)])

                @pl.when(at < refs.c.shape[1])
                def _():
                    mv.store(refs.c.at[0, at], c, products.operand(C))
                    turn(k_rope, refs.rope.at[0, at])

    def gated(rows, gate, up):
        to(refs.inner)(rows, gate / (1 + jnp.exp(-gate)) * up)

    def values() -> None:
        it, first, count, _ = todo["v_b"]

        def fetch(i) -> None:
            pl.when(i < count)(lambda: attention.fetch(head(i)))

        def head(i):
            return lax.div((first + i * blocks) * it.rows, V)

        def latent(i):
            result = attention.latent_of(head(i))
            pl.when(wg == 0)(lambda: fetch(i + 1))
            return result

        meet(lambda: fetch(0))
        multiply("v_b", latent, to(refs.value))

    attention = Attention(shape, blocks, dtype, scale, block, wg, refs, smem, meet_in_block)
    per_head = C // mv.COLUMNS
    units = H * per_head
    down_projections()
    unit = jnp.minimum(block, units - 1)
    k = keys(unit)  # these four are on their way meanwhile
    cos, sin = (mv.load(ref, mv.angles(R)) for ref in (refs.cos, refs.sin))
    latent_gain = vector(refs.kv_gain, C)
    gain = vector(refs.q_gain, Q)
    multiply("q_b", normalised(meet_for(refs.a.at[pl.ds(0, Q)]), gain), to(refs.q))
    meet()
    absorb_and_remember(k, cos, sin, latent_gain)
    meet_in_block()
    meet(lambda: attention.fetch_queries(todo["tokens"]))
    attention.attend_to_new()
    attention.attend(todo["tokens"])
    meet_in_block()
    values()
    x = meet_for(refs.value)
    plgpu.barrier_wait(smem.residual_full)
    multiply("o", x, added_to(refs.middle))
    gain = vector(refs.post_gain, D)
    meet(lambda: copy(refs.middle, smem.residual, smem.residual_full))
    plgpu.barrier_wait(smem.residual_full)
    multiply("gate_up", normalised(vector(smem.residual, D), gain), gated, of_each=2)
    multiply("down", meet_for(refs.inner), added_to(refs.out))


def layer(
    shape: LayerShape, weights: Mapping[str, Any], h_D: jax.Array, cos: jax.Array, sin: jax.Array, length: jax.Array,
    cache: tuple[jax.Array, jax.Array], counter: jax.Array, *, eps: float, scale: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:  # fmt: skip
    """The hidden state of one token after a layer, and the token in the cache; equations 9 to 19 of DeepSeek-V2.

    Args:
        shape: widths.
        weights: see `triton_layer_jax.before_attention`; in 16 bits.
        h_D: the hidden state before, 16 bits.
        cos: float32 [R/2], of the position. `sin` likewise.
        sin: see `cos`.
        length: int32 [1], how many tokens the cache holds; where it is full, nothing is written and it is attended to
            without the new token.
        cache: c [1, S, C] and k_rope [1, S, R]; updated in place where it is donated, else XLA copies it before.
        counter: see `triton_layer_jax.init_counter`.
        eps: of the norms.
        scale: of the scores.

    Returns:
        The output [D], the cache and the counter.

    Raises:
        RuntimeError: there is no NVIDIA GPU.
    """
    gpu = local_gpu()
    if gpu is None:
        raise RuntimeError("Mosaic needs an NVIDIA GPU")
    blocks, dtype = gpu.cores, h_D.dtype
    attn, mlp = weights["self_attn"], weights["mlp"]
    matrices = {name: w.rows for part in (attn, mlp) for name, w in part.items() if "norm" not in name}
    flat = {name: w.reshape(-1) for name, w in matrices.items()}

    def kernel(*args):
        refs = Refs(*args)

        def run(ring, weights, exchange, **rest):
            whole, c_tiles, rope_tiles = ring
            (in_use, scratch), (inbox, partials, vector) = weights, exchange
            smem = Shared(
                whole, c_tiles, rope_tiles, weights=in_use, scratch=scratch, inbox=inbox, partials=partials,
                vector=vector, **rest,
            )  # fmt: skip
            block, wg = lax.axis_index("block"), lax.axis_index("wg")
            held = jnp.minimum(refs.length[0], refs.c.shape[1])
            reading = readings(shape, blocks, refs, held)

            @pl.when(wg == CONSUMERS)
            def _():
                plgpu.set_max_registers(_REGISTERS[0], action="decrease")
                produce(shape, blocks, block, reading, refs, smem)

            @pl.when(wg < CONSUMERS)
            def _():
                plgpu.set_max_registers(_REGISTERS[1], action="increase")

                @pl.when(wg == 0)
                def _():  # each slot starts empty
                    for slot in range(SLOTS):
                        plgpu.barrier_arrive(smem.empty.at[slot])

                todo = dict(shares(reading, block, blocks))
                q_a, kv_a = todo.pop("q_a"), todo.pop("kv_a")
                todo["a"] = Share(q_a.reading, q_a.first, q_a.count + kv_a.count, q_a.number)
                _consume(shape, blocks, dtype, eps, scale, block, wg, todo, refs, smem)

        pl.run_scoped(run, **shared(shape, blocks, dtype), collective_axes="wg")

    in_place = [jax.new_ref(x) for x in (*cache, counter)]
    launch: Any = pl.kernel(
        kernel,
        out_type=out_types(shape, blocks, dtype),
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",), num_threads=CONSUMERS + 1, thread_name="wg"),
        name="mla_layer",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    out = launch(
        h_D, weights["input_layernorm"], flat["q_a_proj"], flat["kv_a_proj_with_mqa"], attn["q_a_layernorm"],
        flat["q_b_proj"], attn["kv_a_layernorm"], flat["kv_b_proj"], matrices["kv_b_proj"], cos, sin, length,
        flat["o_proj"], weights["post_attention_layernorm"], flat["gate_proj"], flat["up_proj"], flat["down_proj"],
        *in_place,
    )  # fmt: skip
    c, k_rope, counter = (jax.freeze(ref) for ref in in_place)
    return out[0], (c, k_rope), counter
