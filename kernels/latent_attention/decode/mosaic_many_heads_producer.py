"""The producer warpgroup of the split-KV kernel with rows on M: TMA loads of queries and of halves of KV tiles."""

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.decode.mosaic_many_heads_smem import PAIR, Smem
from latent_attention.decode.mosaic_producer import locate
from latent_attention.decode.mosaic_smem import TILE, Params, Refs
from latent_attention.decode.tile_scheduler import Split


class Producer:
    """Producer warpgroup of a CTA whose rows are the block `row_block`."""

    def __init__(self, params: Params, refs: Refs, smem: Smem, row_block):
        self.params, self.refs, self.smem, self.row_block = params, refs, smem, row_block
        self.half = params.c_width // PAIR

    def run(self, split: Split) -> None:
        """Loads the queries of a sequence and the split's pairs of tiles, each half as soon as there is room for it."""
        self._load_queries(split)

        def load(i, _):
            number = split.tiles_before + i - split.begin
            # In the order in which the consumers release them: values of tile 0 are multiplied first.
            for tile, half in ((0, 0), (0, 1), (1, 1), (1, 0)):

                @pl.when(number > 0)
                def _(tile=tile, half=half):
                    plgpu.barrier_wait(self.smem.consumed.at[PAIR * tile + half])

                for first in range(0, TILE, self.params.copy_tokens):
                    self._load_tokens(split, (i * PAIR + tile) * TILE + first, tile, half, first)

        lax.fori_loop(split.begin, split.end, load, None)

    def _load_queries(self, split: Split) -> None:
        """Loads the queries of the split's sequence; all loads complete `q_produced`, for which the consumers wait."""
        params, refs, smem, produced = self.params, self.refs, self.smem, self.smem.q_produced

        # Wait until both consumers have computed their last scores of the split before.
        @pl.when(split.splits_before > 0)
        def _():
            plgpu.barrier_wait(smem.q_consumed)

        rows = pl.ds(self.row_block * params.row_block, params.row_block)
        for half in range(PAIR):
            columns = pl.ds(half * self.half, self.half)
            plgpu.copy_gmem_to_smem(refs.q_c.at[split.b, rows, columns], smem.q_c.at[half], produced)
        rope_columns = pl.ds(params.q_rope_column, params.rope_width)
        plgpu.copy_gmem_to_smem(refs.q_rope.at[split.b, rows, rope_columns], smem.q_rope.at[0], produced)

    def _load_tokens(self, split: Split, token, tile: int, half: int, first: int) -> None:
        """Loads a half of the latents of `copy_tokens` tokens to a tile, its tokens from `first` on.

        The rotary keys come with the half that is not the tile's own: their memory is free when that is, as P was there
        for the same consumer.
        """
        refs, smem, copy_tokens = self.refs, self.smem, self.params.copy_tokens
        page, offset = locate(self.params, refs, split, token)
        tokens, to, columns = pl.ds(offset, copy_tokens), pl.ds(first, copy_tokens), pl.ds(half * self.half, self.half)
        produced = (smem.own_produced if half == tile else smem.other_produced).at[tile]
        plgpu.copy_gmem_to_smem(refs.c.at[page, tokens, columns], smem.c.at[tile, half, to], produced)
        if half != tile:
            plgpu.copy_gmem_to_smem(refs.k_rope.at[page, tokens], smem.k_rope_and_p[tile][0].at[0, to], produced)
