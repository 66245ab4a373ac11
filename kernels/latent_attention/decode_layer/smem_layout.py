"""Shared memory and mbarriers of a CTA of the fused decoder layer."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import gemv
from latent_attention.decode_layer.global_layout import PARTIALS_PER_COPY, max_partials
from latent_attention.decode_layer.tile_stream import (
    NUM_CONSUMERS,
    NUM_STAGES,
    STAGE_BYTES,
    TILE_TOKENS,
    sums_per_row,
    token_stages,
)
from latent_attention.hopper.smem_tiles import REDUCE_SCRATCH, swizzled_smem

PARTIAL_SLOTS = 4
"""Copies of partial results in flight for each consumer (not stages of the pipeline)."""
VALUE_ROWS = 16
"""Rows of the up-projection of values that a consumer multiplies at a time."""
VALUE_TOKENS = TILE_TOKENS // 2
"""Tokens of one product of values and probabilities with a cache in 8 bits, whose values pass through registers."""
_ALIGNMENT = 1024
"""Bytes to which Pallas aligns each array."""


def max_vector(shape: LayerShape) -> int:
    """Elements of the longest vector received from other CTAs; also room for one head's query for each consumer."""
    return max(shape.Q, shape.H * shape.V, shape.F, NUM_CONSUMERS * (shape.N + shape.R))


def value_sums_per_row(shape: LayerShape) -> int:
    """`gemv.sums_per_row` of the up-projection of values."""
    return gemv.sums_per_row(shape.C, VALUE_ROWS, NUM_CONSUMERS * VALUE_ROWS)


class Smem(NamedTuple):
    """Shared memory and mbarriers, in the order in which they are allocated: their types, then references to them.

    Arrays that are in use at different times share their place (`plgpu.RefUnion`); properties name these. In two of
    them, `pipeline` and `p_or_scratch`, arrays are in use side by side in different parts of the place, which JAX does
    not promise to keep apart: `assert_offsets`. Docstrings of mbarriers say what completes a phase; Pallas counts
    arrivals of whole warpgroups, each of 128 threads.
    """

    consumed: Any
    """One per stage: the consumer of the tile in it has read it."""
    queries_or_vectors: Any
    """One after the other: `vector` with c_Q, then with parts of the queries; `q_c`, `q_rope`, `exchange` and
    `q_scales`; `partials`; `vector` with the operands of what follows."""
    produced: Any
    """One per stage: the two copies of a matrix tile have completed."""
    head_vector: Any
    """A vector of one head by each consumer, float32 [NUM_CONSUMERS, C]: 64 elements of an absorbed query, or the
    rotary part of a query; later its sum in the combine."""
    exchange_lse: Any
    """Log-sum-exps of `exchange`: float32 [H]."""
    head_lse: Any
    """`partial_lse` of one head."""
    head_lse_loaded: Any
    """Its copy has completed."""
    partials_loaded: Any
    """One per slot of `partials`: the copy into it has completed."""
    row_sums: Any
    """float32 partial sums of the CTA's rows of a matrix, see `gemv.gemv` (not partial results of the attention)."""
    residual: Any
    """The residual stream [D], 16 bits."""
    residual_loaded: Any
    """Its copy, of the hidden state before the layer, has completed."""
    pipeline: Any
    """NUM_STAGES stages: `stages`, or `c_tiles` and `rope_tiles`."""
    combine_weights: Any
    """Weight of each partial result of one head in the combine, not normalised."""
    tokens_produced: Any
    """One per pair of stages, or per stage with a cache in 8 bits: the copies of latents and of rotary keys, and of the
    scales of both, have completed."""
    p_or_scratch: Any
    """`p`, `scratch` or `new_token_scratch` of each consumer."""
    cache_scales: Any = None
    """With a cache in 8 bits, scales of the latents and of the rotary keys in each stage: float32 [NUM_STAGES, 2,
    TILE_TOKENS]."""

    @classmethod
    def types(cls, shape: LayerShape, num_ctas: int, dtype, int8: bool, int8_cache: bool) -> "Smem":
        """Types of all, for `pl.run_scoped`, with weights and a cache in 8 bits or in those of `dtype`."""
        D, _, C, R, _, _, H, _ = shape
        # A pair of stages has as many elements of 16 bits, a stage as many of 8.
        pair, partials, places = STAGE_BYTES, max_partials(num_ctas), NUM_STAGES // token_stages(int8_cache)
        assert TILE_TOKENS * (C + R) <= pair and pair % C == pair % R == 0  # or pairs of stages would not begin alike
        assert 128 * H <= 4 * REDUCE_SCRATCH  # see p_or_scratch
        stage_elements, weights = (STAGE_BYTES, jnp.int8) if int8 else (STAGE_BYTES // 2, dtype)
        row_sums = sums_per_row(shape, num_ctas, int8)[1], NUM_CONSUMERS * VALUE_ROWS * value_sums_per_row(shape)
        cache, queries = dtype, (swizzled_smem(H, C, dtype), swizzled_smem(H, R, dtype), swizzled_smem(H, C, dtype))
        p = swizzled_smem(H, TILE_TOKENS, dtype, NUM_CONSUMERS)
        if int8_cache:
            digits = swizzled_smem(2 * H, C, jnp.int8), swizzled_smem(2 * H, R, jnp.int8)
            cache, queries = jnp.int8, (*digits, swizzled_smem(H, C, dtype), plgpu.SMEM((H,), jnp.float32))
            p = swizzled_smem(H, TILE_TOKENS, jnp.float16, NUM_CONSUMERS, columns=VALUE_TOKENS)
        return cls(
            consumed=plgpu.Barrier(num_arrivals=1, num_barriers=NUM_STAGES),
            queries_or_vectors=plgpu.RefUnion(
                queries,
                plgpu.SMEM((NUM_CONSUMERS * PARTIAL_SLOTS, PARTIALS_PER_COPY, C), dtype),
                plgpu.SMEM((max_vector(shape),), dtype),
            ),
            produced=plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES),
            head_vector=plgpu.SMEM((NUM_CONSUMERS, C), jnp.float32),
            exchange_lse=plgpu.SMEM((H,), jnp.float32),
            head_lse=plgpu.SMEM((partials,), jnp.float32),
            head_lse_loaded=plgpu.Barrier(num_arrivals=1),
            partials_loaded=plgpu.Barrier(num_arrivals=1, num_barriers=NUM_CONSUMERS * PARTIAL_SLOTS),
            row_sums=plgpu.SMEM((max(row_sums),), jnp.float32),
            residual=plgpu.SMEM((D,), dtype),
            residual_loaded=plgpu.Barrier(num_arrivals=1),
            pipeline=plgpu.RefUnion(
                plgpu.SMEM((NUM_STAGES, stage_elements), weights),
                swizzled_smem(pair // C, C, cache, places),
                swizzled_smem(pair // R, R, cache, places),
            ),
            combine_weights=plgpu.SMEM((partials,), jnp.float32),
            tokens_produced=plgpu.Barrier(num_arrivals=4 if int8_cache else 2, num_barriers=places),
            # Bytes of consumers 0 and 1: p [0, 128 H) and [128 H, 256 H), scratch and new_token_scratch [0, 4096) and
            # [4096, 8192). While one's p is in use, the other reduces scores in the first 128 H bytes of its scratch
            # (128 threads store H / 8 pairs of float32 each), or consumer 1 is in `attend_to_new`: none overlap.
            p_or_scratch=plgpu.RefUnion(
                p,
                plgpu.SMEM((NUM_CONSUMERS, REDUCE_SCRATCH), jnp.float32),
                plgpu.SMEM((NUM_CONSUMERS, 2, REDUCE_SCRATCH), dtype),
            ),
            cache_scales=plgpu.SMEM((NUM_STAGES, 2, TILE_TOKENS), jnp.float32) if int8_cache else None,
        )

    def assert_offsets(self) -> None:
        """Checks that arrays which share their place begin where it does, when the kernel is traced."""
        for ref in (*self.pipeline, *self.p_or_scratch):
            assert ref.transforms[0].offset == 0

    @property
    def stages(self) -> Any:
        """The pipeline's stages, with rows of matrices: [NUM_STAGES, elements]."""
        return self.pipeline[0]

    @property
    def c_tiles(self) -> Any:
        """The same memory as places of tiles of the cache, pairs of stages or, in 8 bits, stages: the latents.

        See `tile_stream.token_tile`.
        """
        return self.pipeline[1]

    @property
    def rope_tiles(self) -> Any:
        """The rotary keys beside `c_tiles`."""
        return self.pipeline[2]

    @property
    def q_c(self) -> Any:
        """Absorbed queries [H, C] for wgmma; then the CTA's partial result on its way to global memory.

        With a cache in 8 bits, their high and low digits [2 H, C], as of `q_rope`; see `digits.receive_queries`.
        """
        return self.queries_or_vectors[0][0]

    @property
    def q_rope(self) -> Any:
        """Rotary part of the queries [H, R] for wgmma."""
        return self.queries_or_vectors[0][1]

    @property
    def exchange(self) -> Any:
        """Partial result [H, C] that one consumer hands to the other."""
        return self.queries_or_vectors[0][2]

    @property
    def q_scales(self) -> Any:
        """Scales of the digits of queries [H]."""
        return self.queries_or_vectors[0][3]

    @property
    def partials(self) -> Any:
        """Partial results of one head for the combine, PARTIAL_SLOTS copies for each consumer."""
        return self.queries_or_vectors[1]

    @property
    def vector(self) -> Any:
        """Operand of a gemv as received from the other CTAs, or one head's query for each consumer."""
        return self.queries_or_vectors[2]

    @property
    def p(self) -> Any:
        """Softmax probabilities [H, TILE_TOKENS] of each consumer's tile, for the product with the values."""
        return self.p_or_scratch[0]

    @property
    def scratch(self) -> Any:
        """Scratch of each consumer for reductions across its warps."""
        return self.p_or_scratch[1]

    @property
    def new_token_scratch(self) -> Any:
        """Two vectors [C + R] of each consumer: the new token before and after norm and RoPE, or a query and it.

        Padded to REDUCE_SCRATCH, as they are where the same consumer's `scratch` is. They are reduced within a warp
        (`layouts.is_narrow`, `registers.rope_pairs_layout`), because a reduction in `scratch` would overwrite them.
        """
        return self.p_or_scratch[2]


def smem_bytes(shape: LayerShape, num_ctas: int, int8: bool, int8_cache: bool) -> int:
    """Shared memory of a CTA, with the alignment that Pallas gives each array."""

    def size(x) -> int:
        if x is None:
            return 0
        if isinstance(x, plgpu.Barrier):
            return 8 * int(np.prod(x.num_barriers))
        return -(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // _ALIGNMENT) * _ALIGNMENT

    return sum(map(size, Smem.types(shape, num_ctas, jnp.bfloat16, int8, int8_cache)))
