"""Rows of preference batches: prompts first, then two branches for each pair of answers.

    | prompt | another prompt | padding | chosen | rejected | chosen | rejected | padding |
      prompt region                       branch region: the last `branch_tokens` columns

Both branches of a pair begin with the end of their prompt, at least its last token, so that the hidden states that
predict a completion all lie in the branch region. The rest of the prompt is there once, for all its pairs. Positions
go on from the prompt in each branch. The last token of a completion is a target only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mla_jax.data.workers import Batch
from mla_jax.errors import InputError, UsageError


class Pair(NamedTuple):
    """Two answers to one prompt, int32, each with what ends it; and the end of the prompt that is in both branches."""

    prompt_end: np.ndarray
    """At least one token."""
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def tokens(self) -> int:
        """Columns of the branch region that it takes."""
        return 2 * (len(self.prompt_end) - 1) + len(self.chosen) + len(self.rejected)


class Prompt(NamedTuple):
    """Token ids int32 that pairs have in common, without the ends of their prompts."""

    ids: np.ndarray
    pairs: Sequence[Pair]


def prompt_tokens(seq_len: int, branch_tokens: int) -> int:
    """Columns of the prompt region. Raises UsageError if there is none."""
    if branch_tokens >= seq_len:
        raise UsageError(
            f"data.branch_tokens={branch_tokens} leaves no room for a prompt in rows of train.stages.seq_len={seq_len}"
        )
    return seq_len - branch_tokens


def lay_out(
    rows: Sequence[Sequence[Prompt]], seq_len: int, branch_tokens: int, pairs_per_row: int, pad_id: int
) -> Batch:
    """Rows as arrays [b, T = seq_len].

    `tokens`, `positions`, `targets` (the next token of the branch; `pad_id` where there is none) int32; `completion`
    bool, the target is a token of an answer; `prompts` int32, the prompt 1, 2, ... that a token belongs to, 0 on
    padding; `branches` int32, of pair p = 1, 2, ... 2p - 1 is chosen and 2p rejected, 0 in the prompt region and on
    padding.

    Raises:
        InputError: a row does not hold its prompts, their answers or so many pairs.
        UsageError: no room for prompts.
    """
    region, shape = prompt_tokens(seq_len, branch_tokens), (len(rows), seq_len)
    batch: Batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "completion": np.zeros(shape, bool),
        "prompts": np.zeros(shape, np.int32),
        "branches": np.zeros(shape, np.int32),
    }
    for i, row in enumerate(rows):
        _check(row, region, branch_tokens, pairs_per_row)
        here, start, branch = {name: array[i] for name, array in batch.items()}, 0, 0
        branch_start = region
        for number, prompt in enumerate(row, 1):
            end = start + len(prompt.ids)
            here["tokens"][start:end] = prompt.ids
            here["positions"][start:end] = np.arange(len(prompt.ids))
            here["prompts"][start:end] = number
            start = end
            for pair in prompt.pairs:
                for answer in (pair.chosen, pair.rejected):
                    ids, branch = np.concatenate([pair.prompt_end, answer]), branch + 1
                    end = branch_start + len(ids) - 1
                    here["tokens"][branch_start:end] = ids[:-1]
                    here["targets"][branch_start:end] = ids[1:]
                    here["positions"][branch_start:end] = len(prompt.ids) + np.arange(len(ids) - 1)
                    here["completion"][end - len(answer) : end] = True
                    here["prompts"][branch_start:end] = number
                    here["branches"][branch_start:end] = branch
                    branch_start = end
    return batch


def _check(row: Sequence[Prompt], region: int, branch_tokens: int, pairs_per_row: int) -> None:
    pairs = [pair for prompt in row for pair in prompt.pairs]
    assert all(len(part) for pair in pairs for part in pair), "prompts end somewhere, and answers say something"
    prompts, answers = sum(len(prompt.ids) for prompt in row), sum(pair.tokens for pair in pairs)
    for what, count, key, room in (
        ("tokens of prompts", prompts, "train.stages.seq_len - data.branch_tokens", region),
        ("tokens of answers", answers, "data.branch_tokens", branch_tokens),
        ("pairs", len(pairs), "data.pairs_per_row", pairs_per_row),
    ):
        if count > room:
            raise InputError(f"a row has {count} {what}, but {key} is {room}")
