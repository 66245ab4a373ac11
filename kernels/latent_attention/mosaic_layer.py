"""A layer of MLA for one token on Hopper: one Pallas Mosaic GPU kernel that reads ahead while its products wait.

Every product is a matrix [out, in] times one vector, so that only reading the matrix counts. A block a multiprocessor
stays for the whole layer. In it a warpgroup, the producer, copies what the block has to read into a ring in shared
memory and stops only when the ring is full (`mosaic_layer_ring`); two others, the consumers, take turns at the tiles.
What one product writes, the next reads in all blocks: before it, the consumers of all blocks wait for each other at a
counter in memory (`meet`), while tiles of what follows are already on their way.

Most of the code runs once a layer, and it seems to take longer to fetch than to run: short loops were faster here than
what is written out.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention import mosaic_vector as mv
from latent_attention.mosaic_layer_attention import Attention
from latent_attention.mosaic_layer_memory import Refs, Shared, out_types, shared, shared_bytes
from latent_attention.mosaic_layer_ring import (
    CONSUMERS,
    NARROW_ROWS,
    TOKENS,
    Share,
    produce,
    readings,
    rows_of_tiles,
    shares,
    slot_of,
    turns,
)
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
    wide = [width for width in (D, H * V, F) if width % 256 or mv.is_narrow(width)]
    if wide or Q % 256 or not all(rows_of_tiles(shape, gpu.cores)):
        return f"its tiles do not fit these widths: {shape}"
    if H > gpu.cores or capacity % TOKENS:
        return f"it takes a cache of a multiple of {TOKENS} tokens and a multiprocessor a head"
    if shared_bytes(shape, gpu.cores) > gpu.shared_memory:
        return "its shared memory does not suffice for these widths"
    return None


def _consume(shape: LayerShape, blocks: int, dtype, eps: float, scale: float, block, wg, todo, refs, smem) -> None:
    D, Q, C, R, N, V, H, F = shape
    mine = smem.scratch.at[wg]

    def meet_in_block() -> None:
        plgpu.barrier_arrive(smem.met)
        plgpu.barrier_wait(smem.met)

    def meet() -> None:
        """What any block has written, all can read."""
        meet_in_block()

        @pl.when(wg == 0)
        def _():
            mv.meet_all(refs.counter, blocks)

        meet_in_block()

    def multiply(name: str, x, finish: Callable[[Any, Any], None]) -> None:
        """finish(first row, rows times x) for all of this consumer's; x may be x(tile)."""
        it, first, _, number = todo[name]
        skipped, steps = turns(wg, todo[name])
        narrow = mv.is_narrow(it.width)
        rows = NARROW_ROWS if narrow else it.rows

        def step(m, _):
            i = skipped + m * CONSUMERS
            slot, tile = slot_of(number + i), first + i * blocks
            xs = x(tile) if callable(x) else x
            plgpu.barrier_wait(smem.full.at[slot])

            def some(j):
                used = smem.ring.at[slot, pl.ds(j * rows * it.width, rows * it.width)]
                return mv.products(xs, used, rows, mine)

            if narrow:
                lax.fori_loop(0, it.rows // rows, lambda j, _: finish(tile * it.rows + j * rows, some(j)), None)
                plgpu.barrier_arrive(smem.empty.at[slot])
            else:
                y = some(0)
                plgpu.barrier_arrive(smem.empty.at[slot])
                finish(tile * it.rows, y)

        lax.fori_loop(0, steps, step, None)

    def vector(ref, width: int):
        return mv.load(ref, mv.operand(width))

    def normalised(x, gain):
        factor = lax.rsqrt(mv.total(x * x, mv.operand(x.size), mine) / x.size + eps)
        return (x * factor * gain).astype(dtype).astype(jnp.float32)

    def to(ref, width: int):
        return lambda row, y: mv.store(ref.at[pl.ds(row, y.size)], y.astype(dtype), mv.sums(width))

    def added_to(ref, width: int):
        def finish(row, y):
            residual = mv.load(smem.residual.at[pl.ds(row, y.size)], mv.sums(width))
            to(ref, width)(row, y + residual)

        return finish

    def down_projections() -> None:
        """RMSNorm(h) to the latents. The tiles of the two matrices are one list, and what they give lies together."""
        multiply("a", normalised(vector(refs.h, D), vector(refs.input_gain, D)), to(refs.a, D))

    def absorb_and_remember() -> None:
        """The up-projection of keys moves to the query; the new token's latent and rotary key."""
        parts = C // mv.COLUMNS
        units = H * parts

        def keys(unit):
            row, column = lax.div(unit, parts) * (N + V), lax.rem(unit, parts) * mv.COLUMNS
            return mv.load(refs.kv_b_rows.at[pl.ds(row, N), pl.ds(column, mv.COLUMNS)], mv.TILE)

        def absorb(unit, k):
            head, column = lax.div(unit, parts), lax.rem(unit, parts) * mv.COLUMNS
            q = mv.load(refs.q.at[pl.ds(head * (N + R), N)], mv.TILE.reduce((1,)))
            y = mv.over_rows(k, q, mine)
            mv.store(refs.absorbed.at[head, pl.ds(column, mv.COLUMNS)], y.astype(dtype), mv.TILE.reduce((0,)))

        def own(count):
            return lax.div(jnp.maximum(count - block + blocks - 1, 0), blocks)

        first = jnp.minimum(block, units - 1)
        k = keys(first)  # on their way while the blocks meet
        cos, sin = (mv.load(ref, mv.angles(R)) for ref in (refs.cos, refs.sin))
        gain = vector(refs.kv_gain, C)
        meet()

        def turn(ref, to_ref):
            mv.store(to_ref, mv.turned(mv.load(ref, mv.pairs(R)), cos, sin).astype(dtype), mv.pairs(R))

        @pl.when((wg == 0) & (block < units))
        def _():
            absorb(first, k)
            lax.fori_loop(1, own(units), lambda i, _: absorb(block + i * blocks, keys(block + i * blocks)), None)

        @pl.when(wg == 1)
        def _():
            def rotary(i, _):
                head = block + i * blocks
                turn(refs.q.at[pl.ds(head * (N + R) + N, R)], refs.absorbed.at[head, pl.ds(C, R)])

            lax.fori_loop(0, own(H), rotary, None)

            @pl.when(block == blocks - 1)
            def _():
                c = normalised(vector(refs.a.at[pl.ds(Q, C)], C), gain).astype(dtype)
                k_rope, at = refs.a.at[pl.ds(Q + C, R)], refs.length[0]
                mv.store(refs.new.at[pl.ds(0, C)], c, mv.operand(C))
                turn(k_rope, refs.new.at[pl.ds(C, R)])

                @pl.when(at < refs.c.shape[1])
                def _():
                    mv.store(refs.c.at[0, at], c, mv.operand(C))
                    turn(k_rope, refs.rope.at[0, at])

    def gated(row, y):
        """Rows of the gate stand before those of the up-projection."""
        n = y.size // 2
        gate, up = y[:n], y[n:]
        to(refs.inner, D)(lax.div(row, 2), gate / (1 + jnp.exp(-gate)) * up)

    down_projections()
    gain = vector(refs.q_gain, Q)
    meet()
    multiply("q_b", normalised(vector(refs.a.at[pl.ds(0, Q)], Q), gain), to(refs.q, Q))
    absorb_and_remember()
    meet()
    attention = Attention(shape, blocks, dtype, scale, block, wg, refs, smem, meet_in_block)
    attention.attend_to_new()
    attention.attend(todo["tokens"], before=todo["q_b"].number + todo["q_b"].count)
    meet()
    rows = todo["v_b"].reading.rows
    multiply("v_b", lambda tile: attention.latent_of(lax.div(tile * rows, V)), to(refs.value, C))
    meet()
    x = vector(refs.value, H * V)
    plgpu.barrier_wait(smem.residual_full)
    multiply("o", x, added_to(refs.middle, H * V))
    gain = vector(refs.post_gain, D)
    meet()

    @pl.when(wg == 0)
    def _():
        mv.written_is_seen_by_copies()
        plgpu.copy_gmem_to_smem(
            refs.middle, smem.residual, smem.residual_full, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        )

    multiply("gate_up", normalised(vector(refs.middle, D), gain), gated)
    meet()
    x = vector(refs.inner, F)
    plgpu.barrier_wait(smem.residual_full)
    multiply("down", x, added_to(refs.out, F))


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

        def run(ring, weights, **rest):
            whole, c_tiles, rope_tiles = ring
            in_use, scratch = weights
            smem = Shared(whole, c_tiles, rope_tiles, weights=in_use, scratch=scratch, **rest)
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
