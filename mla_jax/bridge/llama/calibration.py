"""Calibration texts: layer inputs are measured on them, and perplexity on held-out ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError
from mla_jax.losses.cross_entropy import chunked_cross_entropy

HELD_OUT = 8
"""One in this many sequences is held out; these are the last ones of the text."""
_LONGEST_TOKEN = 16
"""Characters read for each token wanted; texts have 3 to 5."""
_TOKENS_AT_ONCE = 8192
_LOSS_CHUNK = 256


@dataclass(frozen=True)
class Calibration:
    """Token ids of equally long sequences, each with a beginning-of-text token where the tokenizer has one."""

    tokens_BT: np.ndarray
    held_out: int
    """Number of sequences at the end that are held out."""

    @property
    def fitted(self) -> int:
        """Number of sequences that are not held out."""
        return len(self.tokens_BT) - self.held_out


def read_calibration(path: str | Path, tokenizer: Tokenizer, tokens: int, length: int, least: int = 1) -> Calibration:
    """Cuts the beginning of a text file into sequences.

    Args:
        path: UTF-8 text.
        tokenizer: the checkpoint's.
        tokens: the most tokens to take, held-out ones included.
        length: tokens of a sequence.
        least: tokens that there must be beside those held out.

    Raises:
        InputError: no such file, no UTF-8, or too short for two sequences or for `least`.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            ids = tokenizer.encode(file.read(tokens * _LONGEST_TOKEN))
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read as UTF-8 text ({e})") from e
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    cut = length - len(begin)
    count = min(tokens // length, len(ids) // cut)
    if count < 2:
        raise InputError(
            f"{path} gives {len(ids)} tokens, {count} sequences of {length}; at least 2 are needed, and many more "
            "tokens than hidden_size for a fit that means something: use a longer text"
        )
    held_out = -(-count // HELD_OUT)
    if (count - held_out) * length < least:
        raise InputError(
            f"{path} gives {(count - held_out) * length} tokens to fit; at least hidden_size={least} are needed, and "
            "many times as many for a fit that means something: use a longer text and more --calibration-tokens"
        )
    rows = np.array(ids[: count * cut], np.int32).reshape(count, cut)
    rows = np.concatenate([np.tile(np.array(begin, np.int32), (count, 1)), rows], axis=1)
    return Calibration(rows, held_out)


def in_batches(function: Callable, rows_BTX: np.ndarray) -> np.ndarray:
    """Concatenates function(rows) over small batches of rows, on the host."""
    size = max(_TOKENS_AT_ONCE // rows_BTX.shape[1], 1)
    parts = [np.asarray(function(rows_BTX[i : i + size])) for i in range(0, len(rows_BTX), size)]
    return np.concatenate(parts)


def perplexity(h_BTD: np.ndarray, head_DX: np.ndarray, tokens_BT: np.ndarray) -> float:
    """Perplexity of tokens, each given those before it, from hidden states after the final norm."""
    losses = [_loss(h_TD[None], head_DX, row_T[None]) for h_TD, row_T in zip(h_BTD, tokens_BT, strict=True)]
    return float(np.exp(np.mean(losses)))


@jax.jit
def _loss(h_BTD: jax.Array, head_DX: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    weights_BT = jnp.ones(tokens_BT.shape, jnp.float32).at[:, -1].set(0)
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    sums = chunked_cross_entropy(head_DX, h_BTD, targets_BT, weights_BT, weights_BT > 0, _LOSS_CHUNK)
    return sums.loss / sums.weight
