"""Needle in a haystack over the user's texts: a sentence at each depth of prompts of each length, and a question.

As github.com/gkamradt/LLMTest_NeedleInAHaystack places it: at depth x length, walked back to the end of a sentence. The
needle has a random key and number, so that an answer is right or wrong, and no judge is needed.
"""

import dataclasses
import itertools
import re

import numpy as np

from mla_jax.config import ModelConfig, NiahConfig
from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.generator import Purpose, make_rng
from mla_jax.data.needle.haystack import TextHaystack
from mla_jax.data.needle.ring import Filler
from mla_jax.data.text_folder import fingerprint
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.within import encode_within
from mla_jax.errors import UsageError
from mla_jax.evals.task import Params, Prompt, Task, grid_index, require_room
from mla_jax.evals.text_prompts import require_writable

NAME = "niah"
TITLE = "Needle in a haystack"
DESCRIPTION = "a sentence hidden at several depths of a text; the answer names what it says"


def niah_task(model: ModelConfig, tokenizer: Tokenizer, config: NiahConfig) -> Task:
    """A needle in every cell of a length x depth grid; each prompt has another part of the texts.

    Args:
        model: the model to evaluate.
        tokenizer: the model's.
        config: texts, needle, lengths, depths, prompts a cell and their seed.

    Raises:
        InputError: a length that does not fit the model, or a text folder that cannot be read.
        UsageError: a length that does not hold needle and question, texts that are too short for one, or a tokenizer
            that cannot write the needle.
    """
    require_room(model, config.lengths, config.max_new_tokens)
    require_writable(tokenizer, " ".join(_draw(config, np.random.default_rng(0))), "eval.needle")
    text = TextHaystack(tokenizer, config.text_folder)
    if text.tokens < max(config.lengths):
        raise UsageError(
            f"eval.text_folder={config.text_folder} has {text.tokens} tokens with tokenizer {tokenizer.source}, too "
            f"few for the {max(config.lengths)} in eval.lengths; add texts or take shorter lengths"
        )

    def prompt(cell: Params, sample: int) -> Prompt:
        index = grid_index(cell["length"], cell["depth"], sample)
        rng = make_rng(config.seed, Purpose.EVALUATION, index)
        needle, question, answer = _draw(config, rng)
        ids = _put_together(tokenizer, text, rng, needle, question, cell["length"], cell["depth"])
        return Prompt(ids, answer, config.seed, index, question=question)

    prompt({"length": min(config.lengths), "depth": config.depths[0]}, 0)  # if it can be made, longer ones can be too
    return Task(
        name=NAME,
        title=TITLE,
        description=DESCRIPTION,
        config=dataclasses.asdict(config) | {"text_fingerprint": fingerprint(config.text_folder)},
        cells=tuple({"length": length, "depth": depth} for length in config.lengths for depth in config.depths),
        samples=config.samples,
        prompt=prompt,
        score=lambda prompt, text: {"correct": names(text, prompt.answer)},
        max_new_tokens=lambda _: config.max_new_tokens,
        batch_size=config.batch_size,
        cache_dtype=config.cache_dtype,
    )


def names(text: str, answer: str) -> bool:
    """Whether an answer is in a text, whatever its case, and not as a part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text.lower()) is not None


def walked_back(filler: Filler, depth: float) -> int:
    """The place of the needle: the last end of a sentence up to `depth`, the start if there is none, the end at 1."""
    if depth == 1:
        return len(filler.ids)
    return int(filler.gaps[np.searchsorted(filler.gaps, int(depth * len(filler.ids)), side="right") - 1])


def _draw(config: NiahConfig, rng: np.random.Generator) -> tuple[str, str, str]:
    """Needle, question and answer with a random key and number in them."""
    adjective, noun = (words[rng.integers(len(words))].strip() for words in (v.ADJECTIVES, v.NOUNS))
    values = {"key": f"{adjective} {noun}", "number": str(rng.integers(10_000, 100_000))}
    needle, question, answer = (text.format(**values) for text in (config.needle, config.question, config.answer))
    return needle, question, answer


def _put_together(
    tokenizer: Tokenizer, text: TextHaystack, rng: np.random.Generator, needle: str, question: str, length: int,
    depth: float,
) -> list[int]:  # fmt: skip
    """Ids of text, needle and question, exactly `length` of them, bos first if there is one."""
    pieces = [f" {needle}", f"\n{question}"] if depth < 1 else [f" {needle}\n{question}"]
    hidden, *asked = encode_within(tokenizer, pieces)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = length - len(bos) - len(hidden) - sum(map(len, asked))
    if room < 0:
        raise UsageError(
            f"eval.lengths has {length}, which does not hold needle and question: these take {length - room} tokens "
            f"with tokenizer {tokenizer.source}"
        )
    filler = text.take(rng, room)
    place = walked_back(filler, depth)
    before, behind = filler.ids[:place].tolist(), filler.ids[place:].tolist()
    return [*bos, *before, *hidden, *behind, *itertools.chain.from_iterable(asked)]
