"""Timestamps of the phases of the fused decoder layer, for `tools/bench/layer_timeline.py`.

With this output, thread 0 of each consumer warpgroup stores two clocks at the end of every phase. `%clock` counts
cycles of its SM, so it measures phases within a CTA; `%globaltimer` counts nanoseconds, alike on all SMs but in coarse
steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm

from latent_attention.decode_layer.tile_stream import NUM_CONSUMERS
from latent_attention.hopper.mlir import i32, inline_ptx
from latent_attention.hopper.registers import SPLAT

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


def _clock(name: str) -> Any:
    # The clobber keeps memory accesses of the phase before the clock is read.
    return llvm.inline_asm(i32(), [], f"mov.u32 $0, {name};", "=r,~{memory}", has_side_effects=True)


def read_clocks(timeline_ref) -> tuple:
    """Each thread's clocks now, to be stored later by `record`; nothing if there is no timeline."""
    if timeline_ref is None:
        return ()
    splat = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT)

    @plgpu.inline_mgpu(return_type=(splat,) * len(CLOCKS))
    def read(_):
        return tuple(mgpu.FragmentedArray.splat(_clock(name), (), is_signed=True) for name in CLOCKS)

    return read()  # pyright: ignore[reportCallIssue]


def record(timeline_ref, cta, wg, phase: str, clocks: tuple = ()) -> None:
    """Stores the clocks at the end of a phase to the timeline, see `timeline_type`; nothing if it is None.

    They are read now, unless `clocks` has been read before by `read_clocks`.
    """
    if timeline_ref is None:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[SPLAT] * len(clocks)))
    def store(_, entry, *clocks):
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            pointer = mgpu.utils.memref_ptr(entry)
            for i, name in enumerate(CLOCKS):
                value = clocks[i].registers.item() if clocks else _clock(name)
                inline_ptx(f"st.global.u32 [$0 + {4 * i}], $1;", "l,r", pointer, value)

    store(timeline_ref.at[cta, wg, PHASES.index(phase)], *clocks)  # pyright: ignore[reportCallIssue]
