"""Timestamps of the phases of the fused decoder layer, for `tools/bench/layer_timeline.py`.

With this output, thread 0 of each consumer warpgroup stores two clocks at the end of every phase. `%clock` counts
cycles of its SM, so it measures phases within a CTA; `%globaltimer` counts nanoseconds, alike on all SMs but in coarse
steps.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm

from latent_attention.decode_layer.tile_stream import NUM_CONSUMERS
from latent_attention.hopper.mlir import i32, inline_ptx

PHASES = (
    "launch",
    "wait for previous layer",
    "load hidden state",
    "q_a, kv_a",
    "receive latents",
    "q_b",
    "absorb, RoPE, append",
    "barrier 1",
    "receive queries",
    "attention",
    "barrier 2",
    "combine, values",
    "receive values",
    "o",
    "barrier 3, receive residual",
    "gate, up",
    "barrier 4, receive activations",
    "down",
)
"""Phases in the order in which they end; the first one ends when the consumer starts."""
CLOCKS = ("%clock", "%globaltimer_lo")
"""The clocks of a timestamp, 32 bits each, which wrap around."""


def timeline_type(num_ctas: int) -> jax.ShapeDtypeStruct:
    """The type of the output: int32 [num_ctas, consumers, len(PHASES), len(CLOCKS)]."""
    return jax.ShapeDtypeStruct((num_ctas, NUM_CONSUMERS, len(PHASES), len(CLOCKS)), jnp.int32)


def record(timeline_ref, cta, wg, phase: str) -> None:
    """Stores the clocks at the end of a phase to the timeline, see `timeline_type`; nothing if it is None."""
    if timeline_ref is None:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def store(_, entry):
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            pointer = mgpu.utils.memref_ptr(entry)
            for i, clock in enumerate(CLOCKS):
                # The clobber keeps memory accesses of the phase before the clock is read.
                value = llvm.inline_asm(i32(), [], f"mov.u32 $0, {clock};", "=r,~{memory}", has_side_effects=True)
                inline_ptx(f"st.global.u32 [$0 + {4 * i}], $1;", "l,r", pointer, value)

    store(timeline_ref.at[cta, wg, PHASES.index(phase)])  # pyright: ignore[reportCallIssue]
