"""Rows of pairs: what is laid out can be read back, and what does not fit is named."""

import numpy as np
import pytest

from mla_jax.data.preference.layout import Pair, Prompt, lay_out, prompt_tokens
from mla_jax.errors import InputError, UsageError
from preference_rows import read_row

PAD = 0


def _random_row(rng, prompts):
    def ids(low, high):
        return rng.integers(1, 100, size=rng.integers(low, high)).astype(np.int32)

    return [
        Prompt(ids(0, 9), [Pair(ids(1, 5), ids(1, 6), ids(1, 6)) for _ in range(rng.integers(1, 4))])
        for _ in range(prompts)
    ]


def _used(row):
    pairs = [pair for prompt in row for pair in prompt.pairs]
    return sum(len(prompt.ids) for prompt in row), sum(pair.tokens for pair in pairs), len(pairs)


@pytest.mark.parametrize("prompts", [0, 1, 2, 5])
def test_rows_read_back_as_they_were(prompts):
    rng = np.random.default_rng(prompts)
    rows = [_random_row(rng, prompts) for _ in range(20)]
    region, branch_tokens, pairs = (max(used) for used in zip(*map(_used, rows), strict=True))
    batch = lay_out(rows, region + 1 + branch_tokens, branch_tokens, pairs, PAD)
    assert {name: array.dtype for name, array in batch.items()} == {
        "tokens": np.int32, "targets": np.int32, "positions": np.int32, "completion": bool, "prompts": np.int32,
        "branches": np.int32,
    }  # fmt: skip
    for i, row in enumerate(rows):
        found, branch = read_row(batch, i, branch_tokens), 0
        assert len(found) == len(row)
        for (ids, answers), prompt in zip(found, row, strict=True):
            assert ids == prompt.ids.tolist() and len(answers) == 2 * len(prompt.pairs)
            for pair in prompt.pairs:
                assert answers[branch + 1] == (pair.prompt_end.tolist(), pair.chosen.tolist())
                assert answers[branch + 2] == (pair.prompt_end.tolist(), pair.rejected.tolist())
                branch += 2
        padding = batch["prompts"][i] == 0
        assert (batch["tokens"][i][padding] == PAD).all() and (batch["targets"][i][padding] == PAD).all()


def test_what_does_not_fit_is_named():
    two, three = np.array([1, 2], np.int32), np.array([3, 4, 5], np.int32)
    row = [Prompt(three, [Pair(two, three, two), Pair(two, two, three)])]
    assert _used(row) == (3, 14, 2)
    assert lay_out([row], 17, 14, 2, PAD)["completion"].sum() == 10
    for seq_len, branch_tokens, pairs, named in (
        (16, 14, 2, "3 tokens of prompts, but train.stages.seq_len - data.branch_tokens is 2"),
        (17, 13, 2, "14 tokens of answers, but data.branch_tokens is 13"),
        (17, 14, 1, "2 pairs, but data.pairs_per_row is 1"),
    ):
        with pytest.raises(InputError, match=named):
            lay_out([row], seq_len, branch_tokens, pairs, PAD)
    with pytest.raises(UsageError, match="no room for a prompt"):
        prompt_tokens(14, 14)
