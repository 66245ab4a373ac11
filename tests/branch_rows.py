"""Rows of two regions, prompts and their branches, and the ordinary rows that say the same; for several tests."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.losses.log_probs import target_log_probs
from mla_jax.model.transformer import Transformer


class Prompt(NamedTuple):
    """A prompt and what follows it, in an even number of ways: chosen, rejected, chosen, rejected, ..."""

    tokens: list[int]
    branches: list[list[int]]


def random_prompt(rng: np.random.Generator, length: int, *branches: int, vocab_size: int = 512) -> Prompt:
    """Random tokens: a prompt of this length and branches of these lengths."""
    return Prompt(
        *(rng.integers(1, vocab_size, length).tolist(), [rng.integers(1, vocab_size, n).tolist() for n in branches])
    )


def branch_rows(rows: list[list[Prompt]], length: int, size: int) -> dict[str, np.ndarray]:
    """Arrays [b, length], whose last `size` tokens are the branch region; every token of a branch is a target."""
    names = "tokens positions targets prompts branches".split()
    arrays = {name: np.zeros((len(rows), length), np.int32) for name in names}
    for b, prompts in enumerate(rows):
        start, branch_start, number = 0, length - size, 0
        for p, (tokens, branches) in enumerate(prompts, 1):
            end = start + len(tokens) - 1  # its last token is the first of each branch
            assert end <= length - size
            put(arrays, b, start, tokens=tokens[:-1], positions=range(len(tokens) - 1), prompts=[p] * (len(tokens) - 1))
            start = end
            for branch in branches:
                number, n = number + 1, len(branch)
                inputs, positions = [tokens[-1], *branch[:-1]], range(len(tokens) - 1, len(tokens) - 1 + n)
                put(arrays, b, branch_start, tokens=inputs[:n], positions=positions, targets=branch, prompts=[p] * n,
                    branches=[number] * n)  # fmt: skip
                branch_start += n
        assert branch_start <= length
    return arrays


def put(arrays, row, start, **values):
    for name, x in values.items():
        arrays[name][row, start : start + len(x)] = x


class OrdinaryRows(NamedTuple):
    """A row for each branch: its prompt and itself."""

    tokens: np.ndarray
    """int32 [branches, T]."""
    row: np.ndarray
    """int32 [b, R]: the row whose target each target of the branch region is; -1 on padding."""
    index: np.ndarray
    """int32 [b, R]: and the index of that target among the targets of that row."""


def ordinary_rows(rows: list[list[Prompt]], size: int, branches: int, longest: int) -> OrdinaryRows:
    """What `branch_rows` says, padded to so many rows of this length."""
    tokens = np.zeros((branches, longest), np.int32)
    row, index = np.full((len(rows), size), -1, np.int32), np.zeros((len(rows), size), np.int32)
    flat = 0
    for b, prompts in enumerate(rows):
        start = 0
        for p in prompts:
            for branch in p.branches:
                put({"tokens": tokens}, flat, 0, tokens=p.tokens + branch)
                row[b, start : start + len(branch)] = flat
                index[b, start : start + len(branch)] = np.arange(len(branch)) + len(p.tokens) - 1
                flat, start = flat + 1, start + len(branch)
    return OrdinaryRows(tokens, row, index)


def log_probs_of_ordinary_rows(transformer: Transformer, rows: OrdinaryRows) -> jax.Array:
    """[b, R] log-probs of the targets of the branch region, each branch by a pass of its own; 0 on padding."""
    logits = transformer.logits(transformer(rows.tokens[:, :-1]))
    log_probs = target_log_probs(logits, rows.tokens[:, 1:]).log_probs_Bt
    return jnp.where(rows.row >= 0, log_probs[rows.row, rows.index], 0)
