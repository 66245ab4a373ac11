"""A consumer warpgroup of the fused decoder layer: the phases of the layer, one after the other.

Most phases need what all CTAs have computed in the one before, so seven times in a layer CTAs wait for each other,
while their producers go on copying tiles. Most vectors are handed on through mailboxes, which need no fence; partial
results of the attention, which are larger, go through global memory and a grid barrier with release and acquire. Where
the wait is long, a relaxed grid barrier comes before the mailbox: spinning on all of its words would slow down the CTAs
that are still working.

Five of the seven waits come before the output projection, where there is little to read: the pipeline is full and
memory idle until they are over. So latency counts: how soon each vector is where it is needed. While they wait,
consumers prefetch tiles into registers, which makes room in the pipeline.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import gemv, layouts, timeline
from latent_attention.decode_layer.combine import Combine
from latent_attention.decode_layer.consumer_context import ConsumerContext
from latent_attention.decode_layer.global_layout import Refs
from latent_attention.decode_layer.projections import Projections
from latent_attention.decode_layer.queries import Queries
from latent_attention.decode_layer.smem_layout import Smem
from latent_attention.decode_layer.split_kv import SplitKV
from latent_attention.hopper import registers as regs


class Consumer:
    """One consumer warpgroup of a CTA. Its constructor already emits code, such as the wait for the previous kernel."""

    def __init__(
        self, shape: LayerShape, num_ctas: int, dtype, eps: float, scale: float, cta, wg, refs: Refs, smem: Smem
    ):  # fmt: skip
        self.eps = eps
        launched = timeline.read_clocks(refs.timeline)
        # Until the previous kernel has completed (programmatic dependent launch), only weights may be read, and nothing
        # may be written: XLA can give an output memory that the previous kernel still reads.
        gammas = refs.input_gamma, refs.q_gamma, refs.kv_gamma
        self.input_gamma, self.q_gamma, kv_gamma = (gemv.load_vector(ref) for ref in gammas)
        plgpu.griddepcontrol_wait()
        timeline.record(refs.timeline, cta, wg, "launch", launched)
        timeline.record(refs.timeline, cta, wg, "wait for previous layer")
        self.context = ConsumerContext(shape, num_ctas, dtype, cta, wg, refs, smem)
        self.projections = Projections(self.context)
        self.queries = Queries(self.context, kv_gamma, eps)
        self.attention = SplitKV(self.context, scale)
        self.combine = Combine(self.context, self.attention.num_partials)

    def run(self) -> None:
        """The layer: equations 9 to 19 of DeepSeek-V2 with its norms, and the feed-forward network."""
        context, projections, queries, attention = self.context, self.projections, self.queries, self.attention
        refs, smem, workspace, R = context.refs, context.smem, context.workspace, context.shape.R
        mark = context.mark

        # Down-projections, equations 9 and 12 and the rotary key of 15: c_Q, c_KV and k_R = [W^DQ; W^DKV; W^KR]
        # RMSNorm(h). Every CTA publishes its rows.
        x = self._rms_norm(gemv.load_vector(refs.h), self.input_gamma)
        mark("load hidden state")
        projections.multiply("qkv_a", x, projections.publish_epilogue(workspace.qkv_a))
        mark("q_a, kv_a")

        # Up-projection of the queries, equations 13 and 14: [W^UQ; W^QR] RMSNorm(c_Q). All CTAs wait for all of c_Q at
        # its mailbox, and publish their rows. Meanwhile, small operands of later phases are loaded.
        first_keys, values = queries.load_first_keys(), self.combine.load_first_values()
        cos, sin = (regs.load_f32(ref, regs.rope_angles_layout(R)) for ref in (refs.cos, refs.sin))
        x = context.receive_vector(workspace.qkv_a.at[pl.ds(0, context.shape.Q)], smem.vector)
        mark("receive latents")
        projections.multiply("q_b", self._rms_norm(x, self.q_gamma), projections.publish_epilogue(workspace.q))
        mark("q_b")

        # Absorbed queries, RoPE and the new token's cache entry: single consumers of some CTAs each wait for the heads
        # that they need, and publish to `absorbed_q` and `new_token`. Then grid barrier 1, relaxed.
        queries.absorb(*first_keys)
        queries.apply_rope(cos, sin)
        queries.append_to_cache(cos, sin)
        mark("absorb, RoPE, append")
        context.grid_barrier(fence=False)
        mark("barrier 1")

        # Attention, equation 18, over latents: every CTA that has tiles of the cache waits for all absorbed queries,
        # some for the new token. Partial results go to global memory. Grid barrier 2 with release and acquire: after
        # it, consumer 0 starts to load the partial results of the head of the CTA's first unit. (The CTA barrier makes
        # consumer 0 release what consumer 1 has written.) While they wait, both prefetch tiles of W^O.
        attention.receive_queries()
        mark("receive queries")
        attention.attend_to_new()
        attention.attend()
        context.cta_barrier()
        mark("attention")
        o_tiles = context.grid_barrier(
            then=lambda: self.combine.prefetch_partials(0), meanwhile=lambda: projections.prefetch("o")
        )
        mark("barrier 2")

        # Combine, and up-projection of values, equation 11: CTAs with a unit of it publish their rows.
        self.combine.project_values(values)
        mark("combine, values")

        # Output projection, equation 19, and residual: all CTAs wait for the whole vector of values, and publish their
        # rows.
        x = context.receive_vector(workspace.values, smem.vector)
        plgpu.barrier_wait(smem.residual_loaded)
        mark("receive values")
        add_residual = projections.residual_epilogue(projections.publish_epilogue(workspace.attn_residual))
        projections.multiply("o", x, add_residual, prefetched=o_tiles)
        mark("o")

        # Feed-forward network: gate and up. Grid barrier 3, relaxed, then all CTAs wait for the hidden state, which
        # stays in shared memory as the next residual. They publish their rows of SwiGLU.
        post_gamma, gate_up_tiles = context.grid_barrier(
            meanwhile=lambda: (gemv.load_vector(refs.post_gamma), projections.prefetch("gate_up")), fence=False
        )
        x = context.receive_vector(workspace.attn_residual, smem.residual)
        mark("barrier 3, receive residual")
        swiglu = projections.swiglu_epilogue(projections.publish_epilogue(workspace.ffn_hidden))
        projections.multiply("gate_up", self._rms_norm(x, post_gamma), swiglu, 2, gate_up_tiles)
        mark("gate, up")

        # Feed-forward network: down, and residual. Grid barrier 4, relaxed, then all CTAs wait for the activations.
        # They write their rows of the output, which the next kernel reads when this one has ended.
        down_tiles = context.grid_barrier(meanwhile=lambda: projections.prefetch("down"), fence=False)
        x = context.receive_vector(workspace.ffn_hidden, smem.vector)
        mark("barrier 4, receive activations")
        projections.multiply("down", x, projections.residual_epilogue(self._write_out), prefetched=down_tiles)
        mark("down")

    def _write_out(self, indices, y) -> None:
        regs.scatter(self.context.refs.out, indices, y.astype(self.context.dtype))

    def _rms_norm(self, x, gamma):
        return regs.rms_norm(x, gamma, self.eps, layouts.operand_layout(x.size), self.context.scratch)
