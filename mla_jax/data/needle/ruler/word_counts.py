"""RULER's aggregation tasks: the most common words of a numbered list (cwe), of a coded text (fwe)."""

import math
import string
from collections.abc import Sequence

import numpy as np

from mla_jax.data.needle.ruler.words import Words, compound
from mla_jax.data.needle.text_prompt import TextPrompt

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
COMMON_WORDS = 10
LONG = 4096
"""Tokens of a prompt from which on common words are repeated more often."""
FREQUENT_SIZE = 73
"""Words of a coded text from which on the third of them appears more often than the fourth, whatever the size."""


def common_words_prompt(rng: np.random.Generator, size: int, length: int, words: Words) -> TextPrompt:
    """A solved example and a question about `size` different words, of which COMMON_WORDS appear more often.

    Args:
        rng: draws all that is random.
        size: different words in the list, more than COMMON_WORDS.
        length: tokens of prompt and answer, which decide how often words are repeated.
        words: of which lists are made. Lists longer than all of them are of adjective-noun pairs, where RULER has
            another list of English words.
    """
    shown, asked = ((10, 3), (30, 3)) if length >= LONG else ((3, 1), (6, 1))
    example, solution = _numbered_list(rng, 40 if length >= LONG else 20, *shown, words)
    context, common = _numbered_list(rng, size, *asked, words)
    solved = f"{_COMMON.format(context=example)} {_numbered(solution)}"
    return TextPrompt(f"{solved}\n{_COMMON.format(context=context)}", tuple(common))


def _numbered_list(rng: np.random.Generator, size: int, often: int, seldom: int, words: Words) -> tuple[str, list[str]]:
    """A list of words, common ones `often` times each and the others `seldom`, and the common ones."""
    single = sorted({*words.adjectives, *words.nouns, *words.verbs})
    if size <= len(single):
        drawn = [single[i] for i in rng.choice(len(single), size, replace=False)]
    else:
        pairs = len(words.adjectives) * len(words.nouns)
        drawn = [compound(words, i) for i in rng.choice(pairs, size, replace=False)]
    common, others = drawn[:COMMON_WORDS], drawn[COMMON_WORDS:]
    listed = common * often + others * seldom
    return _numbered([listed[i] for i in rng.permutation(len(listed))]), common


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def frequent_words_prompt(rng: np.random.Generator, size: int, different: int) -> TextPrompt:
    """A question about a text of random words of six letters, their counts falling with the square of the rank.

    Args:
        rng: draws all that is random.
        size: words of the text, about; at least FREQUENT_SIZE.
        different: words that there are, at least 5; the most frequent is `...`, noise.
    """
    vocabulary: dict[str, None] = {"...": None}
    while len(vocabulary) < different:
        vocabulary["".join(string.ascii_lowercase[i] for i in rng.integers(26, size=6))] = None
    ranks = np.arange(1, different + 1)
    counts = (size * ranks**-2.0 / (math.pi**2 / 6)).astype(int)  # the zeta distribution with alpha = 2
    text = np.repeat(np.array(list(vocabulary)), counts)
    context = " ".join(text[rng.permutation(len(text))])
    return TextPrompt(_FREQUENT.format(context=context), tuple(vocabulary)[1:4])
