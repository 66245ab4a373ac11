"""A session: the tokens that a model has read, one row a prompt, and their latent caches.

Prompts that start with the same tokens, the turns of a chat or many questions about one long text are read once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.inference.memory import ALIGNMENT, bucketed_capacity
from mla_jax.model import decoder
from mla_jax.model.cache import LayerCache

OnPrefill = Callable[[int, int], None]
"""Called with the number of tokens of all prompts that have been read, and the number that there are to read."""


@dataclasses.dataclass
class Session:
    """Tokens that were read and their cache; `Generator.generate` reads on from there and leaves it extended."""

    tokens: list[list[int]]
    """The cached tokens of each row."""
    layers: list[LayerCache]
    """Empty before the first use. On a mesh the batch is padded with rows that stay unused."""

    @classmethod
    def empty(cls, rows: int) -> "Session":
        """A session that has read nothing."""
        return cls([[] for _ in range(rows)], [])

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row of every layer; layers may differ if growing them was interrupted."""
        return min((layer.capacity for layer in self.layers), default=0)

    def keep_common_prefix(self, prompts: Sequence[Sequence[int]]) -> None:
        """Drops from each row the tokens from the first on that is not in its prompt."""
        self.tokens = [_common_prefix(cached, prompt) for cached, prompt in zip(self.tokens, prompts, strict=True)]


class Chunk(NamedTuple):
    """New tokens of all rows that went through the model together."""

    h_BTD: jax.Array
    """Hidden states before the final norm; without meaning where `prefill` was to return none."""
    start: np.ndarray
    """int32 [B], position of the first of the T tokens of each row."""
    valid: np.ndarray
    """int32 [B], how many of the T tokens of each row exist."""


def prefill(
    config: ModelConfig, weights: dict, session: Session, prompts: Sequence[Sequence[int]], tokens_at_once: int,
    *, hidden_states: bool = False,
) -> Iterator[Chunk]:  # fmt: skip
    """Reads what the session has not read of each prompt yet, chunk by chunk, in the expanded form.

    Args:
        config: the model.
        weights: see `decoder.inference_weights`.
        session: its tokens are the beginnings of the prompts; it has room for the rest. Whenever a chunk is yielded, it
            holds the tokens up to there.
        prompts: token ids of each row.
        tokens_at_once: tokens of a chunk, of all rows together; rounded to a multiple of ALIGNMENT a row.
        hidden_states: computes them for the new tokens; without, the last layer only fills its cache.
    """
    rows = len(session.layers[0].c_BSC)
    lengths, end = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(row) for row in session.tokens]
    end[: len(prompts)] = [len(prompt) for prompt in prompts]
    aligned = tokens_at_once // rows // ALIGNMENT * ALIGNMENT
    chunk = min(max(aligned, ALIGNMENT), bucketed_capacity(int((end - lengths).max())))
    while (lengths < end).any():
        start, valid = lengths, np.clip(end - lengths, 0, chunk)
        tokens = np.zeros((rows, chunk), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : valid[row]] = prompt[start[row] : start[row] + valid[row]]
        h_BTD = decoder.prefill_embed(config, weights["embed_tokens"], mesh.shard_batch(tokens))
        lengths_B, valid_B = mesh.shard_batch(start), mesh.shard_batch(valid)
        for i, layer_weights in enumerate(weights["layers"]):
            cache_only = not hidden_states and i + 1 == len(session.layers)
            h_BTD, session.layers[i] = decoder.prefill_layer(
                config, layer_weights, h_BTD, session.layers[i], lengths_B, valid_B, cache_only
            )
        lengths = start + valid
        session.tokens = [list(prompt[: lengths[row]]) for row, prompt in enumerate(prompts)]
        yield Chunk(h_BTD, start, valid)


def _common_prefix(cached: list[int], wanted: Sequence[int]) -> list[int]:
    """The tokens with which both begin."""
    same = next((i for i, pair in enumerate(zip(cached, wanted, strict=False)) if pair[0] != pair[1]), None)
    return cached[: min(len(cached), len(wanted)) if same is None else same]
