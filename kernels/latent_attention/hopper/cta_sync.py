"""Synchronisation of the threads of one CTA: named barriers (`bar.sync`) and the fence of the async proxy."""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.hopper.mlir import inline_ptx

_NAMED_BARRIER = 15
"""The last of the hardware's 16 per CTA; Mosaic uses the first ones, one per warpgroup."""


def warpgroup_barrier() -> None:
    """Waits for all warps of the warpgroup; shared memory written by any of them before is visible to all."""

    @plgpu.inline_mgpu()
    def barrier(_):
        mgpu.utils.warpgroup_barrier()

    barrier()  # pyright: ignore[reportCallIssue]


def named_barrier(num_warpgroups: int) -> None:
    """`bar.sync` of this many warpgroups; shared memory written by any of them before is visible to all."""

    @plgpu.inline_mgpu()
    def barrier(_):
        inline_ptx(f"bar.sync {_NAMED_BARRIER}, {128 * num_warpgroups};", "~{memory}")

    barrier()  # pyright: ignore[reportCallIssue]


def fence_proxy_async() -> None:
    """Orders this thread's earlier generic-proxy accesses before the bulk copies (async proxy) that it starts next.

    Writes that this thread has observed, its own or by acquire, are then visible to those copies, or overwritten by
    them. Copies over memory that was only read (a free pipeline stage) are started without it, after an mbarrier or a
    barrier: a read has returned its value by then, while a write may still be under way.
    """

    @plgpu.inline_mgpu()
    def fence(_):
        inline_ptx("fence.proxy.async;", "")

    fence()  # pyright: ignore[reportCallIssue]
