"""HashHop: chains of random hashes to be followed over 1 to 4 hops, in Magic's public format.

Lengths are those of whole prompts, of which the chains take as much as fits. Questions of one set of chains share one
read of it.
"""

import dataclasses
import functools
import re

from mla_jax.config import HashHopConfig, ModelConfig
from mla_jax.data.needle.generator import Purpose, make_rng
from mla_jax.data.needle.hashhop import HashChains, hash_chains
from mla_jax.data.needle.text_prompt import encode_prompt, fitting_prompt, largest_haystack
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.within import encode_within
from mla_jax.errors import UsageError
from mla_jax.evals.task import Params, Prompt, Task, require_room
from mla_jax.evals.text_prompts import require_writable

NAME = "hashhop"
TITLE = "HashHop"
DESCRIPTION = "the hash that others lead to, over one or more lines of random hash pairs; exact match"


def hashhop_task(model: ModelConfig, tokenizer: Tokenizer, config: HashHopConfig) -> Task:
    """Questions about chains of each length and number of hops.

    Scores: `correct` if what stands between quotes is the answer, `near_miss` if it is a hash on the way there.

    Args:
        model: the model to evaluate.
        tokenizer: the model's.
        config: lengths, hops, questions and their seed.

    Raises:
        InputError: a length that does not fit the model.
        UsageError: a length that does not hold a chain for each question, or a tokenizer that cannot write hashes.
    """
    source = _Source(tokenizer, config)

    def haystack(cell: Params, sample: int) -> int:
        return source.index(cell["length"], cell["hops"]) + sample // config.questions

    def prompt(cell: Params, sample: int) -> Prompt:
        index, chain = haystack(cell, sample), sample % config.questions
        made, ids = source.haystack(cell["length"], cell["hops"], index)
        question = made.question(chain)
        return Prompt(
            [*ids, *encode_within(tokenizer, [question])[0]], made.answer(chain), config.seed, index,
            made.chains[chain][1:-1], question,
        )  # fmt: skip

    for hops in config.hops:
        require_room(model, config.lengths, source.new_tokens(hops))
    source.check()
    return Task(
        name=NAME,
        title=TITLE,
        description=DESCRIPTION,
        config=dataclasses.asdict(config),
        cells=tuple({"length": length, "hops": hops} for length in config.lengths for hops in config.hops),
        samples=config.samples,
        prompt=prompt,
        score=score,
        max_new_tokens=lambda cell: source.new_tokens(cell["hops"]),
        batch_size=config.batch_size,
        cache_dtype=config.cache_dtype,
        haystack=haystack,
    )


def score(prompt: Prompt, text: str) -> dict[str, float]:
    """Scores of an answer, of which the first line up to the second quote counts; see `hashhop_task`."""
    (written,) = re.match(r"\s*'?([^'\n]*)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return {"correct": written.strip() == prompt.answer, "near_miss": written.strip() in prompt.near}


class _Source:
    """The chains of all prompts; how many fit a length is found out once."""

    def __init__(self, tokenizer: Tokenizer, config: HashHopConfig):
        self._tokenizer, self._config = tokenizer, config
        self._size = functools.cache(self._find_size)
        self.haystack = functools.lru_cache(maxsize=2)(self._make_haystack)
        """(length, hops, index) -> chains and the ids of their text; questions about one set follow each other."""

    def index(self, length: int, hops: int) -> int:
        """Index of the random generator of the first set of chains of a cell."""
        return ((length << 8) + hops) << 20

    def new_tokens(self, hops: int) -> int:
        """The tokens of an answer in its quotes, if every character is one."""
        return (self._config.hash_length + 3) * (hops if self._config.chain_of_thought else 1)

    def check(self) -> None:
        """Raises UsageError for what `hashhop_task` says of lengths and tokenizer."""
        length, hops = min(self._config.lengths), max(self._config.hops)
        made = self._make(hops)(self._rng(length, hops), self._config.questions)
        require_writable(self._tokenizer, made.text + made.question(0) + made.answer(0), f"eval={NAME}")
        needed = len(encode_prompt(self._tokenizer, made.text)) + self._question_tokens
        if needed > length:
            raise UsageError(
                f"eval.lengths has {length}, but {self._config.questions} chains of {hops} hops and a question take "
                f"about {needed} tokens with tokenizer {self._tokenizer.source}; take longer prompts or fewer questions"
            )

    @property
    def _question_tokens(self) -> int:
        """The most tokens of a question: each character is one."""
        return self._config.hash_length + 2

    def _make(self, hops: int):
        config = self._config
        return functools.partial(
            hash_chains, hops=hops, letters=config.hash_length, chain_of_thought=config.chain_of_thought
        )

    def _rng(self, length: int, hops: int):
        """The random generator of chains that are only measured."""
        return make_rng(self._config.seed, Purpose.EVALUATION, self.index(length, hops), 1)

    def _find_size(self, length: int, hops: int) -> int:
        return largest_haystack(
            self._tokenizer, self._make(hops), functools.partial(self._rng, length, hops),
            length - self._question_tokens, self._config.questions,
        )  # fmt: skip

    def _make_haystack(self, length: int, hops: int, index: int) -> tuple[HashChains, list[int]]:
        return fitting_prompt(
            self._tokenizer, self._make(hops), make_rng(self._config.seed, Purpose.EVALUATION, index),
            length - self._question_tokens, self._size(length, hops), self._config.questions,
        )  # fmt: skip
