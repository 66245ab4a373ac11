"""The fused decoder layer for Hopper: a layer of MLA for one token of one sequence, in one Pallas Mosaic GPU kernel.

At batch 1 every projection is a matrix times a vector, and time is what reading the weights takes. So one persistent
CTA per SM stays for the whole layer. One of its warpgroups, the producer, copies all that the CTA has to read through a
pipeline in shared memory and runs ahead as far as that has room; two others, the consumers, compute, and wait for all
other CTAs wherever a vector is complete only then. docs/kernels.md explains the design; in the code:

- `tile_stream`: what each CTA reads, in which order, and the number and size of the pipeline's stages (`NUM_STAGES`,
  `STAGE_BYTES`); `producer`: copies it.
- `consumer`: the phases in order, with their equations and barriers. They are in `projections` (`gemv` on tensor
  cores), `queries` (absorption, RoPE, cache), `split_kv` (attention) and `combine` (partial results, values).
- `consumer_context`: barriers and mailboxes of a consumer, on `hopper.grid_barrier`, `hopper.mailbox` and
  `hopper.cta_sync`; `global_layout`, `smem_layout`: all arrays and mbarriers; `timeline`: timestamps of the phases.

By programmatic dependent launch, a CTA starts as soon as one of the previous layer has ended on its SM. It copies
weights at once; everything else only after all CTAs of the previous layer have ended.

Letters are those of `LayerShape`; S is the capacity of the cache. `Refs` has the matrices by the paper's names.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import layouts
from latent_attention.decode_layer.consumer import Consumer
from latent_attention.decode_layer.global_layout import Refs, Scales, Workspace, out_types
from latent_attention.decode_layer.producer import Producer
from latent_attention.decode_layer.smem_layout import VALUE_ROWS, Smem, smem_bytes
from latent_attention.decode_layer.tile_stream import NUM_CONSUMERS, NUM_STAGES, TILE_TOKENS, tile_rows
from latent_attention.decode_layer.timeline import timeline_type
from latent_attention.gpu import Gpu, local_gpu

_OF_SCALES = (
    "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
"""The matrices of `Scales`, in its order."""
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232
"""Per thread (setmaxnreg)."""


def why_not(
    shape: LayerShape, dtype: str, cache_dtype: str, capacity: int, gpu: Gpu | None, int8: bool = False
) -> str | None:
    """Why the kernel cannot run a layer of this shape on this GPU, or None if it can; `int8` is of the weights."""
    D, Q, C, R, N, V, H, F = shape
    if gpu is None or gpu.capability[0] != 9:
        return f"it is for Hopper GPUs (sm_90); this is {'no GPU' if gpu is None else gpu.name}"
    if dtype not in ("bfloat16", "float16") or cache_dtype not in (dtype, "int8"):
        return f"it takes bfloat16 or float16 and a cache of the same type or int8, not {dtype} and {cache_dtype}"
    if (C, R) != (256, 64) or H > 32 or H % 8 or N % 8:
        return f"it takes C of 256, R of 64, up to 32 heads, and multiples of 8 for H and N, not {C}, {R}, {H} and {N}"
    unfit = [width for width in (D, H * V, F) if width % 256 or layouts.is_narrow(width)]
    unfit += [width for width in (D, Q, H * V, F) if int8 and not layouts.fits_int8(width)]
    if unfit or Q % 256 or not all(tile_rows(shape, gpu.num_sms, int8)):
        return f"its tiles do not fit these widths: {shape}"
    if V % (NUM_CONSUMERS * VALUE_ROWS):
        return f"it takes V in multiples of {NUM_CONSUMERS * VALUE_ROWS}, not {V}"
    if N > C + R:  # the keys of a unit of the absorption are in registers: N / 4 of each thread's
        return f"it takes N up to {C + R}, not {N}"
    if H > gpu.num_sms or capacity % TILE_TOKENS:
        return f"it takes a cache of a multiple of {TILE_TOKENS} tokens and an SM per head"
    if smem_bytes(shape, gpu.num_sms, int8, cache_dtype == "int8") > gpu.shared_memory:
        return "its shared memory does not suffice for these widths"
    return None


def init_workspace(shape: LayerShape) -> jax.Array:
    """The sync workspace: new for the first layer, then passed from each layer to the next.

    Its counter overflows after 2^31 / (4 barriers * CTAs) layers, 4 million on 132 SMs. Nothing resets it; a new
    workspace starts anew.
    """
    return jnp.zeros(sum(Workspace.widths(shape)), jnp.int32)


def decode_layer(
    shape: LayerShape, weights: Mapping[str, Any], h_D: jax.Array, cos: jax.Array, sin: jax.Array, length: jax.Array,
    cache: tuple[jax.Array, jax.Array, jax.Array | None], workspace: jax.Array, *, eps: float, scale: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None], jax.Array]:  # fmt: skip
    """The hidden state of one token after a layer, and the token in the cache; equations 9 to 19 of DeepSeek-V2.

    Args:
        shape: widths.
        weights: of the layer, in 16 bits or 8, see `decode_layer.triton.before_attention`. Not an output of the
            previous kernel: the first of them are read while that still runs.
        h_D: the hidden state before the layer, 16 bits.
        cos: float32 [R/2], of the token's position.
        sin: float32 [R/2], likewise.
        length: int32 [1], the number of tokens in the cache. Where it is full, nothing is written, and attention leaves
            the new token out.
        cache: c [1, S, C], k_rope [1, S, R] and, if they are int8, float32 scales [1, 2, S], else None; updated in
            place where they are donated, else XLA copies them before.
        workspace: from `init_workspace`, then from the previous layer.
        eps: of the norms.
        scale: of the attention scores.

    Returns:
        The output [D], the cache and the workspace.

    Raises:
        RuntimeError: there is no NVIDIA GPU.
    """
    args = weights, h_D, cos, sin, length, cache, workspace
    return _launch(shape, *args, eps=eps, scale=scale, with_timeline=False)[:3]


def decode_layer_timeline(shape: LayerShape, *args, eps: float, scale: float) -> tuple:
    """`decode_layer` with a fourth result: the timestamps of its phases, see `timeline`."""
    return _launch(shape, *args, eps=eps, scale=scale, with_timeline=True)


def _launch(
    shape: LayerShape, weights: Mapping[str, Any], h_D, cos, sin, length, cache, workspace, *, eps: float, scale: float,
    with_timeline: bool,
) -> tuple:  # fmt: skip
    gpu = local_gpu()
    if gpu is None:
        raise RuntimeError("Mosaic needs an NVIDIA GPU")
    num_ctas, dtype = gpu.num_sms, h_D.dtype
    attn, mlp = weights["self_attn"], weights["mlp"]
    matrices = {name: w for part in (attn, mlp) for name, w in part.items() if "norm" not in name}
    flat = {name: w.rows.reshape(-1) for name, w in matrices.items()}
    scales = () if attn["o_proj"].scale_out is None else Scales(*(matrices[name].scale_out for name in _OF_SCALES))
    int8, int8_cache = bool(scales), cache[2] is not None

    def kernel(*args):
        refs = Refs.of(args, int8, int8_cache)

        def run(smem: Smem):
            smem.assert_offsets()
            cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

            @pl.when(wg == NUM_CONSUMERS)
            def _():
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
                Producer(shape, num_ctas, cta, refs, smem).run()

            @pl.when(wg < NUM_CONSUMERS)
            def _():
                plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")

                @pl.when(wg == 0)
                def _():  # every stage starts out free
                    for stage in range(NUM_STAGES):
                        plgpu.barrier_arrive(smem.consumed.at[stage])

                # The next kernel may launch once every CTA has come here. All of them are resident by then, so its CTAs
                # take no SM that this one still needs for its grid barriers. As every CTA also waits for the previous
                # kernel, in `Consumer`'s constructor and `Producer.run`, kernels complete in order.
                plgpu.griddepcontrol_launch_dependents()
                Consumer(shape, num_ctas, dtype, eps, scale, cta, wg, refs, smem).run()

        pl.run_scoped(run, Smem.types(shape, num_ctas, dtype, int8, int8_cache), collective_axes="wg")

    in_place = [jax.new_ref(x) for x in (*cache, workspace) if x is not None]
    launch: Any = pl.kernel(
        kernel,
        out_type=out_types(shape, num_ctas, dtype) + [timeline_type(num_ctas)] * with_timeline,
        mesh=plgpu.Mesh(grid=(num_ctas,), grid_names=("cta",), num_threads=NUM_CONSUMERS + 1, thread_name="wg"),
        name="mla_layer",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    out = launch(  # in the order of `Refs`; the outputs follow, as in `out_types`
        h_D, weights["input_layernorm"], flat["q_a_proj"], flat["kv_a_proj_with_mqa"], attn["q_a_layernorm"],
        flat["q_b_proj"], attn["kv_a_layernorm"], matrices["kv_b_proj"].rows, cos, sin, length,
        flat["o_proj"], weights["post_attention_layernorm"], flat["gate_proj"], flat["up_proj"], flat["down_proj"],
        *scales, *in_place,
    )  # fmt: skip
    c, k_rope, *cache_scales, workspace = (jax.freeze(ref) for ref in in_place)
    return out[0], (c, k_rope, cache_scales[0] if int8_cache else None), workspace, *out[3:]
