r"""Held-out questions about one haystack of numbered keys: some of its keys, and some that are not in it.

    <bos>filler with needles between its sentences \n The special magic number for KEY is:

Keys come in pairs that share a word, and an absent key shares one with a key that is there, so that it takes reading to
tell them apart.
"""

import functools
from dataclasses import dataclass

import numpy as np

from mla_jax.data.needle import tasks
from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.generator import Purpose, head, hide, make_rng
from mla_jax.data.needle.haystack import Haystack, NoiseHaystack, WordsHaystack
from mla_jax.data.needle.lexicon import make_lexicon
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import UsageError

REFUSAL = v.NOT_FOUND.strip()
"""The answer that training teaches about a key that is not there."""


@dataclass(frozen=True)
class Question:
    """A question in ids, which follows the haystack."""

    ids: np.ndarray
    value: str | None
    """The key's number; None if the key is not there."""
    near: tuple[str, ...]
    """Numbers of the other keys that share a word with it."""


@dataclass(frozen=True)
class KeyQuestions:
    """A haystack and its questions."""

    haystack: np.ndarray
    """Token ids int32, bos first."""
    present: tuple[Question, ...]
    absent: tuple[Question, ...]


@functools.lru_cache(maxsize=2)  # the questions of a haystack are asked one after the other
def key_questions(
    tokenizer: Tokenizer, length: int, haystack: str, needles: int, present: int, absent: int, seed: int, index: int
) -> KeyQuestions:
    """Questions about a haystack of `needles`, whose keys come in pairs one word apart; of an odd number, one is alone.

    Args:
        tokenizer: writes all of it.
        length: tokens of the haystack and the longest question; other questions may be shorter.
        haystack: `noise` or `words`.
        needles: with a key each; one or more.
        present: questions about keys that are there; at most `needles`.
        absent: questions about keys that are not, each one word away from one that is; at most `needles`.
        seed: of the evaluation.
        index: of the haystack.

    Raises:
        UsageError: `length` does not hold the needles and a question, or there are not enough keys.
    """
    lexicon, rng = make_lexicon(tokenizer), make_rng(seed, Purpose.EVALUATION, index)
    names = tasks.RandomNames(rng, lexicon)
    numbers: dict[tasks.Key, int] = {}
    try:
        first = [names.key() for _ in range(needles - needles // 2)]
        keys = [*first, *(names.neighbour(key) for key in first[: needles // 2])]
        missing = [names.neighbour(key) for key in keys[:absent]]
    except tasks.NamesUsedUp as e:
        raise UsageError(f"{needles + absent} keys that differ are more than there are words for; take fewer") from e
    for key in keys:
        number = names.value()
        while number in numbers.values():
            number = names.value()
        numbers[key] = number

    def question(key: tasks.Key) -> Question:
        near = tuple(str(n) for other, n in numbers.items() if other != key and shares_a_word(other, key))
        value = str(numbers[key]) if key in numbers else None
        return Question(lexicon.ids(tasks.magic_question(lexicon, key)), value, near)

    asked = [keys[i] for i in rng.permutation(len(keys))[:present]]
    there, not_there = tuple(map(question, asked)), tuple(map(question, missing))
    beginning = head(tokenizer, "multi_key")
    hidden = lexicon.ids_of_each([tasks.magic_needle(lexicon, key, number) for key, number in numbers.items()])
    room = length - len(beginning) - max(len(each.ids) for each in (*there, *not_there))
    filler = room - sum(map(len, hidden))
    if filler < 0:
        raise UsageError(
            f"eval.lengths has {length}, which do not hold {needles} needles and a question: these take "
            f"{length - filler} tokens with tokenizer {tokenizer.source}; take longer prompts or fewer needles"
        )
    text = _haystack(tokenizer, haystack).take(rng, filler, names.used)
    body = hide(rng, text, lexicon, hidden, [1] * len(hidden))
    return KeyQuestions(np.concatenate([beginning, *body]).astype(np.int32), there, not_there)


def shares_a_word(one: tasks.Key, other: tasks.Key) -> bool:
    """Whether the keys have the adjective or the noun in common."""
    return one[0] == other[0] or one[1] == other[1]


@functools.lru_cache(maxsize=4)
def _haystack(tokenizer: Tokenizer, name: str) -> Haystack:
    return NoiseHaystack(tokenizer) if name == "noise" else WordsHaystack(tokenizer, make_lexicon(tokenizer))
