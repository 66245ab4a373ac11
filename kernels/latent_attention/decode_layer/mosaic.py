"""A layer of MLA for one token on Hopper: one Pallas Mosaic GPU kernel that reads ahead while its products wait.

Every product is a matrix [out, in] times one vector, so that only reading the matrix counts. A block a multiprocessor
stays for the whole layer. In it a warpgroup, the producer, copies most of what the block has to read into a ring in
shared memory and stops only when the ring is full (`mosaic_layer_ring`); two others, the consumers, take turns at the
tiles (`mosaic_layer_consumer`).

A block starts as soon as one of the layer before has ended on its multiprocessor (programmatic dependent launch), and
has its first weights on their way when all have, which what else it reads must wait for.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import gemv as products
from latent_attention.decode_layer.consumer import Consumer
from latent_attention.decode_layer.producer import CONSUMERS, SLOTS, TOKENS, produce, rows_of_tiles
from latent_attention.decode_layer.smem_layout import VALUES, Board, Refs, Shared, out_types, shared, shared_bytes
from latent_attention.gpu import Gpu, local_gpu

_REGISTERS = 40, 232
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
    if wide or Q % 256 or not all(rows_of_tiles(shape, gpu.num_sms)):
        return f"its tiles do not fit these widths: {shape}"
    if V % (CONSUMERS * VALUES):
        return f"it takes V in multiples of {CONSUMERS * VALUES}, not {V}"
    if N > C + R:  # keys of a unit of the absorption are in registers
        return f"it takes N up to {C + R}, not {N}"
    if H > gpu.num_sms or capacity % TOKENS:
        return f"it takes a cache of a multiple of {TOKENS} tokens and a multiprocessor a head"
    if shared_bytes(shape, gpu.num_sms) > gpu.shared_memory:
        return "its shared memory does not suffice for these widths"
    return None


def init_workspace(shape: LayerShape) -> jax.Array:
    """What the blocks of the kernel meet at: passed from each layer to the next, for four million layers at most."""
    return jnp.zeros(sum(Board.widths(shape)), jnp.int32)


def decode_layer(
    shape: LayerShape, weights: Mapping[str, Any], h_D: jax.Array, cos: jax.Array, sin: jax.Array, length: jax.Array,
    cache: tuple[jax.Array, jax.Array], board: jax.Array, *, eps: float, scale: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:  # fmt: skip
    """The hidden state of one token after a layer, and the token in the cache; equations 9 to 19 of DeepSeek-V2.

    Args:
        shape: widths.
        weights: see `triton_layer_jax.before_attention`; in 16 bits. Not what the kernel before this one writes: the
            first of them are read while that still runs.
        h_D: the hidden state before, 16 bits.
        cos: float32 [R/2], of the position. `sin` likewise.
        sin: see `cos`.
        length: int32 [1], how many tokens the cache holds; where it is full, nothing is written and it is attended to
            without the new token.
        cache: c [1, S, C] and k_rope [1, S, R]; updated in place where it is donated, else XLA copies it before.
        board: see `init_workspace`.
        eps: of the norms.
        scale: of the scores.

    Returns:
        The output [D], the cache and the board.

    Raises:
        RuntimeError: there is no NVIDIA GPU.
    """
    gpu = local_gpu()
    if gpu is None:
        raise RuntimeError("Mosaic needs an NVIDIA GPU")
    blocks, dtype = gpu.num_sms, h_D.dtype
    attn, mlp = weights["self_attn"], weights["mlp"]
    matrices = {name: w.rows for part in (attn, mlp) for name, w in part.items() if "norm" not in name}
    flat = {name: w.reshape(-1) for name, w in matrices.items()}

    def kernel(*args):
        refs = Refs(*args)

        def run(ring, weights, exchange, **rest):
            whole, c_tiles, rope_tiles = ring
            (in_use, scratch, of_new), ((q_c, q_rope, given), partials, vector) = weights, exchange
            smem = Shared(
                whole, c_tiles, rope_tiles, q_c, q_rope, in_use, scratch, of_new, given, partials, vector, **rest
            )  # fmt: skip
            block, wg = lax.axis_index("block"), lax.axis_index("wg")

            @pl.when(wg == CONSUMERS)
            def _():
                plgpu.set_max_registers(_REGISTERS[0], action="decrease")
                produce(shape, blocks, block, refs, smem)

            @pl.when(wg < CONSUMERS)
            def _():
                plgpu.set_max_registers(_REGISTERS[1], action="increase")

                @pl.when(wg == 0)
                def _():  # each slot starts empty
                    for slot in range(SLOTS):
                        plgpu.barrier_arrive(smem.empty.at[slot])

                # When the last block says this, all are there: those of the next kernel take nobody's place. As each of
                # these then waits for the kernel before, this one ends after that.
                plgpu.griddepcontrol_launch_dependents()
                Consumer(shape, blocks, dtype, eps, scale, block, wg, refs, smem).run()

        pl.run_scoped(run, **shared(shape, blocks, dtype), collective_axes="wg")

    in_place = [jax.new_ref(x) for x in (*cache, board)]
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
        flat["q_b_proj"], attn["kv_a_layernorm"], matrices["kv_b_proj"], cos, sin, length,
        flat["o_proj"], weights["post_attention_layernorm"], flat["gate_proj"], flat["up_proj"], flat["down_proj"],
        *in_place,
    )  # fmt: skip
    c, k_rope, board = (jax.freeze(ref) for ref in in_place)
    return out[0], (c, k_rope), board
