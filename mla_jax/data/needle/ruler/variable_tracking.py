"""RULER's variable tracking: which variables have a value, through four assignments from one to the next."""

import functools
import string
from collections.abc import Callable

import numpy as np

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.text_prompt import TextPrompt, largest_haystack
from mla_jax.data.tokenizer import Tokenizer

_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
HOPS = 4
LETTERS = 5
"""Of the name of a variable that is asked for."""
EXAMPLE_TOKENS = 500
"""The most tokens of the solved example, where it can be as short as that."""


def variable_prompt(rng: np.random.Generator, size: int, example_size: int) -> TextPrompt:
    """A solved example and the question, with a haystack of so many noise lines each, more than HOPS."""
    example, question = chain_prompt(rng, example_size, letters=3), chain_prompt(rng, size)
    return TextPrompt(f"{example.text} {' '.join(example.answers)}\n\n{question.text}", question.answers)


def chain_prompt(rng: np.random.Generator, size: int, letters: int = LETTERS) -> TextPrompt:
    """The question alone, about variables of so many capital letters."""
    variables: dict[str, None] = {}
    while len(variables) <= HOPS:
        variables["".join(string.ascii_uppercase[i] for i in rng.integers(26, size=letters))] = None
    names, value = tuple(variables), str(rng.integers(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(HOPS))]
    lines = ["".join(v.NOISE)] * size
    for i, place in enumerate(sorted(rng.choice(size, len(chain), replace=False))):
        lines.insert(place + i, chain[i])
    return TextPrompt(_TEMPLATE.format(context="\n".join(lines), value=value, count=len(names)), names)


def example_size(tokenizer: Tokenizer, rng: Callable[[], np.random.Generator]) -> int:
    """Lines of noise in the solved example; `rng` gives the same random generator each time."""
    return largest_haystack(tokenizer, functools.partial(chain_prompt, letters=3), rng, EXAMPLE_TOKENS, HOPS + 1)
