"""The shapes of a call: what an implementation is asked before it is chosen."""

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
    """Whether there is a block table."""

    @classmethod
    def of(cls, q_BTHW, c_PSC, k_rope_PSR, block_table_BN) -> "DecodeShape":
        """That of a call with these arrays."""
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
    """Whether `kv_lengths` is given."""
    offset: int | None
    """None: differs by row, or is not known when tracing."""


class LayerShape(NamedTuple):
    """Widths of a layer, for the kernels of one token."""

    D: int
    """Hidden."""
    Q: int
    """Query latent."""
    C: int
    """Latent."""
    R: int
    """Rotary."""
    N: int
    """Content of a head."""
    V: int
    """Value of a head."""
    H: int
    """Heads."""
    F: int
    """Feed-forward."""
