"""The producer warpgroup of the split-KV kernel for Hopper: TMA loads of queries and KV tiles into the pipeline."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode.mosaic_smem import TILE, Params, Refs, Smem
from latent_attention.decode.tile_scheduler import Split


class Producer:
    """Producer warpgroup of a CTA whose rows are the block `row_block`."""

    def __init__(self, params: Params, refs: Refs, smem: Smem, row_block):
        self.params, self.refs, self.smem, self.row_block = params, refs, smem, row_block

    def run(self, split: Split) -> None:
        """Loads the queries of a sequence and the split's tiles, each as soon as its stage is free."""
        stages = self.params.config.stages
        self._load_queries(split)

        def load(i, _):
            number = split.tiles_before + i - split.begin
            stage = lax.rem(number, stages)

            # Wait until the consumer of the tile that was in this stage before has arrived; at first all are free.
            @pl.when(number >= stages)
            def _():
                plgpu.barrier_wait(self.smem.consumed.at[stage])

            for first in range(0, TILE, self.params.copy_tokens):
                self._load_tokens(split, i * TILE + first, stage, pl.ds(first, self.params.copy_tokens))

        lax.fori_loop(split.begin, split.end, load, None)

    def _load_queries(self, split: Split) -> None:
        """Loads the queries of the split's sequence; both loads complete `q_produced`, for which the consumers wait."""
        params, refs, smem = self.params, self.refs, self.smem
        q_stage = lax.rem(split.splits_before, params.config.q_stages)

        # Wait until all consumers have arrived that used this stage before; at first all are free.
        @pl.when(split.splits_before >= params.config.q_stages)
        def _():
            plgpu.barrier_wait(smem.q_consumed.at[q_stage])

        rows = pl.ds(self.row_block * params.q_rows, params.q_rows)
        rope_columns = pl.ds(params.q_rope_column, params.rope_width)
        produced = smem.q_produced.at[q_stage]
        plgpu.copy_gmem_to_smem(refs.q_c.at[split.b, rows, pl.ds(0, params.c_width)], smem.q_c.at[q_stage], produced)
        plgpu.copy_gmem_to_smem(refs.q_rope.at[split.b, rows, rope_columns], smem.q_rope.at[q_stage], produced)

    def _load_tokens(self, split: Split, token, stage, to) -> None:
        """Loads `copy_tokens` tokens of a page to the tokens `to` of a stage, whose `produced` the loads complete."""
        params, refs, smem = self.params, self.refs, self.smem
        page, offset = locate(params, refs, split, token)
        tokens, produced = pl.ds(offset, params.copy_tokens), smem.produced.at[stage]
        plgpu.copy_gmem_to_smem(refs.c.at[page, tokens], smem.c.at[stage, to], produced)
        plgpu.copy_gmem_to_smem(refs.k_rope.at[page, tokens], smem.k_rope.at[stage, to], produced)
        for i in range(2 if params.int8 else 0):
            plgpu.copy_gmem_to_smem(refs.scales.at[page, i, tokens], smem.scales.at[stage, i, to], produced)


def locate(params: Params, refs: Refs, split: Split, token) -> tuple[Any, Any]:
    """(page, offset in it) of a token of the split's sequence.

    Tokens beyond kv_len are in page 0: their entries of the block table may be anything.
    """
    if not params.paged:
        return split.b, token
    valid = token < split.kv_len
    page_number = jnp.where(valid, lax.div(token, params.page_size), 0)
    return jnp.where(valid, refs.block_table[split.b, page_number], 0), lax.rem(token, params.page_size)
