"""Reads rows of preference batches back, token by token."""

from collections import defaultdict

import numpy as np

Answers = dict[int, tuple[list[int], list[int]]]
"""By branch: the end of the prompt in it, and the answer."""


def read_row(batch: dict[str, np.ndarray], i: int, branch_tokens: int) -> list[tuple[list[int], Answers]]:
    """The prompts of row i, each with what its branches say; checks what must hold in any row."""
    row = {name: array[i] for name, array in batch.items()}
    region = len(row["tokens"]) - branch_tokens
    assert not row["branches"][:region].any() and not row["completion"][:region].any()
    assert ((row["prompts"] > 0) == (row["branches"] > 0))[region:].all()
    prompts: dict[int, tuple[list[int], Answers]] = {}
    for column in range(region):
        if number := int(row["prompts"][column]):
            ids, _ = prompts.setdefault(number, ([], {}))
            assert row["positions"][column] == len(ids)
            ids.append(int(row["tokens"][column]))
    branches = defaultdict(list)
    for column in range(region, len(row["tokens"])):
        branches[int(row["branches"][column])].append(column)
    branches.pop(0, None)
    assert list(branches) == list(range(1, len(branches) + 1)) and len(branches) % 2 == 0
    for branch, columns in branches.items():
        (number,) = set(row["prompts"][columns].tolist())
        ids, answers = prompts.setdefault(number, ([], {}))
        assert row["positions"][columns].tolist() == list(range(len(ids), len(ids) + len(columns)))
        tokens, targets = row["tokens"][columns].tolist(), row["targets"][columns].tolist()
        assert tokens[1:] == targets[:-1]
        first = int(np.argmax(row["completion"][columns]))
        assert row["completion"][columns].tolist() == [c >= first for c in range(len(columns))]
        answers[branch] = tokens[: first + 1], targets[first:]
    return [prompts[number] for number in sorted(prompts)]


def text_pairs(tokenizer, batch, i, branch_tokens) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of row i as texts, special tokens left out; each answer ends with eos."""
    pairs = []
    for ids, answers in read_row(batch, i, branch_tokens):
        for branch in sorted(answers)[::2]:
            (end, chosen), (same_end, rejected) = answers[branch], answers[branch + 1]
            assert end == same_end and chosen != rejected
            assert chosen[-1] == rejected[-1] == tokenizer.eos_id
            pairs.append(tuple(map(tokenizer.decode, (ids + end, chosen, rejected))))
    return pairs
