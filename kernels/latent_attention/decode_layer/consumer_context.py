"""State of one consumer warpgroup that all phases share, and how it synchronises: within its CTA and between CTAs."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import digits, gemv, timeline
from latent_attention.decode_layer.global_layout import Refs, Workspace
from latent_attention.decode_layer.smem_layout import Smem
from latent_attention.decode_layer.tile_stream import NUM_CONSUMERS, consumer_partition
from latent_attention.hopper import cta_sync, grid_barrier, mailbox
from latent_attention.hopper import registers as regs


def _nothing() -> None: ...


class ConsumerContext:
    """Where a consumer warpgroup is (CTA `cta` of `num_ctas`, consumer `wg`), its memory, barriers and mailboxes.

    The constructor emits loads of `length` and the workspace, so the previous kernel must have completed.
    """

    def __init__(self, shape: LayerShape, num_ctas: int, dtype, cta, wg, refs: Refs, smem: Smem):
        self.shape, self.num_ctas, self.dtype, self.cta, self.wg = shape, num_ctas, dtype, cta, wg
        self.refs, self.smem, self.scratch = refs, smem, smem.scratch.at[wg]
        self.partition = consumer_partition(shape, num_ctas, refs, cta)
        """The CTA's part of each tile stream."""
        self.workspace = Workspace.split(shape, refs.workspace)
        # Other CTAs may have arrived at barrier 1 by now, but not this one, so the division still counts those before.
        barriers_passed = lax.div(grid_barrier.load_counter(self.workspace.counter), num_ctas)
        self.counter_target = barriers_passed * num_ctas
        """The counter's value at the last grid barrier."""
        # 4 k + 1 in the k-th layer, modulo 2^16: never the previous layer's, nor the 0 of a new workspace. Each layer
        # publishes every word, so no older epoch is left when it comes round again.
        self.epoch = (barriers_passed + 1) & 0xFFFF

    def num_own(self, units: int) -> Any:
        """How many of the units of work, which go to the CTAs round-robin, this CTA has."""
        return lax.div(jnp.maximum(units - self.cta + self.num_ctas - 1, 0), self.num_ctas)

    def cta_barrier(self) -> None:
        """Waits for both consumers, which then see what either has written to shared memory."""
        cta_sync.named_barrier(NUM_CONSUMERS)

    def grid_barrier(
        self, then: Callable[[], None] = _nothing, meanwhile: Callable[[], Any] = _nothing, fence: bool = True
    ) -> Any:
        """Waits for all CTAs, then for both consumers of this one.

        To be called once for each barrier of the layer, outside of loops and `pl.when`: the counter's target advances
        as the kernel is traced. Consumer 0 arrives for its CTA, and waits. What consumer 1 has written to global memory
        is covered only if a `cta_barrier` comes before.

        Args:
            then: what consumer 0 does as soon as all CTAs have arrived: starting copies of what they have written.
            meanwhile: what both consumers do between arrival and wait.
            fence: whether to arrive with release and wait with acquire. Without, nothing but the arrival is known; what
                was published may still be under way, as `receive_vector` expects.

        Returns:
            The result of `meanwhile`.
        """

        @pl.when(self.wg == 0)
        def _():
            cta_sync.warpgroup_barrier()
            grid_barrier.arrive(self.workspace.counter, release=fence)

        self.counter_target += self.num_ctas
        result = meanwhile()

        @pl.when(self.wg == 0)
        def _():
            grid_barrier.wait(self.workspace.counter, self.counter_target, acquire=fence)
            if then is not _nothing:  # no barrier before it: the thread that has waited is the one that starts copies
                cta_sync.fence_proxy_async()
                then()

        self.cta_barrier()
        return result

    def publish(self, words, indices, x) -> None:
        """Hands x [128], `ONE_PER_THREAD`, to all CTAs through words `indices` of a mailbox."""
        mailbox.publish(words, indices, x.astype(self.dtype), self.epoch)

    def publish_vector(self, words, first, smem_ref) -> None:
        """Hands a vector that this consumer has written to shared memory to all CTAs, from word `first` on."""
        cta_sync.warpgroup_barrier()
        (width,) = smem_ref.shape
        for start in range(0, width, 128):
            n = jnp.minimum(regs.element_indices() + start, width - 1)
            self.publish(words, n + first, regs.gather(smem_ref, n))
        cta_sync.warpgroup_barrier()

    def receive_vector(self, words, smem_ref) -> Any:
        """A vector that all CTAs publish, received by both consumers into shared memory, as the operand of `gemv`.

        Its `cta_barrier` also comes after consumer 0's last read of `row_sums`, see `Projections.multiply`.
        """
        smem_ref = smem_ref.at[pl.ds(0, words.shape[0])]
        mailbox.receive(words, smem_ref, self.epoch, 128 * NUM_CONSUMERS)
        self.cta_barrier()
        return gemv.load_vector(smem_ref)

    def operand(self, x) -> Any:
        """A vector from `gemv.load_vector` as `gemv.gemv` takes it: in digits if weights are in 8 bits."""
        return x if self.refs.scales is None else digits.split(x)

    def receive_query(self, words) -> Any:
        """A part of one head's query, received by one consumer alone, in shared memory."""
        room, (width,) = self.shape.N + self.shape.R, words.shape
        smem_ref = self.smem.vector.at[pl.ds(self.wg * room, width)]
        cta_sync.warpgroup_barrier()  # all warps are done with what was there
        mailbox.receive(words, smem_ref, self.epoch, 128)
        cta_sync.warpgroup_barrier()
        return smem_ref

    def mark(self, phase: str) -> None:
        """Records the end of a phase, if the kernel has a timeline."""
        timeline.record(self.refs.timeline, self.cta, self.wg, phase)
