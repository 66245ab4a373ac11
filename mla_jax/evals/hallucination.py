"""Hallucination: questions about keys that are in the haystack and about keys that are not, one word away from one.

A model that makes things up answers the latter with a number, one that refuses too much the former with `not found`;
both are needed to tell how far an answer can be trusted. Questions of one haystack share one read of it.
"""

import dataclasses

from mla_jax.config import HallucinationConfig, ModelConfig
from mla_jax.data.needle.questions import REFUSAL, key_questions
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.evals.passkey import first_integer
from mla_jax.evals.task import Params, Prompt, Task, require_room
from mla_jax.evals.text_prompts import require_needles_writable

NAME = "hallucination"
TITLE = "Hallucination"
DESCRIPTION = "numbers of keys that are there, `not found` for keys that are not, one word away from one that is"
PRESENT, ABSENT = "present", "absent"


def hallucination_task(model: ModelConfig, tokenizer: Tokenizer, config: HallucinationConfig) -> Task:
    """Questions about present and absent keys of haystacks of each length.

    Scores of a present key: `correct` and the same as `retrieval`; `false_refusal`. Of an absent key: `correct` if the
    answer is `not found`; `hallucination` if it is a number. Of both `near_miss`: the number of a key one word away.

    Args:
        model: the model to evaluate.
        tokenizer: the model's.
        config: lengths, haystacks, questions and their seed.

    Raises:
        InputError: a length that does not fit the model.
        UsageError: a length that does not hold the needles.
    """

    def haystack(cell: Params, sample: int) -> int:
        return (cell["length"] << 20) + sample // config.questions

    def prompt(cell: Params, sample: int) -> Prompt:
        index = haystack(cell, sample)
        asked = key_questions(
            tokenizer, cell["length"], config.haystack, config.needles, config.questions, config.questions,
            config.seed, index,
        )  # fmt: skip
        questions = asked.present if cell["question"] == PRESENT else asked.absent
        question = questions[sample % config.questions]
        ids = [*asked.haystack.tolist(), *question.ids.tolist()]
        text = tokenizer.decode(question.ids.tolist()).strip()
        return Prompt(ids, question.value or REFUSAL, config.seed, index, question.near, text)

    require_room(model, config.lengths, config.max_new_tokens)
    require_needles_writable(tokenizer, NAME)
    prompt({"length": min(config.lengths), "question": PRESENT}, 0)  # if it can be made, longer ones can be too
    return Task(
        name=NAME,
        title=TITLE,
        description=DESCRIPTION,
        config=dataclasses.asdict(config),
        cells=tuple({"length": length, "question": kind} for length in config.lengths for kind in (PRESENT, ABSENT)),
        samples=config.samples,
        prompt=prompt,
        score=score,
        max_new_tokens=lambda _: config.max_new_tokens,
        batch_size=config.batch_size,
        cache_dtype=config.cache_dtype,
        haystack=haystack,
    )


def score(prompt: Prompt, text: str) -> dict[str, float]:
    """Scores of an answer, of which its first line counts; see `hallucination_task`."""
    line = (text.strip().splitlines() or [""])[0]
    refused, number = line.lower().startswith(REFUSAL), first_integer(line)
    near_miss = not refused and number is not None and str(number) in prompt.near
    if prompt.answer == REFUSAL:
        made_up = not refused and number is not None
        return {"correct": refused, "hallucination": made_up, "near_miss": near_miss}
    found = not refused and number == int(prompt.answer)
    return {"correct": found, "retrieval": found, "false_refusal": refused, "near_miss": near_miss}
