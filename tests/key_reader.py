"""A stand-in for a generator that reads the numbered keys of its prompts, and answers as a test says."""

import re
from collections.abc import Callable

from mla_jax.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("needle-bpe")
NEEDLE = re.compile(r"One of the special magic numbers for (\w+ \w+) is: (\d+)\.")
ASKED = re.compile(r"\nThe special magic number for (\w+ \w+) is:$")


class KeyReader:
    """Stands in for `generator.Generator`: answers what `answer(key, numbers)` says of the keys in the prompt."""

    def __init__(self, answer: Callable[[str, dict[str, str]], str]):
        self.answer = answer

    def __call__(self, config, params, cache_dtype):
        return self

    def read(self, session, prompts, **_):
        session.tokens = prompts

    def most_copies(self, session, wanted):
        return wanted

    def fork(self, session, rows):
        return session

    def generate(self, prompts, **_):
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        return [TOKENIZER.encode(self.answer(ASKED.search(t).group(1), dict(NEEDLE.findall(t)))) for t in texts]


def near_number(key: str, numbers: dict[str, str]) -> str:
    """The number of another key that shares a word with this one."""
    return next(number for other, number in numbers.items() if set(other.split()) & set(key.split()) and other != key)
