"""Multi-key retrieval: one number out of many, each of whose keys differs from another by a word.

A single needle in noise stands out by being a needle. Among many it takes the whole key to find the right one.
Questions of one haystack share one read of it.
"""

import dataclasses

from mla_jax.config import ModelConfig, MultikeyConfig
from mla_jax.data.needle.questions import key_questions
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.evals.passkey import first_integer
from mla_jax.evals.task import Params, Prompt, Task, require_room
from mla_jax.evals.text_prompts import require_needles_writable

NAME = "multikey"
TITLE = "Multi-key retrieval"
DESCRIPTION = "the number of one of many keys, each one word apart from another; exact match"


def multikey_task(model: ModelConfig, tokenizer: Tokenizer, config: MultikeyConfig) -> Task:
    """Questions about keys of haystacks of each length and number of keys.

    Scores: `correct` if the first integer is the key's number, `near_miss` if it is that of a key that shares a word.

    Args:
        model: the model to evaluate.
        tokenizer: the model's.
        config: lengths, keys, haystacks, questions and their seed.

    Raises:
        InputError: a length that does not fit the model.
        UsageError: a length that does not hold the needles, or a tokenizer that cannot write them.
    """

    def haystack(cell: Params, sample: int) -> int:
        return ((cell["length"] << 10) + cell["keys"] << 20) + sample // config.questions

    def prompt(cell: Params, sample: int) -> Prompt:
        index = haystack(cell, sample)
        asked = key_questions(
            tokenizer, cell["length"], config.haystack, cell["keys"], config.questions, 0, config.seed, index
        )
        question = asked.present[sample % config.questions]
        assert question.value is not None
        text = tokenizer.decode(question.ids.tolist()).strip()
        ids = [*asked.haystack.tolist(), *question.ids.tolist()]
        return Prompt(ids, question.value, config.seed, index, question.near, text)

    require_room(model, config.lengths, config.max_new_tokens)
    require_needles_writable(tokenizer, NAME)
    prompt({"length": min(config.lengths), "keys": max(config.keys)}, 0)  # if it can be made, all others can be too
    return Task(
        name=NAME,
        title=TITLE,
        description=DESCRIPTION,
        config=dataclasses.asdict(config),
        cells=tuple({"length": length, "keys": keys} for length in config.lengths for keys in config.keys),
        samples=config.samples,
        prompt=prompt,
        score=score,
        max_new_tokens=lambda _: config.max_new_tokens,
        batch_size=config.batch_size,
        cache_dtype=config.cache_dtype,
        haystack=haystack,
    )


def score(prompt: Prompt, text: str) -> dict[str, float]:
    """Scores of an answer; see `multikey_task`."""
    number = str(first_integer(text))
    return {"correct": number == prompt.answer, "near_miss": number in prompt.near}
