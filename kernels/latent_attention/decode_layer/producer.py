"""The producer warpgroup: copies the CTA's tile stream into the pipeline, each tile as soon as its stages are free.

It waits for a stage's `consumed` mbarrier, then starts two bulk copies (TMA) that complete on its `produced` mbarrier,
or on `tokens_produced` for a tile of the cache, which takes a pair of stages; in 8 bits it takes one, and four copies.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer.tile_stream import (
    MAX_TILES_IN_FLIGHT,
    TILE_TOKENS,
    CtaPartition,
    TileStream,
    cache_length,
    partition,
    stage_of,
    tile_streams,
    token_stages,
    token_tile,
)
from latent_attention.hopper.cta_sync import fence_proxy_async


class Producer:
    """The producer warpgroup of one CTA."""

    def __init__(self, shape: LayerShape, num_ctas: int, cta, refs, smem):
        self.shape, self.num_ctas, self.cta, self.refs, self.smem = shape, num_ctas, cta, refs, smem
        self.token_stages = token_stages(refs.cache_scales is not None)

    def run(self) -> None:
        """Copies all tiles of the CTA, and the hidden state as the first residual.

        The weights before the cache are copied while the previous kernel still runs; whatever that may write (hidden
        state, cache, workspace) only after `griddepcontrol.wait`.
        """
        refs, smem = self.refs, self.smem
        before, _ = self._split_at_tokens(jnp.int32(0))  # these partitions do not depend on kv_len
        tokens_begin = before[-1].first_index + before[-1].num_tiles
        completed = self._copy(before, tokens_begin, tokens_begin, jnp.int32(0))
        plgpu.griddepcontrol_wait()
        fence_proxy_async()  # h and the cache were written by generic stores, and are now read by copies
        plgpu.copy_gmem_to_smem(
            refs.h, smem.residual, smem.residual_loaded, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        )
        _, tokens_and_after = self._split_at_tokens(cache_length(refs))
        self._copy(tokens_and_after, tokens_begin, tokens_and_after[1].first_index, completed)

    def _split_at_tokens(self, kv_len) -> tuple[list[CtaPartition], list[CtaPartition]]:
        """The CTA's partitions before the tokens, and those from the tokens on."""
        streams = tile_streams(self.shape, self.num_ctas, self.refs, kv_len)
        parts = dict(partition(streams, self.cta, self.num_ctas))
        tokens = list(parts).index("tokens")
        return list(parts.values())[:tokens], list(parts.values())[tokens:]

    def _copy(self, parts: list[CtaPartition], tokens_begin, tokens_end, completed):
        """Copies the tiles of these partitions, in order, with a bounded number of matrix tiles in flight.

        Args:
            parts: what to copy.
            tokens_begin: running stage index after the last matrix tile before the tokens.
            tokens_end: running stage index of the first matrix tile after the tokens.
            completed: up to this running index, the copies of matrix tiles have been waited for. A wait on an mbarrier
                distinguishes odd from even phases only, so each of them must be waited for, in order.

        Returns:
            `completed`, after these.
        """
        smem = self.smem
        copies = [
            self._copy_tokens if stream.is_tokens else functools.partial(self._copy_rows, stream)
            for stream, *_ in parts
        ]

        def wait_completed(index, _) -> None:
            # Indices between those of matrices are of tokens, or skipped before them.
            of_matrix = (index < tokens_begin) | (index >= tokens_end)
            pl.when(of_matrix)(lambda: plgpu.barrier_wait(smem.produced.at[stage_of(index)]))

        def step(n, completed):
            # The n-th tile: which partition, and which tile i of it. Selected by comparisons: partitions are few.
            which = i = first_tile = first_index = stages = throttled = end = jnp.int32(0)
            for k, (stream, part_first_tile, num_tiles, part_first_index) in enumerate(parts):
                reached = n >= end
                which, i = jnp.where(reached, k, which), jnp.where(reached, n - end, i)
                first_tile = jnp.where(reached, part_first_tile, first_tile)
                first_index = jnp.where(reached, part_first_index, first_index)
                stages = jnp.where(reached, stream.stages, stages)
                throttled = jnp.where(reached, stream.throttled, throttled)
                end += num_tiles
            # Tiles of two stages are of the cache; where it has tiles of one, its partition can only be the first.
            is_tokens = stages == 2 if self.token_stages == 2 else (which == 0) & parts[0].stream.is_tokens
            index = first_index + i * stages
            stage = stage_of(index)
            plgpu.barrier_wait(smem.consumed.at[stage])
            if self.token_stages == 2:
                pl.when(is_tokens)(lambda: plgpu.barrier_wait(smem.consumed.at[stage + 1]))
            # Before a tile of the cache, all matrix tiles must have completed, as `completed` skips the tokens' stages
            # after it. Before a matrix tile, all but MAX_TILES_IN_FLIGHT, this one counted, or all if it is throttled.
            until = jnp.where(is_tokens, tokens_begin, index + 1 - jnp.where(i < throttled, 1, MAX_TILES_IN_FLIGHT))
            lax.fori_loop(completed, until, wait_completed, None)
            lax.switch(which, copies, first_tile + i * self.num_ctas, stage)
            return jnp.where(is_tokens, index + self.token_stages, jnp.maximum(completed, until))

        return lax.fori_loop(0, sum(part.num_tiles for part in parts), step, completed)

    def _copy_tokens(self, tile, stage) -> None:
        place, tokens = lax.div(stage, self.token_stages), pl.ds(tile * TILE_TOKENS, TILE_TOKENS)
        targets, produced = token_tile(self.shape, self.smem, place), self.smem.tokens_produced.at[place]
        for ref, target in zip((self.refs.c, self.refs.rope), targets, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[0, tokens], target, produced)
        if self.refs.cache_scales is not None:
            for i in range(2):
                plgpu.copy_gmem_to_smem(
                    self.refs.cache_scales.at[0, i, tokens], self.smem.cache_scales.at[place, i], produced,
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )  # fmt: skip

    def _copy_rows(self, stream: TileStream, tile, stage) -> None:
        half = stream.rows * stream.width // 2
        for i, source in enumerate(stream.halves(tile)):
            plgpu.copy_gmem_to_smem(
                source, self.smem.stages.at[stage, pl.ds(i * half, half)], self.smem.produced.at[stage],
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )  # fmt: skip
