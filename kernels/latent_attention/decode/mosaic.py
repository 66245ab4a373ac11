"""Absorbed decode on Hopper: split-KV attention and a combine kernel in Pallas Mosaic GPU; see docs/kernels.md."""

import jax.numpy as jnp

from latent_attention.call_shapes import DecodeShape
from latent_attention.decode.mosaic_combine import combine
from latent_attention.decode.mosaic_many_heads_smem import PAIR, ROWS_ON_M
from latent_attention.decode.mosaic_smem import TILE, Config
from latent_attention.decode.mosaic_split_kv import partials
from latent_attention.decode.tile_scheduler import schedule
from latent_attention.gpu import Gpu, local_gpu
from latent_attention.hopper.int8_tiles import restore_order
from latent_attention.hopper.smem_tiles import CHUNK, REDUCE_SCRATCH

_MIN_TILES = 2
"""KV tiles of a CTA at least: below, combining more splits costs more than more SMs save."""
_ACCUMULATOR = 64 * 256
"""Elements of the output accumulator that fit in the registers of a warpgroup."""
_RESERVED = 6 << 10
"""Bytes of shared memory for mbarriers, alignment and softmax statistics."""
_MAX_STAGES = 8


def why_not_decode(shape: DecodeShape, gpu: Gpu | None) -> str | None:
    """Why these kernels cannot run calls of this shape on this GPU, or None if they can."""
    if gpu is None or gpu.capability[0] != 9:
        return f"it is for Hopper GPUs (sm_90); this is {'no GPU' if gpu is None else gpu.name}"
    if shape.q_dtype not in ("bfloat16", "float16") or shape.cache_dtype not in (shape.q_dtype, "int8"):
        return f"it takes 16-bit queries and a cache of the same type or int8, not {shape.q_dtype}, {shape.cache_dtype}"
    if shape.c_width % 64 or not 64 <= shape.c_width <= 512 or shape.rope_width not in (32, 64):
        return f"it takes C of 64, 128, .. 512 and R of 32 or 64, not {shape.c_width} and {shape.rope_width}"
    if shape.pages_per_row == 1 and (shape.page_size < TILE or shape.page_size % 8):
        return f"it takes a cache of a multiple of 8 tokens a row, {TILE} or more, not {shape.page_size}"
    if shape.pages_per_row > 1 and shape.page_size not in (8, 16, 32) and shape.page_size % TILE:
        return f"it takes pages of 8, 16, 32 or a multiple of {TILE} tokens, not {shape.page_size}"
    if shape.cache_dtype == "int8" and shape.page_size < 32:
        return f"with an int8 cache it takes pages of at least 32 tokens, not {shape.page_size}"
    return None


def why_not_rows_on_m(shape: DecodeShape, gpu: Gpu | None) -> str | None:
    """Why `configure_rows_on_m` has no configuration for calls of this shape, or None if it has."""
    if shape.cache_dtype == "int8" or shape.c_width % (PAIR * CHUNK):
        return f"it takes a 16-bit cache and C of 128, 256, .. 512, not {shape.cache_dtype} and {shape.c_width}"
    return why_not_decode(shape, gpu)


def row_blocks(rows: int, c_width: int, int8: bool) -> tuple[int, int]:
    """(rows of a block, blocks): the fewest blocks whose accumulators fit in the registers of a warpgroup."""
    most = min(_ACCUMULATOR // c_width, 64 if int8 else 128) // 8 * 8
    blocks = -(-rows // most)
    return -(-rows // (8 * blocks)) * 8, blocks


def configure(shape: DecodeShape, gpu: Gpu) -> Config:
    """Chooses as many stages as fit, and a second stage of queries, for prefetch, unless it costs KV stages."""
    int8 = shape.cache_dtype == "int8"
    row_block, blocks = row_blocks(shape.queries * shape.heads, shape.c_width, int8)
    width = shape.c_width + shape.rope_width

    def stages(q_stages: int, consumers: int) -> int:
        taken = q_stages * row_block * width * 2 + consumers * (CHUNK * row_block + REDUCE_SCRATCH) * 4
        stage = TILE * (width + 8) if int8 else TILE * width * 2
        return min((gpu.shared_memory - _RESERVED - taken) // stage, _MAX_STAGES) // consumers * consumers

    consumers = 2 if stages(1, 2) >= 2 else 1
    q_stages = 2 if stages(2, consumers) >= min(stages(1, consumers), 4) else 1
    return Config(stages(q_stages, consumers), max(gpu.num_sms // blocks, 1), consumers, q_stages)


def configure_rows_on_m(shape: DecodeShape, gpu: Gpu) -> Config:
    """The configuration with rows on wgmma's M axis, for many heads."""
    blocks = -(-shape.queries * shape.heads // ROWS_ON_M)
    return Config(PAIR, max(gpu.num_sms // blocks, 1), consumers=2, q_stages=1, rows_on_m=True)


def decode(q_BTHW, c_PSC, k_rope_PSR, lengths_B, *, scale, block_table_BN, scales_P2S, config: Config | None = None):
    """See `latent_attention.decode`; `config` instead of `configure`'s. Returns (out_BTHC, lse_BTH)."""
    shape, gpu = DecodeShape.of(q_BTHW, c_PSC, k_rope_PSR, block_table_BN), local_gpu()
    assert gpu is not None  # `why_not_decode` was asked
    config = config or configure(shape, gpu)
    batch, queries, heads, c_width = shape[:4]
    rows = queries * heads
    row_block, blocks = row_blocks(rows, c_width, scales_P2S is not None)
    tile, min_tiles = TILE, _MIN_TILES
    if config.rows_on_m:
        row_block, blocks, tile, min_tiles = ROWS_ON_M, -(-rows // ROWS_ON_M), PAIR * TILE, _MIN_TILES // PAIR
    q_BRW = jnp.pad(q_BTHW.reshape(batch, rows, -1), ((0, 0), (0, row_block * blocks - rows), (0, 0)))
    tiles = schedule(lengths_B, shape.pages_per_row * shape.page_size, tile, config.num_ctas, min_tiles)
    partial, stats = partials(
        q_BRW, c_PSC, k_rope_PSR, scales_P2S, block_table_BN, tiles, heads=heads, queries=queries, scale=scale,
        config=config, row_block=row_block,
    )  # fmt: skip
    out_BRC, lse_BR = combine(partial, stats, tiles.splits_B2, dtype=q_BTHW.dtype, num_sms=gpu.num_sms)
    if scales_P2S is not None:
        out_BRC = restore_order(out_BRC)
    return out_BRC[:, :rows].reshape(batch, queries, heads, c_width), lse_BR[:, :rows].reshape(batch, queries, heads)
