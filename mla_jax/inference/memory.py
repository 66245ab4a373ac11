"""The device memory that inference takes, known before anything is allocated.

Weights and cache are exact. The workspace is an upper bound of what prefill of one chunk holds at one time in one
layer; it does not grow with the prompt (docs/benchmarks.md has measured peaks beside it).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mla_jax.config import ModelConfig
from mla_jax.hardware import GIB
from mla_jax.model.cache import bytes_per_token
from mla_jax.model.layers import is_norm
from mla_jax.model.mla import CACHE_CHUNK, MIN_CACHE_CHUNK
from mla_jax.model.transformer import abstract_params

ALIGNMENT = 64
"""Prefill chunks and cache capacities, in tokens of a row, are multiples of this."""
_MARGIN = 1.25
"""Factor for what the compiler and libraries take beyond the arrays that are counted: 0.785 GiB where 0.71 were
counted, with `infinite_1b` and an int8 cache of 1M tokens on an H100."""


def round_up(n: int, multiple: int) -> int:
    """The next multiple at or above n."""
    return -(-n // multiple) * multiple


def bucketed_capacity(tokens: int) -> int:
    """The capacity that is allocated for so many tokens: of few sizes, so that few shapes are compiled.

    At most a sixteenth larger than asked for, or rounded up to ALIGNMENT.
    """
    return round_up(tokens, max(ALIGNMENT, 1 << max(tokens.bit_length() - 5, 0)))


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes over all devices."""

    weights: int
    cache: int
    workspace: int

    @classmethod
    def of(
        cls, config: ModelConfig, *, rows: int, tokens: int, cache_dtype: str | None, int8_weights: bool,
        prefill_chunk: int,
    ) -> "MemoryPlan":  # fmt: skip
        """The plan for so many rows of a batch with room for so many tokens each; other arguments as of `Generator`."""
        return cls(
            weights=_weights(config, int8_weights),
            cache=rows * tokens * bytes_per_token(config, cache_dtype),
            workspace=_workspace(config, rows, min(max(prefill_chunk, rows * ALIGNMENT), rows * tokens), int8_weights),
        )

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = f"weights {self.weights / GIB:.2f}, cache {self.cache / GIB:.2f}, workspace {self.workspace / GIB:.2f}"
        return f"{self.total / GIB:.2f} GiB ({parts})"


def _weights(config: ModelConfig, int8: bool) -> int:
    size = jnp.dtype(config.dtype).itemsize

    def of_leaf(path: tuple, x: jax.ShapeDtypeStruct) -> int:
        if is_norm(path):
            return x.size * x.dtype.itemsize
        if int8 and path[0].key == "layers":
            return x.size + 4 * x.size // x.shape[1]
        return x.size * size

    return sum(jax.tree.leaves(jax.tree.map_with_path(of_leaf, abstract_params(config))))


def _workspace(config: ModelConfig, rows: int, tokens: int, int8_weights: bool) -> int:
    """Bytes for `tokens` in all rows: inputs, outputs and what lies between, in the part of a layer that needs most."""
    size, heads = jnp.dtype(config.dtype).itemsize, config.num_attention_heads
    cached = max(CACHE_CHUNK, rows * MIN_CACHE_CHUNK)
    queries, values = heads * config.qk_head_dim, heads * config.v_head_dim
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim) + queries + values
    attention = tokens * (size * (queries + values) + 2 * 4 * values) + size * max(tokens, cached) * expanded
    feed_forward = tokens * size * 3 * config.intermediate_size
    layer = config.hidden_size * (3 * config.intermediate_size + 2 * queries)
    logits = 4 * 4 * rows * config.vocab_size  # of one token a row, sorted, with their probabilities
    residual = 3 * tokens * size * config.hidden_size
    counted = residual + max(attention, feed_forward) + logits + (size * layer if int8_weights else 0)
    return round(_MARGIN * counted)


def most_that_fits(total: Callable[[int], int], limit: int, step: int = ALIGNMENT) -> int:
    """The largest multiple n of `step` for which `total(n)` is within the limit; 0 if there is none."""
    fits, too_many = 0, 1
    while total(too_many * step) <= limit:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if total(middle * step) <= limit else (fits, middle)
    return fits * step
