"""Static description of a call: shapes and types, by which the dispatcher asks an implementation if it can run it."""

from typing import NamedTuple


class DecodeShape(NamedTuple):
    """A call of `decode`, as one device sees it."""

    batch: int
    queries: int
    heads: int
    c_width: int
    rope_width: int
    pages_per_row: int
    page_size: int
    q_dtype: str
    cache_dtype: str
    paged: bool
    """True if there is a block table."""

    @classmethod
    def of(cls, q_BTHW, c_PSC, k_rope_PSR, block_table_BN) -> "DecodeShape":
        """The shape of a call with these arrays."""
        batch, queries, heads, _ = q_BTHW.shape
        _, page_size, c_width = c_PSC.shape
        pages = 1 if block_table_BN is None else block_table_BN.shape[1]
        types, paged = (q_BTHW.dtype.name, c_PSC.dtype.name), block_table_BN is not None
        return cls(batch, queries, heads, c_width, k_rope_PSR.shape[2], pages, page_size, *types, paged)


class AttentionShape(NamedTuple):
    """A call of `attention`, as one device sees it."""

    batch: int
    queries: int
    keys: int
    heads: int
    qk_width: int
    v_width: int
    dtype: str
    segments: bool
    lengths: bool
    """True if `kv_lengths` is given."""
    offset: int | None
    """`q_offset` if it is one static number for all rows, else None."""


class LayerShape(NamedTuple):
    """Widths of a decoder layer, for the batch-1 decode step kernels."""

    D: int
    """Hidden size, d_model."""
    Q: int
    """Query latent width, q_lora_rank."""
    C: int
    """Latent width, kv_lora_rank."""
    R: int
    """Rotary width, qk_rope_head_dim."""
    N: int
    """Content (no position) width of a head, qk_nope_head_dim."""
    V: int
    """Value width of a head, v_head_dim."""
    H: int
    """Number of heads."""
    F: int
    """Feed-forward width, intermediate_size."""
